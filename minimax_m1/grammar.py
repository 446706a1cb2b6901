"""Structured output: which tokens may come next, by JSON schema, regex, choice, grammar or forced tool call.

llguidance (Rust) follows the grammar token by token and gives the mask of the next one; it lets go of Python's lock
while it does, so `Matcher.start_mask` works beside the model's forward pass. Only the content is under the grammar:
thinking before it is free, and `Continuation` says when the content begins. No torch at import, and llguidance only
when the first grammar is compiled.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams, StructuredOutput, tool_function
from minimax_m1.thinking import CLOSE, OPEN
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MOST_KEPT = 64  # compiled grammars that are kept for the next request
# Between JSON's signs: nothing, a space, or a line break with indentation, which is every layout that programs write.
# Where any white space is allowed, a small model may write it until its last token.
_FREE_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "whitespace_pattern": r"( |\n[ \t]{0,40})?"}
# As the chat template writes calls, which is what the model has seen.
_TEMPLATE_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Makes matchers for one tokenizer; made once by an engine. Safe to share between threads."""

    def __init__(self, tokenizer: MiniMaxM1Tokenizer, vocab_size: int) -> None:
        """Take the tokenizer and V, the model's number of ids; ids that the tokenizer lacks are never allowed."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._backend: LLTokenizer | None = None  # llguidance's view of the tokenizer: 0.7 s for 200,000 ids
        self._tokens: TokenTables | None = None
        self._compiled: dict[str, LLMatcher] = {}  # by grammar, the latest last

    def matcher(self, params: SamplingParams, eos_ids: Collection[int]) -> Matcher | None:
        """Return a matcher for one output's content; None if the parameters ask for no form.

        Args:
            params: `structured`, or `tools` with `tool_choice`.
            eos_ids: what may come where the grammar may end; not used with `params.ignore_eos`.

        Raises:
            UserError: the grammar cannot be read, has parts that are not supported, or matches nothing.
        """
        compiled = self.prepare(params)
        if compiled is None:
            return None
        assert self._tokens is not None
        eos_ids = () if params.ignore_eos else [token for token in eos_ids if token < self._vocab_size]
        with self._lock:
            own = compiled.deep_copy()
        return Matcher(own, self._tokens, self._vocab_size, self._tokenizer.eos_token_id, eos_ids)

    def prepare(self, params: SamplingParams) -> LLMatcher | None:
        """Compile the form that parameters ask for, and keep it: the slow part of `matcher`, which waits for nobody.

        Raises:
            UserError: as `matcher`.
        """
        if params.structured is None and not params.forced_tools:
            return None
        with self._lock:
            if self._backend is None or self._tokens is None:
                self._backend, self._tokens = _read_tokenizer(self._tokenizer)
        forms = _forms(params)
        grammar = forms[-1][1]
        with self._lock:
            compiled = self._compiled.pop(grammar, None)
            if compiled is not None:
                self._compiled[grammar] = compiled
                return compiled
        for field, form in forms:
            self._check(field, form)
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > MOST_KEPT:
                del self._compiled[next(iter(self._compiled))]
        return compiled

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        assert self._backend is not None
        return LLMatcher(self._backend, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))

    def _check(self, field: str, grammar: str) -> None:
        matcher = self._compile(grammar)
        error = _error_of(matcher)
        if not error:
            matcher.compute_bitmask()
            error = "no text matches it" if matcher.is_error() else ""
        if error:
            raise UserError(f"{field}: cannot be used: {error}")


def _forms(params: SamplingParams) -> list[tuple[str, str]]:
    """Return the form in llguidance's notation, last, with the field that asks for it; before it its parts."""
    if params.structured is not None:
        return [_write_structured(params.structured)]
    parts = [
        (place, _json_grammar(place, _arguments_schema(tool), _TEMPLATE_LAYOUT))
        for place, tool in ((f"tools[{index}].parameters", tool) for index, tool in enumerate(params.tools))
        if tool in params.forced_tools
    ]
    return [*parts, ("tools", _write_calls(params))]


class TokenTables:
    """Ids that matter where thinking meets content: [k] int64 arrays.

    Attributes:
        newlines: n -> ids of one to n newlines, up to `MOST_NEWLINES`.
        opening: the part of `<think>` that is there -> ids that go on with it.
        straddling: the part of `</think>` that is there -> ids that complete it and begin the content as well.
    """

    MOST_NEWLINES = 2  # between the close and the content

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Sort the tokens' bytes; an empty one (a special token) is in no table."""
        lines = [(i, len(token)) for i, token in enumerate(tokens) if token and not token.strip(b"\n")]
        self.newlines = {n: _ids(i for i, size in lines if size <= n) for n in range(self.MOST_NEWLINES + 1)}
        starts = [(i, token) for i, token in enumerate(tokens) if token and token[0] in OPEN]
        self.opening: dict[bytes, NDArray[np.int64]] = {}
        for size in range(len(OPEN)):
            rest = OPEN[size:]
            self.opening[OPEN[:size]] = _ids(i for i, t in starts if rest.startswith(t) or t.startswith(rest))
        ends = [(i, token) for i, token in enumerate(tokens) if b">" in token]
        self.straddling: dict[bytes, NDArray[np.int64]] = {}
        for size in range(len(CLOSE)):
            begun = CLOSE[:size]
            self.straddling[begun] = _ids(i for i, t in ends if (begun + t).partition(CLOSE)[2].strip(b"\n"))


class Matcher:
    """Follows one output's content; made by `GrammarCompiler.matcher`.

    Attributes:
        tokens: the tables of its tokenizer.
        vocab_size: V.
        is_complete: the grammar has been written to its end: only eos may follow.
        is_dead: what was tried is not what the grammar allows (see `try_accept`).
        failure: why the grammar cannot be followed further (its limits on time and memory); empty if it can.
    """

    def __init__(
        self, backend: LLMatcher, tokens: TokenTables, vocab_size: int, grammar_eos: int, eos_ids: Collection[int]
    ) -> None:
        """Stand before the content.

        Args:
            backend: for this matcher alone.
            tokens, vocab_size: see the class.
            grammar_eos: the id that stands for the end in the backend's masks.
            eos_ids: the ids that stand for it in this output.
        """
        self.tokens, self.vocab_size = tokens, vocab_size
        self.is_complete = self.is_dead = False
        self.failure = ""
        self._backend = backend
        self._grammar_eos, self._eos_ids = grammar_eos, list(eos_ids)
        self._mask: NDArray[np.bool_] | None = None
        self._running: Future[NDArray[np.bool_]] | None = None  # computes the next mask

    def mask(self) -> NDArray[np.bool_]:
        """Return which ids may come next, [V] bool, not to be changed; all once there is a `failure`."""
        self._settle()
        if self._mask is None:
            self._mask = self._compute()
        return self._mask

    def start_mask(self, executor: Executor) -> None:
        """Begin to compute what `mask` will return."""
        if self._mask is None and self._running is None:
            self._running = executor.submit(self._compute)

    def accept(self, token: int) -> None:
        """Take the next token of the content, one that `mask` allows."""
        assert not self.is_dead
        self._settle()
        self._mask = None
        if not self.failure and not self._backend.consume_token(token):
            self.failure = _error_of(self._backend)
        if self.failure:
            return
        self.is_complete = self._backend.is_stopped()
        if not self._eos_ids and not self.is_complete and self._backend.is_accepting():
            self.is_complete = not self.mask().any()  # without an eos nothing would be left to choose from

    def try_accept(self, token: int) -> None:
        """Take a token that may not be the content's: `is_dead` says afterwards that it was not."""
        self._settle()
        if not self.is_dead and self._backend.validate_tokens([token]) == 1:
            self.accept(token)
        else:
            self.is_dead = True

    def reset(self) -> None:
        """Stand before the content again."""
        self._settle()
        self._mask = None
        self._backend.reset()
        self.is_complete = self.is_dead = False

    def fork(self) -> Matcher:
        """Return one that goes on independently."""
        self._settle()
        twin = copy.copy(self)
        twin._backend = self._backend.deep_copy()
        return twin

    def _settle(self) -> None:
        """Wait for the thread that computes the mask."""
        if self._running is not None:
            self._mask, self._running = self._running.result(), None

    def _compute(self) -> NDArray[np.bool_]:
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        found = _unpack(self._backend.compute_bitmask())[: self.vocab_size]
        if self._backend.is_error():
            self.failure = _error_of(self._backend)
            mask[:] = True
            return mask
        mask[: len(found)] = found
        may_end, mask[self._grammar_eos] = bool(mask[self._grammar_eos]), False
        mask[self._eos_ids] = may_end
        return mask


def _error_of(backend: LLMatcher) -> str:
    """Return what went wrong in one line; empty if nothing did."""
    message = backend.get_error().partition("<backtrace>")[0]  # of a panic, whose place is nobody's business
    return " ".join(message.split())[:500]


def _unpack(bitmask: bytes) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bitmask, dtype=np.uint8), bitorder="little").view(np.bool_)


def _ids(ids: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(ids, dtype=np.int64)


class _TokenizerView:
    """What llguidance's `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokenizer: MiniMaxM1Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = tokenizer.all_special_ids
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in tokenizer.valid_token_ids]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allow_special=False)


def _read_tokenizer(tokenizer: MiniMaxM1Tokenizer) -> tuple[LLTokenizer, TokenTables]:
    from llguidance import LLTokenizer, TokenizerWrapper

    view = _TokenizerView(tokenizer)
    special = frozenset(view.special_token_ids)
    tokens = [b"" if token_id in special else token for token_id, token in enumerate(view.tokens)]
    return LLTokenizer(TokenizerWrapper(view)), TokenTables(tokens)


# -- writing grammars ----------------------------------------------------------------------------------------------


def _write_structured(form: StructuredOutput) -> tuple[str, str]:
    """Return the field that is given and its grammar."""
    from llguidance import LLMatcher

    if form.json_schema is not None:
        field = "structured.json_schema"
        return field, _json_grammar(field, form.json_schema, _FREE_LAYOUT)
    if form.json_object:
        field = "structured.json_object"
        return field, _json_grammar(field, {"type": "object"}, _FREE_LAYOUT)
    if form.regex is not None:
        return "structured.regex", LLMatcher.grammar_from_regex(form.regex)
    if form.choice:
        texts = " | ".join(_literal(text) for text in form.choice)
        return "structured.choice", LLMatcher.grammar_from_lark(f"start: {texts}")
    assert form.grammar is not None
    return "structured.grammar", LLMatcher.grammar_from_lark(form.grammar)


def _json_grammar(field: str, schema: Mapping[str, Any] | str, layout: JsonCompileOptions) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=layout)
    except ValueError as error:  # nested too deeply
        raise UserError(f"{field}: cannot be used: {error}") from None


def _write_calls(params: SamplingParams) -> str:
    """Write the grammar of calls as the chat template writes them, one a line."""
    calls = [tool_function(tool) for tool in params.forced_tools]
    rules = [
        'start: "<tool_calls>\\n" '
        + ('(call "\\n")+' if params.parallel_tool_calls else 'call "\\n"')
        + ' "</tool_calls>"',
        "call: " + " | ".join(f"call_{i}" for i in range(len(calls))),
    ]
    for i, tool in enumerate(calls):
        beginning = f'{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, "arguments": '
        schema = {**_arguments_schema(tool), "x-guidance": _TEMPLATE_LAYOUT}
        rules.append(f'call_{i}: {_literal(beginning)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a tool's arguments, which are always an object."""
    return {"type": "object", **(tool_function(tool).get("parameters") or {})}


def _literal(text: str) -> str:
    """Return a text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
