"""The C++ kernels for few rows on a CPU (csrc/), called through ctypes on the tensors' memory.

Shapes: M rows, K in, N out; the rest as in the operation's own module. `library` is None where they were not built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # before the library: both then share the OpenMP threads that PyTorch loads
from torch import Tensor

from minimax_m1.kernels.quantized import QuantizedWeight

PAGE_SIZE = 64  # tokens in a page of the cache, fixed in csrc/sequence.cpp
MAX_ROWS = 32  # of a product; above, PyTorch's is faster (docs/decisions.md)

_ARGUMENTS = {  # p pointer, n int64, f float32
    "linear_f32": "pppnnn",
    "linear_bf16": "pppnnn",
    "experts_f32": "ppppppnnnnn",
    "experts_bf16": "ppppppnnnnn",
    "linear_int8": "ppppnnn",
    "linear_int4": "ppppnnnn",
    "experts_int8": "ppppppppnnnnn",
    "experts_int4": "ppppppppnnnnnn",
    "silu_f32": "pn",
    "rms_norm_f32": "ppppnnf",
    "rms_norm_bf16": "ppppnnf",
    "rotate_append_f32": "ppppppppnnnnnn",
    "route_f32": "ppppnnn",
    "lightning_block": "pf",
    "moe_block": "p",
    "attention_decode_f32": "ppppppppnnnnnnnnn",
    "attention_prefill_f32": "ppppppppnnnnnnnnn",
    "lightning_decode_f32": "ppppppppnnnnn",
    "lightning_prefill_f32": "ppppppppnnnnn",
}
_DTYPES = (torch.float32, torch.bfloat16)  # of weights


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_compiled" + suffix)
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
            for name, arguments in _ARGUMENTS.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = [kinds[a] for a in arguments], None
            return loaded
    return None


library = _load()


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Say whether the kernels take this: on a CPU, float32 rows, no gradient asked for."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return False
    training = torch.is_grad_enabled()
    for w in weights:
        if w.dtype not in _DTYPES or not w.is_contiguous() or (training and w.requires_grad):
            return False
    return not (training and x.requires_grad)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T [M, N] float32 for x [M, K] float32, weight [N, K] float32 or bfloat16."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    assert library is not None
    function = library.linear_f32 if weight.dtype == torch.float32 else library.linear_bf16
    function(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *out.shape, x.shape[1])
    return out


def experts(x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Return `experts.expert_mlp` for few tokens: x [T, D] float32, matrices float32 or bfloat16."""
    x, expert_ids, expert_weights = x.contiguous(), expert_ids.contiguous(), expert_weights.float()
    y = torch.empty_like(x)
    assert library is not None
    function = library.experts_f32 if w13.dtype == torch.float32 else library.experts_bf16
    pointers = (t.data_ptr() for t in (x, w13, w2, expert_ids, expert_weights, y))
    function(*pointers, *expert_ids.shape, w13.shape[0], w2.shape[2], x.shape[1])
    return y


def fits_quantized(x: Tensor) -> bool:
    """Say whether the kernels of quantized weights take these rows, any number of them: float32 on a CPU."""
    return x.dtype == torch.float32 and x.is_cpu


def quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return x weight^T [M, N] float32 for x [M, K] float32; a row's result never depends on the other rows."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.size_out)
    assert library is not None
    pointers = (x.data_ptr(), weight.tiles.data_ptr(), weight.scales.data_ptr(), out.data_ptr())
    if weight.group_size is None:
        library.linear_int8(*pointers, *out.shape, weight.size_in)
    else:
        library.linear_int4(*pointers, *out.shape, weight.size_in, weight.group_size)
    return out


def quantized_experts(
    x: Tensor, w13: QuantizedWeight, w2: QuantizedWeight, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    """Return `experts.expert_mlp` for any number of tokens; w13 [E, 2, I, D], gate and up apart, and w2 [E, D, I]."""
    x, expert_ids, expert_weights = x.contiguous(), expert_ids.contiguous(), expert_weights.float().contiguous()
    y = torch.empty_like(x)
    assert library is not None
    tensors = (x, w13.tiles, w13.scales, w2.tiles, w2.scales, expert_ids, expert_weights, y)
    pointers = (t.data_ptr() for t in tensors)
    sizes = (*expert_ids.shape, w13.shape[0], w13.size_out, w13.size_in)
    if w13.group_size is None:
        library.experts_int8(*pointers, *sizes)
    else:
        library.experts_int4(*pointers, *sizes, w13.group_size)
    return y


def silu(x: Tensor) -> Tensor:
    """Replace x, float32 and contiguous, by x · sigmoid(x); return it."""
    assert library is not None and x.is_contiguous()
    library.silu_f32(x.data_ptr(), x.numel())
    return x


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """Return x · rsqrt(mean(x²) + eps) · weight, and times sigmoid(gate) where there is one.

    x and gate [..., K] float32, weight [K] float32 or bfloat16; the result float32.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    assert library is not None and (gate is None or (gate.is_contiguous() and gate.shape == x.shape))
    function = library.rms_norm_f32 if weight.dtype == torch.float32 else library.rms_norm_bf16
    size = weight.shape[0]
    pointer = None if gate is None else gate.data_ptr()
    function(x.data_ptr(), weight.data_ptr(), pointer, out.data_ptr(), x.numel() // size, size, eps)
    return out


def rotate_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, token_rows: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Rotate q in place, and write k, rotated, and v into their pages: what `rotate` and `HybridCache.append` do.

    q [T, H, D], k and v [T, G, D], cos and sin [T, 1, rotary_dim / 2], keys and values [G, pages, PAGE_SIZE, D], all
    float32 and contiguous; token_rows [T] int64: where each token's key lies, page PAGE_SIZE + place in the page.
    """
    assert library is not None
    tensors = (q, k, v, cos, sin, token_rows, keys, values)
    assert all(x.is_contiguous() for x in tensors)
    groups, pages, page_size, head_dim = keys.shape
    pointers = (x.data_ptr() for x in tensors)
    library.rotate_append_f32(*pointers, q.shape[0], q.shape[1], groups, head_dim, cos.shape[-1], pages * page_size)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities [T, E], the top_k expert ids [T, K] and their weights, which sum to 1, of logits [T, E]."""
    assert library is not None and logits.is_contiguous()
    rows, experts = logits.shape
    probs = torch.empty_like(logits)
    ids, weights = logits.new_empty(rows, top_k, dtype=torch.int64), logits.new_empty(rows, top_k)
    pointers = (x.data_ptr() for x in (logits, probs, ids, weights))
    library.route_f32(*pointers, rows, experts, top_k)
    return probs, ids, weights


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, states: Tensor, slots: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return o [T, H, D] and advance `states` in place, as `lightning.lightning_decode`; q, k and v share strides."""
    assert library is not None
    return _lightning(library.lightning_decode_f32, q, k, v, slope, states, slots, cu_seqlens)


def lightning_prefill(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, states: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Return o [T, H, D] and advance `states` in place, as `lightning.lightning_prefill`; q, k and v share strides."""
    assert library is not None
    return _lightning(library.lightning_prefill_f32, q, k, v, slope, states, slots, cu_seqlens)


def _lightning(
    function: Callable[..., None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    states: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    rows, heads, head_dim = q.shape
    row, head, one = strides = q.stride()
    assert strides == k.stride() == v.stride() and one == 1 and states.is_contiguous() and slope.is_contiguous()
    o = q.new_empty(rows, heads, head_dim)
    function(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        slope.data_ptr(),
        states.data_ptr(),
        slots.data_ptr(),
        None if cu_seqlens is None else cu_seqlens.data_ptr(),
        o.data_ptr(),
        slots.shape[0],
        heads,
        head_dim,
        row,
        head,
    )
    return o


def attention_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    window: int | None,
) -> Tensor:
    """Return `attention.softmax_attention_cached` [T, H, D] for few rows a sequence; cu_seqlens may begin above 0.

    The keys are cut into parts at fixed places, which keeps all threads busy with one sequence.
    """
    assert library is not None
    function = library.attention_decode_f32
    return _attention(function, q, keys, values, slots, block_tables, cu_seqlens, kv_lens, window)


def attention_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    window: int | None,
) -> Tensor:
    """Return `attention.softmax_attention_cached` [T, H, D] for any number of rows; cu_seqlens may begin above 0."""
    assert library is not None
    function = library.attention_prefill_f32
    return _attention(function, q, keys, values, slots, block_tables, cu_seqlens, kv_lens, window)


def _attention(
    function: Callable[..., None],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    window: int | None,
) -> Tensor:
    rows, heads, head_dim = q.shape
    groups, pages, page_size, _ = keys.shape
    row, head, one = q.stride()
    assert page_size == PAGE_SIZE and one == 1 and keys.is_contiguous() and values.is_contiguous()
    out = q.new_empty(rows, heads, head_dim)
    function(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        block_tables.data_ptr(),
        cu_seqlens.data_ptr(),
        kv_lens.data_ptr(),
        out.data_ptr(),
        slots.shape[0],
        heads,
        groups,
        head_dim,
        pages,
        block_tables.stride(0),
        row,
        head,
        window or 0,
    )
    return out
