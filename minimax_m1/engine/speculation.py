"""Speculative decoding by prompt lookup: drafted tokens run as rows of one step, and wrong ones leave no trace.

A draft is verified by drawing every token as if there were no drafts: position t's draw depends on the seed, on t and
on its logits, and decode rows give the same logits to the bit however many run together. So a request's tokens, and
its state afterwards, are those of decoding one by one. Keys and values of wrong drafts lie behind the sequence's
length and are overwritten. Lightning states have taken the wrong tokens in; they are set back to those before the step,
and take in the right ones again by the recurrence alone, from the keys and values that the step kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minimax_m1.batch import ForwardBatch
from minimax_m1.cache import HybridCache
from minimax_m1.kernels.gpu import together_to_device
from minimax_m1.kernels.lightning import lightning_decode
from minimax_m1.model import LightningAttention, MiniMaxM1ForCausalLM


def roll_back(
    model: MiniMaxM1ForCausalLM,
    cache: HybridCache,
    batch: ForwardBatch,
    kept: Mapping[int, int],
    states_before: Mapping[int, Tensor],
) -> None:
    """Set decoding sequences back to the first `kept` of the tokens that they ran in `batch`.

    Args:
        batch: with `cached.drafts`, the keys and values of its decode rows.
        kept: index of the sequence in the batch -> its tokens that stay, at least one and fewer than it ran.
        states_before: slot -> its lightning states before the step.
    """
    assert batch.cached is not None and batch.cached.drafts is not None
    slots: list[int] = []
    bounds, rows = [0], list[int]()
    starts = batch.bounds
    for index, count in kept.items():
        slot = batch.cached.slots[index]
        assert 0 < count < batch.seqlens[index]
        cache.lens[slot] = batch.past_lens[index] + count
        cache.write_states(slot, states_before[slot])
        slots.append(slot)
        rows += range(starts[index], starts[index] + count)
        bounds.append(len(rows))
    device = batch.cu_seqlens.device
    on_host = [torch.tensor(values, dtype=torch.int64) for values in (slots, rows, bounds)]
    slot_ids, row_ids, cu_seqlens = together_to_device(on_host, device)
    cu_seqlens = cu_seqlens.int()
    for layer, (k, v) in batch.cached.drafts.items():
        attention = model.model.layers[layer].self_attn
        assert isinstance(attention, LightningAttention)
        k, v = k[row_ids], v[row_ids]
        slope = attention.slope(k.device)
        lightning_decode(k, k, v, slope, cache.states[layer], slot_ids, cu_seqlens, batch.backend)  # q only gives o
