"""Lightning attention on a GPU: one Triton kernel is the forward, the backward and the prefill; another one decodes.

Shapes: as in `lightning`. The scan walks a sequence in chunks of C tokens, of which the last has n <= C. With p the
place in a chunk, w = exp(-slope) and S the state before the chunk, S' the one after it,

    O  = w^a_p (Q S) + (Q K^T * M) V        a_p = p + 1,      M_ij = w^(i-j) for i >= j, else 0
    S' = w^n S + K^T (w^b_p V)              b_p = n - 1 - p

and the reverse scan does so from the last token to the first one, with a_p = p and b_p = n - p.
No power of w is ever negative, so nothing overflows, whatever the slope. Written out, every gradient is a scan:

    o = scan(q, k, v; S)              dv = reverse scan(k, q, do; dS_final)       dS = what that one ends with
    dq = scan(do, v, k; S^T)          dk = reverse scan(v, do, q; dS_final^T)

so nothing but the inputs is kept for the backward, and no state but the first and the last one ever leaves the chip.

A scan is a program for each sequence, head and block of value columns. In training, few sequences with few heads would
leave most of a GPU idle: they are cut into segments. What each segment adds to a state is scanned for all of them at
once, the states before the segments follow from those one after the other (S' = w^L S + what was added), and the
segments are scanned as sequences with these initial states. Prompts are never cut so: bits do not depend on the cuts.
Source: MiniMax-01 report (arXiv 2501.08313), Algorithm 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_m1.errors import UserError
from minimax_m1.kernels.gpu import num_multiprocessors, shared_memory

CHUNK = 64  # tokens; prompts that are cut at multiples of it give the same bits
SEGMENT_CHUNKS = 16  # the fewest of a segment: its scan takes longer than the launches and the states between segments
JOIN_NUMBERS = 1024  # of a state, for each program that joins segments
HEAD_DIM = 256  # the largest one whose state fits into the registers of a program
DECODE_COLUMNS = 32  # 128 bytes of each row of a state: a whole line of the cache


def lightning_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, *, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run lightning attention chunk by chunk; arguments and results as `lightning.lightning_attention`.

    Rows that no sequence holds are not written.
    """
    _check(q, k, v)
    o, final_state = _LightningAttention.apply(q, k, v, slope, initial_state, cu_seqlens)
    return o, final_state


def lightning_prefill_triton(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, states: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Run a chunk of each of N prompts behind its state in the pool; arguments and result as `lightning_prefill`."""
    _check(q, k, v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    _scan(q, k, v, o, slope, cu_seqlens, initial=states, final=states, slots=slots)
    return o


def lightning_decode_triton(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, states: Tensor, slots: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Advance N sequences token by token, states in place; arguments and result as `lightning.lightning_decode`.

    A slot may repeat: which of its sequences then wins is left open, and nothing else is touched.
    """
    _check(q, k, v)
    num_heads, head_dim = v.shape[1:]
    assert states.is_contiguous()
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    keys = triton.next_power_of_2(head_dim)
    _decode_kernel[(slots.shape[0] * num_heads * triton.cdiv(head_dim, DECODE_COLUMNS),)](
        q, k, v, o, slope, states, slots, cu_seqlens,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        num_heads, head_dim, keys, DECODE_COLUMNS,
        num_warps=max(1, keys // 32),  # so that a thread has 8 independent loads of 16 bytes in flight
        enable_fp_fusion=False,  # what is fused is written so: one row and several rows give the same bits
    )  # fmt: skip
    return o


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise UserError for what the kernels do not take."""
    if v.shape[-1] > HEAD_DIM:
        raise UserError(f"backend: 'triton' takes head_dim up to {HEAD_DIM}, not {v.shape[-1]}; use torch")
    if not q.dtype == k.dtype == v.dtype:
        raise UserError(f"backend: 'triton' takes q, k, v of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}; use torch")


class _LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slope: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, slope, initial_state, cu_seqlens)
        ctx.set_materialize_grads(False)
        o, final_state = torch.empty_like(v, memory_format=torch.contiguous_format), _states_of(cu_seqlens, v)
        _scan_in_segments(q, k, v, o, slope, cu_seqlens, initial=initial_state, final=final_state)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slope, initial, cu_seqlens = ctx.saved_tensors
        if grad_o is None:  # only the final states were used
            grad_o = torch.zeros_like(v)
        grad_initial = _states_of(cu_seqlens, v) if ctx.needs_input_grad[4] else None
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        turned, grad_turned = (None if x is None else x.transpose(2, 3) for x in (initial, grad_final))
        _scan_in_segments(grad_o, v, k, dq, slope, cu_seqlens, initial=turned)
        _scan_in_segments(v, grad_o, q, dk, slope, cu_seqlens, initial=grad_turned, reverse=True)
        _scan_in_segments(k, q, grad_o, dv, slope, cu_seqlens, initial=grad_final, final=grad_initial, reverse=True)
        return dq, dk, dv, None, grad_initial, None


def _states_of(cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """Return memory for a state [N, H, D, D] float32 a sequence."""
    heads, head_dim = v.shape[1:]
    return v.new_empty(cu_seqlens.shape[0] - 1, heads, head_dim, head_dim, dtype=torch.float32)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _scan_in_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    slope: Tensor,
    cu_seqlens: Tensor,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """Do what `_scan` does, in segments where sequences and heads are too few to fill the GPU."""
    tokens, num_heads, head_dim = v.shape
    num_seqs = cu_seqlens.shape[0] - 1
    length = _segment_length(v, num_seqs)
    if length is None:
        _scan(q, k, v, o, slope, cu_seqlens, initial=initial, final=final, reverse=reverse)
        return
    count = tokens // length + num_seqs  # enough wherever sequences begin; those behind the end of one are empty
    bounds = cu_seqlens.new_empty(count + 1)
    states = _states_of(bounds, v)  # what a segment adds, then the state that it begins with
    _bounds_kernel[(num_seqs,)](cu_seqlens, bounds, count, length, num_warps=1)
    _scan(None, k, v, None, slope, bounds, final=states, reverse=reverse)
    _join_kernel[(num_seqs * num_heads * triton.cdiv(head_dim**2, JOIN_NUMBERS),)](
        states, initial, final, slope, cu_seqlens, bounds, count, length,
        *(initial.stride() if initial is not None else (0, 0, 0, 0)),
        num_heads, head_dim, JOIN_NUMBERS, reverse,
    )  # fmt: skip
    _scan(q, k, v, o, slope, bounds, initial=states, reverse=reverse)


def _segment_length(v: Tensor, num_seqs: int) -> int | None:
    """Return the tokens of a segment for about two programs on each multiprocessor; None: no segments.

    Segments read and multiply keys and values twice: not worth it where half of the multiprocessors have a program.
    """
    tokens, num_heads, head_dim = v.shape
    most = 2 * num_multiprocessors(v.device) // (num_heads * triton.cdiv(head_dim, _columns(head_dim)))
    if v.dtype != torch.bfloat16 or 4 * num_seqs > most:
        return None
    length = CHUNK * max(SEGMENT_CHUNKS, triton.cdiv(tokens, CHUNK * (most - num_seqs)))
    return length if tokens >= 2 * length * num_seqs else None


def _columns(head_dim: int) -> int:
    """Return the value columns of a program of `_scan_kernel`; 32 divides 96, and 256 key rows fill the registers."""
    return 64 if head_dim in (64, 128) else 32


def _scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    slope: Tensor,
    cu_seqlens: Tensor,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    slots: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """Write o [T, H, D], and `final` where it is given, by the formulas of this module; `initial` None is zeros.

    q, o: None where only `final` is wanted, of bfloat16. initial, final: [N, H, D, D], or with slots [N] the pool
    [slots, H, D, D], which may be both.
    """
    num_heads, head_dim = v.shape[1:]
    k, v = _with_unit_stride(k), _with_unit_stride(v)
    q = None if q is None else _with_unit_stride(q)
    num_seqs, sign = cu_seqlens.shape[0] - 1, -1 if reverse else 1
    if v.dtype == torch.bfloat16:
        kernel, chunk, columns = _scan_kernel, CHUNK, _columns(head_dim)
        # A multiprocessor has the registers for two programs. A third stage of loads takes the shared memory of one of
        # them: it is for programs that have a multiprocessor to themselves, and for a GPU with 112 to 128 KiB.
        programs = num_seqs * num_heads * triton.cdiv(head_dim, columns)
        alone = initial is None or programs <= num_multiprocessors(v.device)
        third = alone and shared_memory(v.device) >= 160 << 10
        warps, stages = (8, 2) if head_dim > 128 else (4, 3 if third else 2)
    else:  # float16 as well: a state may be too large for it. Products of larger tiles do not fit into registers
        kernel, chunk, columns, warps, stages = _scan_float32_kernel, 16, 16, 4, 1
        if final is None:  # the state lies there, not in registers
            final = _states_of(cu_seqlens, v)
    kernel[(num_seqs * num_heads * triton.cdiv(head_dim, columns),)](
        q, k, v, o, slope, cu_seqlens, initial, final, slots,
        *(0 if x is None else sign * x.stride(0) for x in (q, k, v, o)),
        *(0 if x is None else x.stride(1) for x in (q, k, v, o)),
        *(initial.stride() if initial is not None else (0, 0, 0, 0)),
        *(final.stride() if final is not None else (0, 0, 0, 0)),
        num_heads, head_dim, max(16, triton.next_power_of_2(head_dim)), columns, chunk, reverse,
        num_warps=warps, num_stages=stages,
        enable_fp_fusion=False,  # what is fused is written so: the same bits whatever the stages
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens", "slots"])
def _scan_kernel(
    q, k, v, o, slope, cu_seqlens, initial, final, slots,
    q_row: tl.constexpr, k_row: tl.constexpr, v_row: tl.constexpr, o_row: tl.constexpr, q_head, k_head, v_head, o_head,
    i_seq, i_head, i_key, i_column, f_seq, f_head, f_key, f_column,
    H, D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """A program scans one sequence for BV value columns of one head, with their state [BD, BV] in registers.

    Programs of the same head are neighbours, so that q and k come once from memory and then from the cache.
    """
    COLUMNS: tl.constexpr = (D + BV - 1) // BV
    column_block = tl.program_id(0) % COLUMNS
    head = tl.program_id(0) // COLUMNS % H
    seq = tl.program_id(0) // (COLUMNS * H)
    start = tl.load(cu_seqlens + seq).to(tl.int64)
    length = tl.load(cu_seqlens + seq + 1) - start.to(tl.int32)
    place = seq.to(tl.int64) if slots is None else tl.load(slots + seq).to(tl.int64)

    s = tl.load(slope + head).to(tl.float32)
    p = tl.arange(0, C)
    causal = p[:, None] >= p[None, :]
    key = tl.arange(0, BD)
    column = column_block * BV + tl.arange(0, BV)
    key_mask, column_mask = key < D, column < D

    state_mask = key_mask[:, None] & column_mask[None, :]
    if initial is None:
        state = tl.zeros((BD, BV), tl.float32)
    else:
        initial += place * i_seq + head * i_head
        state = tl.load(initial + key[:, None] * i_key + column[None, :] * i_column, mask=state_mask, other=0.0)

    SHIFT: tl.constexpr = 1 if REVERSE else 0
    row = start + length - 1 if REVERSE else start
    if o is not None:
        q += row * (-q_row if REVERSE else q_row) + head * q_head + key[None, :]
        o += row * (-o_row if REVERSE else o_row) + head * o_head + column[None, :]
    k += row * (-k_row if REVERSE else k_row) + head * k_head + key[None, :]
    v += row * (-v_row if REVERSE else v_row) + head * v_head + column[None, :]
    # What does not change is computed for each chunk all the same: kept, it takes more registers than there are.
    for first in tl.range(0, length, C, disable_licm=True):
        n = tl.minimum(length - first, C)
        rows = p[:, None].to(tl.int64) + first
        key_rows = (p < n)[:, None] & key_mask[None, :]
        column_rows = (p < n)[:, None] & column_mask[None, :]
        kc = tl.load(k + rows * k_row, mask=key_rows, other=0.0)
        vc = tl.load(v + rows * v_row, mask=column_rows, other=0.0)
        if o is not None:
            qc = tl.load(q + rows * q_row, mask=key_rows, other=0.0)
            out_decay = tl.exp(-s * (p + 1 - SHIFT).to(tl.float32))
            to_end = s * (n - p).to(tl.float32)
            within = tl.exp(tl.where(causal, to_end[:, None] - to_end[None, :], float("-inf")))
            out = tl.dot(qc, state.to(tl.bfloat16)) * out_decay[:, None]
            scores = tl.dot(qc, tl.trans(kc)) * within
            out = tl.dot(scores.to(tl.bfloat16), vc, out)
            # A mask of its own, as what `nought` is added to: what is kept takes registers that the loop needs.
            inside = (p[:, None] + first < length) & column_mask[None, :]
            tl.store(o + rows * o_row, out.to(o.dtype.element_ty), mask=inside)
        v_decay = tl.exp(-s * tl.maximum(n - 1 + SHIFT - p, 0).to(tl.float32))
        decayed = vc.to(tl.float32) * v_decay[:, None]
        high = decayed.to(tl.bfloat16)
        state = tl.dot(tl.trans(kc), high, state * tl.exp(-s * n.to(tl.float32)))
        if final is not None:  # the rest of the decayed v: the state then keeps 16 bits of what it adds, not 8
            low = (decayed - high.to(tl.float32)).to(tl.bfloat16)
            state = tl.dot(tl.trans(kc), low, state)
    if final is not None:
        nought = tl.minimum(tl.load(cu_seqlens), 0)  # the compiler cannot know
        key += nought
        column += nought
        state_mask = (key < D)[:, None] & (column < D)[None, :]
        final += place * f_seq + head * f_head
        tl.store(final + key[:, None] * f_key + column[None, :] * f_column, state, mask=state_mask)


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens", "slots"])
def _scan_float32_kernel(
    q, k, v, o, slope, cu_seqlens, initial, final, slots,
    q_row: tl.constexpr, k_row: tl.constexpr, v_row: tl.constexpr, o_row: tl.constexpr, q_head, k_head, v_head, o_head,
    i_seq, i_head, i_key, i_column, f_seq, f_head, f_key, f_column,
    H, D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """As `_scan_kernel`, in float32: operands of such products fill the registers, so the state lies in `final`.

    Of the state, BK key rows at a time are read, multiplied, advanced and written back.
    """
    BK: tl.constexpr = 32
    COLUMNS: tl.constexpr = (D + BV - 1) // BV
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    column_block = tl.program_id(0) % COLUMNS
    head = tl.program_id(0) // COLUMNS % H
    seq = tl.program_id(0) // (COLUMNS * H)
    start = tl.load(cu_seqlens + seq).to(tl.int64)
    length = tl.load(cu_seqlens + seq + 1) - start.to(tl.int32)
    place = seq.to(tl.int64) if slots is None else tl.load(slots + seq).to(tl.int64)

    s = tl.load(slope + head).to(tl.float32)
    p = tl.arange(0, C)
    distance = p[:, None] - p[None, :]
    column = column_block * BV + tl.arange(0, BV)
    column_mask = column < D
    final += place * f_seq + head * f_head + column[None, :] * f_column
    for block in range(0, BD, BK):
        key = block + tl.arange(0, BK)
        mask = (key < D)[:, None] & column_mask[None, :]
        if initial is None:
            state = tl.zeros((BK, BV), tl.float32)
        else:
            begin = initial + place * i_seq + head * i_head
            state = tl.load(begin + key[:, None] * i_key + column[None, :] * i_column, mask=mask, other=0.0)
        tl.store(final + key[:, None] * f_key, state, mask=mask)

    row = start + length - 1 if REVERSE else start
    q += row * (-q_row if REVERSE else q_row) + head * q_head
    k += row * (-k_row if REVERSE else k_row) + head * k_head
    v += row * (-v_row if REVERSE else v_row) + head * v_head + column[None, :]
    o += row * (-o_row if REVERSE else o_row) + head * o_head + column[None, :]
    for first in range(0, length, C):
        n = tl.minimum(length - first, C)
        rows = p[:, None].to(tl.int64) + first
        column_rows = (p < n)[:, None] & column_mask[None, :]
        vc = tl.load(v + rows * v_row, mask=column_rows, other=0.0).to(tl.float32)
        decayed = vc * tl.exp(-s * tl.maximum(n - 1 + SHIFT - p, 0).to(tl.float32))[:, None]
        chunk_decay = tl.exp(-s * n.to(tl.float32))
        out = tl.zeros((C, BV), tl.float32)
        scores = tl.zeros((C, C), tl.float32)
        tl.debug_barrier()  # the state that other threads wrote is there
        for block in range(0, BD, BK):
            key = block + tl.arange(0, BK)
            key_rows = (p < n)[:, None] & (key < D)[None, :]
            mask = (key < D)[:, None] & column_mask[None, :]
            qc = tl.load(q + rows * q_row + key[None, :], mask=key_rows, other=0.0).to(tl.float32)
            kc = tl.load(k + rows * k_row + key[None, :], mask=key_rows, other=0.0).to(tl.float32)
            state = tl.load(final + key[:, None] * f_key, mask=mask, other=0.0)
            out = tl.dot(qc, state, out, input_precision="tf32x3")
            scores = tl.dot(qc, tl.trans(kc), scores, input_precision="tf32x3")
            state = tl.dot(tl.trans(kc), decayed, state * chunk_decay, input_precision="tf32x3")
            tl.debug_barrier()  # all have read it
            tl.store(final + key[:, None] * f_key, state, mask=mask)
        scores *= tl.where(distance >= 0, tl.exp(-s * tl.maximum(distance, 0).to(tl.float32)), 0.0)
        out *= tl.exp(-s * (p + 1 - SHIFT).to(tl.float32))[:, None]
        out = tl.dot(scores, vc, out, input_precision="tf32x3")
        tl.store(o + rows * o_row, out.to(o.dtype.element_ty), mask=column_rows)


@triton.jit(do_not_specialize=["cu_seqlens", "bounds", "count", "length"])
def _bounds_kernel(cu_seqlens, bounds, count, length):
    """Write where the segments of one sequence begin; what follows the last of all is the end of its sequence.

    Sequence i owns the segments from cu_seqlens[i] // length + i on.
    """
    seq = tl.program_id(0)
    start = tl.load(cu_seqlens + seq)
    end = tl.load(cu_seqlens + seq + 1)
    first = start // length + seq
    last = count if seq == tl.num_programs(0) - 1 else end // length + seq
    for segment in range(first, last + 1):
        tl.store(bounds + segment, tl.minimum(start + (segment - first) * length, end))


@triton.jit(do_not_specialize=["cu_seqlens", "bounds", "count", "length"])
def _join_kernel(
    states, initial, final, slope, cu_seqlens, bounds, count, length,
    i_seq, i_head, i_key, i_column,
    H, D: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A program walks along one sequence's segments with BLOCK numbers of one head's state.

    It replaces what each adds by the state that the segment begins with, and writes the one after all to `final`.
    """
    BLOCKS: tl.constexpr = (D * D + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // BLOCKS % H
    seq = tl.program_id(0) // (BLOCKS * H)
    number = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = number < D * D
    s = tl.load(slope + head).to(tl.float32)
    first = tl.load(cu_seqlens + seq) // length + seq
    behind = (
        count if seq == tl.num_programs(0) // (BLOCKS * H) - 1 else tl.load(cu_seqlens + seq + 1) // length + seq + 1
    )
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        initial += seq.to(tl.int64) * i_seq + head * i_head
        state = tl.load(initial + number // D * i_key + number % D * i_column, mask=mask, other=0.0)
    for i in range(behind - first):
        segment = behind - 1 - i if REVERSE else first + i
        at = states + (tl.cast(segment, tl.int64) * H + head) * (D * D) + number
        added = tl.load(at, mask=mask, other=0.0)
        tl.store(at, state, mask=mask)
        n = tl.load(bounds + segment + 1) - tl.load(bounds + segment)
        state = state * tl.exp(-s * n.to(tl.float32)) + added
    if final is not None:
        tl.store(final + (seq.to(tl.int64) * H + head) * (D * D) + number, state, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens", "slots"])
def _decode_kernel(
    q, k, v, o, slope, states, slots, cu_seqlens,
    q_row, q_head, k_row, k_head, v_row, v_head,
    H, D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program advances BV value columns of one head's state of one sequence by all of the sequence's rows."""
    COLUMNS: tl.constexpr = (D + BV - 1) // BV
    column_block = tl.program_id(0) % COLUMNS
    head = tl.program_id(0) // COLUMNS % H
    seq = tl.program_id(0) // (COLUMNS * H)
    slot = tl.load(slots + seq).to(tl.int64)
    if cu_seqlens is None:
        start = seq.to(tl.int64)
        end = start + 1
    else:
        start = tl.load(cu_seqlens + seq).to(tl.int64)
        end = tl.load(cu_seqlens + seq + 1).to(tl.int64)

    key = tl.arange(0, BD)
    column = column_block * BV + tl.arange(0, BV)
    key_mask, column_mask = key < D, column < D
    state_mask = key_mask[:, None] & column_mask[None, :]
    pointers = states + (slot * H + head) * (D * D) + key[:, None] * D + column[None, :]
    state = tl.load(pointers, mask=state_mask, other=0.0)
    decay = tl.exp(-tl.load(slope + head).to(tl.float32))
    for row in range(start, end):
        kr = tl.load(k + row * k_row + head * k_head + key, mask=key_mask, other=0.0).to(tl.float32)
        vr = tl.load(v + row * v_row + head * v_head + column, mask=column_mask, other=0.0).to(tl.float32)
        qr = tl.load(q + row * q_row + head * q_head + key, mask=key_mask, other=0.0).to(tl.float32)
        state = tl.fma(state, decay, kr[:, None] * vr[None, :])
        out = tl.sum(qr[:, None] * state, 0)
        tl.store(o + (row * H + head) * D + column, out.to(o.dtype.element_ty), mask=column_mask)
    tl.store(pointers, state, mask=state_mask)
