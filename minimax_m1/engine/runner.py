"""The runner: one forward pass for a step of the scheduler, the next tokens from it, and the state that follows.

Shapes: T tokens of all chunks end to end, decoding sequences first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from minimax_m1.batch import ForwardBatch
from minimax_m1.cache import PAGE_SIZE, HybridCache
from minimax_m1.continuation import choose_tokens
from minimax_m1.engine.decode_graphs import DecodeGraphs
from minimax_m1.engine.routing_log import RoutingLog, record_routing
from minimax_m1.engine.scheduler import Scheduler, Step
from minimax_m1.engine.sequence import Sequence
from minimax_m1.engine.speculation import roll_back
from minimax_m1.kernels import choose
from minimax_m1.kernels.gpu import to_device
from minimax_m1.model import MiniMaxM1ForCausalLM, Routing
from minimax_m1.sampling import forbidden_ids, prompt_logprobs

LOGPROB_ROWS = 256  # rows of logits [rows, vocab] that are held at once for the log-probabilities of a prompt


class Runner:
    """Runs steps: `run`, `sample`, `commit`, in this order."""

    def __init__(
        self,
        model: MiniMaxM1ForCausalLM,
        cache: HybridCache,
        scheduler: Scheduler,
        num_valid_tokens: int | None,
        backend: str | None,
        totals: RoutingLog | None,
    ) -> None:
        self.model, self.cache, self.scheduler, self.backend = model, cache, scheduler, backend
        self.totals = totals  # the routing of everything that has run
        self.forbidden = forbidden_ids(model.model.embed_tokens.weight, num_valid_tokens)
        self._mask_worker = ThreadPoolExecutor(1, "grammar")
        self.graphs: DecodeGraphs | None = None
        if model.device.type == "cuda" and choose(backend, model.lm_head.weight) == "triton":
            self.graphs = DecodeGraphs(model, cache, backend)
        self._drafted: ForwardBatch | None = None  # the layout of a step that verifies drafts
        self._states_before: dict[int, Tensor] = {}  # slot -> lightning states, of those that have drafts

    def run(self, step: Step) -> tuple[Tensor, list[Routing]]:
        """Run every chunk; return the hidden states [T, hidden] and each layer's routing, of T rows or more.

        Both are valid until the next run.
        """
        chunks = step.chunks
        for chunk in chunks:
            if chunk.sequence.continuation.has_grammar and chunk.completes:  # it is worked out while the network runs
                chunk.sequence.continuation.start_mask(self._mask_worker)
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        seqlens = [len(chunk.token_ids) for chunk in chunks]
        slots = [_slot(chunk.sequence) for chunk in chunks]
        thresholds = [chunk.sequence.params.expert_threshold for chunk in chunks]
        drafting = [_slot(chunk.sequence) for chunk in step.decodes if chunk.num_drafts]
        if self.graphs is not None and not step.prefills and not drafting and min(thresholds) >= 1:
            return self.graphs.run(token_ids, slots)
        batch = self.cache.batch(
            slots,
            seqlens,
            self.backend,
            num_decodes=len(step.decodes),
            keep_drafts=bool(drafting),
            expert_threshold=_per_token(thresholds, seqlens, self.model.device) if min(thresholds) < 1 else None,
        )
        self._drafted = batch if drafting else None
        self._states_before = {slot: self.cache.read_states(slot) for slot in drafting}
        ids = to_device(torch.tensor(token_ids), self.model.device)
        return self.model.forward_packed(ids, batch, self.cache)

    def sample(self, step: Step, hidden: Tensor) -> list[int]:
        """Choose the next token of every sequence whose tokens have all run; return how many tokens of each chunk stay.

        A sequence with drafts goes on as long as the token that it drew is the one that was drafted.
        """
        chunks = step.chunks
        kept = [len(chunk.token_ids) - chunk.num_drafts for chunk in chunks]
        bounds = step.bounds
        drawing: list[tuple[Sequence, int]] = []  # a sequence, and the first row of `logits` that is its own
        rows: list[int] = []  # of hidden
        index_of: dict[Sequence, int] = {}  # of those with drafts
        num_decodes = len(step.decodes)
        for i, chunk in enumerate(chunks):
            if i < num_decodes or chunk.completes:  # what decodes has nothing left by definition, and are many
                drawing.append((chunk.sequence, len(rows)))
                drawing += [(sibling, len(rows)) for sibling in self._fork_siblings(chunk.sequence)]
                rows += range(bounds[i] + kept[i] - 1, bounds[i + 1])
                if chunk.num_drafts:
                    index_of[chunk.sequence] = i
        if not drawing:
            return kept
        own = hidden if len(rows) == len(hidden) else _take(hidden, rows)  # `rows` rises
        logits = self.model.compute_logits(own, self.backend, num_decodes=len(rows))
        everyone, place = list(range(len(rows))), 0
        while drawing:
            at = [row + place for _, row in drawing]
            continuations = [sequence.continuation for sequence, _ in drawing]
            these = logits if at == everyone else _take(logits, at)
            choices = choose_tokens(these, continuations, self.forbidden, self.backend)
            going_on = []
            for (sequence, row), choice in zip(drawing, choices, strict=True):
                sequence.continuation.append(*choice)
                token = choice.token
                if sequence.lookup is not None:
                    sequence.lookup.append(token)
                index = index_of.get(sequence)
                if index is None or sequence.continuation.finish_reason is not None:
                    continue
                if chunks[index].drafts[place : place + 1] == [token]:
                    kept[index] += 1
                    going_on.append((sequence, row))
            drawing, place = going_on, place + 1
        return kept

    def commit(self, step: Step, hidden: Tensor, routings: list[Routing], kept: list[int]) -> None:
        """Take note of what has run: state, checkpoints, logs."""
        wrong = {i: n for i, n in enumerate(kept) if n < len(step.chunks[i].token_ids)}
        if wrong:
            assert self._drafted is not None
            roll_back(self.model, self.cache, self._drafted, wrong, self._states_before)
        bounds = step.bounds
        logged = []
        for i, chunk in enumerate(step.chunks):
            sequence = chunk.sequence
            start, stop = bounds[i], bounds[i] + kept[i]
            if sequence.routing is not None or self.totals is not None:
                known = min(kept[i], max(0, sequence.routed - sequence.computed))
                logged.append((sequence.routing, start + known, stop))
            if sequence.params.prompt_logprobs is not None:
                self._add_prompt_logprobs(sequence, hidden[start:stop])
            sequence.computed += kept[i]
            sequence.routed = max(sequence.routed, sequence.computed)
            if sequence.checkpoints and sequence.computed == sequence.checkpoints[0]:
                self._take_checkpoint(sequence)
        record_routing(routings, logged, self.totals)

    def _fork_siblings(self, sequence: Sequence) -> list[Sequence]:
        """Start the other samples of a request behind the prompt that the first has run; those without room wait."""
        forked = []
        for sibling in sequence.siblings:
            sibling.cached_tokens, sibling.prompt_logprobs = sequence.cached_tokens, sequence.prompt_logprobs
            if sibling.continuation.finish_reason is not None:
                continue
            if self.scheduler.fork(sequence, sibling):
                forked.append(sibling)
            elif not sibling.paused:
                self.scheduler.waiting.appendleft(sibling)
        sequence.siblings = []
        return forked

    def _take_checkpoint(self, sequence: Sequence) -> None:
        assert self.scheduler.prefix_cache is not None
        position, slot = sequence.checkpoints.pop(0), _slot(sequence)
        pages = self.cache.pages[slot][: position // PAGE_SIZE]
        states = self.cache.read_states(slot)
        self.scheduler.prefix_cache.insert(sequence.prompt_ids, position, pages, states, sequence.salt)

    def _add_prompt_logprobs(self, sequence: Sequence, hidden: Tensor) -> None:
        """Append the log-probabilities of the prompt tokens behind those of `hidden`, if they are not there yet."""
        top, found = sequence.params.prompt_logprobs, sequence.prompt_logprobs
        assert top is not None
        if not found:
            found.append(None)  # nothing is before the first token
        first, ahead = len(found), sequence.computed + hidden.shape[0] + 1
        for start in range(max(first, sequence.computed + 1), min(ahead, len(sequence.prompt_ids)), LOGPROB_ROWS):
            following = sequence.prompt_ids[start : min(start + LOGPROB_ROWS, ahead)]
            row = start - 1 - sequence.computed  # what token `start` is predicted from
            logits = self.model.compute_logits(hidden[row : row + len(following)], self.backend, num_decodes=0)
            found += prompt_logprobs(logits, following, top, self.forbidden, self.backend)


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _per_token(values: list[float], seqlens: list[int], device: torch.device) -> Tensor:
    """Repeat each sequence's value for its tokens: [T] float32."""
    return to_device(torch.tensor(values).repeat_interleave(torch.tensor(seqlens)), device)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    return x[to_device(torch.tensor(rows), x.device)]
