"""How the next token is chosen: `SamplingParams`, and pure functions on one row of logits.

Shapes: V ids of the vocabulary; a row is [V] float32, a numpy array on the CPU. Rows are worked on one by one, so that
one row's outcome cannot depend on another row, and so that its temporaries stay in the processor's cache: for 64 rows
of 200,000 ids that is several times faster than operations on the whole matrix. An id with logit -inf is never chosen.
No function changes its arguments, but where it says so. No torch at import.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from minimax_m1.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MOST_LOGPROBS = 20
THINKING_40K, THINKING_80K = 40_000, 80_000  # M1's two thinking budgets, for `max_thinking_tokens`
_BLOCK = 256  # weights are summed block by block, so that a draw reads one block and not the whole vocabulary
_MASK = 0xFFFFFFFFFFFFFFFF
COLDEST = 1e-30  # temperatures below are as cold as this one; float32 could not divide by them


@dataclass(frozen=True)
class StructuredOutput:
    """The form that the content must have; exactly one field is given. Thinking before it stays free.

    Raises:
        UserError: none or several fields, or a field of the wrong type; whether a schema can be used is only known to
            `grammar.GrammarCompiler`.
    """

    json_schema: Mapping[str, Any] | str | None = None  # a JSON schema, or its JSON text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # a regular expression that the whole content matches (Rust's syntax, no look-around)
    choice: tuple[str, ...] = ()  # one of these texts
    grammar: str | None = None  # a grammar in llguidance's dialect of Lark

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", _as_tuple("structured.choice", self.choice))
        if not all(isinstance(text, str) and text for text in self.choice):
            raise UserError(f"structured.choice: {self.choice!r:.60} cannot be used; accepted: texts, none empty")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False, ())]
        if len(given) != 1:
            names = ", ".join(f.name for f in dataclasses.fields(self))
            raise UserError(f"structured: {given} cannot be used; accepted: exactly one of {names}")
        if not isinstance(self.json_object, bool):
            raise UserError(f"structured.json_object: {self.json_object!r} cannot be used; accepted: true")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise UserError(f"structured.{name}: {getattr(self, name)!r} cannot be used; accepted: a text")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _read_schema("structured.json_schema", self.json_schema))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> StructuredOutput:
        """Build from a mapping.

        Raises:
            UserError: an unknown field, naming the nearest one; else as the class.
        """
        _check_names(cls, "structured field", values)
        return cls(**values)


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued; the names are vLLM's, but for `max_new_tokens`, which is Transformers'.

    Raises:
        UserError: a value out of its range; the message names the field, the value and what is accepted.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0: greedy, the most probable token
    top_p: float = 1.0  # the smallest set of tokens that holds this probability; 1: off
    top_k: int = 0  # this many most probable tokens; 0: off
    min_p: float = 0.0  # tokens at least this probable relative to the best; 0: off
    repetition_penalty: float = 1.0  # > 1 discourages what stands in the prompt or the output; 1: off
    presence_penalty: float = 0.0  # subtracted once from what stands in the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    min_tokens: int = 0  # no eos, stop id or stop string ends the output before it has this many tokens
    stop: tuple[str, ...] = ()  # texts that end the output, also in its thinking; `text` ends before the stop string
    stop_token_ids: tuple[int, ...] = ()  # ids that end the output, besides eos
    ignore_eos: bool = False
    seed: int | None = None  # None: another draw every time
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # id -> what is added to its logit
    n: int = 1  # outputs for the prompt; output i draws from seed + i
    logprobs: int | None = None  # 0: of each chosen token; k: of the k most probable as well; None: off
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    max_thinking_tokens: int | None = None  # tokens between <think> and its close; 0: no thinking; None: no limit
    repetition_stop_tokens: int = 3000  # this many tokens in a row above the next field end the output; 0: off
    repetition_stop_probability: float = 0.99  # a token's under the model itself, before temperature and penalties
    structured: StructuredOutput | None = None  # the form of the content
    tools: tuple[Mapping[str, Any], ...] = ()  # definitions that `tool_choice` refers to; the template shows them
    tool_choice: str | Mapping[str, Any] = "auto"  # none, auto, required, or {"name": tool}: the content is its call
    parallel_tool_calls: bool = True  # whether forced calls may be several
    expert_threshold: float = 1.0  # a token uses its experts until their weights reach this; 1: the model's own top-k

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "tools"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        _check_whole("max_new_tokens", self.max_new_tokens, 1)
        _check_number("temperature", self.temperature, 0, 1000)
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_whole("top_k", self.top_k, 0)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 1e-3, 1000)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_whole("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_new_tokens:
            raise UserError(
                f"min_tokens: {self.min_tokens} cannot be used; accepted: up to max_new_tokens ({self.max_new_tokens})"
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop: {list(self.stop)!r} cannot be used; accepted: texts that are not empty")
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias: {self.logit_bias!r} cannot be used; accepted: a mapping from id to number")
        for token, bias in self.logit_bias.items():
            _check_whole("logit_bias", token, 0)
            _check_number("logit_bias", bias, -100, 100)
        _check_whole("n", self.n, 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 0, MOST_LOGPROBS)
        if self.max_thinking_tokens is not None:
            _check_whole("max_thinking_tokens", self.max_thinking_tokens, 0)
        _check_whole("repetition_stop_tokens", self.repetition_stop_tokens, 0)
        _check_number("repetition_stop_probability", self.repetition_stop_probability, 0, 1)
        for name in ("ignore_eos", "parallel_tool_calls"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: {getattr(self, name)!r} cannot be used; accepted: true or false")
        _check_number("expert_threshold", self.expert_threshold, 0, 1, above=True)
        self._check_form()

    def _check_form(self) -> None:
        """Check what constrains the content: `structured`, or `tools` with `tool_choice`."""
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise UserError(f"structured: {self.structured!r} cannot be used; accepted: a StructuredOutput")
        if self.tools or self.tool_choice not in ("auto", "none"):
            from minimax_m1.tokenizer.chat_template import check_tools  # only here, as it imports the template engine

            object.__setattr__(self, "tools", tuple(check_tools(self.tools)))
        names = [tool_function(tool)["name"] for tool in self.tools]
        choice = self.tool_choice
        if isinstance(choice, Mapping):
            function = choice.get("function", choice)
            name = function.get("name") if isinstance(function, Mapping) else None
            if name not in names:
                raise UserError(f"tool_choice: {choice!r} cannot be used; accepted: the name of a tool, one of {names}")
            object.__setattr__(self, "tool_choice", {"name": name})
        elif choice not in ("none", "auto", "required"):
            raise UserError(f'tool_choice: {choice!r} cannot be used; accepted: none, auto, required, or {{"name": …}}')
        elif choice == "required" and not names:
            raise UserError("tool_choice: 'required' cannot be used; accepted when tools are given")
        if self.forced_tools and self.structured is not None:
            raise UserError("structured: cannot be used with a forced tool call; accepted: one of the two")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping, such as a JSON object: lists for tuples, ids as text in `logit_bias`.

        Raises:
            UserError: an unknown field, naming the nearest one; else as the class.
        """
        _check_names(cls, "sampling field", values)
        values = dict(values)
        if isinstance(values.get("structured"), Mapping):
            values["structured"] = StructuredOutput.parse(values["structured"])
        if isinstance(values.get("logit_bias"), Mapping):
            values["logit_bias"] = {
                int(token) if isinstance(token, str) and token.isdecimal() else token: bias
                for token, bias in values["logit_bias"].items()
            }
        return cls(**values)

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own probabilities, and no other tokens' are asked for."""
        cut = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return self.temperature == 1 and not cut and not self.logit_bias and not self.logprobs

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, so that no draw is needed."""
        return self.temperature == 0

    @property
    def forced_tools(self) -> tuple[Mapping[str, Any], ...]:
        """The tools of which one must be called; empty if the model may decide."""
        if isinstance(self.tool_choice, Mapping):
            return tuple(tool for tool in self.tools if tool_function(tool)["name"] == self.tool_choice["name"])
        return self.tools if self.tool_choice == "required" else ()

    @property
    def can_stop_repeating(self) -> bool:
        """Whether the repetition stop is on and can come before `max_new_tokens`."""
        return 0 < self.repetition_stop_tokens < self.max_new_tokens


def tool_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool's `{"name", "description", "parameters"}`, given bare or inside OpenAI's `{"function": ...}`."""
    return tool.get("function", tool)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability under the model itself: log-softmax of the raw float32 logits of all V ids.

    Neither temperature, penalties, bias nor masks are in it, as in OpenAI's API and in vLLM (`raw_logprobs`).
    """

    token: int
    logprob: float
    rank: int  # 1: the most probable; ids that are never sampled do not count
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the most probable ids, best first


def forbidden_ids(embedding: Tensor, num_valid_tokens: int | None = None) -> NDArray[np.int64]:
    """Return the ids, ascending, from `num_valid_tokens` on, and those whose embedding row is all zero.

    Such ids were never trained, so their logit is about 0 and sampling drifts to them (Text-01: ids from 200032 on,
    vllm#19592).

    Args:
        embedding: [V, hidden], any dtype.
        num_valid_tokens: size of the tokenizer's vocabulary; None: V.
    """
    forbidden = embedding[:, 0] == 0  # few rows pass this, and only they are read whole
    suspects = forbidden.nonzero().flatten()
    forbidden[suspects] = ~embedding[suspects].any(dim=1)
    if num_valid_tokens is not None:
        forbidden[num_valid_tokens:] = True
    return forbidden.nonzero().flatten().cpu().numpy()


# -- penalties ----------------------------------------------------------------------------------------------------


class TokenCounts:
    """The ids that penalties concern, kept while the output grows: a token costs the same however long it is."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        """Begin with a prompt and an empty output."""
        self._seen = _Column(np.unique(np.asarray(prompt_ids, dtype=np.int64)))
        self._ids = _Column(np.empty(0, dtype=np.int64))  # of the output
        self._counts = _Column(np.empty(0, dtype=np.float32))
        self._place: dict[int, int] = {}  # id of the output -> its index in the two columns
        self._known = set(self._seen.values.tolist())

    def add(self, token: int) -> None:
        """Count one more token of the output."""
        place = self._place.get(token)
        if place is not None:
            self._counts.values[place] += 1
            return
        self._place[token] = len(self._place)
        self._ids.append(token)
        self._counts.append(1)
        if token not in self._known:
            self._known.add(token)
            self._seen.append(token)

    def copy(self) -> TokenCounts:
        """Return counts that go on independently."""
        twin = TokenCounts(())
        twin._seen, twin._ids, twin._counts = self._seen.copy(), self._ids.copy(), self._counts.copy()
        twin._place, twin._known = self._place.copy(), self._known.copy()
        return twin

    @property
    def seen(self) -> NDArray[np.int64]:
        """The ids of the prompt and the output, each once; valid until the next `add`."""
        return self._seen.values

    def subtractions(self, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return the output's ids, each once, and what frequency and presence penalties subtract from their logits."""
        return self._ids.values, self._counts.values * params.frequency_penalty + params.presence_penalty

    def penalise(self, row: NDArray[np.float32], params: SamplingParams) -> None:
        """Apply repetition, then frequency and presence penalties to `row`, in place.

        An id of the prompt or the output: a positive logit is divided by `repetition_penalty`, a negative one
        multiplied (Keskar et al. 2019, arXiv 1909.05858; as Transformers' RepetitionPenaltyLogitsProcessor and vLLM).
        An id of the output: minus `frequency_penalty` times its count, minus `presence_penalty` (OpenAI's definition,
        as vLLM).
        """
        if params.repetition_penalty != 1:
            seen = self.seen
            scores, penalty = row[seen], np.float32(params.repetition_penalty)
            row[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
        if params.frequency_penalty != 0 or params.presence_penalty != 0:
            ids, subtracted = self.subtractions(params)
            row[ids] -= subtracted


class _Column:
    """A one-dimensional array that grows at its end."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._memory, self._size = values, len(values)

    @property
    def values(self) -> NDArray[Any]:
        return self._memory[: self._size]

    def append(self, value: float) -> None:
        if self._size == len(self._memory):
            self._memory = np.resize(self._memory, max(16, 2 * self._size))
        self._memory[self._size] = value
        self._size += 1

    def copy(self) -> _Column:
        return _Column(self.values.copy())


# -- the draw -----------------------------------------------------------------------------------------------------


def exponentials(row: NDArray[np.float32], temperature: float, weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Write exp((row - max) / temperature) to `weights` [V]; return `cumulated_blocks` of them."""
    np.subtract(row, row.max(), out=weights)
    if temperature != 1:
        with np.errstate(over="ignore"):
            np.divide(weights, np.float32(max(temperature, COLDEST)), out=weights)
    np.exp(weights, out=weights)
    return cumulated_blocks(weights)


def draw_token(
    weights: NDArray[np.float32], blocks: NDArray[np.float64], params: SamplingParams, quantile: float
) -> int:
    """Draw an id: top_k, top_p, min_p in Transformers' order, then the id at a quantile of what they leave.

    Args:
        weights: [V] from `exponentials`, as is `blocks`: proportional to the probabilities, the largest 1.
        quantile: a number in [0, 1).
    """
    if params.top_k == 0 and params.top_p >= 1 and params.min_p == 0:
        return index_at(weights, blocks, quantile * float(blocks[-1]), side="right")
    ids = keep_ids(weights, float(blocks[-1]), params)
    weights = weights[ids]
    blocks = cumulated_blocks(weights)
    return int(ids[index_at(weights, blocks, quantile * float(blocks[-1]), side="right")])


def keep_ids(weights: NDArray[np.float32], total: float, params: SamplingParams) -> NDArray[np.int64]:
    """Return the ids, ascending, that top_k, top_p and min_p leave; ids as probable as the last of a set are in it.

    Args:
        weights: [V], the largest 1.
        total: their sum.
    Source: nucleus sampling, Holtzman et al. 2019 (arXiv 1904.09751); min_p, arXiv 2407.01082.
    """
    if params.top_k == 0 and params.top_p >= 1:
        return np.flatnonzero(weights >= np.float32(params.min_p))
    # Sorting all ids takes long, and few are enough: those too unlikely to be in the set even together are left out.
    tail = 0.0 if params.top_k > 0 else 0.999 * (1 - params.top_p) * total / len(weights)
    for bound in (2e-3, 1e-4, 0.0):
        likely = np.flatnonzero(weights > max(bound, tail))
        found = weights[likely]
        if bound <= tail or (len(found) >= params.top_k if params.top_k > 0 else found.sum() > params.top_p * total):
            break
    values = np.sort(found)[::-1]
    if 0 < params.top_k < len(values):
        values = values[: np.searchsorted(-values, -values[params.top_k - 1], side="right")]
    least = values[-1]
    if params.top_p < 1:
        blocks = cumulated_blocks(values)
        total = float(blocks[-1]) if params.top_k > 0 else total
        least = values[index_at(values, blocks, params.top_p * total, side="left")]
    return likely[np.flatnonzero(found >= max(least, np.float32(params.min_p)))]


def cumulated_blocks(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cumulated sums of blocks of 256 weights: a quantile is then found in one block, not in all ids."""
    whole = len(weights) // _BLOCK
    sums = np.empty(-(-len(weights) // _BLOCK), dtype=np.float64)
    sums[:whole] = weights[: whole * _BLOCK].reshape(whole, _BLOCK).sum(axis=1)
    sums[whole:] = weights[whole * _BLOCK :].sum()
    return sums.cumsum()


def index_at(
    weights: NDArray[np.float32], blocks: NDArray[np.float64], target: float, *, side: Literal["left", "right"]
) -> int:
    """Return the first index whose cumulated weight reaches `target` (left) or exceeds it (right).

    Never that of a weight 0; the last of the others where `target` is the sum of all or, by rounding, more.
    """
    block = _first(blocks, target, side)
    before = float(blocks[block - 1]) if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _first(inside, target - before, side)


def draw_rows(
    rows: NDArray[np.float32], quantiles: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """Draw an id from each row's softmax: what `exponentials` and `index_at` give row by row, to the bit.

    Args:
        rows: [n, V] logits.
        quantiles: [n] numbers in [0, 1).
    Returns:
        the ids [n], and of each row the largest logit [n] and the sum [n] of its exponentials.
    """
    count, size = rows.shape
    whole = size // _BLOCK
    num_blocks = -(-size // _BLOCK)
    weights = np.zeros((count, num_blocks * _BLOCK), dtype=np.float32)
    tops = rows.max(axis=1)
    np.exp(np.subtract(rows, tops[:, None]), out=weights[:, :size])
    blocks = np.empty((count, num_blocks), dtype=np.float64)
    blocks[:, :whole] = weights[:, : whole * _BLOCK].reshape(count, whole, _BLOCK).sum(axis=2)
    blocks[:, whole:] = weights[:, whole * _BLOCK : size].sum(axis=1)[:, None]
    blocks = blocks.cumsum(axis=1)
    targets = quantiles * blocks[:, -1]
    block, every = _first_of_rows(blocks, targets), np.arange(count)
    before = np.where(block > 0, blocks[every, block - 1], 0.0)
    inside = weights.reshape(count, num_blocks, _BLOCK)[every, block].cumsum(axis=1, dtype=np.float64)
    return block * _BLOCK + _first_of_rows(inside, targets - before), tops, blocks[:, -1]


def _first_of_rows(sums: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each row of rising sums [n, m] what `_first` does with side "right"."""
    last = np.count_nonzero(sums < sums[:, -1:], axis=1)
    return np.minimum(np.count_nonzero(sums <= targets[:, None], axis=1), last)


def _first(sums: NDArray[np.float64], target: float, side: Literal["left", "right"]) -> int:
    last = int(np.searchsorted(sums, sums[-1], side="left"))  # the last that adds something
    return min(int(np.searchsorted(sums, target, side=side)), last)


def uniform(seed: int, step: int) -> float:
    """Return the number in [0, 1) that belongs to (seed, step).

    Without a generator's state to carry, a sequence draws the same whatever else is in the batch, and when it is
    interrupted and resumed.

    Source: SplitMix64 (Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators), applied twice.
    """
    return (_mix(_mix(seed) + step) >> 11) * 2.0**-53


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> NDArray[np.float64]:
    """Return `uniform` of each pair of seed and step, to the bit."""
    mixed = _mix_all(np.array([seed & _MASK for seed in seeds], dtype=np.uint64))
    mixed = _mix_all(mixed + np.array([step & _MASK for step in steps], dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fresh_seed() -> int:
    """Return a seed from the operating system."""
    return secrets.randbits(63)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `_mix` of each value: 64-bit numbers drop what is too much by themselves."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# -- log-probabilities --------------------------------------------------------------------------------------------


def logprob_of(row: NDArray[np.float32], token: int, total: float) -> float:
    """Return log-softmax(row)[token]; `total` is the sum of `exponentials` of the row at temperature 1."""
    return float(row[token]) - float(row.max()) - math.log(total)


def describe_token(
    row: NDArray[np.float32], token: int, logprob: float, top: int, forbidden: NDArray[np.int64] | None = None
) -> TokenLogprob:
    """Add rank and the `top` most probable ids (of equal ones the smaller id first) to a token's log-probability.

    Args:
        row: [V] float32, raw logits.
        forbidden: ids that are left out of rank and list, as no text belongs to them.
    """
    if forbidden is not None and len(forbidden):
        row = row.copy()
        own = row[token]
        row[forbidden] = -np.inf
        row[token] = own
    rank = 1 + int(np.count_nonzero(row > row[token]))
    if not top:
        return TokenLogprob(token, logprob, rank)
    top = min(top, len(row))
    least = np.partition(row, len(row) - top)[len(row) - top]
    ids = np.flatnonzero(row >= least)
    ids = ids[np.argsort(-row[ids], kind="stable")][:top]
    own = TokenLogprob(token, logprob, rank)
    return _add_best(own, float(row[token]), ids.tolist(), row[ids].tolist())


def read_answer(answer: Sequence[float], num_best: int) -> TokenLogprob:
    """Return what a row's answer says: the columns of `sampling_triton.choose_rows`.

    Args:
        answer: the token, its logit, the row's largest logit, the sum of exp(logit - largest), the rank; K ids of the
            most probable, and their K logits.
        num_best: how many of these the row has asked for.
    """
    token, own, largest, total, rank, *best = answer
    logprob = own - largest - math.log(total)  # as `logprob_of`
    details = TokenLogprob(int(token), logprob, int(rank))
    room = len(best) // 2
    num_best = min(num_best, room)
    return _add_best(details, own, best[:num_best], best[room : room + num_best])


def _add_best(details: TokenLogprob, own: float, ids: Sequence[float], logits: Sequence[float]) -> TokenLogprob:
    """List the most probable ids by their logits; `own` is the token's."""
    shift = details.logprob - own
    # the token's own value as it stands, for (a + b) - b is not always a
    best = tuple(
        (int(i), details.logprob if i == details.token else logit + shift)
        for i, logit in zip(ids, logits, strict=True)
        if logit > -math.inf
    )
    return dataclasses.replace(details, top=best)


def prompt_logprobs(
    logits: Tensor,
    next_ids: Sequence[int],
    top: int,
    forbidden: NDArray[np.int64] | None = None,
    backend: str | None = None,
) -> list[TokenLogprob]:
    """Return each next token's log-probability, for a chunk of a prompt.

    Args:
        logits: [T, V] float32, of T positions of the prompt.
        next_ids: T ids, what follows each position. (A prompt's first token has no log-probability.)
        top: how many of the most probable ids to list.
        forbidden: see `describe_token`.
        backend: one of `kernels.BACKENDS`, or None for the fastest.
    """
    from minimax_m1.kernels import choose

    if choose(backend, logits) == "triton":
        from minimax_m1.kernels.sampling_triton import ASKED, choose_rows

        asked = np.zeros(len(next_ids), dtype=ASKED)
        asked["top_p"], asked["forced"], asked["adjusted"], asked["num_best"] = 1, next_ids, -1, top
        answer = choose_rows(logits.detach().float(), None, asked, forbidden).cpu()
        return [read_answer(values, top) for values in answer.tolist()]
    rows = logits.detach().float().cpu().numpy()
    weights = np.empty(rows.shape[1], dtype=np.float32)
    found = []
    for row, token in zip(rows, next_ids, strict=True):
        logprob = logprob_of(row, token, float(exponentials(row, 1.0, weights)[-1]))
        found.append(describe_token(row, token, logprob, top, forbidden))
    return found


# -- checks -------------------------------------------------------------------------------------------------------


def _as_tuple(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{name}: {values!r} cannot be used; accepted: a list")
    return tuple(values)


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not fits:
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name}: {value!r} cannot be used; accepted: a whole number {bounds}")


def _check_number(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    """Accept least <= value <= most, or least < value <= most with `above`; NaN is in no range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and least <= value <= most and not (above and value == least)):  # type: ignore[operator]
        bounds = f"a number above {least} and up to {most}" if above else f"a number from {least} to {most}"
        raise UserError(f"{name}: {value!r} cannot be used; accepted: {bounds}")


def _check_names(owner: type, kind: str, values: Mapping[str, Any]) -> None:
    """Refuse keys that are no field of the dataclass `owner`."""
    known = [f.name for f in dataclasses.fields(owner)]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"accepted: {', '.join(known)}"
            raise UserError(f"{kind} {name!r} is not known; {hint}")


def _read_schema(name: str, schema: object) -> Mapping[str, Any]:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UserError(f"{name}: is not JSON ({error}); accepted: a JSON schema") from error
    if not isinstance(schema, Mapping):
        raise UserError(f"{name}: {schema!r} cannot be used; accepted: a JSON schema, which is an object")
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: cannot be written as JSON ({error}); accepted: a JSON schema") from error
    return schema
