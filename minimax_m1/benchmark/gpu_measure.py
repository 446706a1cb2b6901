"""A clock for a GPU, and the GPU's own ceilings, measured here.

A ceiling is the larger of two times: the bytes that must move at least once over the measured copy bandwidth, and the
arithmetic over the measured bfloat16 matrix product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from minimax_m1.benchmark.measure import Figure, Machine

FLUSHED_BYTES = 256 << 20  # written between two calls, so that none finds its inputs in the L2 cache
MEASURED_SECONDS = 0.5  # of a function's calls, in all


class Case(NamedTuple):
    """Something to measure; `ours` and `rival` compute the same from the same inputs."""

    name: str
    unit: str
    work: float  # of a call, in units times seconds: tokens for tok/s, gigabytes for GB/s
    flops: float  # of a call
    num_bytes: float  # that a call must move at least
    ours: Callable[[], Any]
    rival: Callable[[], Any] | None = None
    as_graph: bool = False  # captured and replayed, as decoding runs them


def measure_gpu(device: torch.device, size: int = 8192) -> Machine:
    """Measure a bfloat16 matrix product of random numbers, and a copy inside the memory (read and written bytes)."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm_flops = 2 * size**3 / median_seconds([lambda: a @ b], device)[0]
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    return Machine(gemm_flops, 2 * source.nbytes / median_seconds([lambda: target.copy_(source)], device)[0])


def measure(case: Case, machine: Machine, device: torch.device) -> Figure:
    """Run a case and its rival in turn."""
    functions = [case.ours] if case.rival is None else [case.ours, case.rival]
    if case.as_graph and device.type == "cuda":
        functions = [as_graph(function) for function in functions]
    seconds = median_seconds(functions, device)
    least = max(case.flops / machine.gemm_flops, case.num_bytes / machine.read_bytes)
    rival = case.work / seconds[1] if case.rival is not None else None
    return Figure(case.name, case.unit, case.work / seconds[0], rival, case.work / least)


def median_seconds(functions: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """Return the median seconds of each function on the device, called in turn with a cold cache."""
    clock = _event_seconds if device.type == "cuda" else _wall_seconds
    for function in functions:
        function()  # compiles
        function()
    flushed = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    first = [clock(function, flushed) for function in functions]
    rounds = min(200, max(5, round(MEASURED_SECONDS / max(*first, 1e-6))))
    seconds = [[clock(function, flushed) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def as_graph(function: Callable[[], Any]) -> Callable[[], None]:
    """Capture the kernels of a function, which must not wait for the device, and return their replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _event_seconds(function: Callable[[], Any], flushed: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _wall_seconds(function: Callable[[], Any], flushed: torch.Tensor) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
