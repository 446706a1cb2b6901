"""What is measured on a GPU: kernels and layers of the full-size model, and training a model that fits one GPU."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator

import torch

from minimax_m1.benchmark import gpu_kernels, gpu_layers, gpu_training
from minimax_m1.benchmark.gpu_measure import Case, measure
from minimax_m1.benchmark.measure import Figure, Machine
from minimax_m1.config import MiniMaxM1Config

LAYER_CASES = ("layer-decode", "layer-prefill-1m")
TRAINING_CASE = "train-gpu"
CASES = (*gpu_kernels.CASES, *LAYER_CASES, TRAINING_CASE)


def run(device: torch.device, machine: Machine, cases: Collection[str], *, with_peer: bool) -> Iterator[Figure]:
    """Yield the figures of the cases; one after the other has the GPU's memory. What fails is told on stderr."""
    for name in CASES:
        if name in cases:
            try:
                yield from _figures(name, device, machine, with_peer=with_peer)
            except Exception as error:  # noqa: BLE001 -- compiler, driver, memory: the other cases' figures stand
                _tell(name, error)
            torch.cuda.empty_cache()


def _figures(name: str, device: torch.device, machine: Machine, *, with_peer: bool) -> Iterator[Figure]:
    config = MiniMaxM1Config.preset("minimax-m1")
    if name in gpu_kernels.CASES:
        for case in gpu_kernels.CASES[name](config, device):
            yield from _measured(case, machine, device)
    elif name == "layer-decode":
        yield from gpu_layers.decoding(config, device, machine)
    elif name == "layer-prefill-1m":
        yield from gpu_layers.long_prefill(config, device, machine)
    else:
        yield from gpu_training.training(device, machine, with_peer=with_peer)


def _measured(case: Case, machine: Machine, device: torch.device) -> Iterator[Figure]:
    """Measure a case; where that fails with its rival, without it."""
    for tried in [case, case._replace(rival=None)] if case.rival else [case]:
        try:
            yield measure(tried, machine, device)
            return
        except Exception as error:  # noqa: BLE001 -- as above
            _tell(f"{case.name}{', with its rival' if tried.rival else ''}", error)


def _tell(what: str, error: Exception) -> None:
    lines = str(error).splitlines()
    print(f"{what}: {type(error).__name__}: {lines[0] if lines else ''}", file=sys.stderr, flush=True)
