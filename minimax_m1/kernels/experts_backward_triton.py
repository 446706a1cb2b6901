"""Training of the experts on a GPU: forward that keeps the pre-activations, and an analytic backward in Triton.

Shapes: as in `experts`; h [S, 2 I] are the pre-activations, sorted by expert, gate before up. With g the gradient of a
row's result, the output's gradient at its token:

    grad_a = g w2_e;  grad_weight = grad_a · a;  grad_h = weight · [grad_a up silu'(gate), grad_a silu(gate)]
    grad_x = sum_k grad_h w13_e;  grad_w2_e = sum of g^T (weight a);  grad_w13_e = sum of grad_h^T x, over e's rows

Where an expert's rows begin is known on the device alone, so grids are upper bounds of the shapes, and the host never
waits. Every sum is taken in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_m1.kernels.experts_triton import (
    GROUP,
    VARYING,
    add_up,
    down_product,
    find_tile,
    route_triton,
    row_tiles,
    sort_rows,
    stages_of_large_tiles,
    swizzle,
    up_product,
)


class ExpertMLP(torch.autograd.Function):
    """`experts.expert_mlp` of x, w13, w2, expert_ids, expert_weights, for training: every choice is run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        x = x.contiguous()
        order, offsets = sort_rows(expert_ids, None, w13.shape[0])
        a, h = up_product(x, _like(w13, x), order, offsets, expert_ids.shape[1], keep=True)
        y = down_product(a, _like(w2, x), order, offsets)
        ctx.save_for_backward(x, w13, w2, expert_weights, order, offsets, h)
        return add_up(y, expert_weights, expert_ids.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, expert_weights, order, offsets, h = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, _, needs_weights = ctx.needs_input_grad
        grad_y, top_k = grad_y.contiguous(), expert_weights.shape[1]
        grad_h, weighted_a, grad_weights = activation_grads(
            grad_y, _like(w2, x), h, expert_weights, order, offsets, keep_h=needs_x or needs_w13, keep_a=needs_w2
        )
        # Frozen experts (LoRA elsewhere, a part that is not trained) are spared their products.
        grad_x = grad_w13 = grad_w2 = None
        if weighted_a is not None:
            grad_w2 = torch.empty_like(w2, memory_format=torch.contiguous_format)
            weight_grads(grad_y, weighted_a, order, offsets, grad_w2, left_top_k=top_k, right_top_k=0)
        if grad_h is not None and needs_w13:
            grad_w13 = torch.empty_like(w13, memory_format=torch.contiguous_format)
            weight_grads(grad_h, x, order, offsets, grad_w13, left_top_k=0, right_top_k=top_k)
        if grad_h is not None and needs_x:
            grad_x = add_up(row_grads(grad_h, _like(w13, x), order, offsets), None, top_k)
        return grad_x, grad_w13, grad_w2, None, grad_weights if needs_weights else None


class Route(torch.autograd.Function):
    """`experts.route` of logits [T, E] float32 and K, with the gradients of probabilities and weights in one kernel."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        probs, expert_ids, weights = route_triton(logits, top_k)
        ctx.mark_non_differentiable(expert_ids)
        ctx.save_for_backward(probs, expert_ids)
        return probs, expert_ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probs: Tensor, _: Tensor, grad_weights: Tensor) -> tuple[Tensor, None]:
        probs, expert_ids = ctx.saved_tensors
        return route_grad(probs, expert_ids, grad_probs, grad_weights), None


def activation_grads(
    grad_y: Tensor,
    w2: Tensor,
    h: Tensor,
    expert_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    keep_h: bool,
    keep_a: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Multiply the output's gradient by w2 and carry it through the activation.

    Args:
        grad_y: [T, D]. w2: [E, D, I]. h: [S, 2 I]. All of one dtype, contiguous.
        expert_weights: [T, K].
        order, offsets: of `experts_triton.sort_rows`.
        keep_h, keep_a: whether the first and the second result are wanted; None otherwise.

    Returns:
        grad_h [S, 2 I] and weight · a [S, I] (w2's gradient needs it), both in sorted rows, and grad_weights [T, K].
    """
    num_experts, hidden, width = w2.shape
    pairs, top_k = h.shape[0], expert_weights.shape[1]
    sizes = _tile_sizes(h, hidden, width)
    sizes["num_warps"] *= 2  # half the registers: the other half is for what follows the product
    tiles, column_tiles = row_tiles(pairs, num_experts, sizes["BLOCK_M"]), triton.cdiv(width, sizes["BLOCK_N"])
    grad_h = torch.empty_like(h) if keep_h else None
    weighted_a = h.new_empty(pairs, width) if keep_a else None
    partial = h.new_empty(column_tiles, pairs, dtype=torch.float32)  # grad_weights, each tile of columns by itself
    _activation_grads_kernel[(tiles * column_tiles,)](
        grad_y,
        w2,
        h,
        expert_weights.contiguous(),
        order,
        offsets,
        grad_h,
        weighted_a,
        partial,
        pairs,
        hidden,
        width,
        num_experts,
        top_k,
        tiles,
        **sizes,
        **_constants(num_experts, hidden, width, sizes),
    )
    return grad_h, weighted_a, partial.sum(0).view_as(expert_weights).to(expert_weights.dtype)


@triton.jit(do_not_specialize=VARYING)
def _activation_grads_kernel(
    grad_y,
    w2,
    h,
    expert_weights,
    order,
    offsets,
    grad_h,
    weighted_a,
    partial,
    pairs,
    hidden,
    width,
    num_experts,
    top_k,
    row_tiles,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """BLOCK_M rows of grad_h by BLOCK_N columns of each half, and the part that these have in grad_weights."""
    row_tile, column_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, first, end = find_tile(offsets, row_tile, num_experts, BLOCK_E, BLOCK_M)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        order_rows = tl.load(order + tl.minimum(rows, end - 1))
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        w = w2 + expert.to(tl.int64) * hidden * width
        places = (order_rows // top_k).to(tl.int64) * hidden
        grad_a = _product(grad_y, places, w, columns, hidden, width, EVEN, BLOCK_K)
        weight = tl.load(expert_weights + order_rows).to(tl.float32)
        # 32 or 64 columns at a time: gates and ups of a large tile do not fit into registers beside it.
        HALVINGS: tl.constexpr = 3 if BLOCK_N == 256 else 0
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(1 << HALVINGS):
            column = column_tile * BLOCK_N + part * (BLOCK_N >> HALVINGS)
            grad_part = _part(grad_a, part, HALVINGS)
            sums += _carry_through(grad_part, h, weight, grad_h, weighted_a, first, end, column, width, EVEN)
        tl.store(partial + column_tile * pairs + order_rows, sums, mask=rows < end)


@triton.jit
def _part(tile, part: tl.constexpr, HALVINGS: tl.constexpr):
    """Return one of 2^HALVINGS equal parts of a tile's columns; they stay where they are, in registers."""
    for step in tl.static_range(HALVINGS):
        halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        tile = tl.split(tl.permute(halves, (0, 2, 1)))[(part >> (HALVINGS - 1 - step)) & 1]
    return tile


@triton.jit
def _carry_through(grad_a, h, weight, grad_h, weighted_a, first, end, column, width, EVEN: tl.constexpr):
    """Write grad_h and weight · a from row `first` and `column` on, and return this part of grad_weights."""
    i, j = tl.arange(0, grad_a.shape[0])[:, None], tl.arange(0, grad_a.shape[1])[None, :]
    inside = i < end - first
    if not EVEN:
        inside &= j < width - column
    corner, places = first.to(tl.int64) * 2 * width + column, i * (2 * width) + j
    gate = tl.load(h + corner + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + corner + width + places, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    act = gate * sigmoid
    a = act * up
    sums = tl.sum(grad_a * a, 1)
    if weighted_a is not None:
        a_tile = weighted_a + first.to(tl.int64) * width + column
        tl.store(a_tile + i * width + j, (weight[:, None] * a).to(weighted_a.dtype.element_ty), mask=inside)
    if grad_h is not None:
        grad_a *= weight[:, None]
        # silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g))) = sigmoid + act (1 - sigmoid)
        grad_gate = grad_a * up * (sigmoid + act * (1 - sigmoid))
        tl.store(grad_h + corner + places, grad_gate.to(grad_h.dtype.element_ty), mask=inside)
        tl.store(grad_h + corner + width + places, (grad_a * act).to(grad_h.dtype.element_ty), mask=inside)
    return sums


def row_grads(grad_h: Tensor, w13: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Return grad_h w13 [S, D], the gradients of the experts' inputs, in the order of pairs.

    grad_h [S, 2 I] in sorted rows, w13 [E, 2 I, D] of the same dtype.
    """
    num_experts, inner, hidden = w13.shape
    pairs = grad_h.shape[0]
    sizes = _tile_sizes(grad_h, inner, hidden)
    tiles = row_tiles(pairs, num_experts, sizes["BLOCK_M"])
    out = grad_h.new_empty(pairs, hidden)
    _row_grads_kernel[(tiles * triton.cdiv(hidden, sizes["BLOCK_N"]),)](
        grad_h,
        w13,
        order,
        offsets,
        out,
        inner,
        hidden,
        num_experts,
        tiles,
        **sizes,
        **_constants(num_experts, inner, hidden, sizes),
    )
    return out


@triton.jit(do_not_specialize=VARYING)
def _row_grads_kernel(
    grad_h,
    w13,
    order,
    offsets,
    out,
    inner,
    hidden,
    num_experts,
    row_tiles,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """BLOCK_M rows by BLOCK_N columns, each row written to its pair's place."""
    row_tile, column_tile = swizzle(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert, first, end = find_tile(offsets, row_tile, num_experts, BLOCK_E, BLOCK_M)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        sources = tl.minimum(rows, end - 1)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        w = w13 + expert.to(tl.int64) * inner * hidden
        grad = _product(grad_h, sources.to(tl.int64) * inner, w, columns, inner, hidden, EVEN, BLOCK_K)
        inside = (rows < end)[:, None] & (columns < hidden)[None, :]
        places = tl.load(order + sources).to(tl.int64)[:, None] * hidden + columns[None, :]
        tl.store(out + places, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(x, x_places, w, columns, size_in, size_out, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return x w in float32, [BLOCK_M, BLOCK_N]: rows of x from `x_places` on, all valid, by columns of w."""
    k = tl.arange(0, BLOCK_K)
    x_tile = x + x_places[:, None] + k[None, :]
    w_tile = w + k[:, None] * size_out + columns[None, :]
    out = tl.zeros((x_places.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, size_in, BLOCK_K):
        if EVEN:
            left, right = tl.load(x_tile), tl.load(w_tile)
        else:
            valid = first + k < size_in
            left = tl.load(x_tile, mask=valid[None, :], other=0.0)
            right = tl.load(w_tile, mask=valid[:, None] & (columns < size_out)[None, :], other=0.0)
        out = tl.dot(left, right, out, input_precision="tf32x3")  # of float32; else it says nothing
        x_tile += BLOCK_K
        w_tile += BLOCK_K * size_out
    return out


def weight_grads(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, out: Tensor, *, left_top_k: int, right_top_k: int
) -> None:
    """Write the sum of left^T right over each expert's rows into out [E, M, N]; zeros for an expert without rows.

    left [·, M] and right [·, N] have sorted rows where their top_k is 0, and otherwise a row for each token, which its
    K pairs share.
    """
    num_experts, size_m, size_n = out.shape
    sizes = _tile_sizes(left, size_m, size_n)
    sizes["num_stages"] += 1  # the first is that of `order`
    tiles, column_tiles = triton.cdiv(size_m, sizes["BLOCK_M"]), triton.cdiv(size_n, sizes["BLOCK_N"])
    _weight_grads_kernel[(num_experts * tiles * column_tiles,)](
        left,
        right,
        order,
        offsets,
        out,
        size_m,
        size_n,
        left_top_k,
        right_top_k,
        **sizes,
        GROUP=GROUP,
    )


@triton.jit
def _weight_grads_kernel(
    left,
    right,
    order,
    offsets,
    out,
    size_m,
    size_n,
    LEFT_TOP_K: tl.constexpr,
    RIGHT_TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """BLOCK_M rows by BLOCK_N columns of one expert's gradient: the sum over its rows, BLOCK_K at a time."""
    row_tiles, column_tiles = tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    row_tile, column_tile = swizzle(tl.program_id(0) % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + k
        valid = rows < end
        pair = tl.load(order + rows, mask=valid, other=0)
        left_rows, right_rows = rows, rows
        if LEFT_TOP_K > 0:
            left_rows = pair // LEFT_TOP_K
        if RIGHT_TOP_K > 0:
            right_rows = pair // RIGHT_TOP_K
        left_places = left_rows.to(tl.int64)[:, None] * size_m + m[None, :]
        right_places = right_rows.to(tl.int64)[:, None] * size_n + n[None, :]
        left_tile = tl.load(left + left_places, mask=valid[:, None] & (m < size_m)[None, :], other=0.0)
        right_tile = tl.load(right + right_places, mask=valid[:, None] & (n < size_n)[None, :], other=0.0)
        total = tl.dot(tl.trans(left_tile), right_tile, total, input_precision="tf32x3")
    inside = (m < size_m)[:, None] & (n < size_n)[None, :]
    places = expert.to(tl.int64) * size_m * size_n + m.to(tl.int64)[:, None] * size_n + n[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


def route_grad(probs: Tensor, expert_ids: Tensor, grad_probs: Tensor, grad_weights: Tensor) -> Tensor:
    """Return the gradient of the router's logits [T, E].

    Args:
        probs, expert_ids: what `experts_triton.route_triton` returned.
        grad_probs: [T, E], of any strides: that of the balance loss is one row, expanded. grad_weights: [T, K].
    """
    tokens, num_experts = probs.shape
    grad = torch.empty_like(probs)
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, 1024 // block_e)
    _route_grad_kernel[(triton.cdiv(tokens, block_t),)](
        probs,
        expert_ids,
        grad_probs,
        grad_weights.contiguous(),
        grad,
        tokens,
        num_experts,
        *grad_probs.stride(),
        TOP_K=expert_ids.shape[1],
        BLOCK_T=block_t,
        BLOCK_E=block_e,
    )
    return grad


@triton.jit(do_not_specialize=VARYING)
def _route_grad_kernel(
    probs,
    expert_ids,
    grad_probs,
    grad_weights,
    grad,
    tokens,
    num_experts,
    stride_t,
    stride_e,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_T tokens: through the division by the sum of the chosen, the choice, and the softmax."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_token = t < tokens
    inside = is_token[:, None] & (e < num_experts)[None, :]
    places = t[:, None] * num_experts + e[None, :]
    p = tl.load(probs + places, mask=inside, other=0.0)
    g = tl.load(grad_probs + t[:, None] * stride_t + e[None, :] * stride_e, mask=inside, other=0.0)
    # weight_k = p_k / s, s = sum of the chosen p: grad p_k = (grad weight_k - sum_j grad weight_j weight_j) / s
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)  # 1 where an expert was chosen
    given = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)  # the gradient of its weight
    for i in tl.static_range(TOP_K):
        is_choice = e[None, :] == tl.load(expert_ids + t * TOP_K + i, mask=is_token, other=0)[:, None]
        grad_weight = tl.load(grad_weights + t * TOP_K + i, mask=is_token, other=0.0)
        chosen = tl.where(is_choice, 1.0, chosen)
        given = tl.where(is_choice, grad_weight[:, None], given)
    s = tl.maximum(tl.sum(chosen * p, 1), 1e-30)  # at least 1 / E; of a surplus token 0
    mean = tl.sum(given * p, 1) / s
    g += chosen * (given - mean[:, None]) / s[:, None]
    tl.store(grad + places, p * (g - tl.sum(p * g, 1)[:, None]), mask=inside)


def _like(w: Tensor, x: Tensor) -> Tensor:
    """Return w contiguous and in the dtype of x; converted once, as the products read it many times."""
    return w.to(x.dtype).contiguous()


def _tile_sizes(x: Tensor, *lengths: int) -> dict[str, int]:
    """Return the constants of a product of many rows like x of matrices whose rows have these lengths.

    float32 takes three products of TF32, and rows of lengths that 16 does not divide many small loads: smaller tiles.
    """
    if x.dtype == torch.float32 or any(length % 16 for length in lengths):
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    return {
        "BLOCK_M": 128,
        "BLOCK_N": 256,
        "BLOCK_K": 64,
        "num_warps": 8,
        "num_stages": stages_of_large_tiles(x.device),
    }


def _constants(num_experts: int, size_in: int, size_out: int, sizes: dict[str, int]) -> dict[str, int]:
    """Return what else a grouped product's kernel is compiled for."""
    is_even = size_in % sizes["BLOCK_K"] == 0 and size_out % sizes["BLOCK_N"] == 0
    return {"EVEN": is_even, "BLOCK_E": triton.next_power_of_2(num_experts), "GROUP": GROUP}
