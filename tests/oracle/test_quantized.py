"""Products with weights of 8 and 4 bits: every backend and instruction set against the floats they stand for."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minimax_m1.errors import UserError
from minimax_m1.kernels import compiled
from minimax_m1.kernels.experts import expert_mlp
from minimax_m1.kernels.linear import linear
from minimax_m1.kernels.quantized import CPU_TILE, GPU_TILE, QuantizedWeight
from tests.tolerances import KERNEL, relative_error

GROUP_SIZES = [None, 32, 64, 128]  # None: 8 bits
SHAPES = [(1, 1), (3, 5), (16, 4), (17, 129), (48, 512), (130, 70), (33, 1030), (100, 192), (96, 1024)]  # N, K
ROWS = [1, 2, 3, 5, 16, 17, 33, 64, 200]
EXPERTS = 5e-4  # rows with an outlier, rounded to 16 bits twice; relative to the largest result
SOURCES = Path(compiled.__file__).parent / "csrc"


@pytest.fixture(scope="module", params=["installed", "x86-64", "haswell", "icelake-server"])
def library(request, tmp_path_factory):
    """The compiled kernels, as installed and built for other processors: plain C++, AVX2, AVX512 with VNNI."""
    if request.param == "installed":
        if compiled.library is None:
            pytest.skip("the compiled kernels were not built here")
        return compiled.library
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"x86-64": "sse2", "haswell": "avx2", "icelake-server": "avx512_vnni"}[request.param]
    if needed not in flags:
        pytest.skip(f"this processor has no {needed}")
    path = tmp_path_factory.mktemp("library") / "quantized.so"
    options = ["-std=c++17", "-O2", f"-march={request.param}", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-w"]
    subprocess.run(["g++", *options, "-o", path, SOURCES / "quantized.cpp"], check=True, capture_output=True)
    built = ctypes.CDLL(str(path))
    for name in ("linear_int8", "linear_int4", "experts_int8", "experts_int4"):
        kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64}
        getattr(built, name).argtypes = [kinds[a] for a in compiled._ARGUMENTS[name]]
        getattr(built, name).restype = None
    return built


@pytest.fixture
def with_library(library, monkeypatch):
    monkeypatch.setattr(compiled, "library", library)


def random_weight(*shape, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    most = 127 if group_size is None else 7
    values = torch.randint(-most - (group_size is not None), most + 1, shape, generator=generator).to(torch.int8)
    groups = 1 if group_size is None else -(-shape[-1] // group_size)
    scales = (torch.rand(*shape[:-1], groups, generator=generator) + 0.5) / most
    return QuantizedWeight.pack(values, scales, group_size)


def random_rows(*shape, seed=1):
    """Rows with an outlier of a hundred times the others' size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[:, shape[1] // 2] *= 100
    return x


def rounding_bound(x, weight):
    """Most that rounding x to whole parts of 1 / 32512 of its group's largest value may change each product."""
    group = weight.group_size or 128
    x = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    step = (x.abs().amax(-1, keepdim=True) / 32512).expand_as(x).flatten(1)[:, : weight.size_in]
    return step / 2 * 1.01 @ weight.dequantize(torch.float64).abs().T


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [CPU_TILE, GPU_TILE])
def test_pack_and_unpack(shape, group_size, tile):
    weight = random_weight(2, 3, *shape, group_size=group_size).in_tiles(tile)
    assert weight.tiles.shape[-3:] == tile and weight.in_tiles(tile) is weight
    values, scales = weight.unpack()
    assert weight.shape == (2, 3, *shape) == tuple(values.shape)
    again = QuantizedWeight.pack(values, scales, group_size, tile)
    assert torch.equal(again.tiles, weight.tiles) and torch.equal(again.scales, weight.scales)
    k = torch.arange(shape[1]) // (group_size or shape[1])
    expected = values.double() * scales.double()[..., k]
    assert torch.equal(weight.dequantize(torch.float64), expected.view(-1, shape[1]))
    assert torch.equal(weight[1][2].dequantize(torch.float64), expected[1, 2])


def test_rows_of_a_gpu_are_contiguous():
    values = torch.arange(-40, 60, dtype=torch.int8).view(2, 50)
    rows = QuantizedWeight.pack(values, torch.ones(2, 1), None, GPU_TILE).tiles.view(torch.int16).view(2, 32)
    parts = torch.stack((rows[:, :16] & 255, rows[:, :16] >> 8 & 255, rows[:, 16:] & 255, rows[:, 16:] >> 8 & 255), 1)
    assert torch.equal(parts.flatten(1)[:, :50] - 128, values.to(torch.int16))
    assert bool((parts.flatten(1)[:, 50:] == 128).all())
    values = torch.arange(90).view(2, 45).remainder(16).to(torch.int8) - 8
    rows = QuantizedWeight.pack(values, torch.ones(2, 2), 32, GPU_TILE).tiles.view(torch.int16).view(2, 16)
    parts = torch.stack([rows >> 4 * i & 15 for i in range(4)], 1)
    assert torch.equal(parts.flatten(1)[:, :45] - 8, values.to(torch.int16))


@pytest.mark.slow
@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, group_size):
    weight = random_weight(*shape, group_size=group_size)
    for rows in ROWS:
        x = random_rows(rows, shape[1])
        expected = linear(x.double(), weight, "reference")
        actual = linear(x, weight, "compiled")
        assert bool(((actual - expected).abs() <= rounding_bound(x, weight) + 1e-6 * expected.abs().max()).all())
        for i in range(rows):  # the same bits alone and in a batch
            assert torch.equal(linear(x[i : i + 1], weight, "compiled")[0], actual[i])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_linear(group_size, dtype):
    weight, x = random_weight(33, 70, group_size=group_size), random_rows(5, 70)
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert relative_error(linear(x.to(dtype), weight, "torch"), expected) < KERNEL[dtype]


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_extremes_do_not_overflow(group_size):
    size_in, rows = 4096, 9
    most = 127 if group_size is None else 7
    for w in (most, -most, *((-128, 127) if group_size is None else (-8,))):
        values = torch.full((20, size_in), w, dtype=torch.int8)
        scales = torch.ones(20, 1 if group_size is None else size_in // group_size)
        weight = QuantizedWeight.pack(values, scales, group_size)
        for largest in (1.0, -3e30, 1e-20):
            x = torch.full((rows, size_in), largest)
            expected = linear(x.double(), weight, "reference")
            assert relative_error(linear(x, weight, "compiled"), expected) < KERNEL[torch.float32]


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_zeros_and_what_is_not_finite(group_size):
    weight = random_weight(20, 256, group_size=group_size)
    x = random_rows(4, 256)
    x[0] = 0
    x[1, 200], x[2, 3] = float("inf"), float("nan")
    actual = linear(x, weight, "compiled")
    assert not actual[0].any()
    assert not actual[1].isfinite().any() and not actual[2].isfinite().any()
    assert actual[3].isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 600])
@pytest.mark.parametrize(("width", "hidden"), [(22, 36), (48, 64), (192, 128)])
def test_experts(group_size, tokens, width, hidden):
    generator = torch.Generator().manual_seed(2)
    experts, top_k = 5, 2
    w13 = random_weight(experts, 2, width, hidden, group_size=group_size)
    w2 = random_weight(experts, hidden, width, group_size=group_size, seed=3)
    x = random_rows(tokens, hidden) * 0.1
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
    weights[::3, 1] = 0  # left out
    expected = expert_mlp(x.double(), w13, w2, ids, weights.double(), backend="reference")
    actual = expert_mlp(x, w13, w2, ids, weights, backend="compiled")
    assert relative_error(actual, expected) < EXPERTS
    for t in range(0, tokens, 1 + tokens // 50):  # the same bits alone and in a batch
        alone = expert_mlp(x[t : t + 1], w13, w2, ids[t : t + 1], weights[t : t + 1], backend="compiled")
        assert torch.equal(alone[0], actual[t])
    assert relative_error(expert_mlp(x, w13, w2, ids, weights, backend="torch"), expected) < KERNEL[torch.float32]


@pytest.mark.slow
@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("group_size", [None, 32])
def test_experts_in_rounds(group_size):
    """So wide that the activations of all pairs are not held at once, and one expert's rows are divided."""
    tokens, width, hidden = 150, 40_000, 8
    w13 = random_weight(3, 2, width, hidden, group_size=group_size)
    w2 = random_weight(3, hidden, width, group_size=group_size, seed=3)
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, 2) + 0.5
    ids = torch.tensor([[0, 2]]).repeat(tokens, 1)
    ids[:5, 1] = 1
    actual = expert_mlp(x, w13, w2, ids, weights, backend="compiled")
    expected = expert_mlp(x.double(), w13, w2, ids, weights.double(), backend="reference")
    assert relative_error(actual, expected) < EXPERTS
    for t in (0, 3, 100, 149):
        alone = expert_mlp(x[t : t + 1], w13, w2, ids[t : t + 1], weights[t : t + 1], backend="compiled")
        assert torch.equal(alone[0], actual[t])


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("group_size", [None, 64])
def test_threads_do_not_change_a_bit(group_size):
    weight = random_weight(400, 640, group_size=group_size)
    x = random_rows(250, 640)
    w13 = random_weight(4, 2, 192, 640, group_size=group_size)
    w2 = random_weight(4, 640, 192, group_size=group_size)
    weights, ids = torch.rand(250, 4).topk(2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((linear(x, weight, "compiled"), expert_mlp(x, w13, w2, ids, weights, backend="compiled")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["torch", None])
def test_gradients_are_refused(backend):
    weight = random_weight(16, 32, group_size=None)
    x = torch.randn(2, 32, requires_grad=True)
    with pytest.raises(UserError, match="a quantized model cannot be trained"):
        linear(x, weight, backend)
    with torch.no_grad():
        linear(x, weight, backend)
    experts = random_weight(2, 2, 16, 32, group_size=32), random_weight(2, 32, 16, group_size=32)
    with pytest.raises(UserError, match="a quantized model cannot be trained"):
        expert_mlp(x, *experts, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), backend=backend)
