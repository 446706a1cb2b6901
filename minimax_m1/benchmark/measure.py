"""What every benchmark needs: figures, the machine's own ceilings, and a clock that runs rivals in turn."""

from __future__ import annotations

import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Figure(NamedTuple):
    """One line of the result; `peer` and `ceiling` are in the unit of `ours`, None where there is none."""

    case: str
    unit: str  # tokens/s unless said otherwise
    ours: float
    peer: float | None = None
    ceiling: float | None = None  # what the machine could do at most, by its own measured limit


class Machine(NamedTuple):
    """What this machine can do at most, measured here."""

    gemm_flops: float  # float32, per second
    read_bytes: float  # from memory, per second


def measure_machine(rounds: int) -> Machine:
    """Measure the float32 matrix product (the best of three sizes) and reading memory, both with all threads."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n), torch.randn(n, n)
        seconds = median_seconds(rounds, [lambda a=a, b=b: a @ b], None)[0]  # type: ignore[misc]
        best = max(best, 2 * n**3 / seconds)
    block = torch.ones(2**27)  # 512 MB, beyond any cache
    return Machine(best, block.numel() * 4 / median_seconds(rounds, [block.sum], None)[0])


def median_seconds(rounds: int, functions: list[Callable[[], Any]], has_peer: Any) -> list[float]:
    """Return the median seconds of each function, run in turn; without a peer only the first runs."""
    functions = functions if has_peer else functions[:1]
    seconds: list[list[float]] = [[] for _ in functions]
    if rounds > 1:
        for function in functions:
            function()  # warm-up
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[i].append(time.perf_counter() - start)
    return [statistics.median(s) for s in seconds]


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory; on Linux without what its parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def as_line(figure: Figure) -> str:
    ratio = f"{figure.ours / figure.peer:.2f}x" if figure.peer else ""
    share = f"{100 * figure.ours / figure.ceiling:.0f}%" if figure.ceiling else ""
    peer = f"{figure.peer:.4g}" if figure.peer else ""
    return f"{figure.case:30}{figure.unit:>10}{figure.ours:>10.4g}{peer:>10}{ratio:>8}{share:>12}"
