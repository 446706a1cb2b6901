"""The experts as one matrix product an expert over sorted rows, with an analytic backward.

Shapes: as in `experts`. Why not `grouped_mm`: on a CPU it is the same loop inside, and its backward refuses
gradients of stride 0. Why not autograd over `w13[e]`: every index makes a full-size zero gradient (4.5 times slower at
16 experts). Here each expert's gradient is written straight into its place, and only the pre-activations are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_m1.kernels.linear import matmul
from minimax_m1.kernels.quantized import QuantizedWeight


def expert_mlp_torch(
    x: Tensor,
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    expert_ids: Tensor,
    expert_weights: Tensor,
    min_rows: int = 1,
) -> Tensor:
    """Run the experts over sorted rows; arguments and results as `experts.expert_mlp`, `min_rows` as in `matmul`."""
    num_experts = w13.shape[0]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w13, w2, expert_weights))
    ids = expert_ids.flatten()
    if not training:  # what has no weight goes to an expert that does not exist, behind all others
        ids = ids.masked_fill(expert_weights.flatten() == 0, num_experts)
    order = torch.argsort(ids, stable=True)  # sorted row -> (token, k), flattened
    counts = torch.bincount(ids, minlength=num_experts)[:num_experts].tolist()
    if training:
        return _ExpertMLP.apply(x, w13, w2, expert_weights, order, counts)
    return _run(x, w13, w2, expert_weights, order, counts, keep=False, min_rows=min_rows)[0]


def _run(
    x: Tensor,
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    expert_weights: Tensor,
    order: Tensor,
    counts: list[int],
    keep: bool,
    min_rows: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Return y [T, D] and, with `keep`, the pre-activations [S, 2 I] in sorted order."""
    top_k = expert_weights.shape[1]
    rows = x.index_select(0, order // top_k)
    y = torch.empty_like(rows)
    kept = rows.new_empty(rows.shape[0], w13.shape[1]) if keep else None
    start = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        part = slice(start, start + count)
        h = matmul(rows[part], w13[e], min_rows=min_rows)
        if kept is not None:
            kept[part] = h
        gate, up = h.chunk(2, -1)
        y[part] = matmul(F.silu(gate).mul_(up), w2[e], min_rows=min_rows)
        start += count
    y[start:] = 0
    return _add_up(y, order, expert_weights.to(x.dtype)), kept


def _add_up(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Return [T, D]: the K sorted rows of each token, weighted, summed in the order of k."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    top_k = weights.shape[1]
    out = y.index_select(0, place[0::top_k]).mul_(weights[:, 0, None])
    for k in range(1, top_k):
        out.addcmul_(y.index_select(0, place[k::top_k]), weights[:, k, None])
    return out


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, expert_weights: Tensor, order: Tensor, counts: list[int]
    ) -> Tensor:
        y, h = _run(x, w13, w2, expert_weights, order, counts, keep=True)
        ctx.save_for_backward(x, w13, w2, expert_weights, order, h)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, expert_weights, order, h = ctx.saved_tensors
        tokens = order // expert_weights.shape[1]
        rows, grad_rows = x.index_select(0, tokens), grad_y.index_select(0, tokens)
        weight = expert_weights.flatten()[order].to(x.dtype)[:, None]
        # Frozen experts (LoRA elsewhere, a part that is not trained) are spared half of the products.
        grad_w13 = torch.empty_like(w13, dtype=x.dtype) if ctx.needs_input_grad[1] else None
        grad_w2 = torch.empty_like(w2, dtype=x.dtype) if ctx.needs_input_grad[2] else None
        grad_weight = torch.zeros_like(weight)
        start = 0
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for grad in (grad_w13, grad_w2):
                    if grad is not None:
                        grad[e].zero_()
                continue
            part = slice(start, start + count)
            gate, up = h[part].chunk(2, -1)
            sigmoid = torch.sigmoid(gate)
            act = gate * sigmoid
            a = act * up
            grad_a = grad_rows[part] @ w2[e].to(x.dtype)
            grad_weight[part] = (grad_a * a).sum(-1, keepdim=True)
            if grad_w2 is not None:
                torch.mm(grad_rows[part].T, a.mul_(weight[part]), out=grad_w2[e])
            grad_a.mul_(weight[part])
            grad_h = torch.empty_like(h[part])
            torch.mul(grad_a, act, out=grad_h[:, act.shape[1] :])
            # silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g))) = sigmoid + act (1 - sigmoid)
            torch.addcmul(sigmoid, act, 1 - sigmoid, out=act)
            torch.mul(grad_a.mul_(up), act, out=grad_h[:, : act.shape[1]])
            if grad_w13 is not None:
                torch.mm(grad_h.T, rows[part], out=grad_w13[e])
            torch.mm(grad_h, w13[e].to(x.dtype), out=grad_rows[part])  # from here on: the gradient of rows
            start += count
        grad_x = _add_up(grad_rows, order, torch.ones_like(expert_weights, dtype=x.dtype))
        grad_weights = torch.empty_like(weight[:, 0])
        grad_weights[order] = grad_weight[:, 0]
        grad_weights = grad_weights.view_as(expert_weights).to(expert_weights.dtype)
        grads_w = (None if g is None else g.to(w.dtype) for g, w in ((grad_w13, w13), (grad_w2, w2)))
        return grad_x, *grads_w, grad_weights, None, None
