"""Products with weights of 8 and 4 bits on a GPU: whole numbers become floats in registers, sums are float32.

The weight is the left operand of a product of blocks, W x^T: it goes from memory in words of 16 bits to registers, and
there, a part at a time, to the tensor cores, while x lies in shared memory. Few rows of x are filled up to 16. Part i
of a row's words holds runs of 16 columns (`quantized`), and so is multiplied with runs of 16 columns of x.

Other kernels call `accumulate`, with pointers to any rows of x and of a weight in a GPU's tiles.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minimax_m1.kernels.gpu import num_multiprocessors
from minimax_m1.kernels.quantized import GPU_TILE, QuantizedWeight

# From so many rows on the weight is written out as floats for the library's product, which computes at nearly twice the
# rate of `_product`; 6 bytes a weight to be moved cost as much as some 400 rows (by count, not measured).
MANY_ROWS = 512
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # Triton's interpreter has no inline assembly


def quantized_linear_triton(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return x weight^T [M, N] in the dtype of x [M, K]; not differentiable.

    With bfloat16 rows, 4-bit weights are rounded to bfloat16 with their scale; 8-bit ones are exact.
    """
    weight = weight.in_tiles(GPU_TILE)
    (rows, size_in), size_out = x.shape, weight.size_out
    if rows > MANY_ROWS:
        return F.linear(x, dequantize_triton(weight, x.dtype))
    x = x if x.stride(1) == 1 else x.contiguous()
    block_m, block_n, block_k, warps, stages = _blocks(rows, weight.bits, x.dtype)
    steps = triton.cdiv(size_in, block_k)
    most = max(1, min(16 if rows <= 64 else 2, steps // 4))
    splits = _splits(triton.cdiv(rows, block_m) * triton.cdiv(size_out, block_n), most, x.device)
    out = x.new_empty(rows, size_out)
    sums = out[None] if splits == 1 else x.new_empty(splits, rows, size_out, dtype=torch.float32)
    if rows == 0:
        return out
    words, scales, groups = words_and_scales(weight)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(size_out, block_n), splits)
    _product[grid](
        x, words, scales, sums, rows, size_out, size_in, x.stride(0), words.shape[-1], groups,
        triton.cdiv(steps, splits) * block_k,
        GROUP=weight.group_size or 0, BM=block_m, BN=block_n, BK=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _add_up[(triton.cdiv(rows * size_out, 1024),)](sums, out, rows * size_out, SPLITS=splits, BLOCK=1024)
    return out


def dequantize_triton(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the float weight [... N, K] as a matrix, as `QuantizedWeight.dequantize` does, in one pass."""
    words, scales, groups = words_and_scales(weight.in_tiles(GPU_TILE))
    out = torch.empty(words.shape[0], weight.size_in, dtype=dtype, device=words.device)
    tiles = words.shape[1] // 16
    grid = (triton.cdiv(words.shape[0], 4), triton.cdiv(tiles, 32))
    _dequantize[grid](
        words, scales, out, words.shape[0], weight.size_in, words.shape[1], groups,
        GROUP=weight.group_size or 0, BN=4, TILES=32,
    )  # fmt: skip
    return out


def words_and_scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Return rows of words [... N, words] int16 and of scales [... N, groups] of a weight in a GPU's tiles; groups."""
    words = weight.tiles.view(torch.int16).view(-1, weight.tiles.shape[-4] * 16)
    return words, weight.scales.view(words.shape[0], -1), weight.scales.shape[-2]


def _blocks(rows: int, bits: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Return rows of x, rows of the weight and columns of a block, warps and stages for so many rows of x.

    Up to 64 rows the weight's bytes are what takes time, and two to five programs of a multiprocessor have 8 or 16 KB
    of them on their way in each of three stages. x is read again by each program, from the second-level cache: the
    more rows it has, the more of the weight's a program takes. Beyond 64 it is the arithmetic that takes time, and a
    weight is converted once for 128 rows.
    """
    if dtype == torch.float32:
        return 16, 64, 64 * 8 // bits, 4, 3
    if rows > 64:
        return 128, 128, 64 * 8 // bits, 8, 3
    few = bits == 8 and rows <= 16
    return max(16, triton.next_power_of_2(rows)), 64 if few else 128, 128, 4 if few or bits == 4 else 8, 4


def _splits(tiles: int, most: int, device: torch.device) -> int:
    """Return how many programs share the columns of a tile of the result.

    The fewest that make two programs for every multiprocessor and leave at most a tenth of the places of a round empty.
    """
    places = num_multiprocessors(device)
    enough = [n for n in range(1, most + 1) if tiles * n >= 2 * places] or [most]
    return next((n for n in enough if tiles * n >= 0.9 * places * triton.cdiv(tiles * n, places)), enough[0])


@triton.jit
def accumulate(
    acc, w, scales, x, start, end, K,
    GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return acc [BN, BM] + W x^T over the columns from start to end: multiples of BK, or end is K or more.

    w [BN, 1]: pointers to the first word of rows of a weight; scales [BN, 1]: to their first scale; x [1, BM]: to the
    first column of rows of x, of this dtype. They must be valid (clamped). GROUP: the columns of a scale; 0: 8 bits,
    and the caller multiplies the sum with the rows' scales. BK: a multiple of 32 (8 bits) or 64, and each dot takes
    BK / 2 or BK / 4 columns. `words_and_scales` gives the tensors that w and scales point into.
    """
    PARTS: tl.constexpr = 2 if GROUP == 0 else 4
    tile = tl.arange(0, BK // (16 * PARTS))
    word = tl.arange(0, BK // PARTS)
    first = word // 16 * (16 * PARTS)  # of a tile's columns
    for k in range(start, end, BK):
        words = tl.load(w + (k // PARTS + word)[None, :], mask=(k + first < K)[None, :], other=0)
        for i in tl.static_range(PARTS):
            columns = k + 16 * i + first + word % 16
            x_part = tl.load(x + columns[:, None], mask=(columns < K)[:, None], other=0)
            part = whole_numbers(words, i, PARTS, dtype)
            if GROUP != 0:
                if i % (2 if GROUP == 32 else 4) == 0:
                    begin = k + 16 * i + tile * 64
                    scale = tl.load(scales + (begin // GROUP)[None, :], mask=(begin < K)[None, :], other=0)
                    scale = tl.broadcast_to(scale[:, :, None], (BN, BK // 64, 16)).reshape(BN, BK // 4)
                part = (part * scale.to(part.dtype)).to(dtype)
            acc = tl.dot(part.to(dtype), x_part, acc, input_precision="tf32x3")
    return acc


@triton.jit
def whole_numbers(words, i: tl.constexpr, PARTS: tl.constexpr, dtype: tl.constexpr):
    """Return part i of words: bfloat16 for bfloat16, else float32; exact.

    Two words are a register. Into bits 0 to 6 of both halves of 0x43004300, which are 128 + those bits in bfloat16, the
    part's lower bits go at once. What is to be taken off is 136 with 4 bits, and with 8 bits 128, or 256 where the
    highest bit is 0. (Before compute capability 9.0 bfloat16 have no difference, only a product with a sum.)
    """
    if dtype != tl.bfloat16 or INTERPRETED:
        bits = (words >> (16 // PARTS * i)) & (255 if PARTS == 2 else 15)
        numbers = (bits - (128 if PARTS == 2 else 8)).to(tl.float32)
    elif PARTS == 4:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, one; mov.b32 one, 0x3F803F80; shr.b32 a, $1, $2; mov.b32 b, 0xC308C308; "
            "lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, a, one, b; }",
            "=r,r,r,r", [words, 4 * i], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, one; mov.b32 one, 0x3F803F80; shr.b32 a, $1, $2; "
            "lop3.b32 b, a, 0x00800080, 0xC300C300, 0xAE; lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA; "
            "fma.rn.bf16x2 $0, a, one, b; }",
            "=r,r,r,r", [words, 8 * i], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return numbers


@triton.jit(do_not_specialize=["M"])  # rows differ from call to call: no new compilation
def _product(
    x, words, scales, out, M, N, K, stride_x, stride_w, groups, columns,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One block of x W^T over so many columns, or its sum alone where several programs share the columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_read, n_read = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    start = tl.program_id(2) * columns
    acc = accumulate(
        tl.zeros((BN, BM), tl.float32), words + (n_read * stride_w)[:, None], scales + (n_read * groups)[:, None],
        x + (m_read * stride_x)[None, :], start, tl.minimum(start + columns, K), K,
        GROUP, BN, BK, x.dtype.element_ty,
    )  # fmt: skip
    if GROUP == 0:
        acc *= tl.load(scales + n_read)[:, None]
    place = out + (tl.program_id(2).to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _add_up(sums, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up, always in the same order, what the programs that shared the columns found."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(sums + split * size + i, mask=i < size, other=0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _dequantize(
    words, scales, out, N, K, stride_w, groups,
    GROUP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write out some tiles of some rows."""
    PARTS: tl.constexpr = 2 if GROUP == 0 else 4
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None, None]
    tile = (tl.program_id(1) * TILES + tl.arange(0, TILES))[None, :, None]
    word = tl.arange(0, 16)[None, None, :]
    inside = (n < N) & (tile * 16 * PARTS < K)
    raw = tl.load(words + n * stride_w + tile * 16 + word, mask=inside, other=0)
    for i in tl.static_range(PARTS):
        first = tile * 16 * PARTS + 16 * i
        group = 0 if GROUP == 0 else first // GROUP
        scale = tl.load(scales + n * groups + group, mask=(n < N) & (first < K), other=0).to(tl.float32)
        value = whole_numbers(raw, i, PARTS, tl.float32) * scale
        tl.store(out + n * K + first + word, value.to(out.dtype.element_ty), mask=(n < N) & (first + word < K))
