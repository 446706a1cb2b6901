"""llama.cpp beside us: the same weights through its own converter, measured by its own tools, in turn with ours.

`LLAMA_CPP_BIN` names the folder of llama-bench, llama-batched-bench and llama-quantize; `LLAMA_CPP_CONVERT` its
converter, convert_hf_to_gguf.py, unless that lies in a folder above the binaries. The source package llama-cpp-python
on PyPI has all of it (docs/benchmarks.md says how to build them).
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minimax_m1.benchmark.engine import quantized
from minimax_m1.benchmark.measure import Figure, Machine
from minimax_m1.benchmark.network import DecodeOurs, bytes_per_step, prefill_ours
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM

CASE = "llama-cpp"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize")
FORMATS = {"F32": None, "Q8_0": "int8", "Q4_0": "int4"}  # its name of a format -> ours
TOGETHER = 16

# The converter reads a tokenizer and looks for tokens whose embedding is zero; random weights have neither.
CONVERT = """
import sys
converter, checkpoint, gguf = sys.argv[1:4]
folder = converter.rpartition("/")[0]
sys.path[:0] = [folder, folder + "/gguf-py"]
import convert_hf_to_gguf
from conversion.minimax import MiniMaxText01Model

def set_vocab(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

MiniMaxText01Model.set_vocab = set_vocab
MiniMaxText01Model._get_suppress_tokens = lambda self: None
sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", gguf, "--outtype", "f32"]
convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class LlamaCpp:
    """Where llama.cpp's tools lie; speeds are tokens per second, with as many threads as PyTorch has."""

    folder: Path
    converter: Path

    @property
    def version(self) -> str:
        """What the tools say of themselves: build number and commit."""
        done = subprocess.run([self.folder / TOOLS[1], "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"version: (.*)", done.stdout + done.stderr)
        return "unknown" if found is None else found[1]

    def convert(self, model: MiniMaxM1ForCausalLM, folder: Path) -> dict[str, Path]:
        """Write a network in every one of `FORMATS`; return the files."""
        checkpoint, files = folder / "checkpoint", {name: folder / f"{name}.gguf" for name in FORMATS}
        model.save_pretrained(checkpoint)
        _run([sys.executable, "-c", CONVERT, self.converter, checkpoint, files["F32"]])
        for name in ("Q8_0", "Q4_0"):
            _run([self.folder / "llama-quantize", files["F32"], files[name], name])
        return files

    def alone(self, file: Path, *, prompt: int = 0, new: int = 0, context: int = 0) -> float:
        """Return the speed of a prompt, or of new tokens, behind `context` tokens."""
        options = ["-p", prompt, "-n", new, "-d", context, "-r", 1, "-t", torch.get_num_threads(), "-o", "json"]
        (result,) = json.loads(_run([self.folder / "llama-bench", "-m", file, *options]))
        return result["avg_ts"]

    def together(self, file: Path, count: int, prompt: int, new: int) -> float:
        """Return the speed of new tokens of `count` sequences behind `prompt` tokens each, all of them counted.

        Its rearranged 4-bit weights refuse several sequences of this network (GGML_ASSERT(ne13 == 1) in repack.cpp,
        commit 0c1e570); where they do, the weights stay as in the file.
        """
        room = count * (-(-(prompt + new) // 256) * 256)  # it gives every sequence a multiple of 256
        shape = ["-npp", prompt, "-ntg", new, "-npl", count, "-c", room]
        options = ["-t", torch.get_num_threads(), "--output-format", "jsonl"]
        command = [self.folder / "llama-batched-bench", "-m", file, *shape, *options]
        try:
            output = _run(command)
        except UserError:
            output = _run([*command, "--no-repack"])
        (result,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
        return result["speed_tg"]


def find(*, is_asked_for: bool) -> LlamaCpp | None:
    """Return llama.cpp as the environment names it; None if it does not.

    Raises:
        UserError: a variable names what is not there, or none is set although llama.cpp is asked for.
    """
    named = os.environ.get("LLAMA_CPP_BIN")
    if not named:
        if is_asked_for:
            raise UserError(f"LLAMA_CPP_BIN: is not set; accepted: a folder with {', '.join(TOOLS)}")
        return None
    folder = Path(named).resolve()
    for tool in TOOLS:
        if not os.access(folder / tool, os.X_OK):
            raise UserError(f"LLAMA_CPP_BIN: {named!r} has no {tool}; accepted: a folder with {', '.join(TOOLS)}")
    beside = (above / "convert_hf_to_gguf.py" for above in folder.parents)
    converter = os.environ.get("LLAMA_CPP_CONVERT") or next((path for path in beside if path.is_file()), None)
    if converter is None or not Path(converter).is_file():
        raise UserError(f"LLAMA_CPP_CONVERT: {converter!r} is no file; accepted: llama.cpp's convert_hf_to_gguf.py")
    return LlamaCpp(folder, Path(converter).resolve())


def run(size: str, model: MiniMaxM1ForCausalLM, rival: LlamaCpp, machine: Machine, *, quick: bool) -> Iterator[Figure]:
    """Yield the figures of one network."""
    with tempfile.TemporaryDirectory() as folder:
        files = rival.convert(model, Path(folder))
        for name, quantization in FORMATS.items():
            net = model if quantization is None else quantized(model, quantization)
            about = f"{size} {quantization or 'float32'} / {name}"
            yield from _compare(about, net, files[name], rival, machine, quick=quick)


def _compare(
    about: str, net: MiniMaxM1ForCausalLM, file: Path, rival: LlamaCpp, machine: Machine, *, quick: bool
) -> Iterator[Figure]:
    """Yield the figures of one format: a prompt, decoding alone, behind a long context, and of many together."""
    rounds, length, far = (1, 256, 1024) if quick else (3, 1024, 16_384)
    prompt = torch.randint(0, net.config.vocab_size, (length,))
    ours, theirs = _in_turn(
        rounds, lambda: length / _seconds(lambda: prefill_ours(net, prompt)), lambda: rival.alone(file, prompt=length)
    )
    yield Figure(f"{about} prefill-{length}", "tok/s", ours, theirs)
    for context in (512, far):
        ours, theirs = _decode_behind(context, net, file, rival, rounds)
        ceiling = machine.read_bytes / bytes_per_step(net, 1) if context == 512 else None
        yield Figure(f"{about} decode-1 behind {context}", "tok/s", ours, theirs, ceiling)
    many = DecodeOurs(net, TOGETHER, 128)
    ours, theirs = _in_turn(rounds, lambda: many.run(32), lambda: rival.together(file, TOGETHER, 128, 32))
    yield Figure(f"{about} decode-{TOGETHER}", "tok/s", ours, theirs)


def _decode_behind(
    context: int, net: MiniMaxM1ForCausalLM, file: Path, rival: LlamaCpp, rounds: int
) -> tuple[float, float]:
    decoder = DecodeOurs(net, 1, context)
    return _in_turn(rounds, lambda: decoder.run(32), lambda: rival.alone(file, new=32, context=context))


def _in_turn(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    """Return the median speeds of two rivals."""
    speeds = [(ours(), theirs()) for _ in range(rounds)]
    return statistics.median(a for a, _ in speeds), statistics.median(b for _, b in speeds)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _run(command: list[object]) -> str:
    """Run a tool; return what it prints.

    Raises:
        UserError: it fails; the message has its last words.
    """
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # or it starts a debugger when it fails
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"LLAMA_CPP_BIN: {command[0]} failed with status {done.returncode}: {words}")
    return done.stdout
