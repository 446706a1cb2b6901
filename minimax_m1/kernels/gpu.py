"""What a launch of a Triton kernel asks of the GPU, and copies to it that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

H200_MULTIPROCESSORS = 132
H200_SHARED_MEMORY = 228 << 10


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs of a full size run at the same time; an H200's where there is no GPU."""
    if device.type != "cuda":
        return H200_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of a multiprocessor, of which a program may have all but 1 KiB; an H200's where there is no GPU.

    164 KiB on an A100, 100 KiB on a GeForce or an L40.
    """
    if device.type != "cuda":
        return H200_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def to_device(x: Tensor | NDArray[Any], device: torch.device | str) -> Tensor:
    """Return what the host has on a device; the host does not wait for a GPU, which gets it in its turn."""
    x = torch.as_tensor(x)
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)  # pinned memory is not reused before it was read
    return x.to(device)


def together_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Do what `to_device` does, for vectors [n] int64 of the host, in a single copy."""
    widths = [len(x) + len(x) % 2 for x in tensors]  # each at 16 bytes: Triton compiles anew for other addresses
    joined = torch.empty(sum(widths), dtype=torch.int64, pin_memory=device.type == "cuda")
    for place, x in zip(joined.split(widths), tensors, strict=True):
        place[: len(x)] = x
    moved = joined.to(device, non_blocking=True).split(widths)
    return [place[: len(x)] for place, x in zip(moved, tensors, strict=True)]
