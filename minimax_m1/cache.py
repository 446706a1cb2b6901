"""HybridCache: all state of sequences in flight: keys and values of softmax layers, matrices of lightning layers.

Shapes: a slot holds one sequence, a page PAGE_SIZE tokens of one; H heads, G key/value heads, D head_dim; Ls softmax
layers, Ll lightning layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimax_m1.batch import CachedRows, ForwardBatch, lay_out
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.kernels.gpu import to_device, together_to_device

PAGE_SIZE = 64  # tokens; also the block of lightning attention, so that a page boundary is a cut that changes no bit


class PagePool:
    """Which pages are free, and by how many sequences and cached prefixes each of the others is held."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest number goes first
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """Return by how many `page` is held; 0: it is free."""
        return self._holders[page]

    def take(self, count: int) -> list[int] | None:
        """Return `count` free pages, each held once; None, and nothing taken, if there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Hold pages, which somebody holds already, once more."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages; those that nobody else holds become free."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


@dataclass(frozen=True)
class SequenceState:
    """One sequence's whole state outside the pools: in host memory, or through `save` and `load` on a disk."""

    length: int  # tokens
    states: Tensor  # [Ll, H, D, D] float32
    keys: Tensor  # [Ls, G, length, D]
    values: Tensor  # [Ls, G, length, D]

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return self.states.nbytes + self.keys.nbytes + self.values.nbytes

    def save(self, path: Path) -> None:
        """Write one safetensors file.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {"states": self.states, "keys": self.keys.contiguous(), "values": self.values.contiguous()}
        try:
            save_file(tensors, path, metadata={"length": str(self.length)})
        except (OSError, SafetensorError) as error:
            raise UserError(f"state: cannot write {path}: {error}") from None

    @classmethod
    def load(cls, path: Path) -> SequenceState:
        """Read what `save` wrote, to the bit.

        Raises:
            UserError: the file is missing or is something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(name) for name in ("states", "keys", "values")]
                return cls(int(file.metadata()["length"]), *tensors)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"state: cannot read {path}: {error}") from None


class HybridCache:
    """State of up to `max_seqs` sequences; an argument of the forward pass, never a global.

    Keys and values of softmax layers grow with the sequence, page by page, out of one pool: [G, pages, PAGE_SIZE, D] a
    layer. The memory is only reserved, and taken by the operating system as tokens arrive. The state of a lightning
    layer has the same size at any length: [slots, H, D, D] float32 a layer, whatever the model's dtype (bfloat16 states
    lose characters: vllm#19592).

    Behind the last slot and the last page there is one more of each, which belongs to no sequence: rows that only pad
    a batch read and write there.
    """

    def __init__(
        self,
        config: MiniMaxM1Config,
        max_seqs: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        num_pages: int | None = None,
    ) -> None:
        """Plan for sequences of up to `max_len` tokens; `num_pages` None: pages for all of them at that length."""
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert head_dim is not None
        pages_each = -(-max_len // PAGE_SIZE)
        self.max_seqs, self.max_len = max_seqs, max_len
        self.pool = PagePool(max_seqs * pages_each if num_pages is None else num_pages)
        self.spare_slot, spare_page = max_seqs, self.pool.num_pages
        self.lens = [0] * (max_seqs + 1)  # tokens of the sequence in each slot
        self.pages: list[list[int]] = [[] for _ in range(max_seqs)]  # of each slot, in order
        self.block_tables = torch.zeros(max_seqs + 1, pages_each, dtype=torch.int32, device=device)
        self.block_tables[self.spare_slot] = spare_page
        state_dtype = torch.promote_types(dtype, torch.float32)
        num_lightning, num_softmax = len(config.lightning_layers), len(config.softmax_layers)
        states_shape = (num_lightning, max_seqs + 1, heads, head_dim, head_dim)
        self._states = torch.zeros(states_shape, dtype=state_dtype, device=device)
        shape = (num_softmax, groups, spare_page + 1, PAGE_SIZE, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        for pool in (self._keys, self._values):
            pool[:, :, spare_page].zero_()  # padding computes with numbers, whatever they are
        self.states = dict(zip(config.lightning_layers, self._states, strict=True))  # layer -> [slots, H, D, D]
        self.keys = dict(zip(config.softmax_layers, self._keys, strict=True))  # layer -> [G, pages, PAGE_SIZE, D]
        self.values = dict(zip(config.softmax_layers, self._values, strict=True))

    # -- a step of the network ----------------------------------------------------------------------------------------

    def batch(
        self,
        slots: list[int],
        seqlens: list[int],
        backend: str | None = None,
        *,
        num_decodes: int | None = None,
        keep_drafts: bool = False,
        expert_threshold: Tensor | None = None,
    ) -> ForwardBatch:
        """Return the batch that runs `seqlens` new tokens of the sequences in `slots` behind what they have.

        Args:
            num_decodes: the first so many sequences run through the decode kernels; None: those at the front with one
                new token behind others.
            keep_drafts: keep the keys and values of lightning layers' decode rows in `cached.drafts`.
            expert_threshold: [T] float32, per new token.

        Takes the pages that the new tokens need; the caller has made sure that there are enough.
        """
        past_lens = [self.lens[slot] for slot in slots]
        for slot, past, n in zip(slots, past_lens, seqlens, strict=True):
            reserved = self.reserve(slot, past + n)
            assert reserved, f"slot {slot}: no page for {past} + {n} tokens"
        if num_decodes is None:
            num_decodes = 0
            while num_decodes < len(slots) and seqlens[num_decodes] == 1 and past_lens[num_decodes] > 0:
                num_decodes += 1
        cu_seqlens, positions = lay_out(seqlens, past_lens)
        slot_ids = torch.tensor(slots, dtype=torch.int64)
        if len(positions) == len(slots):
            row_slots, kv_lens = slot_ids, positions + 1
        else:
            lengths = torch.tensor(seqlens, dtype=torch.int64)
            row_slots = slot_ids.repeat_interleave(lengths)
            kv_lens = torch.tensor(past_lens, dtype=torch.int64) + lengths
        device = self.block_tables.device
        if device.type != "cpu":
            on_host = (cu_seqlens.long(), positions, slot_ids, row_slots, kv_lens)
            cu_seqlens, positions, slot_ids, row_slots, kv_lens = together_to_device(on_host, device)
            cu_seqlens = cu_seqlens.int()
        cached = CachedRows(
            slots=list(slots),
            slot_ids=slot_ids,
            kv_lens=kv_lens,
            token_rows=self._token_rows(row_slots, positions),
            num_decodes=num_decodes,
            num_decode_rows=sum(seqlens[:num_decodes]),
            drafts={} if keep_drafts else None,
        )
        return ForwardBatch(cu_seqlens, positions, list(seqlens), past_lens, backend, cached, expert_threshold)

    def decode_batch(
        self, slot_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, backend: str | None = None
    ) -> ForwardBatch:
        """Return the batch of one new token for each of N sequences of which only the device knows which they are.

        Nothing that depends on the sequences is in its Python values, so a run of it can be recorded and repeated with
        other contents of the tensors. The sequences' pages are there already, and nobody has counted the tokens after
        the run: `lens` is the caller's to keep.

        Args:
            slot_ids: [N] int64; `spare_slot` for rows that are padding.
            positions: [N] int64, the sequences' tokens before this one; 0 for padding.
            cu_seqlens: [N + 1] int32: 0, 1, 2, ...
        """
        num_rows = slot_ids.shape[0]
        cached = CachedRows(
            slots=[self.spare_slot] * num_rows,
            slot_ids=slot_ids,
            kv_lens=positions + 1,
            token_rows=self._token_rows(slot_ids, positions),
            num_decodes=num_rows,
            num_decode_rows=num_rows,
        )
        return ForwardBatch(cu_seqlens, positions, [1] * num_rows, [0] * num_rows, backend, cached)

    def _token_rows(self, row_slots: Tensor, positions: Tensor) -> Tensor:
        pages = self.block_tables[row_slots, positions // PAGE_SIZE].long()
        return pages * PAGE_SIZE + positions % PAGE_SIZE

    def commit(self, batch: ForwardBatch) -> None:
        """Count the tokens of a batch that has run through every layer."""
        assert batch.cached is not None
        for slot, past, n in zip(batch.cached.slots, batch.past_lens, batch.seqlens, strict=True):
            self.lens[slot] = past + n

    # -- slots and pages ----------------------------------------------------------------------------------------------

    def pages_lacking(self, slot: int, length: int) -> int:
        """Return how many pages more the sequence in `slot` needs to hold `length` tokens."""
        return max(0, -(-length // PAGE_SIZE) - len(self.pages[slot]))

    def reserve(self, slot: int, length: int) -> bool:
        """Take the pages that `length` tokens need; False, and nothing is taken, if the pool has not so many."""
        assert length <= self.max_len, f"slot {slot}: {length} tokens in a cache for {self.max_len}"
        lacking = self.pages_lacking(slot, length)
        if lacking == 0:
            return True
        pages = self.pool.take(lacking)
        if pages is None:
            return False
        self._add_pages(slot, pages)
        return True

    def reset(self, slot: int) -> None:
        """Make `slot` ready for a new sequence: no page, length 0, lightning states zero."""
        self.release(slot)
        self._states[:, slot].zero_()

    def release(self, slot: int) -> None:
        """Let go of the pages of the sequence in `slot`, which is then gone."""
        self.pool.release(self.pages[slot])
        self.pages[slot], self.lens[slot] = [], 0

    def _add_pages(self, slot: int, pages: list[int]) -> None:
        start = len(self.pages[slot])
        added = to_device(torch.tensor(pages, dtype=torch.int32), self.block_tables.device)
        self.block_tables[slot, start : start + len(pages)] = added
        self.pages[slot] += pages

    # -- moving state -------------------------------------------------------------------------------------------------

    def read_states(self, slot: int) -> Tensor:
        """Return a copy of the lightning states [Ll, H, D, D] of the sequence in `slot`."""
        return self._states[:, slot].clone()

    def write_states(self, slot: int, states: Tensor) -> None:
        """Set the lightning states of the sequence in `slot`; `states` is not kept."""
        self._states[:, slot] = states

    def share_prefix(self, slot: int, pages: list[int], states: Tensor) -> None:
        """Begin a sequence in the empty `slot` with whole `pages` that others hold too, and the states behind them."""
        assert not self.pages[slot]
        self.pool.retain(pages)
        self._add_pages(slot, pages)
        self.lens[slot] = len(pages) * PAGE_SIZE
        self.write_states(slot, states)

    def fork(self, source: int, target: int) -> bool:
        """Make the empty slot `target` a second sequence with everything that `source` has.

        Whole pages are shared, for nobody writes into them again; the last, unfinished one is copied. False, and
        nothing has happened, if no page is free for that.
        """
        whole = self.lens[source] // PAGE_SIZE
        rest = self.lens[source] % PAGE_SIZE
        last = self.pool.take(1 if rest else 0)
        if last is None:
            return False
        self.share_prefix(target, self.pages[source][:whole], self._states[:, source])
        if rest:
            self._add_pages(target, last)
            for pool in (self._keys, self._values):
                pool[:, :, last[0], :rest] = pool[:, :, self.pages[source][whole], :rest]
        self.lens[target] = self.lens[source]
        return True

    def swap_out(self, slot: int) -> SequenceState:
        """Return the whole state of the sequence in `slot` in host memory, and free its pages."""
        length, pages = self.lens[slot], self.pages[slot][: -(-self.lens[slot] // PAGE_SIZE)]
        keys, values = (pool[:, :, pages].flatten(2, 3)[:, :, :length].to("cpu") for pool in (self._keys, self._values))
        state = SequenceState(length, self.read_states(slot).to("cpu"), keys, values)
        self.release(slot)
        return state

    def swap_in(self, slot: int, state: SequenceState) -> bool:
        """Put a state back into the empty `slot`, to the bit; False, and nothing has happened, if pages lack.

        Pages that were reserved for it are used.

        Raises:
            UserError: the state comes from another model.
        """
        assert self.lens[slot] == 0
        expected = (self._states[:, 0].shape, (*self._keys.shape[:2], state.length, self._keys.shape[-1]))
        if (state.states.shape, tuple(state.keys.shape)) != expected or state.values.shape != state.keys.shape:
            raise UserError(f"state: {list(state.states.shape)}, {list(state.keys.shape)} is of another model")
        if not self.reserve(slot, state.length):
            return False
        rows = torch.arange(state.length, device=self.block_tables.device)
        rows = self.block_tables[slot, rows // PAGE_SIZE].long() * PAGE_SIZE + rows % PAGE_SIZE
        for pool, saved in ((self._keys, state.keys), (self._values, state.values)):
            pool.flatten(2, 3).index_copy_(2, rows, saved.to(pool))
        self.write_states(slot, state.states.to(self._states.device))
        self.lens[slot] = state.length
        return True
