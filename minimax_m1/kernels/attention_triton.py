"""Triton kernels of softmax attention: packed, with gradients, and over the pages of a cache.

Shapes: as in `attention`; R = H / G query heads share a key head. A program holds BM queries and walks along the keys
BN at a time with a running maximum and sum (FlashAttention-2, arXiv 2307.08691); gradients are summed by one program
each, so the same inputs give the same bits.

Over pages a program's BM queries are BM // R tokens times the R heads of a group, so a page is read once for all of
them, and few rows (decoding) fill a matrix unit's tile. Few sequences with long contexts would leave most of a GPU
idle: their keys are divided into parts, and a second kernel joins the parts by their log-sum-exps.

Scores are in units of log 2, because a GPU has an exp2: log2(e) is part of the scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
FULL = 264  # programs of `_paged` that keep a GPU's memory busy: two on each multiprocessor of an H100 or H200

VARYING = "cu_seqlens kv_lens slots num_rows num_seqs splits".split()  # differ from call to call: no new compilation


# -- packed sequences -------------------------------------------------------------------------------------------------


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, max_seqlen: int | None
) -> Tensor:
    """Return `attention.softmax_attention`: by a library's kernel if `library` names one for q, else by ours."""
    attend = library(q)
    if attend is not None:
        return attend(q, k, v, cu_seqlens, window, max_seqlen or q.shape[0])
    return attend_own(q, k, v, cu_seqlens, window)


def library(q: Tensor) -> Callable[..., Tensor] | None:
    """Return the library's kernel that packed attention of tensors like q runs through; None: our own.

    FlashAttention, from its own package or within PyTorch, takes 16-bit floats on a GPU since Ampere.
    """
    return _library(q.dtype, q.shape[-1], q.device) if q.is_cuda and len(q) else None


@cache
def _library(dtype: torch.dtype, head_dim: int, device: torch.device) -> Callable[..., Tensor] | None:
    if dtype == torch.float32 or head_dim > 256 or head_dim % 8:
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if find_spec("flash_attn") is not None:
        return _flash_attn
    return _varlen_attn if "window_size" in _varlen_options() else None  # PyTorch 2.10's cannot take a window


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # PyTorch 2.11 takes grouped heads without being told
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _varlen_options() else {}
    window_size = (-1 if window is None else window - 1, 0)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *lengths, window_size=window_size, **grouped)
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen_options() -> frozenset[str]:
    """The arguments that `varlen_attn` has in this PyTorch."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def attend_own(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Return `attention.softmax_attention` through our kernels; the same inputs give the same gradients to the bit."""
    q, k, v = (_rows(x) for x in (q, k, v))
    return _Packed.apply(q, k, v, cu_seqlens, window)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        if len(q):
            wide = _is_wide(q)
            bm, bn = (32, 32) if wide else (128, 64)
            _packed_forward[_grid(q, cu_seqlens, bm)](
                *(q, k, v, o, lse, cu_seqlens, *_sizes(q, k, cu_seqlens), *q.stride()[:2], *k.stride()[:2]),
                *v.stride()[:2],
                **_options(q, window, bm, bn),
                num_warps=8,
                num_stages=2 if wide else 3,
            )
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.window = window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        do = _rows(do)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        if len(q):
            wide = _is_wide(q)
            inputs = (q, k, v, do, lse, delta, cu_seqlens, *_sizes(q, k, cu_seqlens), *q.stride()[:2])
            strides = (*k.stride()[:2], *v.stride()[:2], *do.stride()[:2])
            bm, bn = (32, 32) if wide else (128, 64)
            _packed_dq[_grid(q, cu_seqlens, bm)](
                *(o, dq, *inputs, *strides),
                **_options(q, ctx.window, bm, bn),
                num_warps=8,
                num_stages=1 if wide else 2,
            )
            bm, bn = (32, 32) if wide else (32, 128)  # 64 rows would spill
            _packed_dkv[_grid(k, cu_seqlens, bn)](
                *(dk, dv, *inputs, *strides),
                **_options(q, ctx.window, bm, bn),
                num_warps=8,
                num_stages=1 if wide else 3,
            )
        return dq, dk, dv, None, None


def _is_wide(q: Tensor) -> bool:
    """Whether heads are too large for the tiles that suit M1's, 128 numbers of 16 bits; small ones are for memory."""
    return q.dtype == torch.float32 or q.shape[-1] > 128


def _rows(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous; the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor, cu_seqlens: Tensor, block: int) -> tuple[int, int]:
    """As many blocks as packed sequences can need at most (see `_find`), and heads."""
    return x.shape[0] // block + cu_seqlens.shape[0] - 1, x.shape[1]


def _sizes(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[int, int, int]:
    return q.shape[0], cu_seqlens.shape[0] - 1, q.shape[1] // k.shape[1]


def _options(q: Tensor, window: int | None, bm: int, bn: int) -> dict[str, Any]:
    """The compile-time values that all kernels share."""
    head_dim = q.shape[-1]
    return dict(
        SCALE=head_dim**-0.5 * LOG2_E,
        WINDOW=window or 0,
        D=head_dim,
        BD=max(16, triton.next_power_of_2(head_dim)),
        BM=bm,
        BN=bn,
        # three products of 10-bit mantissas each: float32 to a few last bits, on the matrix units
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
    )


@triton.jit
def _find(cu_seqlens, num_seqs, index, BLOCK: tl.constexpr):
    """The sequence that block `index` lies in, and which of its blocks it is (it may lie behind its end).

    Sequence i owns the blocks from cu_seqlens[i] // BLOCK + i on: enough for its rows, whatever they are, and their
    total is known from shapes.
    """
    before = tl.zeros((), tl.int32)
    for first in range(0, num_seqs, 128):
        i = first + tl.arange(0, 128)
        starts = tl.load(cu_seqlens + i, mask=i < num_seqs, other=0) - tl.load(cu_seqlens)
        before += tl.sum(((i < num_seqs) & (starts // BLOCK + i <= index)).to(tl.int32), 0)
    seq = before - 1
    start = tl.load(cu_seqlens + seq) - tl.load(cu_seqlens)
    return seq, index - (start // BLOCK + seq)


@triton.jit
def _absorb(q, k, v, visible, o, top, total, MASKED: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys k, v [BN, BD] into the output o, maximum `top` and sum `total` so far of queries q [BM, BD]."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # rows that see none of these keys
    p = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(p, 1)
    o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision=PRECISION)
    return o, new_top, total


@triton.jit(do_not_specialize=VARYING)
def _packed_forward(
    q, k, v, o, lse, cu_seqlens, num_rows, num_seqs, R,
    q_row, q_head, k_row, k_head, v_row, v_head,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: one head of BM rows of one sequence. The last blocks, which see most, start first."""
    head = tl.program_id(1).to(tl.int64)
    seq, block = _find(cu_seqlens, num_seqs, tl.num_programs(0) - 1 - tl.program_id(0), BM)
    start = tl.load(cu_seqlens + seq)
    length = tl.load(cu_seqlens + seq + 1) - start
    first = block * BM
    if first >= length:
        return
    rows, dims, cols = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    inside = (rows < length)[:, None] & (dims < D)[None, :]
    at = start.to(tl.int64)
    queries = tl.load(q + (at + rows)[:, None] * q_row + head * q_head + dims[None, :], mask=inside, other=0.0)
    k += at * k_row + (head // R) * k_head
    v += at * v_row + (head // R) * v_head

    out = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(first - WINDOW + 1, 0) // BN * BN
    middle = begin if WINDOW else first // BN * BN  # every row sees all keys before
    for j in range(begin, middle, BN):
        at_keys = (j + cols).to(tl.int64)[:, None]
        keys = tl.load(k + at_keys * k_row + dims[None, :], mask=dims[None, :] < D, other=0.0)
        values = tl.load(v + at_keys * v_row + dims[None, :], mask=dims[None, :] < D, other=0.0)
        out, top, total = _absorb(queries, keys, values, None, out, top, total, False, SCALE, PRECISION)
    for j in range(middle, tl.minimum(first + BM, length), BN):
        at_keys = (j + cols).to(tl.int64)[:, None]
        there = ((j + cols) < length)[:, None] & (dims < D)[None, :]
        keys = tl.load(k + at_keys * k_row + dims[None, :], mask=there, other=0.0)
        values = tl.load(v + at_keys * v_row + dims[None, :], mask=there, other=0.0)
        visible = _visible(rows[:, None], (j + cols)[None, :], WINDOW)
        out, top, total = _absorb(queries, keys, values, visible, out, top, total, True, SCALE, PRECISION)

    total = tl.where(rows < length, total, 1.0)
    o += ((at + rows) * tl.num_programs(1) + head)[:, None] * D + dims[None, :]
    tl.store(o, (out / total[:, None]).to(o.dtype.element_ty), mask=inside)
    tl.store(lse + head * num_rows + at + rows, top + tl.log2(total), mask=rows < length)


@triton.jit
def _visible(rows, keys, WINDOW: tl.constexpr):
    """Which keys a row sees; both are places in their sequence."""
    if WINDOW:
        return (keys <= rows) & (keys > rows - WINDOW)
    return keys <= rows


@triton.jit(do_not_specialize=VARYING)
def _packed_dq(
    o, dq, q, k, v, do, lse, delta, cu_seqlens, num_rows, num_seqs, R,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: dq of one head of BM rows of one sequence; also delta = sum(do · o), which `_packed_dkv` reads."""
    head = tl.program_id(1).to(tl.int64)
    seq, block = _find(cu_seqlens, num_seqs, tl.num_programs(0) - 1 - tl.program_id(0), BM)
    start = tl.load(cu_seqlens + seq)
    length = tl.load(cu_seqlens + seq + 1) - start
    first = block * BM
    if first >= length:
        return
    rows, dims, cols = first + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    inside = (rows < length)[:, None] & (dims < D)[None, :]
    at = start.to(tl.int64)
    own = ((at + rows) * tl.num_programs(1) + head)[:, None] * D + dims[None, :]
    queries = tl.load(q + (at + rows)[:, None] * q_row + head * q_head + dims[None, :], mask=inside, other=0.0)
    grads = tl.load(do + (at + rows)[:, None] * do_row + head * do_head + dims[None, :], mask=inside, other=0.0)
    outputs = tl.load(o + own, mask=inside, other=0.0)
    shares = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + head * num_rows + at + rows, shares, mask=rows < length)
    norms = tl.load(lse + head * num_rows + at + rows, mask=rows < length, other=0.0)
    k += at * k_row + (head // R) * k_head
    v += at * v_row + (head // R) * v_head

    out = tl.zeros((BM, BD), tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(first - WINDOW + 1, 0) // BN * BN
    for j in range(begin, tl.minimum(first + BM, length), BN):
        at_keys = (j + cols).to(tl.int64)[:, None]
        there = ((j + cols) < length)[:, None] & (dims < D)[None, :]
        keys = tl.load(k + at_keys * k_row + dims[None, :], mask=there, other=0.0)
        values = tl.load(v + at_keys * v_row + dims[None, :], mask=there, other=0.0)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE
        dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        p = tl.where(_visible(rows[:, None], (j + cols)[None, :], WINDOW), tl.exp2(s - norms[:, None]), 0.0)
        ds = p * (dp - shares[:, None])
        out = tl.dot(ds.to(keys.dtype), keys, out, input_precision=PRECISION)
    tl.store(dq + own, (out * (SCALE * LN_2)).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _packed_dkv(
    dk, dv, q, k, v, do, lse, delta, cu_seqlens, num_rows, num_seqs, R,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of one key head of BN rows of one sequence, over the R query heads that share it."""
    group = tl.program_id(1).to(tl.int64)
    seq, block = _find(cu_seqlens, num_seqs, tl.program_id(0), BN)
    start = tl.load(cu_seqlens + seq)
    length = tl.load(cu_seqlens + seq + 1) - start
    first = block * BN
    if first >= length:
        return
    cols, dims, steps = first + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BM)
    inside = (cols < length)[:, None] & (dims < D)[None, :]
    at = start.to(tl.int64)
    keys = tl.load(k + (at + cols)[:, None] * k_row + group * k_head + dims[None, :], mask=inside, other=0.0)
    values = tl.load(v + (at + cols)[:, None] * v_row + group * v_head + dims[None, :], mask=inside, other=0.0)
    begin, end = first // BM * BM, length
    if WINDOW:
        end = tl.minimum(length, first + BN - 1 + WINDOW)
    blocks = tl.cdiv(end - begin, BM)

    dk_sum = tl.zeros((BN, BD), tl.float32)
    dv_sum = tl.zeros((BN, BD), tl.float32)
    for step in range(blocks * R):  # one loop over heads and rows, so that loads run ahead across heads
        head = group * R + step // blocks
        rows = begin + (step % blocks) * BM + steps
        real = rows < length
        there = real[:, None] & (dims < D)[None, :]
        queries = tl.load(q + (at + rows)[:, None] * q_row + head * q_head + dims[None, :], mask=there, other=0.0)
        grads = tl.load(do + (at + rows)[:, None] * do_row + head * do_head + dims[None, :], mask=there, other=0.0)
        norms = tl.load(lse + head * num_rows + at + rows, mask=real, other=float("inf"))  # rows behind the end: p = 0
        shares = tl.load(delta + head * num_rows + at + rows, mask=real, other=0.0)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE
        p = tl.where(_visible(rows[None, :], cols[:, None], WINDOW), tl.exp2(s - norms[None, :]), 0.0)
        dv_sum = tl.dot(p.to(grads.dtype), grads, dv_sum, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        ds = p * (dp - shares[None, :])
        dk_sum = tl.dot(ds.to(queries.dtype), queries, dk_sum, input_precision=PRECISION)
    own = ((at + cols) * tl.num_programs(1) + group)[:, None] * D + dims[None, :]
    tl.store(dk + own, (dk_sum * (SCALE * LN_2)).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + own, dv_sum.to(dv.dtype.element_ty), mask=inside)


# -- over pages -------------------------------------------------------------------------------------------------------


def attend_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    num_decodes: int,
    num_decode_rows: int,
    window: int | None,
) -> Tensor:
    """Return `attention.softmax_attention_cached`; the first `num_decode_rows` rows are the decoding sequences'."""
    q = _rows(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for decodes, seqs, rows in (
        (True, slice(0, num_decodes), slice(0, num_decode_rows)),
        (False, slice(num_decodes, None), slice(num_decode_rows, None)),
    ):
        if len(q[rows]):
            bounds = cu_seqlens[seqs.start : None if seqs.stop is None else seqs.stop + 1]
            of_each = (bounds, kv_lens[seqs], slots[seqs])
            _attend_pages(q[rows], keys, values, *of_each, block_tables, decodes, window, out[rows])
    return out


def _attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    decodes: bool,
    window: int | None,
    out: Tensor,
) -> None:
    """The sequences that decode, or all others; cu_seqlens may begin above 0."""
    (num_rows, heads, head_dim), num_seqs, groups = q.shape, slots.shape[0], keys.shape[0]
    shared = heads // groups
    wide = _is_wide(q)
    tokens = -(-num_rows // num_seqs) if decodes else (32 if wide else 128) // shared
    bm = max(16, triton.next_power_of_2(max(1, tokens) * shared))
    tokens = bm // shared
    one_each = decodes and num_rows == num_seqs  # then a block is a sequence
    blocks = num_seqs if one_each else num_rows // tokens + num_seqs
    programs = blocks * groups
    # a short chunk behind a long past is divided too; a program of prefill has its multiprocessor for itself
    busy, alone = (programs, groups) if decodes else (2 * programs, programs)
    splits, fewest_pages = _splits(busy, alone, block_tables.shape[1])
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, num_rows, heads, dtype=torch.float32, device=q.device)
    _paged[blocks, groups, splits](
        *(q, keys, values, partial, lse, cu_seqlens, kv_lens, slots, block_tables),
        *(num_rows, num_seqs, *q.stride()[:2], *keys.stride()[:2], *values.stride()[:2], block_tables.stride(0)),
        R=shared,
        PARTIAL=splits > 1,
        ONE_EACH=one_each,
        FEWEST_PAGES=fewest_pages,
        **_options(q, window, bm, keys.shape[2]),
        num_warps=8 if wide or bm > 64 else 4,
        num_stages=2 if wide else 5,  # two of them hide where the page lies
    )
    if splits > 1:
        options = _options(q, window, bm, keys.shape[2])
        _join[num_rows, heads](
            *(partial, lse, out, num_rows, splits),
            D=head_dim,
            BD=options["BD"],
            BS=triton.next_power_of_2(splits),
        )


def _splits(programs: int, alone: int, most_pages: int) -> tuple[int, int]:
    """Return into how many parts each sequence's keys are divided at most, and the fewest pages of a part.

    Both depend on shapes only, for a captured graph runs at any lengths; the kernel makes as many parts as a sequence's
    length is worth, and programs of surplus ones return at once. Parts must fill a GPU with the `programs` that there
    would be without them, and half of it with the `alone` of one sequence: it may be the only long one.
    """
    fewest = 4 if programs < FULL else 16  # what a part costs, its float32 output above all, is shared by more keys
    return max(1, min(-(-most_pages // fewest), max(-(-FULL // programs), -(-FULL // (2 * alone))))), fewest


@triton.jit(do_not_specialize=VARYING)
def _paged(
    q, k, v, o, lse, cu_seqlens, kv_lens, slots, block_tables, num_rows, num_seqs,
    q_row, q_head, k_group, k_page, v_group, v_page, table_row,
    R: tl.constexpr, PARTIAL: tl.constexpr, ONE_EACH: tl.constexpr, FEWEST_PAGES: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: the R heads of one group of BM // R rows of one sequence, over one part of its pages of BN tokens.

    PARTIAL: o [splits, T, H, D] float32 and lse [splits, T, H] take the parts' results, else o the whole one.
    """
    group, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    if ONE_EACH:
        seq, block = tl.program_id(0), 0
    else:
        seq, block = _find(cu_seqlens, num_seqs, tl.num_programs(0) - 1 - tl.program_id(0), BM // R)
    start = tl.load(cu_seqlens + seq)
    num_new = tl.load(cu_seqlens + seq + 1) - start
    first = block * (BM // R)
    if first >= num_new:
        return
    heads = tl.num_programs(1) * R
    length = tl.load(kv_lens + seq).to(tl.int32)
    m, dims, cols = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    rows = first + m // R
    real = (rows < num_new) & (m // R < BM // R)
    inside = real[:, None] & (dims < D)[None, :]
    at = (start - tl.load(cu_seqlens)).to(tl.int64) + rows
    head = group * R + m % R
    places = rows + (length - num_new)  # of the rows in their sequence

    seen = tl.minimum(first + BM // R, num_new) + (length - num_new)  # tokens that some row sees
    begin = 0
    if WINDOW:
        begin = tl.maximum(first + (length - num_new) - WINDOW + 1, 0) // BN
    last = tl.cdiv(seen, BN)
    each = tl.cdiv(last - begin, tl.minimum(tl.num_programs(2), tl.cdiv(last - begin, FEWEST_PAGES)))
    begin += split * each
    end = tl.minimum(begin + each, last)
    if PARTIAL:
        at_part = at + split.to(tl.int64) * num_rows
        if begin >= end:
            tl.store(lse + at_part * heads + head, tl.full((BM,), float("-inf"), tl.float32), mask=real)
            return
    queries = tl.load(q + (at * q_row + head * q_head)[:, None] + dims[None, :], mask=inside, other=0.0)
    whole = tl.minimum(end, (first + (length - num_new) + 1) // BN)  # pages that every row sees all of
    if WINDOW:
        whole = begin
    table = block_tables + tl.load(slots + seq) * table_row
    k += group * k_group
    v += group * v_group
    within = cols[:, None] * D + dims[None, :]

    out = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for j in range(begin, whole):
        page = tl.load(table + j).to(tl.int64)
        keys = tl.load(k + page * k_page + within, mask=dims[None, :] < D, other=0.0)
        values = tl.load(v + page * v_page + within, mask=dims[None, :] < D, other=0.0)
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        out, top, total = _absorb(queries, keys, values, None, out, top, total, False, SCALE, PRECISION)
    for j in range(tl.maximum(begin, whole), end):
        page = tl.load(table + j).to(tl.int64)
        there = ((j * BN + cols) < length)[:, None] & (dims < D)[None, :]
        keys = tl.load(k + page * k_page + within, mask=there, other=0.0).to(queries.dtype)
        values = tl.load(v + page * v_page + within, mask=there, other=0.0).to(queries.dtype)
        visible = _visible(places[:, None], (j * BN + cols)[None, :], WINDOW)
        out, top, total = _absorb(queries, keys, values, visible, out, top, total, True, SCALE, PRECISION)

    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if PARTIAL:
        at = at_part
        tl.store(lse + at * heads + head, top + tl.log2(total), mask=real)  # -inf: a row that sees none of these keys
    tl.store(o + (at * heads + head)[:, None] * D + dims[None, :], out.to(o.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _join(partial, lse, out, num_rows, splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """A program: one head of one row; the parts' outputs weighted by their shares of the sum of exponentials."""
    row, heads, head = tl.program_id(0).to(tl.int64), tl.num_programs(1), tl.program_id(1)
    parts, dims = tl.arange(0, BS), tl.arange(0, BD)
    norms = tl.load(lse + (parts * num_rows + row) * heads + head, mask=parts < splits, other=float("-inf"))
    top = tl.max(norms, 0)
    used = tl.max(tl.where(norms == float("-inf"), 0, parts + 1), 0)  # behind them nothing was written
    o = tl.zeros((BD,), tl.float32)
    total = tl.sum(tl.exp2(norms - top), 0)
    for first in range(0, used, 16):
        part = first + tl.arange(0, 16)
        at = (part * num_rows + row) * heads + head
        share = tl.exp2(tl.load(lse + at, mask=part < used, other=float("-inf")) - top) / total
        inside = (part < used)[:, None] & (dims < D)[None, :]
        o += tl.sum(share[:, None] * tl.load(partial + at[:, None] * D + dims[None, :], mask=inside, other=0.0), 0)
    tl.store(out + (row * heads + head) * D + dims, o.to(out.dtype.element_ty), mask=dims < D)
