"""The scheduler: which sequences run in the next step, and with how many tokens each.

Decoding sequences come first, for they are what somebody reads; prompts share what is left of the token budget, in
chunks. Who came first is let in first, and who was let in last is preempted first: its pages go, and it is computed
anew later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from minimax_m1.cache import PAGE_SIZE, HybridCache, SequenceState
from minimax_m1.engine.prefix_cache import PrefixCache, checkpoint_positions
from minimax_m1.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence that run in a step: its own, then drafts that are to be verified."""

    sequence: Sequence
    start: int  # tokens of the sequence before these
    token_ids: list[int]
    num_drafts: int = 0

    @property
    def drafts(self) -> list[int]:
        """The drafted tokens, at the end of `token_ids`."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def completes(self) -> bool:
        """Whether nothing that the sequence has remains to be run, so that its next token can be drawn."""
        return self.start + len(self.token_ids) - self.num_drafts == self.sequence.num_tokens


@dataclass(frozen=True)
class Step:
    """What one step runs; the batch holds `decodes` and then `prefills`."""

    decodes: list[Chunk]
    prefills: list[Chunk]

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks, in the order of the batch."""
        return self.decodes + self.prefills

    @property
    def bounds(self) -> list[int]:
        """The row of the batch at which each chunk begins, and the number of all rows."""
        return [0, *accumulate(len(chunk.token_ids) for chunk in self.chunks)]


class Scheduler:
    """Owns the slots of a cache and the queue before them."""

    def __init__(
        self,
        cache: HybridCache,
        prefix_cache: PrefixCache | None,
        max_num_tokens: int,
        num_drafts: int = 0,
        turn_end_ids: frozenset[int] = frozenset(),
        checkpoint_every: int | None = None,
    ) -> None:
        self.cache, self.prefix_cache = cache, prefix_cache
        self.max_num_tokens, self.num_drafts = max_num_tokens, num_drafts
        self.turn_end_ids, self.checkpoint_every = turn_end_ids, checkpoint_every
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of arrival
        self.num_preemptions = 0
        self._free_slots = list(range(cache.max_seqs - 1, -1, -1))

    def schedule(self) -> Step:
        """Plan the next step; takes the slots and pages that it needs, and preempts who must make room."""
        budget = self.max_num_tokens
        preemptions = self.num_preemptions
        decodes: list[Chunk] = []
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:  # asked once: with hundreds of sequences it takes time
            (decoding if sequence.decodes else prompts).append(sequence)
        for sequence in decoding:
            chunk = self._decode_chunk(sequence, budget)
            if chunk is not None:
                decodes.append(chunk)
                budget -= len(chunk.token_ids)
        if self.num_preemptions == preemptions:
            self._admit_waiting(budget, prompts)
        decodes = [chunk for chunk in decodes if chunk.sequence.slot is not None]
        return Step(decodes, self._schedule_prefills(budget, [s for s in prompts if s.slot is not None]))

    def _admit_waiting(self, budget: int, prompts: list[Sequence]) -> None:
        """Let sequences in, as long as there is room and they would get something of the budget; add to `prompts`."""
        pending = sum(s.num_tokens - s.computed for s in prompts)
        while self.waiting and pending < budget and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            if not sequence.decodes:
                prompts.append(sequence)
                pending += sequence.num_tokens - sequence.computed

    def _schedule_prefills(self, budget: int, prompts: list[Sequence]) -> list[Chunk]:
        """Share the budget between prompts: half of it to the short ones first, what is left to the oldest.

        So a prompt of a million tokens goes on at every step, and a short one does not wait for its end.
        """
        if not prompts:
            return []
        oldest, *others = prompts
        chunks = []
        share = budget // 2
        for sequence in sorted(others, key=lambda s: s.num_tokens - s.computed):
            chunk = self._prefill_chunk(sequence, share)
            if chunk is not None:
                chunks.append(chunk)
                share -= len(chunk.token_ids)
        chunk = self._prefill_chunk(oldest, budget - sum(len(c.token_ids) for c in chunks))
        return chunks if chunk is None else [chunk, *chunks]

    def _decode_chunk(self, sequence: Sequence, budget: int) -> Chunk | None:
        """One row, and drafts behind it; None if there is no room, or the sequence had to give way."""
        if sequence.slot is None or budget < 1:
            return None
        drafts: list[int] = []
        if sequence.lookup is not None:
            most = min(self.num_drafts, budget - 1, sequence.continuation.remaining - 1)
            drafts = sequence.lookup.propose(most) if most > 0 else []
        if not self._make_room(sequence, sequence.computed + 1 + len(drafts)):
            return None
        return Chunk(sequence, sequence.computed, [sequence.continuation.output_ids[-1], *drafts], len(drafts))

    def _prefill_chunk(self, sequence: Sequence, budget: int) -> Chunk | None:
        """The next chunk of a prompt, whose pages it has had since it was admitted; None if the budget is too small.

        It ends at a page boundary unless it ends the prompt, and at every checkpoint.
        """
        start, end = sequence.computed, sequence.num_tokens
        stop = min(end, start + budget, *sequence.checkpoints[:1])
        if stop < end:
            stop = stop // PAGE_SIZE * PAGE_SIZE
        return Chunk(sequence, start, sequence.tokens(start, stop)) if stop > start else None

    # -- room -----------------------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot, what is cached of its prompt, and pages for the rest; False: not yet."""
        if not self._free_slots:
            return False
        slot = self._free_slots.pop()
        self.cache.reset(slot)
        begin = self._begin if sequence.saved is None else self._swap_in
        if not begin(sequence, slot):
            self.cache.release(slot)
            self._free_slots.append(slot)
            return False
        sequence.slot, sequence.computed = slot, self.cache.lens[slot]
        sequence.was_admitted = True
        return True

    def _begin(self, sequence: Sequence, slot: int) -> bool:
        prompt, position = sequence.prompt_ids, 0
        prefix_cache = self.prefix_cache if sequence.uses_prefix_cache else None
        if prefix_cache is not None:
            match = prefix_cache.match(prompt, sequence.salt, peek=sequence.was_looked_up)
            sequence.was_looked_up = True
            if match is not None:
                position = match.position
                self.cache.share_prefix(slot, match.pages, match.states)
        if not self._reserve(slot, sequence.num_tokens):
            return False
        if prefix_cache is not None:
            ahead = checkpoint_positions(prompt, self.turn_end_ids, self.checkpoint_every, position)
            shared = prefix_cache.shared_prefix(prompt, sequence.salt)
            sequence.checkpoints = sorted({*ahead, shared} if shared > position else ahead)
        if not sequence.was_admitted:
            sequence.cached_tokens = position
        return True

    def _swap_in(self, sequence: Sequence, slot: int) -> bool:
        if not self._reserve(slot, sequence.num_tokens):  # before the file is read, which then happens once
            return False
        saved = sequence.saved
        assert saved is not None
        self.cache.swap_in(slot, saved if isinstance(saved, SequenceState) else SequenceState.load(saved))
        sequence.saved = None
        if not isinstance(saved, SequenceState):
            saved.unlink()
        return True

    def _reserve(self, slot: int, length: int) -> bool:
        """Take pages for `length` tokens, those of cached prefixes if need be."""
        while not self.cache.reserve(slot, length):
            lacking = self.cache.pages_lacking(slot, length) - self.cache.pool.num_free
            if self.prefix_cache is None or self.prefix_cache.evict(lacking) == 0:
                return False
        return True

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Take pages for `length` tokens, preempting who came last; False if that was the sequence itself."""
        assert sequence.slot is not None
        while not self._reserve(sequence.slot, length):
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        return True

    # -- leaving --------------------------------------------------------------------------------------------------

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's slot and pages; it waits in front of all others and is computed anew."""
        self.release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def release(self, sequence: Sequence) -> None:
        """Free the slot and the pages of a running sequence."""
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.cache.release(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.computed = None, 0

    def swap_out(self, sequence: Sequence) -> SequenceState:
        """Move the state of a running sequence out of the pools."""
        assert sequence.slot is not None
        state = self.cache.swap_out(sequence.slot)
        self.release(sequence)
        return state

    def fork(self, source: Sequence, target: Sequence) -> bool:
        """Start `target` with all state that `source` has; False if there is no slot or page for it now."""
        assert source.slot is not None
        if not self._free_slots:
            return False
        slot = self._free_slots[-1]
        self.cache.reset(slot)
        if not self.cache.fork(source.slot, slot):
            return False
        self._free_slots.pop()
        target.slot, target.computed, target.was_admitted = slot, self.cache.lens[slot], True
        self.running.append(target)
        return True
