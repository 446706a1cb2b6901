"""The experts of a mixture: each token through its own top-k, chosen by a router; none dropped, no padding.

Shapes: T tokens, D hidden, E experts, I an expert's width, K experts a token; S = T K rows after each token is repeated
for each of its experts and the rows are sorted by expert.

    y = sum_k weight_k · w2_e(silu(w1_e x) * w3_e x),   e = expert_ids[:, k]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_m1.kernels import choose, compiled
from minimax_m1.kernels.experts_torch import expert_mlp_torch
from minimax_m1.kernels.linear import MIN_ROWS, refuse_gradient, row_kernel_rows
from minimax_m1.kernels.quantized import QuantizedWeight


def route(logits: Tensor, top_k: int, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts; differentiable but for the choice.

    Args:
        logits: [T, E] float32 (or float64), of the router.
        top_k: K.
        backend: one of `kernels.BACKENDS`, or None for the fastest.

    Returns:
        probabilities [T, E], the ids of the K most probable experts [T, K] int64, their probabilities divided by their
        sum [T, K].
    """
    if choose(backend, logits) == "compiled" and compiled.fits(logits):
        return compiled.route(logits, top_k)
    if choose(backend, logits) == "triton":
        from minimax_m1.kernels.experts_backward_triton import Route
        from minimax_m1.kernels.experts_triton import route_triton

        return (Route.apply if _needs_gradient(logits) else route_triton)(logits, top_k)
    probs = torch.softmax(logits, -1)
    weights, expert_ids = torch.topk(probs, top_k)
    return probs, expert_ids, weights / weights.sum(-1, keepdim=True)


def expert_mlp(
    x: Tensor,
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    expert_ids: Tensor,
    expert_weights: Tensor,
    *,
    backend: str | None = None,
    num_decodes: int | None = None,
) -> Tensor:
    """Run every token through its experts and add up the results; differentiable in all but `expert_ids`.

    Args:
        x: [T, D].
        w13: [E, 2 I, D], gate rows (w1) above up rows (w3). w2: [E, D, I]. Cast to the dtype of x where they differ.
            Quantized: both alike, w13 as [E, 2, I, D] with gate and up apart; then nothing here is differentiable.
        expert_ids: [T, K] int64.
        expert_weights: [T, K], what each expert's result counts; in inference, 0 leaves the expert out.
        backend: one of `kernels.BACKENDS`, or None for the fastest.
        num_decodes: as in `linear.linear`.

    Returns:
        [T, D] in the dtype of x.

    Raises:
        UserError: a gradient through quantized weights is asked for.
    """
    if choose(backend, x) == "triton":
        return _expert_mlp_triton(x, w13, w2, expert_ids, expert_weights)
    if isinstance(w13, QuantizedWeight) or isinstance(w2, QuantizedWeight):
        assert isinstance(w13, QuantizedWeight) and isinstance(w2, QuantizedWeight)
        refuse_gradient(x, expert_weights)
        if choose(backend, x) == "compiled" and compiled.fits_quantized(x):
            return compiled.quantized_experts(x, w13, w2, expert_ids, expert_weights)
        if choose(backend, x) != "reference":
            min_rows = MIN_ROWS if num_decodes is not None else 1
            return expert_mlp_torch(x, w13, w2, expert_ids, expert_weights, min_rows)
        w13, w2 = (torch.stack([w[e].dequantize(x.dtype) for e in range(w.shape[0])]) for w in (w13, w2))
    if choose(backend, x) == "reference":
        return expert_mlp_reference(x, w13, w2, expert_ids, expert_weights)
    rows = row_kernel_rows(x, backend, num_decodes, w13, w2, expert_weights)
    min_rows = MIN_ROWS if num_decodes is not None else 1
    if rows and rows == x.shape[0]:
        return compiled.experts(x, w13, w2, expert_ids, expert_weights)
    if rows == 0:
        return expert_mlp_torch(x, w13, w2, expert_ids, expert_weights, min_rows)
    decoded = compiled.experts(x[:rows], w13, w2, expert_ids[:rows], expert_weights[:rows])
    return torch.cat((decoded, expert_mlp_torch(x[rows:], w13, w2, expert_ids[rows:], expert_weights[rows:], min_rows)))


def _expert_mlp_triton(
    x: Tensor, w13: Tensor | QuantizedWeight, w2: Tensor | QuantizedWeight, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    from minimax_m1.kernels.experts_backward_triton import ExpertMLP
    from minimax_m1.kernels.experts_triton import expert_mlp_triton

    if isinstance(w13, QuantizedWeight):
        refuse_gradient(x, expert_weights)
    run = ExpertMLP.apply if _needs_gradient(x, w13, w2, expert_weights) else expert_mlp_triton
    return run(x, w13, w2, expert_ids, expert_weights)


def _needs_gradient(*inputs: Tensor | QuantizedWeight) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return [E] int64: how many of the ids fall on each expert. For bincount, the host would wait on a GPU."""
    return (expert_ids.flatten()[:, None] == torch.arange(num_experts, device=expert_ids.device)).sum(0)


def expert_mlp_reference(x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Run all experts on all tokens and mask what was not chosen; the oracle of every other backend."""
    y = torch.zeros_like(x)
    for e in range(w13.shape[0]):
        gate, up = F.linear(x, w13[e].to(x.dtype)).chunk(2, -1)
        weight = torch.where(expert_ids == e, expert_weights, 0.0).sum(-1, keepdim=True)
        y = y + F.linear(F.silu(gate) * up, w2[e].to(x.dtype)) * weight.to(x.dtype)
    return y
