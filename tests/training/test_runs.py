"""What a run says to whoever starts it, resumes it with other settings, or gives it bad data."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minimax_m1.errors import UserError
from minimax_m1.training import trainer, vocabulary
from minimax_m1.training.report import write_report
from minimax_m1.training.settings import TrainSettings

NETWORK = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "attn_type_list": [0, 1],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 4,
}


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    lines = [json.dumps({"text": f"Line {i} of a small text."}) for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    return TrainSettings(
        output=tmp_path / "run",
        mixture={str(tmp_path / "a.jsonl"): 1.0},
        vocab_size=300,
        steps=2,
        tokens_per_batch=64,
        window=(32,),
        log_every=1,
        eval_every=0,
        model=NETWORK,
    )


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to draw it, which takes longer than so small a run."""
    monkeypatch.setattr(trainer, "_write_report", lambda output: None)


def events(settings: TrainSettings) -> list[str]:
    lines = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    return [line["event"] for line in lines if "event" in line]


def last_metrics(settings: TrainSettings) -> dict[str, Any]:
    lines = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)


@pytest.mark.usefixtures("no_report")
def test_a_resumed_run_says_what_has_changed(settings: TrainSettings) -> None:
    trainer.train(settings)
    assert events(settings) == []
    vocabulary = (settings.output / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    longer = replace(settings, steps=3, model={**NETWORK, "rope_theta": 5e4})
    trainer.train(longer)
    assert events(longer) == ["resumed with other settings: steps: 2 -> 3, rope_theta: None -> 50000.0"]
    assert (settings.output / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == vocabulary
    trainer.train(longer)
    assert len(events(longer)) == 1
    recipe = (settings.output / "recipe.toml").read_bytes()
    with pytest.raises(UserError, match=r"^steps: 2 cannot be used; accepted: at least 3"):
        trainer.train(settings)
    with pytest.raises(UserError, match=r"^vocab_size: 310 cannot be used; accepted: 300"):
        trainer.train(replace(longer, vocab_size=310))
    assert (settings.output / "recipe.toml").read_bytes() == recipe


def test_ctrl_c_says_where_the_run_goes_on(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = trainer.train_step

    def stop_at_step_2(*arguments: Any) -> dict[str, Any]:
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", stop_at_step_2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(replace(settings, save_every=1))
    assert capsys.readouterr().err.endswith("stopped; the same command continues after step 1\n")


@pytest.mark.usefixtures("no_report")
def test_records_left_out_are_counted_and_the_first_of_a_kind_is_named(settings: TrainSettings) -> None:
    path = Path(next(iter(settings.mixture)))
    path.write_text(path.read_text() + '{"text": \n' + json.dumps({"text": "word " * 100}) + "\n")
    settings = replace(settings, bad_records="skip", tokens_per_batch=512)
    trainer.train(settings)
    assert sorted(events(settings)) == [
        f"record cut: text longer than the window, as {path}:10",
        f"record skipped: broken JSON, as {path}:9",
    ]
    metrics = last_metrics(settings)
    assert metrics["records_skipped"] >= 1 and metrics["records_cut"] >= 1


def test_a_vocabulary_is_not_built_from_the_same_book_without_end(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("Some words and other words. " * 40)
    texts: list[str] = []
    monkeypatch.setattr(vocabulary, "VOCABULARY_CHARACTERS", 4000)
    monkeypatch.setattr(vocabulary, "train_prefix_tokenizer", lambda given, *_: texts.extend(given))
    vocabulary.build_tokenizer(replace(settings, mixture={str(tmp_path / "book.txt"): 1.0}))
    assert sum(map(len, texts[:-1])) < 4000 <= sum(map(len, texts))


def test_an_output_that_cannot_be_written_is_one_line(settings: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output: cannot write .*file.run: Not a directory"):
        trainer.train(replace(settings, output=tmp_path / "file" / "run"))


def test_a_report_that_does_not_fit_on_the_disk_leaves_the_earlier_one(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    trainer.train(settings)
    report = settings.output / "report.html"
    before = report.read_bytes()

    def full_disk(path: Path, text: str, encoding: str, errors: str) -> None:
        path.write_bytes(text.encode(encoding, errors)[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match=r"^output: cannot write .*report.html: No space left on device"):
        write_report(settings.output)
    assert report.read_bytes() == before and not list(settings.output.glob("*.part"))
