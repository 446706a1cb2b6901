"""The head of a model in training, with M1's vocabulary: no value is asked for between the first chunk and the last."""

import torch

from minimax_m1.kernels.cross_entropy import linear_cross_entropy, linear_logprobs
from minimax_m1.kernels.linear import float32_linear

TOKENS, HIDDEN, VOCABULARY = 5000, 6144, 200_064


def inputs(rows, dtype=torch.bfloat16):
    hidden = torch.empty(TOKENS, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(rows, HIDDEN, dtype=torch.float32, device="meta", requires_grad=True)
    return hidden, weight, torch.empty(TOKENS, dtype=torch.int64, device="meta")


def case_cross_entropy():
    linear_cross_entropy(*inputs(VOCABULARY), z_loss=1e-4, backend="triton")[0].backward()


def case_logprobs():
    linear_logprobs(*inputs(VOCABULARY), backend="triton")[0].sum().backward()


def case_float32():
    linear_cross_entropy(*inputs(VOCABULARY, torch.float32), backend="triton")[0].backward()


def case_router():
    """Launches nothing of ours; `torch.mm` with an `out_dtype` has no gradient of its own."""
    hidden, weight, _ = inputs(32)
    float32_linear(hidden, weight, "triton").sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
