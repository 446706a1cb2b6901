"""Sequence: one request in flight; with n samples asked for, one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minimax_m1.cache import SequenceState
from minimax_m1.continuation import Continuation
from minimax_m1.engine.prompt_lookup import PromptLookup
from minimax_m1.engine.routing_log import RoutingLog
from minimax_m1.sampling import SamplingParams, TokenLogprob


@dataclass(eq=False)
class Sequence:
    """What the engine knows of one output while it is being written.

    Its tokens are the prompt and then `continuation.output_ids`; the first `computed` of them are in the cache. A
    sequence that has a slot runs, one without waits (or is paused, if `paused`).
    """

    request_id: str
    index: int  # 0 .. n - 1, which sample of its request
    prompt_ids: list[int]
    params: SamplingParams
    continuation: Continuation
    slot: int | None = None
    computed: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first admitted
    checkpoints: list[int] = field(default_factory=list)  # positions still ahead where a prefill stops
    siblings: list[Sequence] = field(default_factory=list)  # other samples, forked from this one behind its prompt
    reported: int = 0  # tokens of the output that a delta has given out
    routed: int = 0  # tokens that the routing log has; what is computed anew does not count again
    was_looked_up: bool = False  # in the prefix cache, which counts a request once
    was_admitted: bool = False
    paused: bool = False
    saved: SequenceState | Path | None = None  # its state while it is swapped out
    lookup: PromptLookup | None = None  # drafts from its own text, if the engine speculates
    routing: RoutingLog | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def salt(self) -> bytes:
        """What beside the tokens decides the state behind a prefix of this prompt."""
        threshold = self.params.expert_threshold
        return b"" if threshold == 1 else str(threshold).encode()

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether its prompt may be found in the cache; log-probabilities of a prompt need every token to be run."""
        return self.params.prompt_logprobs is None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self.prompt_ids) + len(self.continuation.output_ids)

    @property
    def decodes(self) -> bool:
        """Whether all but the newest token, a generated one, are in the cache."""
        return self.computed == self.num_tokens - 1 and self.computed >= len(self.prompt_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return its tokens start .. stop - 1."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:split] + self.continuation.output_ids[max(0, start - split) : stop - split]
