"""The experts at full size: prefill of 8,192 tokens, decoding of 64 and of 1; weights of 16, 8 and 4 bits; odd rows."""

import torch

from minimax_m1.kernels import experts_triton
from minimax_m1.kernels.quantized import GPU_TILE, QuantizedWeight

HIDDEN, WIDTH, EXPERTS, TOP_K = 6144, 9216, 32, 2


def run(tokens, w13, w2, dtype=torch.bfloat16):
    logits = torch.empty(tokens, EXPERTS, device="meta")
    x = torch.empty(tokens, w2.shape[1], dtype=dtype, device="meta")
    _, ids, expert_weights = experts_triton.route_triton(logits, TOP_K)
    experts_triton.expert_mlp_triton(x, w13, w2, ids, expert_weights)


def floats(hidden=HIDDEN, width=WIDTH):
    w13 = torch.empty(EXPERTS, 2 * width, hidden, dtype=torch.bfloat16, device="meta")
    return w13, torch.empty(EXPERTS, hidden, width, dtype=torch.bfloat16, device="meta")


def quantized(group_size):
    shapes = (EXPERTS, 2, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    return [QuantizedWeight.empty(*shape, group_size=group_size, device="meta").in_tiles(GPU_TILE) for shape in shapes]


def case_prefill():
    run(8192, *floats())


def case_decode_64():
    run(64, *floats())


def case_decode_1():
    run(1, *floats())


def case_rows_of_lengths_that_8_does_not_divide():
    run(8192, *floats(36, 22))


def case_int8_decode_64():
    run(64, *quantized(None))


def case_int4_prefill():
    run(8192, *quantized(128))


def case_int4_decode_64():
    run(64, *quantized(128))
