"""The experts on a GPU: routing, sorting and two grouped matrix products, none of which makes the host wait.

Shapes: as in `experts`. A pair is a token and one of its K experts, number t K + k; a row is a pair's place after they
are sorted by expert. Row r is the pair `order[r]`, and rows `offsets[e]:offsets[e + 1]` belong to expert e; how many
there are of each, only the device knows, so a grid has a tile for every row that may be and the surplus ends at once.

Products are taken as w x^T, in tiles of BLOCK_N rows of the weight by BLOCK_M rows of x: a tensor core wants 64 rows
or more of its left operand, but of its right one 16 do, and few rows of x are what decoding has. The left one may also
come out of registers, where quantized weights become floats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimax_m1.kernels.gpu import shared_memory
from minimax_m1.kernels.quantized import GPU_TILE, QuantizedWeight
from minimax_m1.kernels.quantized_triton import accumulate, words_and_scales

SORT_ALONE = 1024  # pairs that one program sorts faster than three launches do
VARYING = ["tokens", "pairs", "blocks", "row_tiles"]  # differ from call to call: no new compilation for a 1 or a 16
GROUP = 16  # row tiles that run next to each other: 16 by 8 tiles of a wave read as little as possible into the L2


def route_triton(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts; arguments and results as `experts.route`, not differentiable."""
    tokens, num_experts = logits.shape
    logits = logits.contiguous()
    probs = torch.empty_like(logits)
    expert_ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k)
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, 1024 // block_e) if tokens > 256 else 1
    _route_kernel[(triton.cdiv(tokens, block_t),)](
        logits,
        probs,
        expert_ids,
        weights,
        tokens,
        num_experts,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=4 if block_t > 1 else 1,
    )
    return probs, expert_ids, weights


@triton.jit(do_not_specialize=VARYING)
def _route_kernel(
    logits,
    probs,
    expert_ids,
    weights,
    tokens,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Softmax, top-k and renormalisation of BLOCK_T tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < tokens)[:, None] & (e < num_experts)[None, :]
    sources = tl.minimum(t, tokens - 1)[:, None] * num_experts + e[None, :]  # behind the last token: that one again
    x = tl.load(logits + sources, mask=(e < num_experts)[None, :], other=float("-inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    p = x / tl.sum(x, 1)[:, None]
    tl.store(probs + t[:, None] * num_experts + e[None, :], p, mask=inside)
    p = tl.where((e < num_experts)[None, :], p, -1.0)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.minimum(tl.argmax(p, 1, tie_break_left=True), num_experts - 1)  # an expert that exists, even of NaNs
        chosen = tl.where((k == i)[None, :], tl.max(p, 1)[:, None], chosen)
        ids = tl.where((k == i)[None, :], best[:, None], ids)
        p = tl.where(e[None, :] == best[:, None], -1.0, p)
    chosen = chosen / tl.sum(chosen, 1)[:, None]
    inside = (t < tokens)[:, None] & (k < TOP_K)[None, :]
    places = t[:, None] * TOP_K + k[None, :]
    tl.store(expert_ids + places, ids.to(tl.int64), mask=inside)
    tl.store(weights + places, chosen, mask=inside)


def sort_rows(expert_ids: Tensor, expert_weights: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs by expert, those of an expert in the order of tokens.

    Args:
        expert_ids: [T, K] int64.
        expert_weights: [T, K]; pairs of weight 0 come behind all experts' rows. None: no pair is left out.
        num_experts: E.

    Returns:
        order [S] int32, offsets [E + 1] int32.
    """
    pairs = expert_ids.numel()
    ids = expert_ids.contiguous()
    weights = ids if expert_weights is None else expert_weights.contiguous()
    order = ids.new_empty(pairs, dtype=torch.int32)
    offsets = ids.new_empty(num_experts + 1, dtype=torch.int32)
    block_e = triton.next_power_of_2(num_experts + 1)
    sizes = {
        "WEIGHTED": expert_weights is not None,
        "BLOCK_E": block_e,
        "BLOCK": max(16, min(8192 // block_e, triton.next_power_of_2(pairs))),
    }
    if pairs <= SORT_ALONE:
        _sort_kernel[(1,)](ids, weights, order, offsets, pairs, num_experts, **sizes)
        return order, offsets
    blocks = triton.cdiv(pairs, sizes["BLOCK"])
    counts = ids.new_empty(blocks, block_e, dtype=torch.int32)
    _count_kernel[(blocks,)](ids, weights, counts, pairs, num_experts, **sizes)
    _prefix_kernel[(1,)](counts, offsets, blocks, num_experts, BLOCK_E=block_e, BLOCK=max(1, 4096 // block_e))
    _place_kernel[(blocks,)](ids, weights, counts, order, pairs, num_experts, **sizes)
    return order, offsets


@triton.jit
def _one_hot(
    ids, weights, first, pairs, num_experts, WEIGHTED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr
):
    """Return pairs from `first` on, and a matrix [BLOCK, BLOCK_E] with a 1 in the column of each pair's expert.

    Column E is that of pairs without weight.
    """
    pair = first + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    if WEIGHTED:
        weight = tl.load(weights + pair, mask=pair < pairs, other=1).to(tl.float32)
        expert = tl.where(weight == 0, num_experts, expert)
    return pair, (expert[:, None] == tl.arange(0, BLOCK_E)[None, :]).to(tl.int32)


@triton.jit
def _place(order, pair, one_hot, base, pairs):
    """Write pairs to their rows: base [BLOCK_E], where each expert's rows of this block begin, plus those before it."""
    row = tl.sum(one_hot * (tl.cumsum(one_hot, 0) - 1 + base[None, :]), 1)
    tl.store(order + row, pair, mask=pair < pairs)


@triton.jit(do_not_specialize=VARYING)
def _sort_kernel(
    ids,
    weights,
    order,
    offsets,
    pairs,
    num_experts,
    WEIGHTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count and place all pairs in one program."""
    count = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, pairs, BLOCK):
        _, one_hot = _one_hot(ids, weights, first, pairs, num_experts, WEIGHTED, BLOCK_E, BLOCK)
        count += tl.sum(one_hot, 0)
    e = tl.arange(0, BLOCK_E)
    base = tl.cumsum(count, 0) - count
    tl.store(offsets + e, base, mask=e <= num_experts)
    for first in range(0, pairs, BLOCK):
        pair, one_hot = _one_hot(ids, weights, first, pairs, num_experts, WEIGHTED, BLOCK_E, BLOCK)
        _place(order, pair, one_hot, base, pairs)
        base += tl.sum(one_hot, 0)


@triton.jit(do_not_specialize=VARYING)
def _count_kernel(
    ids, weights, counts, pairs, num_experts, WEIGHTED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the pairs of each expert in one block."""
    block = tl.program_id(0)
    _, one_hot = _one_hot(ids, weights, block * BLOCK, pairs, num_experts, WEIGHTED, BLOCK_E, BLOCK)
    tl.store(counts + block * BLOCK_E + tl.arange(0, BLOCK_E), tl.sum(one_hot, 0))


@triton.jit(do_not_specialize=VARYING)
def _prefix_kernel(counts, offsets, blocks, num_experts, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """Replace the blocks' counts by the rows where their pairs begin, in one program."""
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        places = block[:, None] * BLOCK_E + e[None, :]
        count += tl.sum(tl.load(counts + places, mask=(block < blocks)[:, None], other=0), 0)
    base = tl.cumsum(count, 0) - count
    tl.store(offsets + e, base, mask=e <= num_experts)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        places = block[:, None] * BLOCK_E + e[None, :]
        part = tl.load(counts + places, mask=(block < blocks)[:, None], other=0)
        tl.store(counts + places, tl.cumsum(part, 0) - part + base[None, :], mask=(block < blocks)[:, None])
        base += tl.sum(part, 0)


@triton.jit(do_not_specialize=VARYING)
def _place_kernel(
    ids, weights, bases, order, pairs, num_experts, WEIGHTED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the pairs of one block to their rows."""
    block = tl.program_id(0)
    pair, one_hot = _one_hot(ids, weights, block * BLOCK, pairs, num_experts, WEIGHTED, BLOCK_E, BLOCK)
    _place(order, pair, one_hot, tl.load(bases + block * BLOCK_E + tl.arange(0, BLOCK_E)), pairs)


def row_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """Return how many tiles of `block_m` rows there are at most, when no tile has rows of two experts."""
    return (pairs + min(num_experts, pairs) * (block_m - 1)) // block_m


def tile_sizes(pairs: int, num_experts: int, x: Tensor, bits: int = 16) -> dict[str, int]:
    """Return the constants of a grouped product, for rows like x and the bits of a weight (16: floats of any).

    A tile has the rows that an expert gets on average, with room for more, so that nearly every weight is read once;
    few rows leave shared memory to more weights under way, which is what their time is made of. Rows of lengths that 8
    does not divide are read by many small loads, whose addresses take registers: small tiles.
    """
    rows = pairs / num_experts
    few = 16 if rows <= 4 else 32 if rows <= 12 else 64 if rows <= 40 else None
    if x.dtype == torch.float32:  # three products of TF32 an element, so twice the registers
        block_n, block_k, warps, stages = 64, 32 * 16 // bits, 4, 3
        few = 16 if bits < 16 else min(few or 64, 64)
    elif bits == 16 and x.shape[1] % 8:
        few, block_n, block_k, warps, stages = min(few or 64, 64), 64, 32, 4, 3
    elif bits < 16:
        block_n, block_k = 64 if few else 128, (1024 if few in (16, 32) else 512) // bits
        warps, stages = (4, 4) if few else (8, 3)
    else:
        block_n, block_k, warps, stages = (128, 64, 4, 4) if few else (256, 64, 8, stages_of_large_tiles(x.device))
    sizes = {"BLOCK_M": few or 128, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**sizes, "num_warps": warps, "num_stages": stages}


def stages_of_large_tiles(device: torch.device) -> int:
    """Return how many stages of loads tiles of 256 by 64 and 128 by 64, of 16 bits, may have on a GPU.

    One takes 48 KiB. Before Hopper there are as many in memory as stages but one.
    """
    return 4 if shared_memory(device) >= 160 << 10 else 3


def up_product(
    x: Tensor, w13: Tensor | QuantizedWeight, order: Tensor, offsets: Tensor, top_k: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return a = silu(x w1^T) · (x w3^T) [S, I] in sorted rows and, with `keep`, both products side by side [S, 2 I].

    x [T, D] is gathered, w13 is as in `experts.expert_mlp`; results have the dtype of x. Rows behind `offsets[E]` are
    not written.
    """
    weight = _Weight.of(w13)
    pairs, width = order.shape[0], weight.rows // 2
    x = _rows_contiguous(x)
    a = x.new_empty(pairs, width)
    h = x.new_empty(pairs, 2 * width) if keep else None
    sizes = tile_sizes(pairs, weight.experts, x, weight.bits)
    tiles = row_tiles(pairs, weight.experts, sizes["BLOCK_M"])
    _up_kernel[(tiles * triton.cdiv(width, sizes["BLOCK_N"] // 2),)](
        x,
        weight.values,
        weight.scales,
        order,
        offsets,
        a,
        a if h is None else h,
        x.stride(0),
        weight.stride,
        weight.groups,
        weight.columns,
        width,
        weight.experts,
        top_k,
        tiles,
        KEEP=keep,
        EVEN_K=weight.columns % sizes["BLOCK_K"] == 0,
        BLOCK_E=triton.next_power_of_2(weight.experts),
        GROUP=GROUP,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size,
        **sizes,
    )
    return a, h


def down_product(a: Tensor, w2: Tensor | QuantizedWeight, order: Tensor, offsets: Tensor) -> Tensor:
    """Return a w2^T [S, D] from sorted rows a [S, I], in the order of pairs: row r goes to `order[r]`.

    w2 is as in `experts.expert_mlp`. Pairs behind `offsets[E]` are not written.
    """
    weight = _Weight.of(w2)
    pairs, hidden = order.shape[0], weight.rows
    a = _rows_contiguous(a)
    y = a.new_empty(pairs, hidden)
    sizes = tile_sizes(pairs, weight.experts, a, weight.bits)
    tiles = row_tiles(pairs, weight.experts, sizes["BLOCK_M"])
    _down_kernel[(tiles * triton.cdiv(hidden, sizes["BLOCK_N"]),)](
        a,
        weight.values,
        weight.scales,
        order,
        offsets,
        y,
        a.stride(0),
        weight.stride,
        weight.groups,
        weight.columns,
        hidden,
        weight.experts,
        tiles,
        EVEN_K=weight.columns % sizes["BLOCK_K"] == 0,
        BLOCK_E=triton.next_power_of_2(weight.experts),
        GROUP=GROUP,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size,
        **sizes,
    )
    return y


class _Weight(NamedTuple):
    """A stack of weights, float or quantized, as `_product` takes it."""

    values: Tensor  # floats, or words of 16 bits
    scales: Tensor  # of floats: anything
    experts: int
    rows: int  # of an expert
    columns: int
    stride: int  # between rows
    groups: int  # of scales, a row; of floats: anything
    bits: int
    group_size: int  # 0: all of a row

    @classmethod
    def of(cls, w: Tensor | QuantizedWeight) -> _Weight:
        if isinstance(w, QuantizedWeight):
            words, scales, groups = words_and_scales(w.in_tiles(GPU_TILE))
            experts, rows = w.shape[0], words.shape[0] // w.shape[0]
            return cls(words, scales, experts, rows, w.size_in, words.shape[1], groups, w.bits, w.group_size or 0)
        w = w.contiguous()
        return cls(w, w, w.shape[0], w.shape[1], w.shape[2], w.shape[2], 0, 16, 0)


def _rows_contiguous(x: Tensor) -> Tensor:
    """Return x with its columns next to each other; its rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def find_tile(offsets, tile, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the expert of a row tile, the tile's first row and the end of the expert's; 0, 0, 0 for a surplus tile."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + e, mask=e < num_experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < num_experts, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(tiles, 0)
    mine = (tile >= behind - tiles) & (tile < behind)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    first = tl.sum(tl.where(mine, start + (tile - behind + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def swizzle(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return row and column of a program's tile: GROUP row tiles walk over the columns together, for the L2's sake."""
    first = program // (GROUP * column_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % size, within // size


@triton.jit
def _product(
    w,
    scales,
    w_rows,
    w_stride,
    groups,
    x,
    x_places,
    size_in,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Return w x^T [BLOCK_N, BLOCK_M] in float32.

    w_rows [BLOCK_N] and x_places [BLOCK_M], both int64: the rows of the weight, and where those of x begin. All of them
    exist (those past an end repeat one), so that only columns are masked, and not if BLOCK_K divides them (EVEN_K).
    """
    out = tl.zeros((w_rows.shape[0], x_places.shape[0]), tl.float32)
    w += (w_rows * w_stride)[:, None]
    x += x_places[None, :]
    if BITS < 16:
        rows: tl.constexpr = w_rows.shape[0]
        dtype: tl.constexpr = x.dtype.element_ty
        scale = scales + (w_rows * groups)[:, None]
        out = accumulate(out, w, scale, x, 0, size_in, size_in, GROUP_SIZE, rows, BLOCK_K, dtype)
        if BITS == 8:
            out *= tl.load(scales + w_rows)[:, None]
    else:
        k = tl.arange(0, BLOCK_K)
        for first in range(0, size_in, BLOCK_K):
            column = first + k
            if EVEN_K:
                left, right = tl.load(w + column[None, :]), tl.load(x + column[:, None])
            else:  # both zero behind the last column: what a mask leaves open may be NaN on a GPU
                left = tl.load(w + column[None, :], mask=(column < size_in)[None, :], other=0.0)
                right = tl.load(x + column[:, None], mask=(column < size_in)[:, None], other=0.0)
            # tf32x3: of float32; for others it says nothing
            out = tl.dot(left.to(right.dtype), right, out, input_precision="tf32x3")
    return out


@triton.jit(do_not_specialize=VARYING)
def _up_kernel(
    x,
    w13,
    scales,
    order,
    offsets,
    a,
    h,
    x_stride,
    w_stride,
    groups,
    hidden,
    width,
    num_experts,
    top_k,
    row_tiles,
    KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """BLOCK_M rows of a by BLOCK_N / 2 columns: the upper half of a tile's products are gates, the lower half ups.

    A thread holds gate and up of the same place, so the halves meet without leaving registers.
    """
    half: tl.constexpr = BLOCK_N // 2
    row_tile, column_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, half), GROUP)
    expert, first, end = find_tile(offsets, row_tile, num_experts, BLOCK_E, BLOCK_M)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        tokens = tl.load(order + tl.minimum(rows, end - 1)) // top_k
        n = tl.arange(0, BLOCK_N)
        w_rows = n // half * width + tl.minimum(column_tile * half + n % half, width - 1)
        w_rows += expert.to(tl.int64) * 2 * width
        places = tokens.to(tl.int64) * x_stride
        out = _product(w13, scales, w_rows, w_stride, groups, x, places, hidden, EVEN_K, BLOCK_K, BITS, GROUP_SIZE)
        gate, up = tl.split(tl.permute(tl.reshape(out, (2, half, BLOCK_M)), (2, 1, 0)))
        columns = column_tile * half + tl.arange(0, half)
        inside = (rows < end)[:, None] & (columns < width)[None, :]
        row, start = tl.arange(0, BLOCK_M)[:, None], first.to(tl.int64) * width
        result = gate * tl.sigmoid(gate) * up
        tl.store(a + start + (row * width + columns[None, :]), result.to(a.dtype.element_ty), mask=inside)
        if KEEP:
            h += 2 * start
            places = row * 2 * width + columns[None, :]
            tl.store(h + places, gate.to(h.dtype.element_ty), mask=inside)
            tl.store(h + width + places, up.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _down_kernel(
    a,
    w2,
    scales,
    order,
    offsets,
    y,
    a_stride,
    w_stride,
    groups,
    width,
    hidden,
    num_experts,
    row_tiles,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """BLOCK_M rows of y by BLOCK_N columns."""
    row_tile, column_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert, first, end = find_tile(offsets, row_tile, num_experts, BLOCK_E, BLOCK_M)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        sources = tl.minimum(rows, end - 1)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        w_rows = expert.to(tl.int64) * hidden + tl.minimum(columns, hidden - 1)
        places = sources.to(tl.int64) * a_stride
        out = _product(w2, scales, w_rows, w_stride, groups, a, places, width, EVEN_K, BLOCK_K, BITS, GROUP_SIZE)
        inside = (rows < end)[:, None] & (columns < hidden)[None, :]
        places = tl.load(order + sources).to(tl.int64)[:, None] * hidden + columns[None, :]
        tl.store(y + places, tl.trans(out).to(y.dtype.element_ty), mask=inside)


def add_up(y: Tensor, expert_weights: Tensor | None, top_k: int) -> Tensor:
    """Return [T, D]: the K rows of each token, weighted, summed in the order of k in float32.

    Args:
        y: [S, D] in the order of pairs, contiguous.
        expert_weights: [T, K]; a row of weight 0 is not read. None: all count 1.
        top_k: K.
    """
    tokens, hidden = y.shape[0] // top_k, y.shape[1]
    out = y.new_empty(tokens, hidden)
    block = min(2048, triton.next_power_of_2(hidden))
    weights = y if expert_weights is None else expert_weights.contiguous()
    _add_up_kernel[(tokens, triton.cdiv(hidden, block))](
        y, weights, out, hidden, WEIGHTED=expert_weights is not None, TOP_K=top_k, BLOCK=block
    )
    return out


@triton.jit
def _add_up_kernel(y, weights, out, hidden, WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        end, weight = hidden, 1.0
        if WEIGHTED:
            weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
            end = tl.where(weight != 0, hidden, 0)
        row = y + (token * TOP_K + k) * hidden
        total += weight * tl.load(row + columns, mask=columns < end, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + columns, total.to(out.dtype.element_ty), mask=columns < hidden)


def expert_mlp_triton(
    x: Tensor, w13: Tensor | QuantizedWeight, w2: Tensor | QuantizedWeight, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    """Run the experts without gradients; arguments and results as `experts.expert_mlp`."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    num_experts, top_k = w13.shape[0], expert_ids.shape[1]
    if isinstance(w13, Tensor) and isinstance(w2, Tensor) and expert_ids.numel() <= num_experts // 4:
        return _gathered_mlp(x, w13.contiguous(), w2.contiguous(), expert_ids.contiguous(), expert_weights.contiguous())
    order, offsets = sort_rows(expert_ids, expert_weights, num_experts)
    a, _ = up_product(x, w13, order, offsets, top_k, keep=False)
    return add_up(down_product(a, w2, order, offsets), expert_weights, top_k)


def _gathered_mlp(x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Run the experts of a few pairs, each pair by itself, with float weights; quantized ones want tensor cores.

    Nothing is sorted, and no tensor core is filled with rows that do not exist. An expert of two tokens is read twice,
    but the second time from the L2: programs of the same part of a weight are neighbours in the grid.
    """
    (tokens, top_k), (_, hidden, width) = expert_ids.shape, w2.shape
    x = _rows_contiguous(x)
    a, y = x.new_empty(tokens * top_k, width), x.new_empty(tokens, hidden)
    sizes = {"ROWS": 16, "BLOCK_K": 512}  # 16 KiB of bfloat16 under way in each of a multiprocessor's programs
    _gathered_up_kernel[(tokens * top_k, triton.cdiv(width, sizes["ROWS"] // 2))](
        x, w13, expert_ids, expert_weights, a, x.stride(0), hidden, width, TOP_K=top_k, **sizes
    )
    _gathered_down_kernel[(tokens, triton.cdiv(hidden, sizes["ROWS"]))](
        a, w2, expert_ids, expert_weights, y, width, hidden, TOP_K=top_k, **sizes
    )
    return y


@triton.jit
def _row_product(w, w_rows, x, size_in, BLOCK_K: tl.constexpr):
    """Return w x of rows `w_rows` of w, all of which exist, and one row of x, in float32.

    Every byte of the weight goes once from memory into a register, 16 of them at a time.
    """
    k = tl.arange(0, BLOCK_K)
    out = tl.zeros((w_rows.shape[0], BLOCK_K // 8), tl.float32)
    for first in range(0, size_in, BLOCK_K):
        inside = first + k < size_in
        left = tl.load(w + w_rows[:, None] * size_in + (first + k)[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(x + first + k, mask=inside, other=0.0)
        products = left.to(tl.float32) * right.to(tl.float32)[None, :]
        out += tl.sum(tl.reshape(products, (w_rows.shape[0], BLOCK_K // 8, 8)), 2)  # a thread's own
    return tl.sum(out, 1)


@triton.jit
def _gathered_up_kernel(
    x,
    w13,
    expert_ids,
    expert_weights,
    a,
    x_stride,
    hidden,
    width,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ROWS / 2 columns of one pair's a."""
    pair = tl.program_id(0)
    half: tl.constexpr = ROWS // 2
    if tl.load(expert_weights + pair).to(tl.float32) != 0:
        n = tl.arange(0, ROWS)
        w_rows = n // half * width + tl.minimum(tl.program_id(1) * half + n % half, width - 1)
        w13 += tl.load(expert_ids + pair) * 2 * width * hidden
        out = _row_product(w13, w_rows, x + (pair // TOP_K).to(tl.int64) * x_stride, hidden, BLOCK_K)
        gate, up = tl.split(tl.permute(tl.reshape(out, (2, half)), (1, 0)))
        columns = tl.program_id(1) * half + tl.arange(0, half)
        result = gate * tl.sigmoid(gate) * up
        tl.store(a + pair * width + columns, result.to(a.dtype.element_ty), mask=columns < width)


@triton.jit
def _gathered_down_kernel(
    a,
    w2,
    expert_ids,
    expert_weights,
    y,
    width,
    hidden,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ROWS columns of one token's result: its experts one after the other, in the order of k."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w_rows = tl.minimum(columns, hidden - 1)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        weight = tl.load(expert_weights + pair).to(tl.float32)
        if weight != 0:
            w = w2 + tl.load(expert_ids + pair) * hidden * width
            total += weight * _row_product(w, w_rows, a + pair * width, width, BLOCK_K)
    tl.store(y + token * hidden + columns, total.to(y.dtype.element_ty), mask=columns < hidden)
