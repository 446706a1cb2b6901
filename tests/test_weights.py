"""Checkpoints: bits that survive, names of three dialects, memory, and what a damaged folder says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.weights import find_pieces, load_model, save_model
from tests.tolerances import LOGITS, relative_error

CONFIG = MiniMaxM1Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    attn_type_list=(0, 1, 0),
    num_local_experts=4,
)
VARIANTS = {
    "plain": CONFIG,
    "shared expert": CONFIG.replace(shared_intermediate_size=24),
    "dynamic gate": CONFIG.replace(dynamic_gate=True),
    "tied": CONFIG.replace(tie_word_embeddings=True),
}


def random_model(config: MiniMaxM1Config = CONFIG, dtype: torch.dtype = torch.float32) -> MiniMaxM1ForCausalLM:
    model = MiniMaxM1ForCausalLM(config).to(dtype)
    model.init_weights(seed=1)
    return model


def assert_same_bits(a: MiniMaxM1ForCausalLM, b: MiniMaxM1ForCausalLM) -> None:
    theirs = b.state_dict()
    assert list(a.state_dict()) == list(theirs)
    for name, tensor in a.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Change or (None) remove tensors of a checkpoint of one file."""
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(random_model(), tmp_path / "model")
    return tmp_path / "model"


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip_keeps_every_bit(tmp_path: Path, variant: str, dtype: torch.dtype, max_shard_bytes: int) -> None:
    model = random_model(VARIANTS[variant], dtype)
    save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert_same_bits(load_model(tmp_path), model)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who may read one file may read all


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """The official checkpoint is bfloat16 with a float32 router."""
    model = random_model(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.float()
    model.init_weights(seed=2)
    save_model(model, tmp_path)
    assert_same_bits(load_model(tmp_path), model)
    assert_same_bits(load_model(tmp_path, dtype="bfloat16"), model)


def test_golden_checkpoint(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "m1_h8"
    load_model(golden).save_pretrained(tmp_path)
    theirs, ours = load_file(golden / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", torch.bfloat16), (torch.float64, torch.float64), ("auto", torch.float32), (None, torch.float32)],
)
def test_dtype_is_converted(folder: Path, dtype: torch.dtype | str | None, expected: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    assert model.dtype == expected
    assert not model.training
    gates = {layer.block_sparse_moe.gate.weight.dtype for layer in model.model.layers}
    assert gates == {torch.promote_types(expected, torch.float32)}
    saved = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name].to(tensor.dtype)), name


def test_shards_have_an_index_that_others_can_read(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert index["weight_map"].keys() == state.keys()
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}


def test_saving_again_leaves_nothing_of_the_older_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for max_shard_bytes in (20_000, 10**9, 40_000):
        model = random_model()
        save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
        assert_same_bits(load_model(tmp_path), model)
        assert not list(tmp_path.glob("*.part"))
        assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
    assert (tmp_path / "tokenizer.json").exists()


def test_unknown_config_keys_survive(tmp_path: Path) -> None:
    config = MiniMaxM1Config.from_dict({**CONFIG.to_dict(), "auto_map": {"AutoConfig": "x.Y"}})
    save_model(random_model(config), tmp_path)
    assert load_model(tmp_path).config.extra["auto_map"] == {"AutoConfig": "x.Y"}


# -- other dialects --------------------------------------------------------------------------------------------------


def test_minimax_text_01(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "minimax_text_01"}))
    assert load_model(folder).config.model_type == "minimax_text_01"


@pytest.mark.parametrize("names", ["as saved", "in memory"])
def test_transformers_minimax(tmp_path: Path, names: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MiniMaxConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        linear_attn_alpha_factor=1.5,
        full_attn_alpha_factor=1.25,
        mlp_alpha_factor=1.75,
        mlp_beta_factor=0.5,
        block_size=16,
    )
    torch.manual_seed(0)
    peer = transformers.MiniMaxForCausalLM(config).eval()
    peer.save_pretrained(tmp_path)
    if names == "in memory":
        save_file(peer.state_dict(), tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    assert ours.config.model_type == "minimax_m1"
    assert ours.config.attn_type_list == (0, 1, 0, 1)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = peer(ids).logits, ours(ids).logits
    assert relative_error(found, expected) < LOGITS
    ours.save_pretrained(tmp_path / "official")  # and from here on it is an official checkpoint
    assert "layer_types" not in json.loads((tmp_path / "official" / "config.json").read_text())
    assert_same_bits(load_model(tmp_path / "official"), ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types: .*accepted: linear_attention or full_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, 'rope_parameters.rope_type: .*"default"'),
    ],
)
def test_a_minimax_config_that_m1_cannot_be(change: dict[str, object], message: str) -> None:
    values = {"model_type": "minimax", "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    with pytest.raises(UserError, match=message):
        MiniMaxM1Config.from_dict(values | change)


# -- damage -----------------------------------------------------------------------------------------------------------


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_that_does_not_fit_is_one_error(folder: Path) -> None:
    gates = {f"model.layers.{i}.block_sparse_moe.gate.weight": None for i in range(3)}
    experts = {f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": None for e in range(4) for w in ("w1", "w2")}
    rewrite(folder, {**gates, **experts, "lm_head.weight": torch.zeros(95, 32), "stray": torch.zeros(1)})
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = one_line(caught)
    assert "11 missing: model.layers.0.block_sparse_moe.experts.0.w1.weight, " in message
    assert " and 1 more" in message
    assert "1 unexpected: stray" in message
    assert "1 of another shape: lm_head.weight [95, 32] instead of [96, 32]" in message


def test_integers_are_not_weights(folder: Path) -> None:
    rewrite(folder, {"lm_head.weight": torch.zeros(96, 32, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"lm_head.weight is I64; accepted: F64, F32, BF16, F16"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors") as caught:
        load_model(folder)
    one_line(caught)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    save_model(random_model(), tmp_path, max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of {len(shards)} shards: {shards[1].name}") as caught:
        load_model(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\x00"])
def test_a_damaged_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="is not an index") as caught:
        load_model(folder)
    one_line(caught)


def test_missing_folder_weights_and_config(folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere") as caught:
        load_model(folder / "nowhere")
    one_line(caught)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON") as caught:
        load_model(folder)
    one_line(caught)


@pytest.mark.parametrize("dtype", ["int8", "float31", torch.int64])
def test_a_dtype_that_parameters_cannot_have(folder: Path, dtype: torch.dtype | str) -> None:
    with pytest.raises(UserError, match=r"dtype: .*accepted: auto, float64, float32, bfloat16, float16"):
        load_model(folder, dtype=dtype)


def test_an_interrupted_save_leaves_the_older_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = load_model(folder)
    calls = []

    def fail_at_second(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("minimax_m1.weights.save_file", fail_at_second)
    newer = MiniMaxM1ForCausalLM(CONFIG)
    newer.init_weights(seed=5)
    with pytest.raises(UserError, match="No space left on device"):
        save_model(newer, folder, max_shard_bytes=20_000)
    assert_same_bits(load_model(folder), older)
    assert not list(folder.glob("*.part"))


# -- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, torch
from minimax_m1.weights import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1], dtype=sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("dtype", "max_shard_bytes"), [("float32", 60 * 10**6), ("bfloat16", 10**9)])
def test_loading_takes_the_model_and_one_tensor(tmp_path: Path, dtype: str, max_shard_bytes: int) -> None:
    config = MiniMaxM1Config.preset("nano").replace(vocab_size=50_000)
    save_model(random_model(config), tmp_path, max_shard_bytes=max_shard_bytes)
    sizes = [4 * torch.Size(piece.shape).numel() for piece in find_pieces(tmp_path).values()]
    assert sum(sizes) > 200e6
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    model_bytes = sum(sizes) // (2 if dtype == "bfloat16" else 1)
    assert int(measured.stdout) < model_bytes + max(sizes) + 15e6
