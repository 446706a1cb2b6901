"""Causal softmax attention with grouped heads, over packed sequences and over a cache.

Shapes: T query tokens of all sequences end to end, N sequences, H query heads, G key/value heads (H a multiple of G;
query head h reads key/value head h // (H / G)), D head_dim, L keys of one sequence. Scale 1 / sqrt(D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_m1.kernels import choose, compiled
from minimax_m1.kernels.attention_torch import attend_torch


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run causal attention inside each packed sequence; differentiable in q, k and v.

    `triton` on a GPU is a library's FlashAttention, the package's or PyTorch's, for what those take (16-bit floats,
    head sizes that are multiples of 8 up to 256), and our kernels for all else: `attention_triton.library` says which.
    The library's gradients have the same bits each time only under `torch.use_deterministic_algorithms`.

    Args:
        q: [T, H, D], k, v: [T, G, D], any float dtype; the softmax is in float32 or better.
        cu_seqlens: [N + 1] int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i + 1].
        max_seqlen: no sequence is longer; None: T. It only saves empty programs.
        window: each token sees this many last tokens, itself included; None: all.
        backend: one of `kernels.BACKENDS`, or None for the fastest.

    Returns:
        [T, H, D] in the dtype of q.
    """
    chosen = choose(backend, q)
    if chosen == "triton":
        from minimax_m1.kernels.attention_triton import attend_packed

        return attend_packed(q, k, v, cu_seqlens, window, max_seqlen)
    attend = attend_reference if chosen == "reference" else attend_torch
    bounds = cu_seqlens.tolist()
    outputs = [
        attend(q[start:end], k[start:end].transpose(0, 1), v[start:end].transpose(0, 1), window)
        for start, end in zip(bounds, bounds[1:], strict=False)
        if end > start
    ]
    return torch.cat(outputs) if outputs else q.clone()


def softmax_attention_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    num_decodes: int,
    num_decode_rows: int | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run causal attention of new tokens over their sequences' pages, which already hold the new tokens' own rows.

    Row r of the n new tokens of a sequence sees its first kv_len - n + r + 1 tokens.

    Args:
        q: [T, H, D], the new tokens of N sequences end to end.
        keys, values: [G, pages, PAGE_SIZE, D], the pools; only read. Not differentiable.
        cu_seqlens: [N + 1] int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i + 1] of q.
        kv_lens: [N] int64, the tokens of each sequence, new ones included.
        slots: [N] int64, the row of `block_tables` of each sequence.
        block_tables: [slots, most pages] int32; entry j is the page of tokens j PAGE_SIZE to (j + 1) PAGE_SIZE - 1.
        num_decodes: the first so many sequences decode: few rows each, through a kernel of their own.
        num_decode_rows: their rows; None: read from cu_seqlens where others follow, for which the host waits.
        window, backend: as in `softmax_attention`.

    Returns:
        [T, H, D] in the dtype of q.
    """
    chosen = choose(backend, q)
    if chosen == "triton":
        from minimax_m1.kernels.attention_triton import attend_cached

        cut = num_decode_rows
        if cut is None:
            cut = q.shape[0] if num_decodes == slots.shape[0] else int(cu_seqlens[num_decodes])
        return attend_cached(q, keys, values, cu_seqlens, kv_lens, slots, block_tables, num_decodes, cut, window)
    if chosen == "compiled" and compiled.fits(q, keys, values) and keys.dtype == q.dtype:
        return _cached_compiled(q, keys, values, cu_seqlens, kv_lens, slots, block_tables, num_decodes, window)
    attend = attend_reference if chosen == "reference" else attend_torch
    out = torch.empty_like(q)
    page_size, bounds = keys.shape[2], cu_seqlens.tolist()
    for i, (length, slot) in enumerate(zip(kv_lens.tolist(), slots.tolist(), strict=True)):
        rows = slice(bounds[i], bounds[i + 1])
        pages = block_tables[slot, : -(-length // page_size)]
        k, v = (pool[:, pages].flatten(1, 2)[:, :length].to(q.dtype) for pool in (keys, values))
        out[rows] = attend(q[rows], k, v, window)
    return out


def _cached_compiled(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    num_decodes: int,
    window: int | None,
) -> Tensor:
    """The sequences that decode through one kernel, the others through the other."""
    m = num_decodes
    if m == slots.shape[0]:
        return compiled.attention_decode(q, keys, values, slots, block_tables, cu_seqlens, kv_lens, window)
    if m == 0:
        return compiled.attention_prefill(q, keys, values, slots, block_tables, cu_seqlens, kv_lens, window)
    cut = int(cu_seqlens[m])
    first, rest = cu_seqlens[: m + 1], cu_seqlens[m:]  # the kernels count rows from the first of these
    return torch.cat(
        (
            compiled.attention_decode(q[:cut], keys, values, slots[:m], block_tables, first, kv_lens[:m], window),
            compiled.attention_prefill(q[cut:], keys, values, slots[m:], block_tables, rest, kv_lens[m:], window),
        )
    )


def attend_reference(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attend from the last n tokens of one sequence to all L of its tokens, as the formula reads.

    q [n, H, D], k and v [G, L, D] with L >= n; returns [n, H, D] in the dtype of q.
    """
    n, heads, head_dim = q.shape
    length = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = heads // k.shape[0]
    k, v = (x.to(dtype).repeat_interleave(groups, 0) for x in (k, v))
    scores = torch.einsum("nhd,hld->hnl", q.to(dtype), k) * head_dim**-0.5
    distance = torch.arange(length - n, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hnl,hld->nhd", torch.softmax(scores, -1), v).to(q.dtype)
