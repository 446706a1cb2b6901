"""The head's matrix product and what is made of its logits, chunk by chunk: those of all tokens never exist together.

Shapes: n tokens, D hidden, V vocabulary.

`product_dtype` is float32 everywhere but in the experiment that shows what a float32 head is for. bfloat16: hidden,
weight and logits are rounded to it, sums are taken in float32 all the same, as tensor cores do; gradients pass the
rounding as if it were not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_m1.kernels import choose

CHUNK_BYTES = 32 << 20  # of logits that exist at a time
MIN_CHUNK = 128  # tokens; below, the products are slow


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    chunk: int | None = None,
    product_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the cross-entropy of softmax(hidden weight^T) over tokens, in float32 (float64 for float64).

    The gradients are made in the forward pass, chunk by chunk, while the chunk's logits are there: three products as
    in a plain backward, and memory for one chunk.

    Args:
        hidden: [n, D], any float dtype; n may be 0.
        weight: [V, D].
        targets: [n] int64, ids below V.
        z_loss: coefficient of the squared log of the softmax's normaliser.
        chunk: tokens at a time; None: what CHUNK_BYTES hold (those of `cross_entropy_triton` on a GPU).
        product_dtype: see above.
        backend: as everywhere; bfloat16 is multiplied by PyTorch with each of them.

    Returns:
        the loss: cross-entropy + z_loss · squares, summed, differentiable in hidden and weight; the summed
        cross-entropy and the summed squares, for reports; how many targets were the most probable token.

    Source: the z-loss is PaLM's (arXiv 2204.02311).
    """
    if product_dtype == torch.float32 and choose(backend, hidden) == "triton":
        from minimax_m1.kernels.cross_entropy_triton import linear_cross_entropy_triton

        return linear_cross_entropy_triton(hidden, weight, targets, z_loss, chunk)
    options = z_loss, chunk or _tokens_at_a_time(weight), product_dtype
    loss, cross_entropy, squares, hits = _LinearCrossEntropy.apply(hidden, weight, targets, *options)
    return loss, cross_entropy, squares, hits


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    product_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's log-probability under softmax(hidden weight^T) and the entropy of that, [n] float32 each.

    float64 for float64. The backward pass makes a chunk's logits again: what comes back to each token is not known
    before, and memory stays that of one chunk (and of its exponentials).

    Args:
        hidden: [n, D], any float dtype; n may be 0.
        weight: [V, D].
        targets: [n] int64, ids below V.
        chunk: tokens at a time; None: what CHUNK_BYTES hold (those of `cross_entropy_triton` on a GPU).
        product_dtype: see above.
        backend: as everywhere; bfloat16 is multiplied by PyTorch with each of them.

    Returns:
        the log-probabilities, differentiable (once) in hidden and weight, and the entropies in nats, which are not.
    """
    if product_dtype == torch.float32 and choose(backend, hidden) == "triton":
        from minimax_m1.kernels.cross_entropy_triton import linear_logprobs_triton

        return linear_logprobs_triton(hidden, weight, targets, chunk)
    chunk = chunk or _tokens_at_a_time(weight)
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, targets, chunk, product_dtype)
    return logprobs, entropy


def rounded(x: Tensor, product_dtype: torch.dtype) -> Tensor:
    """Round to bfloat16 if that is the product's dtype, keeping the dtype of x; the gradient passes unchanged."""
    return x if product_dtype == torch.float32 else _Rounded.apply(x, product_dtype)


def _tokens_at_a_time(weight: Tensor) -> int:
    return max(MIN_CHUNK, CHUNK_BYTES // (4 * weight.shape[0]))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product_dtype: torch.dtype) -> Tensor:
        return x.to(product_dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk: int,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = rounded(weight.to(dtype), product_dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(3, dtype=dtype, device=hidden.device)  # cross-entropy, squares, hits
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x, wanted = rounded(hidden[rows].to(dtype), product_dtype), targets[rows, None]
            logits = rounded(x @ wide.T, product_dtype)
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
        return grad_hidden, grad_weight, None, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, product_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = rounded(weight.to(dtype), product_dtype)
        logprobs, entropy, highest, total = torch.zeros(4, hidden.shape[0], 1, dtype=dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = rounded(rounded(hidden[rows].to(dtype), product_dtype) @ wide.T, product_dtype)
            picked = logits.gather(1, targets[rows, None])
            highest[rows] = logits.amax(1, keepdim=True)
            shifted = logits.sub_(highest[rows])
            exponentials = shifted.exp()
            total[rows] = exponentials.sum(1, keepdim=True)
            log_total = total[rows].log()
            logprobs[rows] = picked - highest[rows] - log_total  # the large terms cancel first
            entropy[rows] = log_total - exponentials.mul_(shifted).sum(1, keepdim=True) / total[rows]
        # apart, as their sum would lose the total beside large logits
        ctx.save_for_backward(hidden, weight, targets, highest, total)
        ctx.chunk, ctx.product_dtype = chunk, product_dtype
        results = logprobs[:, 0].clone(), entropy[:, 0].clone()
        ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, highest, total = ctx.saved_tensors
        dtype, product_dtype = total.dtype, ctx.product_dtype
        wide = rounded(weight.to(dtype), product_dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            x, coming = rounded(hidden[rows].to(dtype), product_dtype), grad_logprobs[rows, None]
            logits = rounded(x @ wide.T, product_dtype)
            grad = logits.sub_(highest[rows]).exp_().mul_(-coming / total[rows])
            grad.scatter_add_(1, targets[rows, None], coming)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ wide
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, x)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
