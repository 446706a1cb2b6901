"""ForwardBatch: which rows of a packed forward belong to which sequence, and where each sequence's state lives.

Shapes: T tokens of N sequences end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from minimax_m1.kernels.context import ContextPart
from minimax_m1.kernels.gpu import to_device


@dataclass(frozen=True)
class ForwardBatch:
    """The layout of one packed forward pass.

    Training samples laid end to end, a chunk of a prompt and a step of decoding requests differ only in these numbers.
    Sequences that decode come first where a cache is used: their rows go through the decode kernels and all others
    through the prefill kernels. Build it with `packed`, or with `HybridCache.batch` where there is a cache.
    """

    cu_seqlens: Tensor  # [N + 1] int32: sequence i is rows cu_seqlens[i]:cu_seqlens[i + 1]
    positions: Tensor  # [T] int64: each token's place in its own sequence
    seqlens: list[int]  # per sequence: tokens in this batch
    past_lens: list[int]  # per sequence: tokens before them, in the cache
    backend: str | None = None  # kernels to run with; None: the preferred ones
    cached: CachedRows | None = None  # where the cache comes in; None: every sequence starts here
    expert_threshold: Tensor | None = None  # [T] float32 in (0, 1]; None: every token uses all its top-k experts
    context: ContextPart | None = None  # whose rows are on which rank; None: all of them are here

    @classmethod
    def packed(
        cls,
        seqlens: list[int],
        *,
        past_lens: list[int] | None = None,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        cached: CachedRows | None = None,
        expert_threshold: Tensor | None = None,
    ) -> ForwardBatch:
        """Lay sequences of `seqlens` new tokens end to end, each behind its `past_lens` (default 0) earlier tokens."""
        past_lens = [0] * len(seqlens) if past_lens is None else past_lens
        assert len(past_lens) == len(seqlens)
        cu_seqlens, positions = lay_out(seqlens, past_lens)
        return cls(
            to_device(cu_seqlens, device),
            to_device(positions, device),
            list(seqlens),
            list(past_lens),
            backend,
            cached,
            expert_threshold,
        )

    @property
    def bounds(self) -> list[int]:
        """What `cu_seqlens` holds, known without asking the device."""
        return [0, *accumulate(self.seqlens)]

    @property
    def num_decode_rows(self) -> int | None:
        """How many rows, from the first, belong to decoding sequences; None without a cache."""
        return None if self.cached is None else self.cached.num_decode_rows

    @property
    def only_decodes(self) -> bool:
        """Whether every row belongs to a decoding sequence, and no drafts are to be kept."""
        cached = self.cached
        return cached is not None and cached.num_decodes == len(self.seqlens) and cached.drafts is None


@dataclass(frozen=True)
class CachedRows:
    """Which parts of a `HybridCache` the sequences of a batch use."""

    slots: list[int]  # per sequence: its slot
    slot_ids: Tensor  # [N] int64: the same on the device
    kv_lens: Tensor  # [N] int64: tokens of each sequence, new ones included
    token_rows: Tensor  # [T] int64: where each new token's key lies, page PAGE_SIZE + place in the page
    num_decodes: int  # the first so many sequences decode
    num_decode_rows: int  # their rows: one each, or more where drafted tokens are verified
    drafts: dict[int, tuple[Tensor, Tensor]] | None = field(default=None)  # layer -> k, v of the decode rows, if kept


def lay_out(seqlens: list[int], past_lens: list[int]) -> tuple[Tensor, Tensor]:
    """Return `cu_seqlens` and `positions` of a batch, on the host."""
    past = torch.tensor(past_lens, dtype=torch.int64)
    if max(seqlens, default=0) == min(seqlens, default=0) == 1:  # every sequence decodes: a short way
        return torch.arange(len(seqlens) + 1, dtype=torch.int32), past
    lengths = torch.tensor(seqlens, dtype=torch.int64)
    cu_seqlens = torch.zeros(len(seqlens) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return cu_seqlens, torch.arange(int(cu_seqlens[-1])) + (past - cu_seqlens[:-1]).repeat_interleave(lengths)
