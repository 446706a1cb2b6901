"""Quantized networks: names, rounding, and the same bits whichever way they are loaded, saved and moved."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minimax_m1 import accounting, kernels
from minimax_m1.config import PRESETS, QUANTIZATIONS, MiniMaxM1Config, QuantizationConfig
from minimax_m1.errors import UserError
from minimax_m1.kernels import compiled
from minimax_m1.kernels.quantized import CPU_TILE, GPU_TILE
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.quantization import (
    QuantizedModule,
    from_checkpoint,
    quantize_model,
    quantize_weight,
    quantized_matrices,
    to_checkpoint,
)
from minimax_m1.settings import Quantization
from minimax_m1.weights import find_pieces, load_model, quantize_checkpoint, save_model
from tests.tolerances import LOGITS, relative_error

CONFIG = MiniMaxM1Config(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=75,  # no vector's, tile's or group's multiple, and odd
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    attn_type_list=(0, 1, 0),
    num_local_experts=4,
    shared_intermediate_size=24,
    dynamic_gate=True,
)
IDS = torch.arange(60).view(2, 30)


def random_model(dtype: torch.dtype = torch.float32, config: MiniMaxM1Config = CONFIG) -> MiniMaxM1ForCausalLM:
    model = MiniMaxM1ForCausalLM(config).to(dtype)
    model.init_weights(seed=1)
    return model.eval()


def quantized(name: str, dtype: torch.dtype = torch.float32) -> MiniMaxM1ForCausalLM:
    model = random_model(dtype)
    quantize_model(model, QuantizationConfig.parse(name))
    return model


def assert_same_bits(a: MiniMaxM1ForCausalLM, b: MiniMaxM1ForCausalLM) -> None:
    theirs = b.state_dict()
    assert list(a.state_dict()) == list(theirs)
    for name, tensor in a.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(random_model(), tmp_path / "float")
    return tmp_path / "float"


# -- names ------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert QuantizationConfig.parse("int8") == QuantizationConfig(8)
    assert QuantizationConfig.parse("int8-experts") == QuantizationConfig(8, None, "experts")
    assert QuantizationConfig.parse("int4").bits == 4
    assert Quantization.__args__ == QUANTIZATIONS
    for name in QUANTIZATIONS:
        quantization = QuantizationConfig.parse(name)
        assert QuantizationConfig.parse(quantization.name) == quantization
        assert QuantizationConfig.from_dict(quantization.to_dict()) == quantization
    for name in ("int5", "int4-g48", "int8-g32", "", "INT8"):
        with pytest.raises(UserError, match=r"quantization: .* cannot be used; accepted: int8, int8-experts, int4"):
            QuantizationConfig.parse(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method: 'gptq' cannot be used; accepted: \"minimax_m1\""),
        ("int8", "quant_method: 'int8' cannot be used"),
        ({"quant_method": "minimax_m1"}, "bits: None cannot be used; accepted: 8 or 4"),
        (
            {"quant_method": "minimax_m1", "bits": 4, "group_size": 7},
            "group_size: 7 .* accepted: 32, 64, 128 with 4 bits",
        ),
        ({"quant_method": "minimax_m1", "bits": 8, "group_size": 32}, "group_size: 32 .* accepted: null with 8 bits"),
        ({"quant_method": "minimax_m1", "bits": 8, "modules": "head"}, "modules: 'head' .* accepted: all or experts"),
    ],
)
def test_what_a_config_json_may_say(folder: Path, values: object, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": values}))
    with pytest.raises(UserError, match=f"quantization_config.{message}"):
        load_model(folder)


# -- rounding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(QUANTIZATIONS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    size=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_rounding_is_close_and_survives_a_checkpoint(
    name: str, rows: int, columns: int, size: float, seed: int
) -> None:
    quantization = QuantizationConfig.parse(name)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    weight[rows // 2] = 0
    rounded = quantize_weight(weight, quantization)
    values, scales = to_checkpoint(rounded)
    assert values.shape == (rows, columns if quantization.bits == 8 else (columns + 1) // 2)
    assert scales.shape == (rows, 1 if quantization.bits == 8 else -(-columns // quantization.group_size))
    again = from_checkpoint(values, scales, columns, quantization.group_size)
    assert torch.equal(again.tiles, rounded.tiles) and torch.equal(again.scales, rounded.scales)
    back = rounded.dequantize(torch.float64)
    assert not back[rows // 2].any()
    # what plain rounding to the largest magnitude would give is never much better
    most = 127 if quantization.bits == 8 else 7
    largest = weight.abs().amax(1, keepdim=True).double()
    plain = (weight / (largest / most).clamp(min=1e-30)).round() * largest / most
    assert (back - weight).square().sum() <= (plain - weight).square().sum() * 1.02 + 1e-5 * weight.square().sum()


def test_int4_error_falls_with_the_group() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    errors = [
        float((quantize_weight(weight, QuantizationConfig.parse(name)).dequantize(torch.float32) - weight).norm())
        for name in ("int8", "int4-g32", "int4-g64", "int4-g128")
    ]
    relative = [error / float(weight.norm()) for error in errors]
    assert relative == sorted(relative)
    assert relative[0] < 0.008 and relative[1] < 0.085 and relative[3] < 0.1


def test_what_is_not_finite_is_refused(folder: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"weights: {name} has values that are not finite"):
        load_model(folder, quantization="int8")


# -- a network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_what_is_quantized(name: str) -> None:
    state, model = random_model().state_dict(), quantized(name)
    changed = {n for n, tensor in model.state_dict().items() if n not in state or tensor.dtype != state[n].dtype}
    experts = {n for n in state if ".experts." in n}
    kept = ("embed_tokens", "lm_head", ".gate.", "coefficient", "norm")
    matrices = experts if name.endswith("experts") else {n for n in state if not any(part in n for part in kept)}
    assert changed == matrices | {f"{n}_scale" for n in matrices}
    assert state.keys() - model.state_dict().keys() == set()
    assert model.config.quantization == QuantizationConfig.parse(name)
    with pytest.raises(UserError, match="quantized already"):
        quantize_model(model, QuantizationConfig(8))


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("backend", ["reference", "torch", "compiled"])
def test_the_network_computes_with_the_floats_that_its_weights_stand_for(name: str, backend: str) -> None:
    if backend == "compiled" and compiled.library is None:
        pytest.skip("the compiled kernels were not built here")
    model, plain = quantized(name), random_model()
    state = plain.state_dict()
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            for key, weight in module.matrices():
                state[f"{prefix}.{key}"] = weight.dequantize(torch.float32)
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = plain.double()(IDS, backend="reference").logits
        actual = model(IDS, backend=backend).logits
    assert relative_error(actual, expected) < (50 * LOGITS if backend == "compiled" else LOGITS)


def test_a_quantized_network_is_not_trained() -> None:
    model = quantized("int8")
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="a quantized model cannot be trained"):
        model.train()
    model.eval()
    model(IDS)  # without no_grad
    model.model.norm.requires_grad_()  # behind every matrix
    model(IDS).logits.sum().backward()
    model.model.embed_tokens.requires_grad_()
    with pytest.raises(UserError, match="a quantized model cannot be trained"):
        model(IDS)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_moving_copying_and_state_dict(name: str) -> None:
    model = quantized(name)
    logits = model(IDS).logits
    twin = copy.deepcopy(model)
    assert_same_bits(twin, model)
    proj = twin.model.layers[0].self_attn.qkv_proj
    assert proj.weight.tiles.data_ptr() == proj.weight_tiles.data_ptr()  # one memory, not that of the original
    assert proj.weight.tiles.data_ptr() != model.model.layers[0].self_attn.qkv_proj.weight.tiles.data_ptr()
    for module in (proj, twin.model.layers[1].block_sparse_moe.experts):
        before = {key: to_checkpoint(weight) for key, weight in module.matrices()}
        module.to(torch.float16).float()
        for key, weight in module.matrices():  # the scales have not been through float16
            assert all(torch.equal(a, b) for a, b in zip(before[key], to_checkpoint(weight), strict=True))
    other = MiniMaxM1ForCausalLM(CONFIG)
    other.init_weights(seed=9)
    quantize_model(other, QuantizationConfig.parse(name))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, logits)
    assert other.compute_dtype == torch.float32 and other.dtype == torch.float32 and other.device.type == "cpu"
    state = model.state_dict()
    del state["model.layers.0.self_attn.qkv_proj.weight_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv_proj\.weight_scale"):
        other.load_state_dict(state)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_gpu_holds_rows_and_a_cpu_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def layouts(model: MiniMaxM1ForCausalLM) -> set[tuple[int, ...]]:
        return {tuple(weight.tiles.shape[-3:]) for weight in quantized_matrices(model).values()}

    model = quantized(name)
    logits = model(IDS, backend="torch").logits
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_model(random_model(), tmp_path / "float")
    save_model(model, tmp_path / "small")
    assert layouts(model) == {CPU_TILE}
    with monkeypatch.context() as patched:
        patched.setattr(kernels.quantized, "tile_of", lambda device: GPU_TILE)  # as if this were one
        for here in (
            model.to("cpu"),
            load_model(tmp_path / "small"),
            load_model(tmp_path / "float", quantization=name),
            quantized(name),
        ):
            assert layouts(here) == {GPU_TILE}
            assert_same_bits(here, quantized(name))
            assert torch.equal(here(IDS, backend="torch").logits, logits)
        model.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in state.items()})
        model.load_state_dict(state)
        assert layouts(model) == {GPU_TILE} and torch.equal(model(IDS, backend="torch").logits, logits)
    model.to("cpu")
    assert layouts(model) == {CPU_TILE}
    assert_same_bits(model, quantized(name))


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "max_shard_bytes"),
    [
        (name, dtype, (10**9, 20_000)[(i + j) % 2])  # one file and several in turn
        for i, name in enumerate(QUANTIZATIONS)
        for j, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_four_ways_to_the_same_bits(tmp_path: Path, name: str, dtype: torch.dtype, max_shard_bytes: int) -> None:
    save_model(random_model(dtype), tmp_path / "float")
    in_place = quantized(name, dtype)
    assert_same_bits(load_model(tmp_path / "float", quantization=name), in_place)
    save_model(in_place, tmp_path / "saved", max_shard_bytes)
    assert_same_bits(load_model(tmp_path / "saved"), in_place)
    assert_same_bits(load_model(tmp_path / "saved", quantization=name), in_place)
    quantization = QuantizationConfig.parse(name)
    quantize_checkpoint(tmp_path / "float", tmp_path / "streamed", quantization, max_shard_bytes=max_shard_bytes)
    assert_same_bits(load_model(tmp_path / "streamed"), in_place)
    configs = [json.loads((tmp_path / way / "config.json").read_text()) for way in ("saved", "streamed")]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"] == quantization.to_dict()
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == {p.name for p in (tmp_path / "saved").iterdir()}


def test_tied_embedding_and_dtype(tmp_path: Path) -> None:
    save_model(random_model(config=CONFIG.replace(tie_word_embeddings=True)), tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "small", QuantizationConfig(8), dtype="bfloat16")
    model = load_model(tmp_path / "small")
    assert_same_bits(load_model(tmp_path / "float", dtype="bfloat16", quantization="int8"), model)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].block_sparse_moe.gate.weight.dtype == torch.float32


def test_what_does_not_fit(tmp_path: Path, folder: Path) -> None:
    quantize_checkpoint(folder, tmp_path / "int8", QuantizationConfig(8))
    with pytest.raises(UserError, match=r"quantization: 'int4' cannot be used; .* is int8 already"):
        load_model(tmp_path / "int8", quantization="int4")
    with pytest.raises(UserError, match="quantization: 'int3' cannot be used; accepted"):
        load_model(folder, quantization="int3")
    with pytest.raises(UserError, match="is int8 already; the float checkpoint is needed"):
        quantize_checkpoint(tmp_path / "int8", tmp_path / "again", QuantizationConfig(4, 32))
    assert not (tmp_path / "again").exists()
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    for change, message in (
        ({name: tensors[name].float()}, f"1 of another type: {name} float32"),
        ({name: tensors[name][:, 1:].contiguous()}, f"1 of another shape: {name}"),
        ({f"{name}_scale": None}, f"1 missing: {name}_scale"),
    ):
        kept = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(kept, tmp_path / "int8" / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "int8")
    shutil.copy(folder / "config.json", tmp_path / "int8" / "config.json")  # says nothing of quantization
    save_file(tensors, tmp_path / "int8" / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected: .*weight_scale.*of another type: .* int8"):
        load_model(tmp_path / "int8")


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_accounting_counts_the_bytes_of_the_file(name: str, preset: str) -> None:
    from minimax_m1.quantization import plan_quantized

    config = MiniMaxM1Config.preset(preset).replace(num_hidden_layers=2, attn_type_list=(0, 1))
    if preset == "nano":
        config = config.replace(shared_intermediate_size=75)
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(config)
    model = model.to(torch.bfloat16)
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.float()
    plan_quantized(model, QuantizationConfig.parse(name))
    assert accounting.weight_bytes(config, name) == sum(t.nbytes for t in model.state_dict().values())


MEASURE = """
import resource, sys
from pathlib import Path
from minimax_m1.config import QuantizationConfig
from minimax_m1.weights import load_model, quantize_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "load":
    model = load_model(sys.argv[1], quantization=sys.argv[3])
else:
    quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), QuantizationConfig.parse(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("name", ["int8"])  # the one that needs more
def test_memory(tmp_path: Path, name: str) -> None:
    """The float model is never in memory: loading takes the model and one tensor, writing a smaller checkpoint two."""
    config = MiniMaxM1Config.preset("nano").replace(num_hidden_layers=16, attn_type_list=(0, 1) * 8)
    save_model(random_model(config=config), tmp_path / "float")
    sizes = [4 * torch.Size(piece.shape).numel() for piece in find_pieces(tmp_path / "float").values()]
    assert sum(sizes) > 200e6

    def measure(way: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "float"), way, name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert measure(str(tmp_path / "small")) < 2 * max(sizes) + 30e6
    small = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert measure("load") < small + max(sizes) + 30e6


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from minimax_m1.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minimax-m1", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit:
            return int(exit.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


def test_command(run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    output = tmp_path / "small"
    status, out, err = run("quantize", "--model", tiny_checkpoint, "--output", output, "--quantization", "int4")
    assert (status, err) == (0, "") and "int4-g32" in out and "MB of weights" in out
    others = {"config.json", "model.safetensors"}
    assert {p.name for p in output.iterdir()} == {p.name for p in tiny_checkpoint.iterdir()}
    for path in tiny_checkpoint.iterdir():
        assert path.name in others or path.read_bytes() == (output / path.name).read_bytes()
    sizes = [sum(p.file.stat().st_size for p in find_pieces(f).values()) for f in (tiny_checkpoint, output)]
    assert sizes[1] < sizes[0]
    options = ("--prompt", "2 plus 3", "--max-new-tokens", 5, "--greedy", "--quiet")
    given_small = run("generate", "--model", output, *options)
    given_float = run("generate", "--model", tiny_checkpoint, "--quantization", "int4", *options)
    assert given_small == given_float and given_small[0] == 0

    before = {p.name: p.read_bytes() for p in output.iterdir()}
    status, _, err = run("quantize", "--model", tiny_checkpoint, "--output", output)
    assert status == 2 and "is not empty; give another folder, or --overwrite" in err
    status, _, err = run("quantize", "--model", output, "--output", tmp_path / "again")
    assert status == 2 and "is int4-g32 already" in err
    status, _, err = run("quantize", "--model", tiny_checkpoint, "--output", tiny_checkpoint, "--overwrite")
    assert status == 2 and "is the model itself" in err
    status, _, err = run("quantize", "--model", tmp_path / "nowhere", "--output", output)
    assert status == 2 and "there is no folder" in err
    status, _, err = run("quantize", "--model", tiny_checkpoint, "--output", output, "--quantization", "int3")
    assert status == 2 and "int8" in err
    assert before == {p.name: p.read_bytes() for p in output.iterdir()}
    status, _, _ = run("quantize", "--model", tiny_checkpoint, "--output", output, "--overwrite")
    assert status == 0 and MiniMaxM1Config.from_pretrained(output).quantization == QuantizationConfig(8)
