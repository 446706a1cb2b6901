"""Expert parallelism: rows travel to the rank that holds their expert, and back.

Shapes: as in `experts`; R ranks hold E / R experts each, in order. Every rank sends S = T K rows, sorted by expert and
so by rank, and receives those of its experts, from rank 0 first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_m1.kernels.experts import count_choices, expert_mlp, expert_mlp_reference


def expert_mlp_exchanged(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    group: dist.ProcessGroup,
    backend: str | None = None,
) -> Tensor:
    """Run every token through its experts, which lie on several ranks; as `experts.expert_mlp`, each rank's own tokens.

    Every rank of the group must call it, and its backward, equally often. The host waits for the counts alone.

    Args:
        x, expert_ids, expert_weights: of this rank's tokens; `expert_ids` count all E experts.
        w13, w2: of this rank's E / R experts.
        group: the R ranks.
    """
    num_ranks, num_local = dist.get_world_size(group), w13.shape[0]
    num_tokens, top_k = expert_ids.shape
    order = torch.argsort(expert_ids.flatten(), stable=True)  # sorted row -> (token, k), flattened
    counts = count_choices(expert_ids, num_ranks * num_local)
    received = torch.empty_like(counts)  # [R E / R]: from each rank, rows for each of our experts
    dist.all_to_all_single(received, counts, group=group)
    both = torch.stack((counts, received)).view(2, num_ranks, num_local).sum(2)
    sent_rows, received_rows = both.tolist()

    rows = _Exchange.apply(x.index_select(0, order // top_k), received_rows, sent_rows, group)
    own_ids = torch.arange(num_local, device=x.device).repeat(num_ranks)
    own_ids = own_ids.repeat_interleave(received, output_size=rows.shape[0])[:, None]
    ones = torch.ones_like(own_ids, dtype=expert_weights.dtype)
    if rows.shape[0]:
        y = expert_mlp(rows, w13, w2, own_ids, ones, backend=backend)
    else:  # gradients are zeros then, not missing: the exchange needs them on every rank
        y = expert_mlp_reference(rows, w13, w2, own_ids, ones)
    y = _Exchange.apply(y, sent_rows, received_rows, group)

    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=x.device)
    y = y.index_select(0, place).view(num_tokens, top_k, x.shape[1])
    return (y * expert_weights.to(x.dtype)[..., None]).sum(1)


class _Exchange(torch.autograd.Function):
    """Send rows [S, D], the first of them to rank 0; return those received. Gradients travel the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _exchange(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), x.shape[1])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
