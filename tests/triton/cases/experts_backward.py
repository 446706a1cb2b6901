"""Training of the experts at M1's size, at sizes that no tile divides, and in float32."""

import torch

from minimax_m1.kernels.experts_backward_triton import ExpertMLP, Route


def train(tokens, hidden, width, num_experts, top_k, dtype=torch.bfloat16):
    def leaf(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)

    logits = leaf(tokens, num_experts, dtype=torch.float32)
    probs, expert_ids, expert_weights = Route.apply(logits, top_k)
    x, w13, w2 = leaf(tokens, hidden), leaf(num_experts, 2 * width, hidden), leaf(num_experts, hidden, width)
    y = ExpertMLP.apply(x, w13, w2, expert_ids, expert_weights)
    (y.sum() + probs.mean(0).sum()).backward()


def case_m1():
    train(32768, 6144, 9216, 32, 2)


def case_no_tile_divides():
    train(32768, 1008, 368, 32, 2)


def case_float32():
    train(32768, 1024, 1024, 32, 2, torch.float32)
