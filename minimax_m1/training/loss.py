"""The loss: cross-entropy in float32 over the tokens that are learned, and the routers' balance.

Shapes: T packed tokens, n of them learned, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minimax_m1.kernels.experts import count_choices
from minimax_m1.model import MiniMaxM1ForCausalLM, Routing, load_balancing_loss
from minimax_m1.training.data import PackedBatch
from minimax_m1.training.parallel import World, context_balance_loss


class PackedLosses(NamedTuple):
    """What one micro-batch gives; under context parallelism, what this rank's part of it gives."""

    loss: Tensor  # summed over the learned tokens: cross-entropy + z_loss · squares; differentiable
    cross_entropy: Tensor  # the first part alone, for reports
    squares: Tensor  # of the log of the softmax's normaliser, summed
    hits: Tensor  # learned tokens that were the most probable one
    balance: Tensor  # `model.load_balancing_loss` of the whole micro-batch; differentiable
    expert_counts: Tensor  # [L, E] int64: how many choices fell on each expert


def packed_losses(
    model: MiniMaxM1ForCausalLM, batch: PackedBatch, z_loss: float = 0.0, world: World | None = None
) -> PackedLosses:
    """Run the model on a packed batch; logits are made only for the tokens that are learned, a chunk at a time."""
    hidden, routings = model.forward_packed(batch.input_ids, batch.layout)
    hidden, targets = hidden.index_select(0, batch.learned), batch.targets[batch.learned]
    loss, cross_entropy, squares, hits = model.lm_head.token_losses(hidden, targets, z_loss, batch.layout.backend)
    if world is not None and world.num_context_ranks > 1:
        balance = context_balance_loss(routings, world.context_group)
    else:
        balance = load_balancing_loss(routings)
    return PackedLosses(loss, cross_entropy, squares, hits, balance, expert_counts(routings))


def expert_counts(routings: list[Routing]) -> Tensor:
    """Return [L, E]: how many of the tokens' choices fell on each expert of each layer."""
    num_experts = routings[0].probs.shape[-1]
    return torch.stack([count_choices(r.expert_ids, num_experts) for r in routings])
