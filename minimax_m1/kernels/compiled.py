"""The C++ kernels for few rows on a CPU (csrc/compiled.cpp), called through ctypes on the tensors' memory.

Shapes: M rows, K in, N out; the rest as in the operation's own module. `library` is None where they were not built.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # before the library: both then share the OpenMP threads that PyTorch loads
from torch import Tensor

MAX_ROWS = 32  # of a product; above, PyTorch's is faster (docs/decisions.md)

_ARGUMENTS = {  # p pointer, n int64, f float32
    "linear_f32": "pppnnn",
    "linear_bf16": "pppnnn",
    "experts_f32": "ppppppnnnnn",
    "experts_bf16": "ppppppnnnnn",
    "rms_norm_f32": "pppnnf",
    "lightning_decode_f32": "pppppppnnnnn",
    "attention_decode_f32": "pppppppnnnnn",
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x · rsqrt(mean(x²) + eps) · weight for x [..., K] and weight [K], both float32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    assert library is not None
    size = weight.shape[0]
    library.rms_norm_f32(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
    return out


def lightning_decode(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """Return o [N, H, D] and advance `states` in place, as `lightning.lightning_decode`; q, k and v share strides."""
    assert q.stride() == k.stride() == v.stride() and q.stride(2) == 1 and states.is_contiguous()
    o = q.new_empty(q.shape)
    assert library is not None
    pointers = (t.data_ptr() for t in (q, k, v, slope, states, slots, o))
    library.lightning_decode_f32(*pointers, *q.shape, q.stride(0), q.stride(1))
    return o


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, slots: list[int], lens: list[int], window: int | None
) -> Tensor:
    """Return attention [N, H, D] of q [N, H, D], each row to the `lens` tokens in its slot of keys and values."""
    assert keys.is_contiguous() and values.is_contiguous()
    q = q.contiguous()
    out = torch.empty_like(q)
    end = torch.tensor(lens)
    first = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    rows = torch.tensor(slots)
    pointers = [t.data_ptr() for t in (q, keys, values, rows, first, end, out)]
    assert library is not None
    library.attention_decode_f32(*pointers, *q.shape[:2], keys.shape[1], q.shape[2], keys.shape[2])
    return out
