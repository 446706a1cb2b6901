"""Prompt lookup: what followed the same few tokens before will perhaps follow them again.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; the latest occurrence and the longest n-gram first.
"""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 2  # a single token that stood before says too little
_BITS = 32  # of one id in a key


class PromptLookup:
    """An index of one sequence's n-grams: a token more costs the same however long the sequence is.

    Memory: about 100 bytes for every different n-gram of each size, 200 MB for a million tokens without repetition.
    """

    def __init__(self, tokens: Iterable[int] = (), ngram: int = 3) -> None:
        """Index a prompt.

        Args:
            tokens: its ids.
            ngram: the most tokens that are looked up, at least `SHORTEST`.
        """
        assert ngram >= SHORTEST
        self._tokens: list[int] = []
        self._sizes = range(ngram, SHORTEST - 1, -1)
        self._masks = {size: (1 << size * _BITS) - 1 for size in self._sizes}
        self._followers: dict[int, dict[int, int]] = {size: {} for size in self._sizes}  # n-gram -> index behind it
        self._end = 0  # the last `ngram` tokens as one number
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Take the sequence's next token."""
        place = len(self._tokens)
        for size in self._sizes:
            if place >= size:
                self._followers[size][self._end & self._masks[size]] = place
        self._tokens.append(token)
        self._end = (self._end << _BITS | token) & self._masks[self._sizes[0]]

    def propose(self, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` ids that followed the last tokens where these stood the last time before; or none.

        Where that place is so near that its followers reach the end of the sequence, they go on with themselves, as in
        a text that repeats.
        """
        if max_tokens <= 0:
            return []
        for size in self._sizes:
            start = self._followers[size].get(self._end & self._masks[size]) if len(self._tokens) >= size else None
            if start is not None:
                period = self._tokens[start : start + max_tokens]
                return [period[i % len(period)] for i in range(max_tokens)]
        return []
