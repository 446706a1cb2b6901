"""What a launch of a Triton kernel asks of the GPU."""

from __future__ import annotations

from functools import cache

import torch

H200_MULTIPROCESSORS = 132


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs of a full size run at the same time; an H200's where there is no GPU."""
    if device.type != "cuda":
        return H200_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
