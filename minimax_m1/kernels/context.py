"""Context parallelism: a micro-batch whose rows are divided over ranks, for both kinds of attention.

Shapes: T rows of all ranks, n of them this rank's, from row `start` on; R ranks; H query heads, G key/value heads, D
head_dim. A segment is what this rank has of one sequence; only its first one can have a past on earlier ranks, and only
its last one a rest on later ranks.

Lightning layers exchange one state a rank. With S_j what rank j's last segment adds from zero, b_j where rank j ends,
w = exp(-slope), and ranks j those on which the sequence of this rank's first segment lies before `start`:

    S = sum_j w^(start - b_j) S_j,   o_p = o_p(from zero) + w^(p + 1) q_p S   for rows p = 0, 1, … of the first segment

Source: LASP-2 (arXiv 2502.07563). Softmax layers gather all keys and values; rows of later ranks have more of them to
look at, so ranks are not equally busy there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minimax_m1.kernels import choose
from minimax_m1.kernels.attention import attend_reference
from minimax_m1.kernels.attention_torch import attend_torch
from minimax_m1.kernels.lightning import lightning_attention


@dataclass(frozen=True)
class ContextPart:
    """Which rows of a micro-batch are this rank's, and where its sequences lie."""

    group: dist.ProcessGroup  # the R ranks
    rank: int  # of this process in the group
    starts: list[int]  # [R + 1]: rank j has rows starts[j]:starts[j + 1]
    bounds: list[int]  # [N + 1]: cu_seqlens of the whole micro-batch

    @property
    def start(self) -> int:
        """The first row of this rank."""
        return self.starts[self.rank]

    @property
    def end(self) -> int:
        """The row behind the last of this rank."""
        return self.starts[self.rank + 1]

    @cached_property
    def seqlens(self) -> list[int]:
        """Rows of each segment."""
        lengths = [min(b, self.end) - max(a, self.start) for a, b in pairwise(self.bounds)]
        return [length for length in lengths if length > 0]

    @cached_property
    def past_lens(self) -> list[int]:
        """Rows of each segment's sequence that lie on earlier ranks; 0 but for the first."""
        spans = [(a, b) for a, b in pairwise(self.bounds) if min(b, self.end) > max(a, self.start)]
        return [max(0, self.start - a) for a, _ in spans]

    def earlier_ends(self) -> list[int | None]:
        """Return for each rank where it ends, if it holds rows of this rank's first sequence before `start`."""
        past = self.past_lens[0] if self.past_lens else 0
        return [
            b if past and j < self.rank and b > max(a, self.start - past) else None
            for j, (a, b) in enumerate(pairwise(self.starts))
        ]


def lightning_attention_divided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    *,
    cu_seqlens: Tensor,
    context: ContextPart,
    backend: str | None = None,
) -> Tensor:
    """Run `lightning.lightning_attention` on this rank's rows of a micro-batch; differentiable in q, k and v.

    Every rank of the group must call it, and its backward, equally often.

    Args:
        q, k, v: [n, H, D].
        slope: [H] float32.
        cu_seqlens: of this rank's segments.

    Returns:
        o [n, H, D] in the dtype of v.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if context.seqlens:
        o, finals = lightning_attention(q, k, v, slope, cu_seqlens=cu_seqlens, backend=backend)
        last = finals[-1]
    else:  # no rows: still a part of the exchange, in both directions
        o, last = v, torch.einsum("nhd,nhe->hde", k.to(dtype), v.to(dtype))
    states = gather_rows(last[None], [1] * len(context.starts[1:]), context.group)

    slope, ends = slope.to(dtype), context.earlier_ends()
    distance = torch.tensor([0 if b is None else context.start - b for b in ends], dtype=dtype).to(q.device)
    is_earlier = torch.tensor([b is not None for b in ends]).to(q.device)
    weights = torch.exp(-slope * distance[:, None]) * is_earlier[:, None]  # [R, H]
    state = torch.einsum("rh,rhde->hde", weights, states)
    rows = context.seqlens[0] if any(context.past_lens) else 0  # with 0 rows the graph is the same on every rank
    decay = torch.exp(-slope * torch.arange(1, rows + 1, device=q.device, dtype=dtype)[:, None])[..., None]
    o_past = torch.einsum("nhd,hde->nhe", q[:rows].to(dtype) * decay, state)
    return torch.cat(((o[:rows] + o_past).to(v.dtype), o[rows:]))


def softmax_attention_divided(
    q: Tensor, k: Tensor, v: Tensor, *, context: ContextPart, window: int | None = None, backend: str | None = None
) -> Tensor:
    """Run `attention.softmax_attention` on this rank's rows of a micro-batch; differentiable in q, k and v.

    Every rank of the group must call it, and its backward, equally often.

    Args:
        q: [n, H, D], k, v: [n, G, D], rotated already.
        window, backend: as in `attention.softmax_attention`.

    Returns:
        [n, H, D] in the dtype of q.
    """
    sizes = [b - a for a, b in pairwise(context.starts)]
    keys_values = gather_rows(torch.stack((k, v), 1), sizes, context.group)  # [T, 2, G, D]
    if not context.seqlens:
        return q + keys_values[:0].sum()  # no rows: still a part of the exchange, in both directions
    attend = attend_reference if choose(backend, q) == "reference" else _attend
    lengths = [n + past for n, past in zip(context.seqlens, context.past_lens, strict=True)]
    # split, not slices: the gradient of a slice is as large as the whole
    _, *parts, _ = keys_values.split([context.end - sum(lengths), *lengths, context.starts[-1] - context.end])
    outputs = []
    for rows, part in zip(q.split(context.seqlens), parts, strict=True):
        keys, values = part.permute(1, 2, 0, 3)
        outputs.append(attend(rows, keys, values, window))
    return torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """As `attention_torch.attend_torch`, differentiable behind a past as well."""
    has_past = 1 < q.shape[0] < k.shape[1] and (window is None or window >= k.shape[1])
    if has_past and q.is_cpu and q.dtype != torch.float64:
        return _AttendBehindPast.apply(q, k, v)
    if has_past:
        return _attend_lower_right(q, k, v)
    return attend_torch(q, k, v, window)


def _attend_lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """n query tokens behind L - n earlier ones: PyTorch's flash kernel for GPUs knows this mask, which is never made.

    Where that kernel does not fit (float32, float64), PyTorch makes the mask, [n, L] bool.
    """
    from torch.nn.attention.bias import causal_lower_right

    mask = causal_lower_right(q.shape[0], k.shape[1])
    o = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], mask, enable_gqa=True)
    return o[0].transpose(0, 1)


class _AttendBehindPast(torch.autograd.Function):
    """n query tokens [n, H, D] behind L - n earlier ones, keys and values [G, L, D], by PyTorch's fused CPU kernels.

    Forward: over the past and over the chunk itself, joined by their log-sum-exps. Backward: the fused kernels make the
    probabilities again from a log-sum-exp and the output; given the joined ones, each gives its part of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = k.shape[1] - q.shape[0]
        q = q.transpose(0, 1)[None]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        o_past, lse_past = fused(q, k[None, :, :past], v[None, :, :past])
        o_self, lse_self = fused(q, k[None, :, past:], v[None, :, past:], 0.0, True)
        o = torch.lerp(o_self, o_past, torch.sigmoid(lse_past - lse_self)[..., None].to(q.dtype))
        ctx.save_for_backward(q, k, v, o, torch.logaddexp(lse_past, lse_self))
        return o[0].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, lse = ctx.saved_tensors
        past = k.shape[1] - q.shape[2]
        grad_o = grad_o.transpose(0, 1)[None]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads_past = fused(grad_o, q, k[None, :, :past], v[None, :, :past], o, lse, 0.0, False)
        grads_self = fused(grad_o, q, k[None, :, past:], v[None, :, past:], o, lse, 0.0, True)
        grad_q = (grads_past[0] + grads_self[0])[0].transpose(0, 1)
        grad_k, grad_v = (torch.cat(both, 2)[0] for both in zip(grads_past[1:], grads_self[1:], strict=True))
        return grad_q, grad_k, grad_v


def gather_rows(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows of all ranks [sum(sizes), …] end to end, of x [sizes[rank], …] on each; differentiable."""
    return _GatherRows.apply(x, sizes, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        padded = x.contiguous()
        if min(sizes) < max(sizes):
            padded = x.new_zeros(max(sizes), *x.shape[1:])
            padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Each rank gets what all ranks have for its rows, and adds it up in the order of ranks."""
        own = ctx.sizes[dist.get_rank(ctx.group)]
        parts = grad.new_empty(len(ctx.sizes), own, *grad.shape[1:])
        dist.all_to_all_single(
            parts.flatten(0, 1), grad.contiguous(), [own] * len(ctx.sizes), ctx.sizes, group=ctx.group
        )
        return parts.sum(0), None, None
