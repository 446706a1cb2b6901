"""`minimax-m1 data`: what is learned is marked, and the figures are those of the samples."""

import json
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., Path]:
    """A function that writes a recipe over a mixture of files, and returns its path."""

    def write(mixture: dict[Path, float], *lines: str) -> Path:
        text = f'init = "{tiny_checkpoint}"\ntokens_per_batch = 300\nwindow = [200]\noutput = "{tmp_path / "run"}"\n'
        text += "".join(f"{line}\n" for line in lines) + "[mixture]\n"
        text += "".join(f"{json.dumps(str(name))} = {share}\n" for name, share in mixture.items())
        (tmp_path / "recipe.toml").write_text(text)
        return tmp_path / "recipe.toml"

    return write


def test_samples_with_what_is_learned_in_brackets(run, recipe, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "A pear.\x1b[31m"}))
    path = recipe({tmp_path / "chat.jsonl": 1.0, tmp_path / "text.jsonl": 1.0})
    outcome = run("data", "--config", path, "--count", "2", "--statistics", "0")
    assert (outcome.status, outcome.err) == (0, "")
    tokens = re.findall(r"^sample \d: (.*), (\d+) tokens, the loss falls on (\d+)$", outcome.out, re.MULTILINE)
    assert [Path(name).name for name, _, _ in tokens] == ["chat.jsonl", "text.jsonl"]
    learned = "[[<think>\ntwo and two\n</think>\n4<end_of_sentence>]]"
    assert f"<beginning_of_sentence>ai name=assistant\n{learned}\n" in outcome.out
    assert "A[[ pear.\\x1b[31m<end_of_sentence>]]\n" in outcome.out  # nothing steers the terminal
    assert int(tokens[1][2]) == int(tokens[1][1]) - 1
    assert not (tmp_path / "run").exists()


def test_statistics(run, recipe, tmp_path: Path) -> None:
    texts = [json.dumps({"text": "pear " * n}) for n in range(1, 300, 6)]  # of which some are above the window
    (tmp_path / "a.jsonl").write_text("\n".join([*texts, "{", '{"text": ""}']))
    (tmp_path / "b.txt").write_text("plum " * 30)
    path = recipe({tmp_path / "a.jsonl": 3.0, tmp_path / "b.txt": 1.0}, 'bad_records = "skip"')
    outcome = run("data", "--config", path, "--count", "0", "--statistics", "300")
    assert (outcome.status, outcome.err) == (0, "")
    assert re.search(r"^300 samples, [\d,]+ tokens; the loss falls on 9\d\.\d% of them$", outcome.out, re.MULTILINE)
    rows = re.findall(r"^ +([\d.]+)% +([\d.]+)% +(\d+) +([\d,]+)  (.*)$", outcome.out, re.MULTILINE)
    assert [float(asked) for asked, *_ in rows] == [75.0, 25.0]
    assert all(abs(float(asked) - float(real)) < 1.5 for asked, real, *_ in rows)
    assert sum(int(samples) for _, _, samples, _, _ in rows) == 300
    efficiencies = [float(x) for x in re.findall(r"([\d.]+)% of (?:300 tokens|them, with|what is run)", outcome.out)]
    assert len(efficiencies) == 3
    assert 95 < efficiencies[0] <= 100 and efficiencies[0] == max(efficiencies)
    assert re.search(r"^cut +\d+ records?: text longer than the window$", outcome.out, re.MULTILINE)
    assert re.search(r"^skipped +\d+ records?: broken JSON$", outcome.out, re.MULTILINE)


def test_mistakes_are_one_line(run, recipe, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n')
    for name, flags, message in (
        ("a.jsonl", [], "a.jsonl:1: text is not a string (int)"),
        ("none.jsonl", [], "no family of problems and no data file"),
        ("a.jsonl", ["--count", "-1"], "count: -1 cannot be used"),
    ):
        outcome = run("data", "--config", recipe({tmp_path / name: 1.0}), *flags)
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert message in outcome.err


def test_a_very_long_sample_loses_its_middle(run, recipe, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("pear " * 4000 + "the end")
    path = recipe({tmp_path / "a.txt": 1.0}, "")
    flags = ["--window", "9000", "--tokens-per-batch", "9000", "--count", "1", "--statistics", "0"]
    outcome = run("data", "--config", path, *flags)
    tokens = re.search(r"sample 1: .*, ([\d,]+) tokens", outcome.out)
    left_out = re.search(r"^… ([\d,]+) tokens …$", outcome.out, re.MULTILINE)
    assert tokens and left_out, outcome
    assert int(tokens[1].replace(",", "")) - int(left_out[1].replace(",", "")) == 3000
    assert outcome.out.rstrip().endswith("the end<end_of_sentence>]]")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("no_color", [False, True])
def test_the_loss_in_colour_on_a_terminal(run, recipe, tmp_path: Path, monkeypatch, no_color: bool) -> None:
    import pty

    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
    path = recipe({tmp_path / "chat.jsonl": 1.0})
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    reading, writing = pty.openpty()
    with os.fdopen(writing, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert run("data", "--config", path, "--count", "1", "--statistics", "0").status == 0
        terminal.flush()
        shown = b""
        while select.select([reading], [], [], 0.5)[0]:
            shown += os.read(reading, 4096)
    text = shown.decode().replace("\r\n", "\n")
    os.close(reading)
    if no_color:
        assert "[[<think>\ntwo and two\n</think>\n4<end_of_sentence>]]" in text and "\x1b[" not in text
    else:
        assert "\x1b[32m<think>" in text and "\x1b[1;32m<end_of_sentence>" in text and "[[" not in text
