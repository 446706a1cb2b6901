"""Triton kernels of the rotary embedding: alone, for training, and with the writing of pages.

Shapes: as in `rotary`. A program turns TOKENS tokens of HEADS heads, one matrix row each; angles, products and sums are
in float32, and what leaves is rounded once. Both read and write everything once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS = 4
HEADS = 8  # so many heads' rows use the angles of a token that have been loaded


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `rotary.rotate`, differentiable in x."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return a new tensor of x turned by the angles, or back by them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        grid = (triton.cdiv(x.shape[0], TOKENS), triton.cdiv(x.shape[1], HEADS))
        sizes = (x.shape[0], x.shape[1], *x.stride()[:2], *y.stride()[:2])
        _rotate[grid](x, y, cos.contiguous(), sin.contiguous(), *sizes, BACK=back, **_options(x, cos))
    return y


def rotate_append_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    token_rows: Tensor,
) -> Tensor:
    """Do what `rotary.rotate_append` does in one kernel; q is turned where it lies."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (num_tokens, heads, head_dim), groups = q.shape, k.shape[1]
    pools = keys.flatten(1, 2), values.flatten(1, 2)  # views: [G, pages PAGE_SIZE, D]
    grid = (triton.cdiv(num_tokens, TOKENS), triton.cdiv(heads, HEADS) + 2 * triton.cdiv(groups, HEADS))
    if num_tokens:
        _rotate_append[grid](
            *(q, k, v, *pools, cos.contiguous(), sin.contiguous(), token_rows, num_tokens, heads, groups),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *pools[0].stride()[:2], *pools[1].stride()[:2]),
            BLOCK_ALL=triton.next_power_of_2(head_dim),
            **_options(q, cos),
        )
    return q


def _options(x: Tensor, cos: Tensor) -> dict[str, Any]:
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    return dict(
        HALF=half,
        REST=rest,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(rest),
        TOKENS=TOKENS,
        HEADS=HEADS,
        num_warps=4,
    )


@triton.jit
def _turn(x, y, cos, sin, valid, BACK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
          BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):  # fmt: skip
    """Write to rows y what rows x are when turned, and their REST; all are pointers [rows], y may be x."""
    d = tl.arange(0, BLOCK_HALF)
    mask = valid[:, None] & (d < HALF)[None, :]
    c = tl.load(cos[:, None] + d[None, :], mask=mask, other=0.0)
    s = tl.load(sin[:, None] + d[None, :], mask=mask, other=0.0)
    if BACK:
        s = -s
    first = tl.load(x[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x[:, None] + HALF + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y[:, None] + d[None, :], first * c - second * s, mask=mask)
    tl.store(y[:, None] + HALF + d[None, :], second * c + first * s, mask=mask)
    _copy(x + 2 * HALF, y + 2 * HALF, valid, REST, BLOCK_REST)


@triton.jit
def _copy(x, y, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write to rows y the first SIZE numbers of rows x."""
    if SIZE > 0:
        d = tl.arange(0, BLOCK)
        mask = valid[:, None] & (d < SIZE)[None, :]
        tl.store(y[:, None] + d[None, :], tl.load(x[:, None] + d[None, :], mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate(
    x, y, cos, sin, num_tokens, num_heads, x_row, x_head, y_row, y_head,
    BACK: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens of HEADS heads."""
    i = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + i // HEADS
    head = tl.program_id(1) * HEADS + i % HEADS
    valid = (token < num_tokens) & (head < num_heads)
    x += token * x_row + head * x_head
    y += token * y_row + head * y_head
    _turn(x, y, cos + token * HALF, sin + token * HALF, valid, BACK, HALF, REST, BLOCK_HALF, BLOCK_REST)


@triton.jit(do_not_specialize=["num_tokens", "token_rows"])
def _rotate_append(
    q, k, v, keys, values, cos, sin, token_rows, num_tokens, H, G,
    q_row, q_head, k_row, k_head, v_row, v_head, keys_group, keys_row, values_group, values_row,
    HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_ALL: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens of HEADS heads of q, turned in place, or of k or v, which go to their pages."""
    i = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + i // HEADS
    cos += token * HALF
    sin += token * HALF
    part = tl.program_id(1)
    if part < tl.cdiv(H, HEADS):
        head = part * HEADS + i % HEADS
        valid = (token < num_tokens) & (head < H)
        rows = q + token * q_row + head * q_head
        _turn(rows, rows, cos, sin, valid, False, HALF, 0, BLOCK_HALF, BLOCK_REST)
    else:
        place = part - tl.cdiv(H, HEADS)
        is_key = place < tl.cdiv(G, HEADS)
        group = (place - tl.where(is_key, 0, tl.cdiv(G, HEADS))).to(tl.int64) * HEADS + i % HEADS
        valid = (token < num_tokens) & (group < G)
        row = tl.load(token_rows + token, mask=token < num_tokens, other=0)
        if is_key:
            rows, pages = k + token * k_row + group * k_head, keys + group * keys_group + row * keys_row
            _turn(rows, pages, cos, sin, valid, False, HALF, REST, BLOCK_HALF, BLOCK_REST)
        else:
            rows, pages = v + token * v_row + group * v_head, values + group * values_group + row * values_row
            _copy(rows, pages, valid, 2 * HALF + REST, BLOCK_ALL)
