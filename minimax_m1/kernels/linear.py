"""Matrix products with a weight, RMSNorm and SiLU: what every layer is made of.

Shapes: M rows (tokens), K in, N out; a weight is [N, K], in its own dtype, and is used in that of x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_m1.errors import UserError
from minimax_m1.kernels import choose, compiled
from minimax_m1.kernels.quantized import QuantizedWeight


def _multiplies_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 faster than float32: with AMX, or AMD's AVX512 (measured: 4 times).

    Intel's AVX512 without AMX is 1.5 to 3 times slower at it than at float32, other CPUs 8 to 150 times.
    """
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported())


CPU_MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()

MIN_ROWS = 16  # from so many rows on, a row of PyTorch's product does not depend on how many others there are


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, backend: str | None = None, num_decodes: int | None = None
) -> Tensor:
    """Return x weight^T [M, N] in the dtype of x [M, K]; differentiable unless the weight is quantized.

    Args:
        num_decodes: inference with a cache: the first so many rows belong to decoding sequences. They run through the
            row kernels and all others through `matmul`, however many they are, so that a row's result is the same to
            the bit whatever else is in the batch. None: whichever is faster for this number of rows.

    Where x is float32 and the weight bfloat16, as on a CPU, the product is taken as `matmul` says.

    Raises:
        UserError: a gradient through a quantized weight is asked for.
    """
    if isinstance(weight, QuantizedWeight):
        refuse_gradient(x)
        if choose(backend, x) == "compiled" and compiled.fits_quantized(x):
            return compiled.quantized_linear(x, weight)
        if choose(backend, x) == "triton":
            from minimax_m1.kernels.quantized_triton import quantized_linear_triton

            return quantized_linear_triton(x, weight)
        return matmul(x, weight, backend, MIN_ROWS if num_decodes is not None else 1)
    return _linear(x, weight, backend, num_decodes, widen=False)


def float32_linear(x: Tensor, weight: Tensor, backend: str | None = None, num_decodes: int | None = None) -> Tensor:
    """Return x weight^T computed in float32 (float64 if x is), whatever the dtype of either; differentiable.

    `num_decodes` as in `linear`.
    """
    if choose(backend, x) == "triton" and x.dtype != torch.float32:
        return _Float32Linear.apply(x, weight)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _linear(x, weight, backend, num_decodes, widen=True)


class _Float32Linear(torch.autograd.Function):
    """x weight^T in float32 without x in float32, which would move five times the bytes of a 16-bit head.

    Gradients are rounded to the dtype of x, as those of any other matrix are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        parts = parts_of(weight, x.dtype)
        ctx.save_for_backward(x, parts[0])
        ctx.dtype = weight.dtype
        if len(parts) == 1:
            return float32_product(x, parts[0].T)
        both = float32_product(x, torch.cat(parts).T)  # x is read once
        return both[:, : len(weight)] + both[:, len(weight) :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = float32_product(grad.T, x).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def float32_product(a: Tensor, b: Tensor, added_to: Tensor | None = None) -> Tensor:
    """Return a b [M, N] in float32, or add it to a tensor of that; not differentiable.

    Matrices of 16 bits are multiplied by a GPU's tensor cores: each product is exact in float32, where they are summed.
    PyTorch has this product on a GPU alone, and without a gradient.
    """
    if a.dtype == torch.float32 or a.device.type == "cpu":  # a CPU has no such product
        a, b = a.float(), b.float()
        return torch.mm(a, b) if added_to is None else added_to.addmm_(a, b)
    if added_to is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(added_to, a, b, out_dtype=torch.float32, out=added_to)


def parts_of(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return one or two tensors of `dtype` that sum to weight: bfloat16 and what rounding to it left of a float32.

    Logits from two of them are off by 2.5e-6 of their norm (measured), from one by 1.7e-3, in TF32 by 2e-4 and in plain
    float32 by 3e-7. A third part would make a head's product half as long again.
    """
    first = weight.to(dtype)
    if dtype in (torch.float32, weight.dtype):
        return [first]
    return [first, (weight - first.to(weight.dtype)).to(dtype)]


def _linear(x: Tensor, weight: Tensor, backend: str | None, num_decodes: int | None, widen: bool) -> Tensor:
    """Run the first rows through the row kernel, the rest through `matmul`, the weight widened to x's dtype or not."""
    rows = row_kernel_rows(x, backend, num_decodes, weight)
    if rows and rows == x.shape[0]:
        return compiled.linear(x, weight)
    min_rows = MIN_ROWS if num_decodes is not None else 1
    rest = matmul(x[rows:], weight.to(x.dtype) if widen else weight, backend, min_rows)
    return rest if rows == 0 else torch.cat((compiled.linear(x[:rows], weight), rest))


def row_kernel_rows(x: Tensor, backend: str | None, num_decodes: int | None, *weights: Tensor) -> int:
    """Return how many rows of x, from the first, run through the compiled row kernels."""
    if choose(backend, x) != "compiled" or not compiled.fits(x, *weights):
        return 0
    if num_decodes is None:
        return x.shape[0] if x.shape[0] <= compiled.MAX_ROWS else 0
    return num_decodes


def refuse_gradient(*inputs: Tensor) -> None:
    """Raise UserError where a quantized weight would have to pass a gradient on."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise UserError("quantization: a quantized model cannot be trained; load the weights without quantization")


def matmul(x: Tensor, weight: Tensor | QuantizedWeight, backend: str | None = None, min_rows: int = 1) -> Tensor:
    """Return x weight^T in the dtype of x through PyTorch's product, in the type that is fastest here.

    On a CPU fewer rows than `min_rows` are filled up with zeros: below 16 PyTorch's product sums in another order. On a
    GPU the order depends on the number of rows at any size, and filling up would only be two launches more.

    float32 rows times a bfloat16 weight: a CPU with bfloat16 instructions rounds the rows, as a GPU would; any other,
    and the reference, widens the weight, which is exact. A quantized weight is multiplied as the floats it stands for.
    """
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    rows = x.shape[0]
    if rows < min_rows and x.device.type == "cpu":
        return matmul(F.pad(x, (0, 0, 0, min_rows - rows)), weight, backend)[:rows]
    narrow = x.dtype == torch.float32 and weight.dtype == torch.bfloat16 and CPU_MULTIPLIES_BFLOAT16
    if narrow and choose(backend, x) != "reference":
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return F.linear(x, weight.to(x.dtype))


def silu(x: Tensor, backend: str | None = None) -> Tensor:
    """Return x · sigmoid(x); differentiable. In inference x, which must be nobody else's, may be changed."""
    chosen = choose(backend, x)
    if chosen == "compiled" and compiled.fits(x) and x.is_contiguous():
        return compiled.silu(x)
    return F.silu(x, inplace=chosen == "triton" and not torch.is_grad_enabled())


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str | None = None, gate: Tensor | None = None) -> Tensor:
    """Return x · rsqrt(mean(x²) + eps), taken in float32 and cast back to the dtype of x [M, K], times weight [K].

    With a gate [M, K], times sigmoid(gate) as well; differentiable in all three.
    """
    chosen = choose(backend, x)
    if chosen == "triton":
        from minimax_m1.kernels.rowwise_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, gate)
    # one pass over memory instead of five, so for any number of rows
    if chosen == "compiled" and compiled.fits(x, weight):
        return compiled.rms_norm(x, weight, eps, gate)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), weight.shape, eps=eps).to(x.dtype) * weight.to(x.dtype)
    return y if gate is None else torch.sigmoid(gate) * y


def add_scaled(residual: Tensor, alpha: float, branch: Tensor, beta: float) -> Tensor:
    """Return alpha · residual + beta · branch; differentiable in both."""
    if beta != 1.0:
        branch = branch * beta
    return torch.add(branch, residual, alpha=alpha)


def add_rms_norm(
    residual: Tensor,
    alpha: float,
    branch: Tensor,
    beta: float,
    weight: Tensor,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """Return `rms_norm` of alpha · residual + beta · branch [M, K]; differentiable in both and in the weight."""
    if choose(backend, residual) == "triton":
        from minimax_m1.kernels.rowwise_triton import add_rms_norm_triton

        return add_rms_norm_triton(residual, alpha, branch, beta, weight, eps)
    return rms_norm(add_scaled(residual, alpha, branch, beta), weight, eps, backend)
