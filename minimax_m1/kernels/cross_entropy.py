"""The head's matrix product and the cross-entropy in one, chunk by chunk: logits of all tokens never exist together.

Shapes: n tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20  # of logits that exist at a time
MIN_CHUNK = 128  # tokens; below, the products are slow


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the cross-entropy of softmax(hidden weight^T) over tokens, in float32 (float64 for float64).

    The gradients are made in the forward pass, chunk by chunk, while the chunk's logits are there: three products as
    in a plain backward, and memory for one chunk.

    Args:
        hidden: [n, D], any float dtype; n may be 0.
        weight: [V, D].
        targets: [n] int64, ids below V.
        z_loss: coefficient of the squared log of the softmax's normaliser.
        chunk: tokens at a time; None: what CHUNK_BYTES hold.

    Returns:
        the loss: cross-entropy + z_loss · squares, summed, differentiable in hidden and weight; the summed
        cross-entropy and the summed squares, for reports; how many targets were the most probable token.

    Source: the z-loss is PaLM's (arXiv 2204.02311).
    """
    chunk = chunk or max(MIN_CHUNK, CHUNK_BYTES // (4 * weight.shape[0]))
    loss, cross_entropy, squares, hits = _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, chunk)
    return loss, cross_entropy, squares, hits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(3, dtype=dtype, device=hidden.device)  # cross-entropy, squares, hits
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x, wanted = hidden[rows].to(dtype), targets[rows, None]
            logits = x @ wide.T
            picked, highest = logits.gather(1, wanted), logits.amax(1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)
            log_total = total.log() + highest
            hits = (picked >= highest).sum()
            losses = total.log() - (picked - highest)  # the large terms cancel first
            sums += torch.stack([losses.sum(), log_total.square().sum(), hits.to(dtype)])
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.mul_((1 + 2 * z_loss * log_total) / total)
            grad.scatter_add_(1, wanted, torch.full_like(picked, -1.0))
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ wide
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, x)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        cross_entropy, squares, correct = sums.unbind()
        results = cross_entropy + z_loss * squares, cross_entropy.clone(), squares.clone(), correct.clone()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None
