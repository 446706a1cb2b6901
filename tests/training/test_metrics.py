"""The metrics of a run: lines that strict readers read, resumed without gaps or repeats, shown where someone looks."""

import io
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from struct import pack

import pytest
from rich.console import Console

from minimax_m1.errors import UserError
from minimax_m1.training.metrics import RunLog, draw, drop_lines_after, imbalance, read_lines, scalars

LINE = {
    "step": 20,
    "tokens": 81_920,
    "loss": 2.5,
    "balance": 1.01,
    "token_accuracy": 0.5,
    "grad_norm": 0.75,
    "lr": 1e-3,
    "tokens_per_second": 6500,
    "mfu": 0.41,
    "packing": 0.993,
    "grad_norm_by_layer": {"embedding": 0.1, "layer 0": 0.2},
    "expert_load": [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]],
    "window": 4096,
    "seconds": 12.5,
}


def open_log(output: Path, resume_step: int = 0, tensorboard: bool = False) -> RunLog:
    return RunLog(output, 100, resume_step=resume_step, tensorboard=tensorboard, is_main=True)


def strict_lines(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_there_at_once(tmp_path):
    with open_log(tmp_path) as log:
        log.write(LINE)
        assert strict_lines(tmp_path / "metrics.jsonl") == [LINE]
        log.write({"step": 20, "event": "stage 2: déjà vu"})
    assert strict_lines(tmp_path / "metrics.jsonl")[1]["event"] == "stage 2: déjà vu"


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    with open_log(tmp_path) as log:
        log.write({**LINE, "loss": float("nan"), "expert_load": [[1.0], [float("inf")]]})
    line, event = strict_lines(tmp_path / "metrics.jsonl")
    assert line == {**LINE, "loss": None, "expert_load": [[1.0], [None]]}
    assert event == {"step": 20, "event": "not finite: loss nan, expert_load 1 0 inf"}


def test_resuming_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            log.write({"step": step, "loss": 0.1 * step})
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + b'{"step": 40, "lo')  # kill -9
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"step": 20, "text": "kept"}\n{"step": 30, "text": "said again"}\n')
    with open_log(tmp_path, resume_step=20) as log:
        assert path.read_bytes() == b"".join(before[:2])
        log.write({"step": 30, "loss": 7.0})
    assert [line["step"] for line in strict_lines(path)] == [10, 20, 30]
    assert [line["text"] for line in strict_lines(samples)] == ["kept"]
    assert sorted(tmp_path.iterdir()) == [path, samples]


def test_a_run_from_the_beginning_has_no_lines_of_another(tmp_path):
    for _ in range(2):
        with open_log(tmp_path) as log:
            log.write({"step": 0, "event": "stage 1"})
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 1


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n[1]\n{"step": 2}')
    drop_lines_after(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path, 100, resume_step=0, tensorboard=True, is_main=False) as log:
        log.write(LINE)
        log.advance(21)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="output: cannot write"), open_log(tmp_path, resume_step=5):
        pass


def test_a_full_disk_is_told_once_and_loses_no_line(tmp_path, capsys):
    # A limit on the size of files fails in the way a full disk does: first a part of a line fits, then nothing.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open_log(tmp_path) as log:
            log.write({"step": 1, "loss": 1.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
            log.write({"step": 2, "loss": 2.0})
            log.write({"step": 3, "loss": 3.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            log.write({"step": 4, "loss": 4.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot write metrics.jsonl: File too large; training goes on" in told


def test_scalars_for_tensorboard():
    found = scalars({**LINE, "solved": {"chain": 0.5}, "eval_loss": {"a.txt": None}, "note": "text"})
    assert found["loss/train"] == 2.5 and found["optimizer/lr"] == 1e-3 and found["accuracy/solved/chain"] == 0.5
    assert found["grad_norm/layer 0"] == 0.2
    assert found["experts/imbalance/layer 0"] == 2.0 and found["experts/imbalance/layer 1"] == 1.0
    assert not {"step", "note", "loss/eval/a.txt"} & found.keys()
    assert imbalance([None, [], [None]]) == [None, None, None]


def test_tensorboard_reads_the_events(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_log(tmp_path, tensorboard=True) as log:
        log.write({"step": 10, "loss": 3.0})
        log.write({"step": 20, "loss": 2.0})
    time.sleep(1.1)  # the files' names have seconds, and are read in their order
    with open_log(tmp_path, resume_step=10, tensorboard=True) as log:
        log.write({"step": 20, "loss": 1.0, "event": "a new stage"})
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(10, 3.0), (20, 1.0)]
    assert "events/text_summary" in events.Tags()["tensors"]


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "minimax-m1\[tensorboard\]"'):
        open_log(tmp_path, tensorboard=True)


def shown(width: int, **latest: object) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(draw(40, 100, 3_725.0, latest))
    return console.export_text()


def test_the_display():
    text = shown(100, **LINE, solved=(20, {"chain": 0.5, "word problem": 1.0}), eval_loss=(20, {"a.txt": 1.5}))
    assert "step 40/100" in text and "40%" in text and "1 h 02 min left" in text
    for number in ("loss 2.5000", "accuracy 50.0%", "grad norm 0.75", "lr 1.00e-03", "6,500 tokens/s", "MFU 41.0%"):
        assert number in text
    assert "solved at 20:  chain 50%  word problem 100%\n" in text and "eval loss at 20:  a.txt 1.500\n" in text
    assert "packing 99.3%" in text


def test_the_display_with_nothing_yet_and_with_nulls():
    assert shown(100).count("\n") == 1
    text = shown(100, loss=None, solved=(0, {"chain": None}), event="not finite: loss nan")
    assert "loss -" in text and "chain -" in text and "not finite" in text


@pytest.mark.parametrize("width", [20, 40, 200])
def test_the_display_fits(width):
    lines = shown(width, **LINE, solved=(20, {f"family {i}": i / 30 for i in range(30)})).splitlines()
    assert max(map(len, lines)) <= width


def test_silent_without_a_terminal(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.write(LINE)
    assert capsys.readouterr() == ("", "")


PROGRAM = """
import sys, time
from pathlib import Path
from minimax_m1.training.metrics import RunLog
with RunLog(Path(sys.argv[1]), 1000, resume_step=0, tensorboard=False, is_main=True) as log:
    for step in range(1, 1001):
        time.sleep(0.02)
        log.advance(step)
        if step % 5 == 0:
            log.write({"step": step, "loss": 1 / step})
        if step == 20:
            print("said meanwhile", file=sys.stderr)
            print("for the file")
"""


def test_a_terminal_that_is_resized_and_interrupted(tmp_path):
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=slave, env=environment)
    seen, begin, resized = "", time.monotonic(), False
    while not re.search(r"step [6-9]\d/", seen) and time.monotonic() - begin < 30:
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 65_536).decode(errors="replace")
        if "said meanwhile" in seen and not resized:
            ioctl(slave, termios.TIOCSWINSZ, pack("HHHH", 10, 30, 0, 0))
            process.send_signal(signal.SIGWINCH)
            resized = True
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=30)
    os.close(slave)
    while select.select([master], [], [], 0.2)[0]:
        try:
            seen += os.read(master, 65_536).decode(errors="replace")
        except OSError:
            break
    os.close(master)
    assert process.returncode in (-signal.SIGINT, 130, 1) and "KeyboardInterrupt" in seen
    assert stdout == b"for the file\n"
    assert "said meanwhile" in seen and "loss" in seen and resized
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # the cursor is there
    pictures = seen.count("step ")
    # and one more for each of beginning, a line said meanwhile, resizing and the end, which a slow machine repeats
    assert pictures <= 2 * (time.monotonic() - begin) + 8, "more than two pictures a second"
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) >= 5
