"""What Triton programs multiply with: tiles of rows with tiles of a weight, of floats or of 8 or 4 bits.

Shapes: M rows of x [M, K], a weight [N, K]; a tile has BLOCK_N rows of the weight and BLOCK_M of x. BITS: 16 for floats
(of any dtype, and used in that of x), 8 or 4 for a quantized weight in tiles of one row, as `quantized` describes them.

The weight stands on the left: a tensor core wants 64 rows or more there, but on its right 16 do, and few rows of x are
what decoding has. Its left operand may also come from registers, where whole numbers become floats. Those are exact in
every float type, so scales come after the sum: with 8 bits once, with 4 bits once a group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swizzle(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return row and column of a program's tile: GROUP row tiles walk over the columns together, for the L2's sake."""
    first = program // (GROUP * column_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % size, within // size


@triton.jit
def product(
    w,
    scales,
    w_rows,
    w_stride,
    x,
    x_places,
    size_in,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return w x^T [BLOCK_N, BLOCK_M] in float32.

    w_rows [BLOCK_N] are rows of the matrix at w, `w_stride` elements or bytes apart; x_places [BLOCK_M] int64 are where
    rows of x begin. All must exist (those past an end repeat a row): only columns are masked, and not if BLOCK_K
    divides their number (EVEN_K). 4 bits: BLOCK_K must divide GROUP_SIZE.
    """
    k = tl.arange(0, BLOCK_K if BITS > 4 else BLOCK_K // 2)
    w_tile = w + w_rows[:, None] * w_stride + k[None, :]
    if BITS == 4:
        k = k // 16 * 32 + k % 16  # the column in a byte's low half; the other is 16 columns on
    x_tile = x + x_places[None, :] + k[:, None]
    out = tl.zeros((w_rows.shape[0], x_places.shape[0]), tl.float32)
    for first in range(0, size_in, BLOCK_K):
        # tf32x3: of float32 rows; for others it says nothing
        if BITS == 4:
            raw = tl.load(w_tile) if EVEN_K else tl.load(w_tile, mask=(first + k < size_in)[None, :], other=0)
            low = _columns(x_tile, first + k, size_in, EVEN_K)
            high = _columns(x_tile + 16, first + k + 16, size_in, EVEN_K)
            part = tl.dot(_whole(raw & 15, 8, low.dtype), low, input_precision="tf32x3")
            part = tl.dot(_whole(raw >> 4, 8, high.dtype), high, part, input_precision="tf32x3")
            out += part * tl.load(scales + w_rows * tl.cdiv(size_in, GROUP_SIZE) + first // GROUP_SIZE)[:, None]
            w_tile += BLOCK_K // 2
        else:
            right = _columns(x_tile, first + k, size_in, EVEN_K)
            left = tl.load(w_tile) if EVEN_K else tl.load(w_tile, mask=(first + k < size_in)[None, :], other=0)
            left = _whole(left, 128, right.dtype) if BITS == 8 else left.to(right.dtype)
            out = tl.dot(left, right, out, input_precision="tf32x3")
            w_tile += BLOCK_K
        x_tile += BLOCK_K
    if BITS == 8:
        out *= tl.load(scales + w_rows)[:, None]
    return out


@triton.jit
def _columns(x_tile, columns, size_in, EVEN_K: tl.constexpr):
    """Return a tile [BLOCK_K, BLOCK_M] of x^T, 0 behind its last column."""
    if EVEN_K:
        return tl.load(x_tile)
    return tl.load(x_tile, mask=(columns < size_in)[:, None], other=0.0)


@triton.jit
def _whole(raw, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Return the whole numbers that unsigned bytes stand for, as floats; ZERO is the byte of 0."""
    return (raw.to(tl.int16) - ZERO).to(tl.int8).to(DTYPE)


@triton.jit
def row_product(
    w, scales, w_rows, w_stride, x, size_in, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return w x of one row of x [K] and rows `w_rows` of w, all of which must exist, in float32.

    Without tensor cores: every byte of the weight goes from memory into registers once, and that is what takes time.
    """
    k = tl.arange(0, BLOCK_K)
    if BITS == 4:
        sums = tl.zeros((w_rows.shape[0], BLOCK_K // 16), tl.float32)
        groups = tl.cdiv(size_in, GROUP_SIZE)
        blocks = tl.arange(0, BLOCK_K // 16)  # of 16 bytes, 32 columns, which share a scale
        for first in range(0, tl.cdiv(size_in, 32) * 16, BLOCK_K):
            byte = first + k
            column = byte // 16 * 32 + byte % 16
            raw = tl.load(w + w_rows[:, None] * w_stride + byte[None, :], mask=(column < size_in)[None, :], other=0)
            low = tl.load(x + column, mask=column < size_in, other=0.0).to(tl.float32)
            high = tl.load(x + column + 16, mask=column + 16 < size_in, other=0.0).to(tl.float32)
            part = _whole(raw & 15, 8, tl.float32) * low[None, :] + _whole(raw >> 4, 8, tl.float32) * high[None, :]
            group = (first // 16 + blocks) * 32 // GROUP_SIZE
            scale = tl.load(scales + w_rows[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0)
            part = tl.reshape(part, (w_rows.shape[0], BLOCK_K // 16, 16))
            sums += tl.sum(part, 2) * scale.to(tl.float32)
        return tl.sum(sums, 1)
    out = tl.zeros((w_rows.shape[0], BLOCK_K), tl.float32)
    for first in range(0, size_in, BLOCK_K):
        inside = first + k < size_in
        left = tl.load(w + w_rows[:, None] * w_stride + (first + k)[None, :], mask=inside[None, :], other=0)
        right = tl.load(x + first + k, mask=inside, other=0.0).to(tl.float32)
        left = _whole(left, 128, tl.float32) if BITS == 8 else left.to(tl.float32)
        out += left * right[None, :]
    out = tl.sum(out, 1)
    if BITS == 8:
        out *= tl.load(scales + w_rows)
    return out
