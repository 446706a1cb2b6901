"""`minimax-m1 merge`: the checkpoint it writes computes what base and adapter compute, or nothing is written."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.lora import add_lora, load_lora, merge_lora, save_lora
from minimax_m1.training.settings import TrainSettings
from minimax_m1.weights import find_pieces
from tests.tolerances import LOGITS, relative_error

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny checkpoint whose additions are not zero."""
    model = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    add_lora(model, TrainSettings(init=tiny_checkpoint, lora_rank=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    save_lora(model, folder)
    return folder


@torch.no_grad()
def logits(model: MiniMaxM1ForCausalLM) -> Tensor:
    return model(torch.arange(60)[None]).logits


def with_adapter(base: Path, adapter: Path) -> Tensor:
    model = MiniMaxM1ForCausalLM.from_pretrained(base)
    load_lora(model, adapter)
    return logits(model)


def test_the_merged_checkpoint_computes_the_same(run, tmp_path, tiny_checkpoint, adapter):
    outcome = run("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'merged'}: {tiny_checkpoint} with the additions of {adapter}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    merged = MiniMaxM1ForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(logits(merged), with_adapter(tiny_checkpoint, adapter)) < LOGITS
    assert relative_error(logits(merged), logits(MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint))) > 0.01
    assert merged.config == MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint).config
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("pear plum") == MiniMaxM1Tokenizer.from_pretrained(tiny_checkpoint).encode("pear plum")


def test_another_place_of_the_base_and_another_dtype(run, tmp_path, tiny_checkpoint, adapter):
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    (tmp_path / "merged").mkdir()  # empty: may be used
    arguments = ("merge", "--adapter", adapter, "--model", moved, "--output", tmp_path / "merged")
    assert run(*arguments, "--dtype", "bfloat16").status == 0
    dtypes = {name: piece.dtype for name, piece in find_pieces(tmp_path / "merged").items()}
    assert all((dtype == torch.float32) == name.endswith("moe.gate.weight") for name, dtype in dtypes.items())
    expected = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    load_lora(expected, adapter)
    merge_lora(expected)
    merged = MiniMaxM1ForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged[name], tensor.to(dtypes[name])), name  # rounded once, after the sum


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("adapter_model.safetensors", "error: adapter: cannot read .*adapter_model.safetensors"),
        ("adapter_config.json", "error: adapter: cannot read .*adapter_config.json: No such file"),
        ("config.json", "error: .*config.json"),
        ("tokenizer.json", "error: .*has neither tokenizer.json"),
        ("model.safetensors", "error: weights: .*has no model.safetensors"),
    ],
)
def test_a_missing_file_is_one_line_and_nothing_is_written(run, tmp_path, tiny_checkpoint, adapter, broken, message):
    base, copy = shutil.copytree(tiny_checkpoint, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    (copy if broken.startswith("adapter") else base).joinpath(broken).unlink()
    refused(run("merge", "--adapter", copy, "--model", base, "--output", tmp_path / "merged"), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_folders_that_cannot_be_used(run, tmp_path, tiny_checkpoint, adapter):
    merged = tmp_path / "merged"
    refused(run("merge", "--adapter", tmp_path / "no", "--output", merged), "error: adapter: cannot read .*no")
    absent = ("--model", tmp_path / "no")
    refused(run("merge", "--adapter", adapter, *absent, "--output", merged), "error: model: there is no folder .*no;")
    refused(run("merge", "--adapter", adapter, "--output", tiny_checkpoint), "error: output: .* exists already")
    file = tmp_path / "file"
    file.write_text("")
    refused(run("merge", "--adapter", adapter, "--output", file), "error: output: .*file exists already")
    refused(run("merge", "--adapter", adapter, "--output", file / "merged"), "error: output: cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_adapter_of_another_model(run, tmp_path, tiny_checkpoint, adapter):
    model = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    other = MiniMaxM1ForCausalLM(model.config.replace(hidden_size=48))
    other.init_weights(0)
    other.save_pretrained(tmp_path / "other")
    MiniMaxM1Tokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "other")
    arguments = ("--model", tmp_path / "other", "--output", tmp_path / "merged")
    refused(run("merge", "--adapter", adapter, *arguments), r"error: adapter: .* is of another model: .*instead of")
    assert run("quantize", "--model", tiny_checkpoint, "--output", tmp_path / "int8").status == 0
    arguments = ("--model", tmp_path / "int8", "--output", tmp_path / "merged")
    refused(run("merge", "--adapter", adapter, *arguments), "error: quantization: a quantized model cannot get LoRA")
    assert not (tmp_path / "merged").exists()


def test_values_that_are_not_finite(run, tmp_path, tiny_checkpoint):
    model = MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint)
    add_lora(model, TrainSettings(init=tiny_checkpoint, lora_rank=4))
    next(p for name, p in model.named_parameters() if ".lora_B." in name).data[0, 0] = float("nan")
    save_lora(model, tmp_path / "adapter")
    outcome = run("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    refused(outcome, "error: adapter: NaNs detected")
    assert not (tmp_path / "merged").exists()


def refused(outcome, message: str) -> None:
    """Assert that a command ended with one line like `message`."""
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert re.match(message, outcome.err), outcome.err
