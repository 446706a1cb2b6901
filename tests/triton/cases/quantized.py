"""Products with weights of 8 and 4 bits at M1's size, and at an odd one in every dtype."""

import torch

from minimax_m1.kernels.linear import linear
from minimax_m1.kernels.quantized import GPU_TILE, QuantizedWeight


def product(rows: int, size_out: int, size_in: int, group_size: int | None, dtype=torch.bfloat16) -> None:
    weight = QuantizedWeight.empty(size_out, size_in, group_size=group_size, device="meta").in_tiles(GPU_TILE)
    linear(torch.empty(rows, size_in, dtype=dtype, device="meta"), weight, "triton")


def case_int8_decode() -> None:
    product(1, 24576, 6144, None)
    product(8, 6144, 8192, None)  # programs share the columns


def case_int4_decode() -> None:
    product(64, 24576, 6144, 32)


def case_some_rows() -> None:
    product(256, 24576, 6144, 32)


def case_many_rows() -> None:
    product(4096, 24576, 6144, None)
    product(4096, 24576, 6144, 128)


def case_odd_sizes() -> None:
    product(3, 75, 45, None, torch.float16)
    product(3, 75, 45, 32, torch.float32)
