"""One output being written, and the choice of the next token of many.

`Continuation` holds all that decides one request's next token and its end, so the plain loop of `generation.py` and the
engine give the same tokens by construction: both append what `choose_tokens` chooses, until `finish_reason` is set.

A token costs the same however long the output is. N rows (continuations), V ids of the vocabulary.
"""

from __future__ import annotations

import codecs
import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minimax_m1.errors import UserError
from minimax_m1.sampling import (
    COLDEST,
    SamplingParams,
    TokenCounts,
    TokenLogprob,
    describe_token,
    draw_rows,
    draw_token,
    exponentials,
    logprob_of,
    read_answer,
    uniform,
    uniforms,
)
from minimax_m1.thinking import Thinking, close_ids, opens_thinking
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from minimax_m1.grammar import Matcher

FinishReason = Literal["stop", "length", "repetition", "abort"]
DRAWN_TOGETHER = 1 << 17  # logits of rows that are worked on at once: what stays in the processor's cache


class Choice(NamedTuple):
    """A row's next token, and what its continuation asked to know about it: `row.append(*choice)`."""

    token: int
    logprob: float | None = None  # under the model itself; for the repetition stop
    details: TokenLogprob | None = None  # for `params.logprobs`


class Continuation:
    """One output: its tokens, its text, how it ends, and what its next token may be.

    Attributes:
        output_ids: the tokens so far; the one that ended the output is the last.
        finish_reason: None while it goes on; "stop" (eos, a stop id, a stop string, a complete grammar), "length",
            "repetition", or what `finish` was told.
        stop_reason: the stop id or stop string that ended it; with "abort", why the grammar could not be followed; None
            for eos and all else.
        logprobs: one entry a token if `params.logprobs` asks.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
        tokenizer: MiniMaxM1Tokenizer | None,
        vocab_size: int,
        *,
        matcher: Matcher | None = None,
        max_tokens: int | None = None,
        thinking_open: bool | None = None,
    ) -> None:
        """Begin an output.

        Args:
            params: how to continue; `seed`, `n` and `prompt_logprobs` in it are the caller's business.
            seed: what the draws depend on, together with the number of tokens.
            prompt_ids: the prompt.
            eos_ids: ids that end a text.
            tokenizer: needed for text, thinking, stop strings; None: ids only.
            vocab_size: V of the model.
            matcher: what `grammar.GrammarCompiler.matcher(params, eos_ids)` returned for this output.
            max_tokens: room that the context leaves; the output ends there or at `params.max_new_tokens`.
            thinking_open: whether the prompt has opened the thinking; None: see `thinking.opens_thinking`.

        Raises:
            UserError: a parameter needs the tokenizer and there is none, or a biased id is not in the vocabulary.
        """
        _check(params, vocab_size, tokenizer, matcher)
        self.params, self.seed, self.prompt_ids = params, seed, prompt_ids
        self.output_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[TokenLogprob] = []
        self._max_tokens = params.max_new_tokens if max_tokens is None else min(max_tokens, params.max_new_tokens)
        self._tokenizer, self._matcher = tokenizer, matcher
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._ending_ids = frozenset(i for i in self._eos_ids.union(params.stop_token_ids) if i < vocab_size)
        self._counts: TokenCounts | None = None
        if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
            self._counts = TokenCounts(prompt_ids if params.repetition_penalty != 1 else ())
        self._plain = params.is_plain and matcher is None and self._counts is None
        self._can_repeat = params.can_stop_repeating
        self._sure_tokens = 0  # how many of the last tokens had a probability above the repetition stop's
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._released: list[str] = []  # pieces of text that cannot be the beginning of a stop string
        self._num_taken = 0  # how many of them `take_text` has returned
        self._held = ""  # text behind it
        self._special_stops = _special_stops(params, tokenizer)
        self._forced: list[int] = []  # the next tokens, last first
        self.forced: list[int] = []  # places in the output of tokens that were not chosen: a close of the thinking
        self._thinking: Thinking | None = None
        if tokenizer is not None:
            is_open = opens_thinking(prompt_ids, tokenizer) if thinking_open is None else thinking_open
            self._thinking = Thinking(is_open=is_open)
            self._limit_thinking()

    # -- what has been written -----------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The text so far, without special tokens, the token that ended it, or the stop string."""
        return "".join(self._released) + self._held

    def take_text(self) -> str:
        """Return the text that is new since the last call, but for what may be the beginning of a stop string."""
        new = "".join(self._released[self._num_taken :])
        self._num_taken = len(self._released)
        return new

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens the thinking has (see `thinking`); 0 without a tokenizer."""
        return 0 if self._thinking is None else self._thinking.num_tokens

    @property
    def remaining(self) -> int:
        """How many tokens may still come."""
        return 0 if self.finish_reason is not None else self._max_tokens - len(self.output_ids)

    # -- what comes next -----------------------------------------------------------------------------------------

    @property
    def forced_ids(self) -> list[int]:
        """The tokens that come next whatever the logits say: the close of the thinking."""
        return self._forced[::-1]

    @property
    def wants_logprob(self) -> bool:
        """Whether `append` needs the log-probability of each token."""
        return self._can_repeat or self.params.logprobs is not None

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar decides what may come next."""
        return self._matcher is not None

    @property
    def draws_plainly(self) -> bool:
        """Whether the next token is drawn from the model's own probabilities, and at most its own is asked for."""
        return self._plain and not self._forced and len(self.output_ids) >= self.params.min_tokens

    @property
    def counts(self) -> TokenCounts | None:
        """What penalties need; None if there are none."""
        return self._counts

    def banned_ids(self) -> Collection[int]:
        """Ids that must not come next, apart from `allowed_ids`: what would end the output too early, and the like."""
        banned: Collection[int] = ()
        if len(self.output_ids) < self.params.min_tokens and not self._is_complete():
            banned = self._ending_ids
        if self._matcher is not None and self._thinking is not None and self._thinking.phase == "thinking":
            # The content is still to come, and must not begin in the token that ends the close.
            banned = self._ending_ids.union(self._matcher.tokens.straddling[self._thinking.closing].tolist())
        return banned

    def allowed_ids(self) -> NDArray[np.bool_] | None:
        """Return which ids may come next, [V] bool, by the grammar; None while it allows all (no grammar, thinking)."""
        if self._matcher is None or self._thinking is None or self._thinking.phase == "thinking":
            return None
        thinking, tokens = self._thinking, self._matcher.tokens
        if thinking.phase == "content":
            return self._matcher.mask()
        if thinking.phase == "after":
            return _with_ids(
                self._matcher.mask(), tokens.newlines[max(0, tokens.MOST_NEWLINES - thinking.num_newlines)]
            )
        opening = tokens.opening[thinking.begun]
        if self._matcher.is_dead:
            return _with_ids(np.zeros(self._matcher.vocab_size, dtype=np.bool_), opening)
        return _with_ids(self._matcher.mask(), opening)

    def start_mask(self, executor: Executor) -> None:
        """Begin to compute the grammar's mask for the next token in a thread, while the model runs."""
        if self._matcher is None or self._thinking is None or self._thinking.phase == "thinking":
            return
        if self.finish_reason is None and not self._forced and not self._matcher.is_dead:
            self._matcher.start_mask(executor)

    # -- the next token has come ---------------------------------------------------------------------------------

    def append(self, token: int, logprob: float | None = None, details: TokenLogprob | None = None) -> None:
        """Take the next token; afterwards `finish_reason` says whether it was the last.

        Args:
            token: its id.
            logprob: its log-probability under the model, if `wants_logprob`.
            details: if `params.logprobs` asks.
        """
        assert self.finish_reason is None, "the output has ended"
        if self._forced:
            forced = self._forced.pop()
            assert token == forced, "this token is not free"
            self.forced.append(len(self.output_ids))
        self.output_ids.append(token)
        if details is not None:
            self.logprobs.append(details)
        if self._counts is not None:
            self._counts.add(token)
        if self._matcher is not None and self._matcher.failure:
            self._end("abort", self._matcher.failure)
            return
        may_end = len(self.output_ids) >= self.params.min_tokens
        if token in self._ending_ids and (may_end or self._is_complete()):
            self._end("stop", None if token in self._eos_ids else token)
            return
        if self._tokenizer is not None:
            self._take_bytes(token, may_end)
        if self._can_repeat and self.finish_reason is None:
            self._watch_repetition(logprob)
        if self.finish_reason is None and len(self.output_ids) >= self._max_tokens:
            self._end("length")

    def finish(self, reason: FinishReason) -> None:
        """End the output from outside, for example with "abort"."""
        if self.finish_reason is None:
            self._end(reason)

    def fork(self, seed: int) -> Continuation:
        """Return an equal continuation that goes on independently, with draws of its own."""
        twin = copy.copy(self)
        twin.seed = seed
        twin.output_ids, twin.logprobs = self.output_ids.copy(), self.logprobs.copy()
        twin._counts = None if self._counts is None else self._counts.copy()
        twin._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        twin._utf8.setstate(self._utf8.getstate())
        twin._released, twin._forced = self._released.copy(), self._forced.copy()
        twin.forced = self.forced.copy()
        twin._thinking = None if self._thinking is None else self._thinking.copy()
        twin._matcher = None if self._matcher is None else self._matcher.fork()
        return twin

    def _take_bytes(self, token: int, may_end: bool) -> None:
        assert self._tokenizer is not None and self._thinking is not None
        if token in self._special_stops and may_end:
            self._end("stop", self._special_stops[token])
            return
        data = self._tokenizer.token_bytes(token, skip_special_tokens=True)
        phase = self._thinking.phase
        if phase != "content":
            self._thinking.push(data)
        if self._matcher is not None:
            self._follow_grammar(token, phase)
            if self.finish_reason is not None:
                return
        new = self._utf8.decode(data)
        if self.params.stop:
            self._look_for_stop(new, may_end)
        elif new:
            self._released.append(new)
        if self.params.max_thinking_tokens is not None and self.finish_reason is None:
            self._limit_thinking()
        if self._matcher is not None and self.finish_reason is None and self._is_complete() and not self._eos_ids:
            self._end("stop")  # nothing can follow, and there is no eos to say so

    def _follow_grammar(self, token: int, phase: str) -> None:
        """Let the grammar take a token that came in this phase of the output, if it is part of the content."""
        assert self._matcher is not None and self._thinking is not None
        now = self._thinking.phase
        if phase == "content" or (phase == "after" and now == "content"):
            self._matcher.accept(token)
            if self._matcher.failure:
                self._end("abort", self._matcher.failure)
        elif phase == "start":
            # The beginning may be that of <think> and that of the content, until one of the two is excluded.
            if now in ("start", "content"):
                self._matcher.try_accept(token)
                assert now == "start" or not self._matcher.is_dead, "neither thinking nor what the grammar allows"
            else:
                self._matcher.reset()

    def _is_complete(self) -> bool:
        """Whether the grammar has been written to its end."""
        return self._matcher is not None and self._matcher.is_complete

    def _limit_thinking(self) -> None:
        """Force the close if the budget of thinking tokens is used up."""
        budget, thinking = self.params.max_thinking_tokens, self._thinking
        if budget is None or thinking is None or thinking.phase != "thinking" or self._forced:
            return
        if thinking.num_tokens >= budget:
            assert self._tokenizer is not None
            self._forced = close_ids(thinking, self._tokenizer)[::-1]

    def _look_for_stop(self, new: str, may_end: bool) -> None:
        """Add text, and end the output at the stop string that it completes first."""
        text, before = self._held + new, len(self._held)
        if may_end and new:
            found: tuple[int, int, str] | None = None  # end, start, stop: the first to end; of several the longest
            for stop in self.params.stop:
                start = text.find(stop, max(0, before - len(stop) + 1))
                if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                    found = (start + len(stop), start, stop)
            if found is not None:
                self._held = text[: found[1]]
                self._utf8.reset()  # what of a character stands behind the stop string is not text
                self._end("stop", found[2])
                return
        held = max(_overlap(text, stop) for stop in self.params.stop)
        if len(text) > held:
            self._released.append(text[: len(text) - held])
        self._held = text[len(text) - held :]

    def _watch_repetition(self, logprob: float | None) -> None:
        assert logprob is not None, "the repetition stop needs every token's log-probability"
        threshold = self.params.repetition_stop_probability
        self._sure_tokens = self._sure_tokens + 1 if math.exp(logprob) > threshold else 0
        if self._sure_tokens >= self.params.repetition_stop_tokens:
            self._end("repetition")

    def _end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        self._forced = []
        rest = self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        if rest:
            self._released.append(rest)


def choose_tokens(
    logits: Tensor,
    rows: Sequence[Continuation],
    forbidden: NDArray[np.int64] | None = None,
    backend: str | None = None,
) -> list[Choice]:
    """Choose each row's next token: bans, bias, penalties, mask, then greedy or a draw; forced tokens as they are.

    The choice of a row depends on its logits, its continuation and its seed, on nothing else in the batch, to the bit.
    The draw belongs to (seed, number of output tokens), so that it is the same when a row is interrupted, resumed, or
    verified speculatively.

    With the backend triton, the choice is made on the GPU, and the host waits once; a draw may differ from that on a
    CPU where the quantile lies within rounding of a boundary between two tokens.

    Args:
        logits: [N, V] float32.
        rows: N continuations; they are not changed.
        forbidden: ids that are never chosen, from `sampling.forbidden_ids`.
        backend: one of `kernels.BACKENDS`, or None for the fastest.
    Returns:
        N choices, for `rows[i].append(*choices[i])`.
    """
    from minimax_m1.kernels import choose

    if choose(backend, logits) == "triton":
        return _choose_on_gpu(logits.detach().float(), rows, forbidden)
    matrix = logits.detach().float().cpu().numpy()
    vocab_size = matrix.shape[1]
    weights, work = np.empty(vocab_size, dtype=np.float32), np.empty(vocab_size, dtype=np.float32)
    together = DRAWN_TOGETHER // vocab_size  # rows; of a large vocabulary one by one is faster
    is_plain = together > 1 and (forbidden is None or not len(forbidden))
    plain = [i for i, row in enumerate(rows) if row.draws_plainly] if is_plain else []
    choices: dict[int, Choice] = {}
    for start in range(0, len(plain), max(1, together)):
        some = plain[start : start + together]
        is_run = some[-1] - some[0] == len(some) - 1
        raw = matrix[some[0] : some[-1] + 1] if is_run else matrix[some]
        choices.update(zip(some, _draw_plainly(raw, [rows[i] for i in some]), strict=True))
    for i, row in enumerate(rows):
        if i not in choices:
            choices[i] = _choose(matrix[i], row, forbidden, weights, work)
    return [choices[i] for i in range(len(rows))]


def _draw_plainly(raw: NDArray[np.float32], rows: Sequence[Continuation]) -> list[Choice]:
    """Do what `_choose` does, to the bit, for rows [n, V] that are drawn from the model's own probabilities."""
    quantiles = uniforms([row.seed for row in rows], [len(row.output_ids) for row in rows])
    tokens, tops, totals = draw_rows(raw, quantiles)
    chosen, ranks = raw[np.arange(len(rows)), tokens], [0] * len(rows)
    if any(row.params.logprobs is not None for row in rows):
        ranks = (1 + np.count_nonzero(raw > chosen[:, None], axis=1)).tolist()
    columns = tokens.tolist(), chosen.tolist(), tops.tolist(), totals.tolist(), ranks
    return _read_answers(list(zip(*columns, strict=True)), rows)


def _read_answers(answers: Sequence[Sequence[float]], rows: Sequence[Continuation]) -> list[Choice]:
    """Return what each row asks to know of its answer (see `read_answer`)."""
    choices = []
    for row, answer in zip(rows, answers, strict=True):
        if not row.wants_logprob:
            choices.append(Choice(int(answer[0])))
            continue
        details = read_answer(answer, row.params.logprobs or 0)
        choices.append(Choice(details.token, details.logprob, None if row.params.logprobs is None else details))
    return choices


def _choose(
    raw: NDArray[np.float32],
    row: Continuation,
    forbidden: NDArray[np.int64] | None,
    weights: NDArray[np.float32],
    work: NDArray[np.float32],
) -> Choice:
    """Choose one row's token; `weights` and `work` [V] are room for exponentials and scores."""
    params = row.params
    total: float | None = None  # of the exponentials of `raw`
    if row.forced_ids:
        token = row.forced_ids[0]
    else:
        scores = _scores(raw, row, forbidden, work)
        if params.temperature == 0:
            token = int(scores.argmax())
        else:
            blocks = exponentials(scores, params.temperature, weights)
            token = draw_token(weights, blocks, params, uniform(row.seed, len(row.output_ids)))
            total = float(blocks[-1]) if scores is raw and params.temperature == 1 else None
    if not row.wants_logprob:
        return Choice(token)
    logprob = logprob_of(raw, token, float(exponentials(raw, 1.0, weights)[-1]) if total is None else total)
    if params.logprobs is None:
        return Choice(token, logprob)
    return Choice(token, logprob, describe_token(raw, token, logprob, params.logprobs, forbidden))


class _Adjustment(NamedTuple):
    """What is done to a row's logits before the choice, in this order; forbidden ids are last."""

    bias: Mapping[int, float]
    counts: TokenCounts | None
    allowed: NDArray[np.bool_] | None
    banned: Collection[int]

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return bool(self.bias) or self.counts is not None or bool(self.banned) or self.allowed is not None


def _adjustment(row: Continuation) -> _Adjustment:
    return _Adjustment(row.params.logit_bias, row.counts, row.allowed_ids(), row.banned_ids())


def _scores(
    raw: NDArray[np.float32], row: Continuation, forbidden: NDArray[np.int64] | None, work: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what the row's token is chosen by: `raw` itself if nothing changes it, else written to `work`."""
    bias, counts, allowed, banned = adjustment = _adjustment(row)
    no_forbidden = forbidden is None or not len(forbidden)
    if no_forbidden and not adjustment.changes:
        return raw
    np.copyto(work, raw)
    for token, value in bias.items():
        work[token] += value
    if counts is not None:
        counts.penalise(work, row.params)
    if allowed is not None:
        np.copyto(work, -np.inf, where=~allowed)
    if banned:
        work[list(banned)] = -np.inf
    if not no_forbidden:
        assert forbidden is not None
        kept = work[forbidden]
        work[forbidden] = -np.inf
        if allowed is not None and work.max() == -np.inf:  # the grammar has only ids that were never trained
            work[forbidden] = kept
    return work


# -- the choice on a GPU ------------------------------------------------------------------------------------------


def _choose_on_gpu(logits: Tensor, rows: Sequence[Continuation], forbidden: NDArray[np.int64] | None) -> list[Choice]:
    """Do what `_choose` does for all rows, without a wait until the tokens are copied to the host."""
    from minimax_m1.kernels import sampling_triton

    quantiles = uniforms([row.seed for row in rows], [len(row.output_ids) for row in rows]).tolist()
    wanted: list[tuple[float, ...]] = []
    adjusted: list[tuple[int, _Adjustment]] = []
    for i, row in enumerate(rows):
        p, forced = row.params, row.forced_ids
        if not forced and (adjustment := _adjustment(row)).changes:
            adjusted.append((i, adjustment))
        temperature = max(p.temperature, COLDEST) if p.temperature else 0
        num_best = -1 if p.logprobs is None else p.logprobs
        wanted.append((temperature, p.top_k, p.top_p, p.min_p, quantiles[i], forced[0] if forced else -1, -1, num_best))
    asked = np.array(wanted, dtype=sampling_triton.ASKED)
    scores = None
    if adjusted:
        adjusted.sort(key=lambda pair: pair[1].allowed is None)  # those with a grammar first
        order = [i for i, _ in adjusted]
        asked["adjusted"][order] = range(len(order))
        scores = _adjust_on_gpu(logits, [rows[i].params for i in order], adjusted, forbidden)
    answers = sampling_triton.choose_rows(logits, scores, asked, forbidden).cpu()
    return _read_answers(answers.tolist(), rows)


def _adjust_on_gpu(
    logits: Tensor,
    params: Sequence[SamplingParams],
    adjusted: Sequence[tuple[int, _Adjustment]],
    forbidden: NDArray[np.int64] | None,
) -> Tensor:
    """Return what `_scores` does, [M, V], for M rows of the logits; those with a grammar come first."""
    import torch

    from minimax_m1.kernels.gpu import to_device
    from minimax_m1.kernels.sampling_triton import forbidden_mask

    device, vocab_size = logits.device, logits.shape[1]
    scores = logits.index_select(0, to_device(np.array([i for i, _ in adjusted]), device))
    flat, adjustments = scores.view(-1), [adjustment for _, adjustment in adjusted]

    def placed(pieces: Iterable[tuple[Sequence[int] | NDArray[np.int64], ArrayLike]]) -> tuple[Tensor, Tensor]:
        """Copy ids and values of each row to the GPU: the ids as places in `flat`, one value an id."""
        ids, values = [], []
        for m, (own, value) in enumerate(pieces):
            ids.append(np.asarray(own, dtype=np.int64) + m * vocab_size)
            values.append(np.broadcast_to(np.asarray(value, dtype=np.float32), len(ids[-1])))
        return to_device(np.concatenate(ids), device), to_device(np.concatenate(values), device)

    both = list(zip(adjustments, params, strict=True))
    if any(a.bias for a in adjustments):
        flat.index_add_(0, *placed((list(a.bias), list(a.bias.values())) for a in adjustments))
    if any(p.repetition_penalty != 1 for p in params):
        seen = [() if a.counts is None or p.repetition_penalty == 1 else a.counts.seen for a, p in both]
        places, penalty = placed(zip(seen, [p.repetition_penalty for p in params], strict=True))
        kept = flat[places]
        flat[places] = torch.where(kept > 0, kept / penalty, kept * penalty)
    if any(a.counts is not None for a in adjustments):
        places, subtracted = placed(((), 0.0) if a.counts is None else a.counts.subtractions(p) for a, p in both)
        flat.index_add_(0, places, subtracted, alpha=-1)
    if any(a.banned for a in adjustments):
        flat.index_fill_(0, placed((list(a.banned), 0.0) for a in adjustments)[0], -torch.inf)
    masks = [a.allowed for a in adjustments if a.allowed is not None]
    if masks:
        scores[: len(masks)].masked_fill_(~to_device(np.stack(masks), device), -torch.inf)
    if forbidden is None or not len(forbidden):
        return scores
    left = scores.masked_fill(forbidden_mask(forbidden.tobytes(), vocab_size, device), -torch.inf)
    if masks:  # a grammar may have only ids that were never trained
        own, rest = scores[: len(masks)], left[: len(masks)]
        rest.copy_(torch.where(rest.amax(1, keepdim=True) == -torch.inf, own, rest))
    return left


def _check(
    params: SamplingParams, vocab_size: int, tokenizer: MiniMaxM1Tokenizer | None, matcher: Matcher | None
) -> None:
    if tokenizer is None:
        if params.stop:
            raise UserError("stop: stop strings are matched on text; give the tokenizer as well")
        if params.max_thinking_tokens is not None:
            raise UserError("max_thinking_tokens: thinking is found in text; give the tokenizer as well")
    if (params.structured is not None or params.forced_tools) and (matcher is None or tokenizer is None):
        field = "structured" if params.structured is not None else "tool_choice"
        raise UserError(f"{field}: grammars are matched on text; give the tokenizer as well")
    too_large = [token for token in params.logit_bias if token >= vocab_size]
    if too_large:
        raise UserError(f"logit_bias: id {too_large[0]} cannot be used; accepted: 0 to {vocab_size - 1}")


def _special_stops(params: SamplingParams, tokenizer: MiniMaxM1Tokenizer | None) -> dict[int, str]:
    """Return the stop strings that are special tokens, by id: they are never in the text."""
    added = {} if tokenizer is None else tokenizer.added_tokens
    return {added[stop]: stop for stop in params.stop if stop in added}


def _with_ids(mask: NDArray[np.bool_], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = mask.copy()
    mask[ids] = True
    return mask


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, the whole of `stop` left out."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
