"""Half a layer in one call of the C++ kernels, for steps in which every row decodes.

They run the kernels that the single operations run, in the same order, and give the same bits; what is saved is
Python's time for a dozen calls, which is as long as the kernels themselves take on a small model.

Shapes: T rows, D hidden, E experts, K experts a token; weights may be float32, bfloat16 or quantized.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from minimax_m1.kernels import choose, compiled
from minimax_m1.kernels.quantized import QuantizedWeight

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_QUANTIZED_KINDS = {8: 2, 4: 3}
_CODE = "q"  # 8 bytes, as the structures of csrc/blocks.cpp have them


def usable(x: Tensor, weights: Sequence[Tensor | QuantizedWeight], backend: str | None) -> bool:
    """Say whether these rows and weights can take the one call."""
    if choose(backend, x) != "compiled" or torch.is_grad_enabled() or x.dtype != torch.float32 or not x.is_cpu:
        return False
    return all(isinstance(w, QuantizedWeight) or (w.dtype in _KINDS and w.is_contiguous()) for w in weights)


def lightning_block(
    u: Tensor,
    qkv: Tensor | QuantizedWeight,
    gate: Tensor | QuantizedWeight,
    out: Tensor | QuantizedWeight,
    norm: Tensor,
    eps: float,
    slope: Tensor,
    states: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Return a lightning layer's attention [T, D] of rows u [T, D] that decode, and advance their states in place.

    out(norm(o) · sigmoid(gate u)), o = lightning_decode(silu(qkv u)); arguments as in `lightning.lightning_decode`.
    """
    assert compiled.library is not None and states.is_contiguous()
    u = u.contiguous()
    result = torch.empty_like(u)
    heads, head_dim = states.shape[1:3]
    numbers = array(_CODE, (*_weight(qkv), *_weight(gate), *_weight(out), *_weight(norm[None])))
    numbers.extend((u.data_ptr(), slope.data_ptr(), states.data_ptr(), slots.data_ptr(), cu_seqlens.data_ptr()))
    numbers.extend((result.data_ptr(), u.shape[0], slots.shape[0], heads, head_dim))
    compiled.library.lightning_block(numbers.buffer_info()[0], eps)
    return result


def moe_block(
    x: Tensor, gate: Tensor, w13: Tensor | QuantizedWeight, w2: Tensor | QuantizedWeight, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the experts' result [T, D] of rows x [T, D] that decode, and what `experts.route` returns.

    Arguments as in `experts.expert_mlp`, gate [E, D] the router's matrix.
    """
    assert compiled.library is not None
    x = x.contiguous()
    rows, experts = x.shape[0], gate.shape[0]
    result, probs, weights = torch.empty_like(x), x.new_empty(rows, experts), x.new_empty(rows, top_k)
    ids = torch.empty(rows, top_k, dtype=torch.int64)
    numbers = array(_CODE, (*_weight(gate), *_weight(w13), *_weight(w2)))
    numbers.extend((x.data_ptr(), result.data_ptr(), probs.data_ptr(), weights.data_ptr(), ids.data_ptr(), rows, top_k))
    compiled.library.moe_block(numbers.buffer_info()[0])
    return result, probs, ids, weights


def _weight(w: Tensor | QuantizedWeight) -> tuple[int, int, int, int, int, int]:
    """Return kind, address of the values and of the scales, group size, rows out, columns in."""
    if isinstance(w, QuantizedWeight):
        kind = _QUANTIZED_KINDS[w.bits]
        return kind, w.tiles.data_ptr(), w.scales.data_ptr(), w.group_size or 0, w.size_out, w.size_in
    return _KINDS[w.dtype], w.data_ptr(), 0, 0, w.shape[-2], w.shape[-1]
