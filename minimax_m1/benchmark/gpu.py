"""What is measured on a GPU: kernels and layers of the full-size model, and training a model that fits one GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from minimax_m1.benchmark import gpu_kernels, gpu_layers, gpu_training
from minimax_m1.benchmark.gpu_measure import measure
from minimax_m1.benchmark.measure import Figure, Machine
from minimax_m1.config import MiniMaxM1Config

LAYER_CASES = ("layer-decode", "layer-prefill-1m")
TRAINING_CASE = "train-gpu"
CASES = (*gpu_kernels.CASES, *LAYER_CASES, TRAINING_CASE)


def run(device: torch.device, machine: Machine, cases: Collection[str], *, with_peer: bool) -> Iterator[Figure]:
    """Yield the figures of the cases; one after the other has the GPU's memory."""
    config = MiniMaxM1Config.preset("minimax-m1")
    for name, kernels in gpu_kernels.CASES.items():
        if name in cases:
            for case in kernels(config, device):
                yield measure(case, machine, device)
            torch.cuda.empty_cache()
    if "layer-decode" in cases:
        yield from gpu_layers.decoding(config, device, machine)
    if "layer-prefill-1m" in cases:
        yield from gpu_layers.long_prefill(config, device, machine)
    torch.cuda.empty_cache()
    if TRAINING_CASE in cases:
        yield from gpu_training.training(device, machine, with_peer=with_peer)
