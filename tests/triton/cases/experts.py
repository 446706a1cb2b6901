"""The experts at full size: prefill of 8,192 tokens, decoding of 64 and of 1."""

import torch

from minimax_m1.kernels import experts_triton

HIDDEN, WIDTH, EXPERTS, TOP_K = 6144, 9216, 32, 2


def weights(dtype=torch.bfloat16):
    w13 = torch.empty(EXPERTS, 2 * WIDTH, HIDDEN, dtype=dtype, device="meta")
    return w13, torch.empty(EXPERTS, HIDDEN, WIDTH, dtype=dtype, device="meta")


def run(tokens, w13, w2, dtype=torch.bfloat16):
    logits = torch.empty(tokens, EXPERTS, device="meta")
    x = torch.empty(tokens, HIDDEN, dtype=dtype, device="meta")
    _, ids, expert_weights = experts_triton.route_triton(logits, TOP_K)
    experts_triton.expert_mlp_triton(x, w13, w2, ids, expert_weights)


def case_prefill():
    run(8192, *weights())


def case_decode_64():
    run(64, *weights())
