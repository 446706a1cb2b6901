"""Experts, matrix products and RMSNorm: every backend against the formula in float64."""

from types import SimpleNamespace

import pytest
import torch

from minimax_m1 import kernels
from minimax_m1.errors import UserError
from minimax_m1.kernels import choose, compiled
from minimax_m1.kernels.experts import expert_mlp
from minimax_m1.kernels.linear import float32_linear, linear, rms_norm
from tests.tolerances import KERNEL, relative_error

needs_compiled = pytest.mark.skipif(not compiled.library, reason="the compiled kernels were not built here")
EXPERTS, WIDTH, HIDDEN = 5, 22, 36  # nothing divides a vector register


def make_inputs(tokens, top_k, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator, dtype=torch.float64) * 0.2
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64) * 0.2
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64).topk(top_k)
    return x.to(dtype), w13.to(dtype), w2.to(dtype), ids, weights.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_torch_forward_and_backward(dtype, tokens, top_k):
    x, w13, w2, ids, weights = make_inputs(tokens, top_k, dtype)
    results = []
    for backend, wide in (("reference", torch.float64), ("torch", None)):
        inputs = [t.to(wide or t.dtype, copy=True).requires_grad_() for t in (x, w13, w2, weights)]
        y = expert_mlp(*inputs[:3], ids, inputs[3], backend=backend)
        results.append([y, *torch.autograd.grad(y.double().square().sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < KERNEL[dtype]


def test_gradient_of_stride_zero_and_unused_experts():
    x, w13, w2, ids, weights = make_inputs(4, 1)
    ids = torch.zeros_like(ids)
    w13.requires_grad_()
    expert_mlp(x, w13, w2, ids, weights, backend="torch").sum().backward()  # sum's gradient is expanded: stride 0
    assert w13.grad[0].abs().max() > 0
    assert not w13.grad[1:].any()


@needs_compiled
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_compiled_experts(weight_dtype, tokens, top_k):
    x, w13, w2, ids, weights = make_inputs(tokens, top_k, torch.float32)
    w13, w2 = w13.to(weight_dtype), w2.to(weight_dtype)
    assert compiled.fits(x, w13, w2)
    expected = expert_mlp(x.double(), w13.double(), w2.double(), ids, weights.double(), backend="reference")
    actual = expert_mlp(x, w13, w2, ids, weights, backend="compiled")
    assert relative_error(actual, expected) < KERNEL[torch.float32]
    for t in range(tokens):  # the same bits alone and in a batch
        assert torch.equal(expert_mlp(x[t : t + 1], w13, w2, ids[t : t + 1], weights[t : t + 1]), actual[t : t + 1])


@needs_compiled
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 32])
@pytest.mark.parametrize(("size_in", "size_out"), [(1, 1), (15, 3), (16, 4), (512, 130), (70, 600)])
def test_compiled_linear(weight_dtype, rows, size_in, size_out):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size_in, generator=generator)
    weight = torch.randn(size_out, size_in, generator=generator).to(weight_dtype)
    actual = linear(x, weight, "compiled")
    assert relative_error(actual, x.double() @ weight.double().T) < KERNEL[torch.float32]
    assert all(torch.equal(linear(x[i : i + 1], weight, "compiled")[0], actual[i]) for i in range(rows))


@needs_compiled
def test_compiled_rms_norm_and_denormals():
    x = torch.randn(40, 50) * 1e-3
    weight = torch.rand(50)
    expected = rms_norm(x.double(), weight.double(), 1e-5, "reference")
    assert relative_error(rms_norm(x, weight, 1e-5, "compiled"), expected) < KERNEL[torch.float32]
    # AdamW's second moments live at 1e-36: loading the library must not make the process flush small numbers to 0
    assert (torch.tensor([1e-30]) * torch.tensor([1e-12])).item() > 0


@needs_compiled
def test_gradients_are_never_lost_to_the_compiled_kernels():
    x, weight = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    x, w13, w2, ids, weights = make_inputs(3, 2, torch.float32)
    weights.requires_grad_()  # only the router trains: everything else is frozen
    expert_mlp(x, w13, w2, ids, weights).sum().backward()
    assert weights.grad is not None


def test_a_named_backend_is_used_or_refused(monkeypatch):
    x = torch.empty(1)
    with pytest.raises(UserError, match=r"'cuda' is not known; choose one of triton, compiled, torch, reference"):
        choose("cuda", x)
    monkeypatch.setattr(compiled, "library", None)
    assert choose(None, x) == "torch"
    with pytest.raises(UserError, match="was not built here"):
        choose("compiled", x)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton"):  # not installed, or no GPU
        choose("triton", x)


@pytest.mark.parametrize(("capability", "hip"), [((7, 5), None), ((9, 0), "7.2")])
def test_a_gpu_that_the_kernels_are_not_for_gets_torch_or_is_told(monkeypatch, capability, hip):
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 100 + capability[0]))
    assert choose(None, x) == "torch"
    with pytest.raises(UserError, match=r"compute capability 8\.0"):
        choose("triton", x)


@pytest.mark.parametrize("instructions", [False, True])
def test_bfloat16_weights_under_float32_rows(instructions, monkeypatch):
    """Exact in the reference and without bfloat16 instructions; with them rows are rounded, as on a GPU."""
    monkeypatch.setattr("minimax_m1.kernels.linear.CPU_MULTIPLIES_BFLOAT16", instructions)
    x, w13, w2, ids, weights = make_inputs(40, 2, torch.float32)
    w13, w2 = w13.bfloat16(), w2.bfloat16()
    exact = x.double() @ w13[0].double().T
    assert relative_error(linear(x, w13[0], "torch"), exact) < KERNEL[torch.bfloat16 if instructions else torch.float32]
    assert relative_error(linear(x, w13[0], "reference"), exact) < KERNEL[torch.float32]
    assert relative_error(float32_linear(x, w13[0], "torch"), exact) < KERNEL[torch.float32]
    expected = expert_mlp(x.double(), w13.double(), w2.double(), ids, weights.double(), backend="reference")
    actual = expert_mlp(x, w13, w2, ids, weights, backend="torch")
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < KERNEL[torch.bfloat16 if instructions else torch.float32]
