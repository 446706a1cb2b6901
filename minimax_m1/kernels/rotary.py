"""Rotary embedding: the leading dimensions of each head turned by angles that grow with the token's place.

Shapes: T tokens, H query heads, G key/value heads, D head_dim, r rotary_dim <= D. Dimension i pairs with i + r / 2.
Source: RoFormer (arXiv 2104.09864), in the layout of GPT-NeoX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_m1.kernels import choose, compiled


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backend: str | None = None) -> Tensor:
    """Return x [T, heads, D] turned by angles whose cos and sin [T, 1, r / 2] are given; differentiable in x.

    `triton` rounds once; the others take cos, sin and the products in the dtype of x.
    """
    if choose(backend, x) == "triton":
        from minimax_m1.kernels.rotary_triton import rotate_triton

        return rotate_triton(x, cos, sin)
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    token_rows: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Write k, turned, and v into the pages of their sequences; return q turned. Not differentiable.

    Args:
        q: [T, H, D]; may be changed. k, v: [T, G, D].
        cos, sin: [T, 1, r / 2] float32.
        keys, values: [G, pages, PAGE_SIZE, D], the pools; rows `token_rows` are written.
        token_rows: [T] int64: where each token's key lies, page PAGE_SIZE + place in the page.
        backend: one of `kernels.BACKENDS`, or None for the fastest.
    """
    chosen = choose(backend, q)
    if chosen == "triton":
        from minimax_m1.kernels.rotary_triton import rotate_append_triton

        return rotate_append_triton(q, k, v, cos, sin, keys, values, token_rows)
    if chosen == "compiled" and compiled.fits(q, keys, values) and keys.dtype == q.dtype:
        compiled.rotate_append(q, k, v, cos, sin, token_rows, keys, values)
        return q
    for pool, new in ((keys, rotate(k, cos, sin, backend)), (values, v)):
        pool.flatten(1, 2).index_copy_(1, token_rows, new.transpose(0, 1).to(pool.dtype))
    return rotate(q, cos, sin, backend)
