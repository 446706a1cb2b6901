"""`minimax-m1 convert`: what a run's checkpoint or another layout holds is what `from_pretrained` then loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minimax_m1.benchmark.network import transformers_twin
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.settings import to_toml
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.checkpoint import Checkpoints
from minimax_m1.training.export import export
from minimax_m1.training.lora import add_lora, load_lora, merge_lora
from minimax_m1.training.parallel import World
from minimax_m1.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]
ONE_PROCESS = World(0, 1, torch.device("cpu"), None, 0, 1, 0, 1, None)
# Said at every save and load in one process; pytest undoes our filter.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make_run(folder: Path, model: MiniMaxM1ForCausalLM, tokenizer_of: Path, **changes: Any) -> Path:
    """The output of a training run that has saved steps 1 and 2, the second with the weights of `model`."""
    MiniMaxM1Tokenizer.from_pretrained(tokenizer_of).save_pretrained(folder / "tokenizer")
    settings = TrainSettings(output=folder, lr=0.125, **changes)
    (folder / "recipe.toml").write_text(to_toml(settings), encoding="utf-8")
    checkpoints = Checkpoints(folder / "checkpoints", 2, ONE_PROCESS)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for step in (1, 2):
        tensors = {name: tensor * step / 2 for name, tensor in trained.items()}
        moments = {f"{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in trained.items()}
        progress = {"step": step, "config": model.config.to_dict()}
        checkpoints.save(step, {"model": tensors, "optimizer": moments, "progress": progress, "slots": {"0": {}}})
    checkpoints.wait()
    return folder


@pytest.fixture
def trained(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    model = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    model.init_weights(seed=5)
    return make_run(tmp_path / "run", model, tiny_checkpoint)


def weights(seed: int, config: MiniMaxM1Config) -> MiniMaxM1ForCausalLM:
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed)
    return model


def test_a_run_becomes_a_checkpoint_folder(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    done = run("convert", "--checkpoint", trained, "--output", tmp_path / "out")
    assert (done.status, done.err) == (0, "")
    assert "checkpoints/step-000002" in done.out and "float32" in done.out
    model = MiniMaxM1ForCausalLM.from_pretrained(tmp_path / "out")
    expected = weights(5, model.config).state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == expected.keys()  # which are the official index's: oracle/test_official_index.py
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in stored
    assert "lr = 0.125" in (tmp_path / "out" / "recipe.toml").read_text()
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == MiniMaxM1Tokenizer.from_pretrained(trained / "tokenizer").get_vocab()


def test_an_older_checkpoint_in_bfloat16(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    source, output = trained / "checkpoints" / "step-000001", tmp_path / "out"
    assert run("convert", "--checkpoint", source, "--output", output, "--dtype", "bfloat16").status == 0
    stored = load_file(output / "model.safetensors")
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    expected = weights(5, MiniMaxM1Config.from_pretrained(output)).state_dict()
    for name, tensor in stored.items():
        wanted = torch.float32 if name.endswith(".gate.weight") else torch.bfloat16  # as in the official checkpoint
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, (expected[name] / 2).to(wanted)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere", "--output", "out"], "checkpoint: there is no folder nowhere"),
        (["--checkpoint", "empty", "--output", "out"], "checkpoint: empty cannot be used; accepted: the output of"),
        (["--checkpoint", "run", "--output", "run"], "output: run is the checkpoint itself"),
        (["--checkpoint", "run", "--output", "run/recipe.toml"], "is a file; a folder is needed"),
        (["--checkpoint", "run", "--output", "run/tokenizer"], "is not empty; give another folder, or --overwrite"),
        (["--checkpoint", "run", "--output", "run/tokenizer", "--overwrite"], "holds no model; only one is replaced"),
    ],
)
def test_folders_that_cannot_be_used(
    run: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(trained.parent)
    (trained.parent / "empty").mkdir()
    done = run("convert", *arguments)
    assert done.status == 2
    assert message in done.err and done.err.count("\n") == 1


def test_a_damaged_checkpoint_is_named(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    os.truncate(trained / "checkpoints" / "step-000002" / "__0_0.distcp", 1000)
    done = run("convert", "--checkpoint", trained, "--output", tmp_path / "out")
    assert done.status == 2
    assert re.search(r"step-000002: __0_0\.distcp has not the length .* remove it", done.err)
    assert not (tmp_path / "out").exists()


def test_only_a_whole_model_replaces_another(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run("convert", "--checkpoint", trained, "--output", output, "--dtype", "bfloat16").status == 0
    before = load_file(output / "model.safetensors")
    (tmp_path / "out.part").write_text("in the way")
    again = ("convert", "--checkpoint", trained, "--output", output, "--overwrite")
    assert run(*again).status == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(output / "model.safetensors").items())
    (tmp_path / "out.part").unlink()
    assert run(*again).status == 0
    assert load_file(output / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_transformers_layout_becomes_the_official_one(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = MiniMaxM1Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attn_type_list=(0, 1),
        num_local_experts=4,
        postnorm=True,
    )
    ours = weights(3, config)
    transformers_twin(ours).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("card")
    done = run("convert", "--checkpoint", tmp_path / "theirs", "--output", tmp_path / "out")
    assert done.status == 0, done.err
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in stored.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "minimax_m1"
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_a_run_of_lora_is_merged(run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    changes: dict[str, Any] = {"init": tiny_checkpoint, "lora_rank": 2, "lora_targets": ("attention", "experts")}
    model = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    add_lora(model, TrainSettings(**changes))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    make_run(tmp_path / "run", model, tiny_checkpoint, **changes)
    settings = TrainSettings(output=tmp_path / "run", export_dtype="float32", **changes)
    export(model, MiniMaxM1Tokenizer.from_pretrained(tiny_checkpoint), settings, tmp_path / "run/model", ONE_PROCESS)
    assert run("convert", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out").status == 0
    merge_lora(model)
    base = load_file(tiny_checkpoint / "model.safetensors")
    for folder in (tmp_path / "out", tmp_path / "run" / "model"):
        stored = load_file(folder / "model.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
        assert not torch.equal(stored["model.layers.0.block_sparse_moe.experts.0.w1.weight"], base["lm_head.weight"])
    again = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    load_lora(again, tmp_path / "run" / "adapter")
    merge_lora(again)
    assert torch.equal(
        again.model.layers[0].block_sparse_moe.experts.w2, model.model.layers[0].block_sparse_moe.experts.w2
    )


@pytest.mark.slow  # four ranks that import torch
def test_what_four_ranks_wrote_becomes_one_model(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Two by experts and two by rows: their checkpoint, and what they exported together."""
    script = ROOT / "tests" / "training" / "checkpoint_worker.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "run"), str(tiny_checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = weights(0, MiniMaxM1Config.from_pretrained(tiny_checkpoint)).state_dict()
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert run("convert", "--checkpoint", tmp_path / "moved", "--output", tmp_path / "out").status == 0
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name
        assert torch.equal(exported[name], tensor.to(exported[name].dtype)), name
    assert exported["model.norm.weight"].dtype == torch.bfloat16
