"""Lightning attention: causal linear attention with a per-head exponential decay, over packed sequences.

Shapes: T tokens of all sequences end to end, N sequences, H heads, D head_dim. Row t of sequence i is
cu_seqlens[i] <= t < cu_seqlens[i + 1]. A state is [H, D, D]: key rows, value columns.

    S_t = exp(-slope) S_{t-1} + k_t^T v_t,   o_t = q_t S_t          (no 1/sqrt(D) scale, no normaliser, no softmax)

Source: MiniMax-01 report (arXiv 2501.08313), lightning attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minimax_m1.kernels import choose, compiled
from minimax_m1.kernels.lightning_torch import lightning_attention_torch


def lightning_slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Return the decay slopes s [H] float32 of one layer; the decay of head h is exp(-s[h]) a token.

    s = 2^(-8 (h + 1) / H) (1 - layer / (num_layers - 1) + 1e-5): early layers forget fast, late ones slowly. For H not
    a power of two the ALiBi rule: the slopes of the nearest lower power of two, then every second one of the next.
    Source: MiniMax-M1's modelling code; ALiBi (arXiv 2108.12409).
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    lower = 2 ** int(math.log2(num_heads))
    slopes = geometric(lower)
    slopes += geometric(2 * lower)[0::2][: num_heads - lower]
    factor = 1 - layer / (num_layers - 1) + 1e-5 if num_layers > 1 else 1 + 1e-5
    return torch.tensor(slopes, dtype=torch.float32) * factor


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run lightning attention over packed sequences; differentiable in q, k, v and initial_state.

    Args:
        q, k, v: [T, H, D], any float dtype; products accumulate in float32 (float64 stays float64).
        slope: [H] float32, >= 0.
        cu_seqlens: [N + 1] int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i + 1], of any length >= 0.
        initial_state: [N, H, D, D] float32, or None for zeros; not modified.
        backend: one of `kernels.BACKENDS`, or None for the fastest.

    Returns:
        o [T, H, D] in the dtype of v, and the final states [N, H, D, D] float32 (float64 for float64 inputs).

    Raises:
        UserError: on a GPU (backend "triton", as in all functions here), head_dim > 256 or q, k, v of several dtypes.
    """
    return _runner(choose(backend, q))(q, k, v, slope, cu_seqlens=cu_seqlens, initial_state=initial_state)


def _runner(chosen: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if chosen == "reference":
        return lightning_attention_reference
    if chosen == "triton":
        from minimax_m1.kernels.lightning_triton import lightning_attention_triton

        return lightning_attention_triton
    return lightning_attention_torch


def lightning_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, *, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token, as the formula reads; the oracle of every other backend."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_heads, head_dim = q.shape[1:]
    decay = torch.exp(-slope.to(dtype))[:, None, None]
    outputs, finals = [], []
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = q.new_zeros(num_heads, head_dim, head_dim, dtype=dtype)
        if initial_state is not None:
            state = initial_state[i].to(dtype)
        for t in range(start, end):
            state = decay * state + k[t].to(dtype)[:, :, None] * v[t].to(dtype)[:, None, :]
            outputs.append(torch.einsum("hd,hde->he", q[t].to(dtype), state))
        finals.append(state)
    o = torch.stack(outputs) if outputs else q.new_zeros(q.shape, dtype=dtype)
    return o.to(v.dtype), torch.stack(finals)


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    states: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance N sequences token by token, updating their states in place. Not differentiable.

    Args:
        q, k, v: [T, H, D], the rows of the sequences end to end.
        slope: [H] float32.
        states: [slots, H, D, D] float32, the pool of states; rows `slots` are read and written.
        slots: [N] int64, the row of `states` of each sequence, all different.
        cu_seqlens: [N + 1] int32; None: one row a sequence.
        backend: as in `lightning_attention`.

    Returns:
        o [T, H, D] in the dtype of v; several rows of a sequence give to the bit what as many calls would.
    """
    chosen = choose(backend, q)
    if chosen == "triton":
        from minimax_m1.kernels.lightning_triton import lightning_decode_triton

        return lightning_decode_triton(q, k, v, slope, states, slots, cu_seqlens)
    if chosen == "compiled" and compiled.fits(q, states):
        return compiled.lightning_decode(q, k, v, slope, states, slots, cu_seqlens)
    if cu_seqlens is None or q.shape[0] == slots.shape[0]:
        return _advance(q, k, v, slope, states, slots)
    o = torch.empty_like(v)
    first, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    for j in range(int(lengths.max())):  # the j-th token of every sequence that has one
        active = lengths > j
        rows = first[active] + j
        o[rows] = _advance(q[rows], k[rows], v[rows], slope, states, slots[active])
    return o


def _advance(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """One token a sequence: S = exp(-slope) S + k^T v, o = q S."""
    dtype = states.dtype
    decay = torch.exp(-slope.to(dtype))
    state = states[slots]
    state.mul_(decay[:, None, None]).addcmul_(k.to(dtype)[..., :, None], v.to(dtype)[..., None, :])
    states[slots] = state
    return torch.matmul(q.to(dtype)[..., None, :], state)[..., 0, :].to(v.dtype)


def lightning_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    states: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Run a chunk of each of N prompts behind its state in the pool, updated in place. Not differentiable.

    Arguments as in `lightning_decode`. Tokens are taken in blocks of 64 from each sequence's first row, so prompts
    that are cut at multiples of 64 give the same bits however they are cut.

    Returns:
        o [T, H, D] in the dtype of v.
    """
    chosen = choose(backend, q)
    if chosen == "triton":
        from minimax_m1.kernels.lightning_triton import lightning_prefill_triton

        return lightning_prefill_triton(q, k, v, slope, states, slots, cu_seqlens)
    if chosen == "compiled" and compiled.fits(q, states):
        return compiled.lightning_prefill(q, k, v, slope, states, slots, cu_seqlens)
    o, states[slots] = _runner(chosen)(q, k, v, slope, cu_seqlens=cu_seqlens, initial_state=states[slots])
    return o
