"""The head's losses on a GPU: products by tensor cores with float32 sums, and the softmax in two passes over logits.

Shapes: as in `cross_entropy`: n tokens, D hidden, V vocabulary.

Logits are float32 sums of exact products (`linear.float32_product`): hidden is bfloat16, and of a float32 weight two
bfloat16 parts are taken, side by side, so that one product [n, 2 D] x [2 D, V] sums both. The logits' gradient is
rounded to the dtype of hidden before its two products, as that of any other matrix is. With float32 hidden, everything
is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_m1.kernels.linear import float32_product, parts_of

CHUNK_BYTES = 2 << 30  # of logits that exist at a time: for a vocabulary of 200,000, products of 2,560 tokens
NUMBERS = ["targets", "highest", "total", "shifted", "picked", "factors", "of_targets"]  # a row's: read one by one
BLOCK = 4096  # logits of a row that a program has at a time: 16 in each of 256 threads


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the cross-entropy; arguments and results as `cross_entropy.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, chunk or _tokens_at_a_time(weight))


def linear_logprobs_triton(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies; arguments and results as `cross_entropy.linear_logprobs`."""
    return _LinearLogprobs.apply(hidden, weight, targets, chunk or _tokens_at_a_time(weight))


def _tokens_at_a_time(weight: Tensor) -> int:
    return max(1024, CHUNK_BYTES // (4 * weight.shape[0]) // 256 * 256)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = _Head(hidden, weight, ctx.needs_input_grad)
        softmax = _Softmax(hidden.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = head.logits(hidden[rows])
            softmax.reduce(logits, targets[rows], rows)
            if any(ctx.needs_input_grad):
                log_total = softmax.total[rows].log() + softmax.highest[rows]
                factors = (1 + 2 * z_loss * log_total) / softmax.total[rows]
                grad = softmax.gradient(
                    logits, targets[rows], rows, factors, torch.full_like(factors, -1.0), hidden.dtype
                )
                head.add_gradient(grad, hidden[rows], rows)
        ctx.save_for_backward(head.grad_hidden, head.grad_weight)
        ctx.dtype = weight.dtype
        cross_entropy, log_total = -softmax.logprobs().sum(), softmax.total.log() + softmax.highest
        squares = log_total.square().sum()
        hits = (softmax.picked >= softmax.highest).sum().float()
        ctx.mark_non_differentiable(cross_entropy, squares, hits)
        return cross_entropy + z_loss * squares, cross_entropy, squares, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss.view(1, 1)).to(grad_hidden.dtype)  # the factor stays float32
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, (False, False))
        softmax = _Softmax(hidden.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            softmax.reduce(head.logits(hidden[rows]), targets[rows], rows, entropy=True)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.softmax, ctx.chunk = softmax, chunk
        entropy = softmax.total.log() - softmax.shifted / softmax.total
        ctx.mark_non_differentiable(entropy)
        return softmax.logprobs(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        head, softmax = _Head(hidden, weight, ctx.needs_input_grad), ctx.softmax
        grad_logprobs = grad_logprobs.contiguous()
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits, coming = head.logits(hidden[rows]), grad_logprobs[rows]
            factors = -coming / softmax.total[rows]
            grad = softmax.gradient(logits, targets[rows], rows, factors, coming, hidden.dtype)
            head.add_gradient(grad, hidden[rows], rows)
        grad_weight = head.grad_weight
        return head.grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


class _Head:
    """The products with the weight: logits, and what becomes of their gradient."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs_grad: tuple[bool, ...]) -> None:
        self.first, *rest = parts_of(weight, hidden.dtype)
        self.parts = torch.cat((self.first, *rest), 1) if rest else self.first  # [V, D or 2 D]
        self.grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else None

    def logits(self, x: Tensor) -> Tensor:
        """Return [rows, V] float32."""
        x = x if self.parts is self.first else x.repeat(1, 2)
        return float32_product(x, self.parts.T)

    def add_gradient(self, grad: Tensor, x: Tensor, rows: slice) -> None:
        """Set the gradient of hidden's rows x from that of their logits, and add to the weight's."""
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = grad @ self.first
        if self.grad_weight is not None:
            float32_product(grad.T, x, self.grad_weight)


class _Softmax:
    """What is kept of each token's softmax, [n] float32 each; apart, as sums would lose the small beside the large."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        numbers = torch.empty(4, num_tokens, dtype=torch.float32, device=device)
        self.highest, self.total, self.shifted, self.picked = numbers.unbind()
        # the largest logit; the sum of exp(logit - highest); of that times (logit - highest); the target's logit

    def logprobs(self) -> Tensor:
        """Return the targets' log-probabilities; the large terms cancel first."""
        return self.picked - self.highest - self.total.log()

    def reduce(self, logits: Tensor, targets: Tensor, rows: slice, entropy: bool = False) -> None:
        """Read logits [rows, V] once; `shifted` is set if the entropy is wanted."""
        outputs = (self.highest[rows], self.total[rows], self.shifted[rows], self.picked[rows])
        _reduce_kernel[(logits.shape[0],)](
            logits, targets, *outputs, logits.shape[1], ENTROPY=entropy, BLOCK=BLOCK, num_warps=8
        )

    def gradient(
        self, logits: Tensor, targets: Tensor, rows: slice, factors: Tensor, of_targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return exp(logits - highest) · factors, plus of_targets at the targets; in place if that is the dtype."""
        grad = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
        grid = (logits.shape[0], triton.cdiv(logits.shape[1], BLOCK))
        _gradient_kernel[grid](
            logits, targets, self.highest[rows], factors, of_targets, grad, logits.shape[1], BLOCK=BLOCK, num_warps=8
        )
        return grad


@triton.jit(do_not_specialize_on_alignment=NUMBERS)
def _reduce_kernel(
    logits,
    targets,
    highest,
    total,
    shifted,
    picked,
    size,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row. Every lane has a largest logit and sums of its own; they meet at the end."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -1e30, tl.float32)  # below any logit, but finite: a lane without one adds nothing
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(logits + row * size + start + columns, start + columns < size, other=-1e30)
        new = tl.maximum(most, x)
        keep, weight = tl.exp(most - new), tl.exp(x - new)
        if ENTROPY:
            moments = keep * (moments + sums * (most - new)) + weight * (x - new)
        sums = keep * sums + weight
        most = new
    top = tl.max(most, 0)
    keep = tl.exp(most - top)
    tl.store(highest + row, top)
    tl.store(total + row, tl.sum(keep * sums, 0))
    if ENTROPY:
        tl.store(shifted + row, tl.sum(keep * (moments + sums * (most - top)), 0))
    tl.store(picked + row, tl.load(logits + row * size + tl.load(targets + row)))


@triton.jit(do_not_specialize_on_alignment=NUMBERS)
def _gradient_kernel(logits, targets, highest, factors, of_targets, grad, size, BLOCK: tl.constexpr):
    """Make BLOCK numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(logits + row * size + columns, mask, other=-1e30)
    result = tl.exp(x - tl.load(highest + row)) * tl.load(factors + row)
    result += tl.where(columns == tl.load(targets + row), tl.load(of_targets + row), 0.0)
    tl.store(grad + row * size + columns, result.to(grad.dtype.element_ty), mask)
