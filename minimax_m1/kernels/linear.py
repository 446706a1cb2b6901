"""Matrix products with a weight, RMSNorm and SiLU: what every layer is made of.

Shapes: M rows (tokens), K in, N out; a weight is [N, K], in its own dtype, and is used in that of x.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

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
    is_exact = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled()
    if is_exact and choose(backend, x) == "triton" and x.device.type != "cpu":
        # Products of two such numbers are exact in float32, in which a GPU sums them: nothing needs to be widened,
        # which for the head would move five times its bytes. (PyTorch has this product on a GPU alone.)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _linear(x, weight, backend, num_decodes, widen=True)


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

    Fewer rows than `min_rows` are filled up with zeros: below 16 PyTorch's product sums in another order.

    float32 rows times a bfloat16 weight: a CPU with bfloat16 instructions rounds the rows, as a GPU would; any other,
    and the reference, widens the weight, which is exact. A quantized weight is multiplied as the floats it stands for.
    """
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    rows = x.shape[0]
    if rows < min_rows:
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
