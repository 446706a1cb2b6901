"""Parsing the answer: one incremental state machine over text, from thinking to content to tool calls.

    <think>\\n REASONING \\n</think>\\n CONTENT \\n<tool_calls>\\n {"name": ..., "arguments": {...}} \\n</tool_calls>

Every part is optional. What is not a well-formed call is content, byte for byte: a `<tool_calls>` mentioned in prose, a
broken JSON object, a call that the end of the text cuts off. The newlines shown belong to the markup.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

_THINK_OPEN = "<think>"
_THINK_CLOSE = "</think>"
_CALLS_OPEN = "<tool_calls>"
_CALLS_CLOSE = "</tool_calls>"
_SPACES = " \t\r\n"
# Text between two calls that is neither a call nor the closing tag; spaces at its end may belong to the markup.
_STRAY_TEXT = re.compile(r"[^ \t\r\n][^{<]*(?<![ \t\r\n])")
# What JSON has outside strings, literals and numbers included; anything else ends the object as broken.
_JSON_CHARACTERS = frozenset("{}[]:,+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_" + _SPACES)


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments as an object."""

    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON text, which is how OpenAI's API carries them."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class AnswerEvent:
    """A piece of the answer in order: more reasoning or content in `text`, or one complete `tool_call`."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    tool_call: ToolCall | None = None


@dataclass(frozen=True)
class ParsedAnswer:
    """A whole answer; the strings are empty when the part is absent."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def parse_answer(text: str, *, thinking_open: bool = False) -> ParsedAnswer:
    """Parse a complete answer; see `AnswerParser`."""
    parser = AnswerParser(thinking_open=thinking_open)
    events = parser.push(text) + parser.finish()
    return ParsedAnswer(
        reasoning="".join(event.text for event in events if event.kind == "reasoning"),
        content="".join(event.text for event in events if event.kind == "content"),
        tool_calls=tuple(event.tool_call for event in events if event.tool_call is not None),
    )


class AnswerParser:
    """Splits an answer that arrives in pieces; any cutting into pieces gives the same reasoning, content and calls.

    Text goes out as soon as it cannot be the beginning of markup. A call goes out when its closing brace has come.
    A tool call inside the thinking is not a call; `</tool_calls>` inside a JSON string does not end the calls.
    """

    def __init__(self, *, thinking_open: bool = False, tool_calls: bool = True) -> None:
        """Start before the answer's first character.

        Args:
            thinking_open: the prompt has already written `<think>`.
            tool_calls: False: whoever asked has no tools, and what looks like a call is content.
        """
        self._tool_calls = tool_calls
        self._after_start = self._thinking if thinking_open else self._content
        self._state = self._start
        self._buffer = ""  # what has come and has not gone out
        self._final = False
        self._events: list[AnswerEvent] = []
        # Within <tool_calls>:
        self._has_calls = False  # a call of this block went out, so its opening tag was markup
        self._scan = 0  # the buffer is scanned up to here
        self._depth = 0  # of braces and brackets
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece of text and return what it settles; neighbouring events differ in kind, or are calls."""
        assert not self._final, "push after finish"
        # Slices keep the buffer short, so the cost stays linear however much comes at once.
        for start in range(0, len(text), 4096):
            self._buffer += text[start : start + 4096]
            self._advance()
        return self._take_events()

    def finish(self) -> list[AnswerEvent]:
        """Return what was held back, now that nothing follows."""
        self._final = True
        self._advance()
        return self._take_events()

    def _advance(self) -> None:
        # Each state consumes from the buffer and returns True, or needs more text and returns False.
        while self._state():
            pass

    def _take_events(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return events

    # ---- the states, in the order of an answer -------------------------------------------------------------------

    def _start(self) -> bool:
        text = self._buffer.lstrip(_SPACES)
        if text.startswith(_THINK_OPEN):
            self._buffer = text[len(_THINK_OPEN) :]
            self._state = self._thinking_start
            return True
        if _THINK_OPEN.startswith(text) and not self._final:
            return False
        self._state = self._thinking_start if self._after_start == self._thinking else self._content
        return True

    def _thinking_start(self) -> bool:
        if not self._buffer and not self._final:
            return False
        self._buffer = self._buffer.removeprefix("\n")
        self._state = self._thinking
        return True

    def _thinking(self) -> bool:
        end = self._buffer.find(_THINK_CLOSE)
        if end < 0:
            return self._release("reasoning", "\n" + _THINK_CLOSE)
        self._emit("reasoning", self._buffer[:end].removesuffix("\n"))
        self._buffer = self._buffer[end + len(_THINK_CLOSE) :]
        self._state = self._content_start
        return True

    def _content_start(self) -> bool:
        self._buffer = self._buffer.lstrip("\n")
        if not self._buffer:
            return False
        self._state = self._content
        return True

    def _content(self) -> bool:
        if not self._tool_calls:
            return self._release("content", "")
        begin = self._buffer.find(_CALLS_OPEN)
        if begin < 0:
            return self._release("content", "\n" + _CALLS_OPEN)
        end = begin + len(_CALLS_OPEN)
        begin -= self._buffer[:begin].endswith("\n")
        self._emit("content", self._buffer[:begin])
        self._buffer = self._buffer[begin:]
        self._has_calls, self._scan = False, end - begin
        self._state = self._between_calls
        return True

    def _between_calls(self) -> bool:
        text = self._buffer[self._scan :].lstrip(_SPACES)
        position = len(self._buffer) - len(text)
        if text.startswith("{"):
            self._scan, self._depth, self._in_string, self._is_escaped = position, 0, False, False
            self._state = self._call
            return True
        if text.startswith(_CALLS_CLOSE):
            self._buffer = text[len(_CALLS_CLOSE) :]
            self._state = self._after_calls
            return True
        if _CALLS_CLOSE.startswith(text):
            if self._final and self._has_calls:  # a closing tag cut short by the end is still markup
                self._buffer = ""
            return self._final and self._not_a_call(len(self._buffer))
        if not self._has_calls:  # then <tool_calls> was only mentioned
            return self._not_a_call(position)
        stray = _STRAY_TEXT.match(text)
        assert stray is not None
        return self._not_a_call(position + stray.end())

    def _call(self) -> bool:
        for position in range(self._scan, len(self._buffer)):
            character = self._buffer[position]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._in_string = character != '"'
                self._is_escaped = character == "\\"
            elif character == '"':
                self._in_string = True
            elif character not in _JSON_CHARACTERS:
                return self._not_a_call(position)
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return self._end_of_call(position + 1)
        self._scan = len(self._buffer)
        return self._final and self._not_a_call(self._scan)

    def _after_calls(self) -> bool:
        text = self._buffer.lstrip(_SPACES)
        if text.startswith(_CALLS_OPEN) or (self._final and not text):
            self._buffer = text
        elif _CALLS_OPEN.startswith(text) and not self._final:
            return False
        self._state = self._content
        return True

    # ---- transitions ---------------------------------------------------------------------------------------------

    def _end_of_call(self, end: int) -> bool:
        call = _read_call(self._buffer[self._buffer.index("{") : end])
        if call is None:
            return self._not_a_call(end)
        self._events.append(AnswerEvent("tool_call", tool_call=call))
        self._buffer = self._buffer[end:]
        self._has_calls, self._scan = True, 0
        self._state = self._between_calls
        return True

    def _not_a_call(self, end: int) -> bool:
        """Give the buffer up to `end` out as content, and look for calls behind it."""
        self._emit("content", self._buffer[:end])
        self._buffer = self._buffer[end:]
        self._scan = 0
        self._state = self._between_calls if self._has_calls else self._content
        return end > 0

    def _release(self, kind: Literal["reasoning", "content"], marker: str) -> bool:
        """Give out the buffer but for what may be the beginning of `marker`, with or without its newline."""
        held = 0
        if not self._final:
            for size in range(1, min(len(marker), len(self._buffer) + 1)):
                if self._buffer.endswith((marker[:size], marker[1 : size + 1])):
                    held = size
        keep = len(self._buffer) - held
        self._emit(kind, self._buffer[:keep])
        self._buffer = self._buffer[keep:]
        return False

    def _emit(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if not text:
            return
        if self._events and self._events[-1].kind == kind:
            text = self._events.pop().text + text
        self._events.append(AnswerEvent(kind, text))


def _read_call(text: str) -> ToolCall | None:
    """Read `{"name": ..., "arguments": ...}`; None if it is not a call that can be passed on as JSON."""
    try:
        # strict=False: models write raw newlines into strings, and what is meant is clear.
        call = json.loads(text, strict=False, parse_constant=_finite, parse_float=_finite)
        arguments = call.get("arguments")
        if isinstance(arguments, str):  # given as JSON text: not to be encoded twice
            arguments = json.loads(arguments, strict=False, parse_constant=_finite, parse_float=_finite)
        json.dumps(call, ensure_ascii=False).encode()  # refuses half a surrogate pair
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    arguments = {} if arguments is None else arguments
    if not isinstance(call.get("name"), str) or not call["name"] or not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], arguments)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} has no JSON form")
    return number
