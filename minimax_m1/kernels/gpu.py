"""What a launch of a Triton kernel asks of the GPU."""

from __future__ import annotations

from functools import cache

import torch

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
