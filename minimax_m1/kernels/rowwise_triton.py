"""RMSNorm on a GPU, with the scaled residual before it or the gate after it: each row is read once.

Shapes: M rows of K numbers; a program holds a whole row, in float32, in registers. All of it is bound by memory.

Rounding is that of `linear.rms_norm`: the sum of residual and branch to their dtype, and the normed row before it is
multiplied by the weight; what follows is float32 up to the store. Gradients pass the rounding as if it were not there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PROGRAMS = 264  # of a backward pass, each with its own sum for the weight's gradient: two a multiprocessor


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """Norm x [M, K]; arguments and result as `linear.rms_norm`, differentiable (once)."""
    return _RMSNorm.apply(x, None, weight, gate, eps, 1.0, 1.0)


def add_rms_norm_triton(
    residual: Tensor, alpha: float, branch: Tensor, beta: float, weight: Tensor, eps: float
) -> Tensor:
    """Norm alpha · residual + beta · branch [M, K]; as `linear.add_rms_norm`, differentiable (once).

    The sum itself is not written: the backward pass makes it again.
    """
    return _RMSNorm.apply(residual, branch, weight, None, eps, alpha, beta)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        gate: Tensor | None,
        eps: float,
        alpha: float,
        beta: float,
    ) -> Tensor:
        rows, size = x.shape
        x = _with_plain_rows(x)
        branch, gate = (None if t is None else _with_plain_rows(t) for t in (branch, gate))
        y = torch.empty(rows, size, dtype=x.dtype, device=x.device)
        _norm_kernel[(rows,)](
            x, branch, weight, gate, y, *_strides(x, branch, gate), size, eps, alpha, beta, **_shape(size)
        )
        ctx.save_for_backward(x, branch, weight, gate)
        ctx.scalars = eps, alpha, beta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, branch, weight, gate = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        rows, size = grad_y.shape
        programs = min(rows, PROGRAMS * max(1, 8192 // triton.next_power_of_2(size)))  # small ones are more
        grads = [None if t is None else torch.empty_like(grad_y) for t in (x, branch, gate)]
        sums = torch.empty(programs, size, dtype=torch.float32, device=x.device)
        _norm_backward_kernel[(programs,)](
            x,
            branch,
            weight,
            gate,
            grad_y,
            *grads,
            sums,
            *_strides(x, branch, gate),
            rows,
            size,
            *ctx.scalars,
            **_shape(size),
        )
        return grads[0], grads[1], sums.sum(0).to(weight.dtype), grads[2], None, None, None


def _with_plain_rows(x: Tensor) -> Tensor:
    """Return x with its columns next to each other; rows may be anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]


def _shape(size: int) -> dict[str, int]:
    """Return a program's width, and enough warps that a thread holds at most 16 numbers of each row."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 512))}


@triton.jit
def _sum_of_row(x, branch, row, x_stride, branch_stride, columns, mask, alpha, beta):
    """Return a row of x, or of alpha · x + beta · branch as it would be stored, in float32."""
    h = tl.load(x + row * x_stride + columns, mask, other=0.0).to(tl.float32)
    if branch is not None:
        b = tl.load(branch + row * branch_stride + columns, mask, other=0.0).to(tl.float32)
        b = (beta * b).to(branch.dtype.element_ty).to(tl.float32)
        h = (alpha * h + b).to(x.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _norm_kernel(
    x,
    branch,
    weight,
    gate,
    y,
    x_stride,
    branch_stride,
    gate_stride,
    size,
    eps,
    alpha,
    beta,
    BLOCK: tl.constexpr,
):
    """Norm one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    h = _sum_of_row(x, branch, row, x_stride, branch_stride, columns, mask, alpha, beta)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / size + eps)
    w = tl.load(weight + columns, mask, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    result = (h * inverse).to(x.dtype.element_ty).to(tl.float32) * w
    if gate is not None:
        result *= tl.sigmoid(tl.load(gate + row * gate_stride + columns, mask, other=0.0).to(tl.float32))
    tl.store(y + row * size + columns, result.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])  # differs from call to call: no new compilation
def _norm_backward_kernel(
    x,
    branch,
    weight,
    gate,
    grad_y,
    grad_x,
    grad_branch,
    grad_gate,
    sums,
    x_stride,
    branch_stride,
    gate_stride,
    rows,
    size,
    eps,
    alpha,
    beta,
    BLOCK: tl.constexpr,
):
    """Make the gradients of the rows from this program's number on, in steps of all programs, and sum the weight's."""
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    w = tl.load(weight + columns, mask, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    grad_w = tl.zeros((BLOCK,), tl.float32)
    # two stages: a row is on its way while the one before is summed, as few programs fit on a multiprocessor
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=2):
        grad = tl.load(grad_y + row * size + columns, mask, other=0.0).to(tl.float32)
        h = _sum_of_row(x, branch, row, x_stride, branch_stride, columns, mask, alpha, beta)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / size + eps)
        normed = h * inverse
        if gate is not None:
            s = tl.sigmoid(tl.load(gate + row * gate_stride + columns, mask, other=0.0).to(tl.float32))
            of_gate = grad * normed * w * s * (1.0 - s)
            tl.store(grad_gate + row * size + columns, of_gate.to(grad_gate.dtype.element_ty), mask)
            grad *= s
        grad_w += grad * normed
        grad *= w
        grad = inverse * (grad - normed * (tl.sum(grad * normed, 0) / size))
        if branch is not None:
            tl.store(grad_branch + row * size + columns, (beta * grad).to(grad_branch.dtype.element_ty), mask)
        tl.store(grad_x + row * size + columns, (alpha * grad).to(grad_x.dtype.element_ty), mask)
    tl.store(sums + tl.program_id(0) * size + columns, grad_w, mask)
