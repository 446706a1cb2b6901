"""Where an output's thinking begins and ends, found in its bytes, and how many tokens it has.

`<think>` and `</think>` are several ordinary tokens in M1, and what surrounds them may share a token with them. The
rules are `tokenizer.AnswerParser`'s: thinking is what an output begins with, after spaces, or what the prompt has
opened.

The count is of the tokens strictly between two: the one that completes `<think>` (or the end of a prompt that opened
the thinking) and the first that belongs to the close. The close is `</think>`, with the newline before it if that is a
token of its own. So forcing the close adds nothing to the count.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Literal

from minimax_m1.tokenizer import MiniMaxM1Tokenizer

OPEN, CLOSE = b"<think>", b"</think>"
_SPACES = b" \t\r\n"


class Thinking:
    """Follows one output's tokens."""

    def __init__(self, *, is_open: bool = False) -> None:
        """Stand before the output's first token; `is_open`: the prompt has written `<think>` already."""
        # start: may still begin with <think>; after: only newlines since the close; content: all that follows.
        self.phase: Literal["start", "thinking", "after", "content"] = "thinking" if is_open else "start"
        self.num_tokens = 0  # so far; while thinking, tokens that may turn out to be of the close are in it
        self.num_newlines = 0  # since the close
        self.begun = b""  # at the start: the part of <think> that is there
        self._recent: list[bytes] = []  # while thinking: the tokens that hold the last bytes

    def push(self, data: bytes) -> None:
        """Take the bytes of the next token."""
        if self.phase == "thinking":
            self.num_tokens += 1
            self._look_for_close(data)
        elif self.phase == "start":
            self._look_for_open(data)
        elif self.phase == "after":
            self._skip_newlines(data)

    @property
    def closing(self) -> bytes:
        """While thinking: the beginning of `</think>` that the output ends in, empty if none."""
        tail = b"".join(self._recent)
        sizes = range(len(CLOSE) - 1, 0, -1)
        return next((CLOSE[:size] for size in sizes if tail.endswith(CLOSE[:size])), b"")

    def copy(self) -> Thinking:
        """Return one that goes on independently."""
        twin = copy.copy(self)
        twin._recent = self._recent.copy()
        return twin

    def _look_for_open(self, data: bytes) -> None:
        text = (self.begun + data).lstrip(_SPACES)
        if text.startswith(OPEN):
            self.phase, self.begun = "thinking", b""
            self._look_for_close(text[len(OPEN) :])
        elif OPEN.startswith(text):
            self.begun = text
        else:
            self.phase, self.begun = "content", b""

    def _look_for_close(self, data: bytes) -> None:
        recent = self._recent
        recent.append(data)
        tail = b"".join(recent)
        place = tail.find(CLOSE)
        if place < 0:
            size = len(tail)
            while size - len(recent[0]) >= len(CLOSE):  # one byte more than the close needs: the newline before it
                size -= len(recent.pop(0))
            return
        start, first = len(tail), len(recent)  # of the token in which the close begins
        while start > place:
            first -= 1
            start -= len(recent[first])
        if start == place and first and recent[first - 1] == b"\n":
            first -= 1
        self.num_tokens = max(0, self.num_tokens - (len(recent) - first))
        self.phase = "after"
        self._recent = []
        self._skip_newlines(tail[place + len(CLOSE) :])

    def _skip_newlines(self, data: bytes) -> None:
        if data.strip(b"\n"):
            self.phase = "content"
        else:
            self.num_newlines += len(data)


def close_ids(thinking: Thinking, tokenizer: MiniMaxM1Tokenizer) -> list[int]:
    """Return the tokens that close the thinking now: `tokenizer.thinking_close`, less what of `</think>` has begun.

    A lone `<` is not taken for the beginning: it is mostly a sign of comparison.
    """
    closing = thinking.closing
    text = tokenizer.thinking_close
    if len(closing) > 1:
        text = text[text.index(CLOSE.decode()) + len(closing) :]
    return tokenizer.encode(text, allow_special=False)


def opens_thinking(prompt_ids: Sequence[int], tokenizer: MiniMaxM1Tokenizer) -> bool:
    """Whether the prompt ends within a thinking part: after a `<think>` that ends it, or one that begins its last turn.

    The last turn is what follows the last special token and the line behind it (`ai name=assistant`).
    """
    end = tokenizer.decode(prompt_ids[-16:]).rstrip()
    if end.endswith(OPEN.decode()):
        return True
    start = _last_index(prompt_ids, tokenizer.added_tokens.values()) + 1
    if not start:
        return False
    turn = tokenizer.decode(prompt_ids[start:]).partition("\n")[2].lstrip()
    return turn.startswith(OPEN.decode()) and CLOSE.decode() not in turn


def _last_index(ids: Sequence[int], wanted: Collection[int]) -> int:
    """Return the index of the last of `ids` that is in `wanted`, or -1."""
    wanted = frozenset(wanted)
    return next((index for index in range(len(ids) - 1, -1, -1) if ids[index] in wanted), -1)
