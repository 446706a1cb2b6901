"""Prompt lookup against its definition, by search."""

import time

from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.engine.prompt_lookup import SHORTEST, PromptLookup


def propose_by_search(tokens: list[int], max_tokens: int, ngram: int) -> list[int]:
    """Look for the last n-gram from the end to the beginning, then read on, over the end into what was read."""
    for size in range(min(ngram, len(tokens) - 1), SHORTEST - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for place in range(start + size, start + size + max_tokens):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), max_size=30),
    split=st.integers(0, 30),
    max_tokens=st.integers(0, 9),
    ngram=st.integers(2, 4),
)
def test_equals_the_search(tokens: list[int], split: int, max_tokens: int, ngram: int) -> None:
    lookup = PromptLookup(tokens[:split], ngram)
    for token in tokens[split:]:
        lookup.append(token)
    assert lookup.propose(max_tokens) == propose_by_search(tokens, max_tokens, ngram)


def test_large_ids_are_told_apart() -> None:
    lookup = PromptLookup([200_019, 3, 200_020, 9, 200_063, 3, 200_020])
    assert lookup.propose(2) == [9, 200_063]
    assert PromptLookup([0, 0, 7, 5, 0, 7]).propose(1) == [5]
    assert PromptLookup([1, 0, 7, 5, 0, 0, 7]).propose(1) == [5]


def test_a_token_costs_the_same_in_a_long_sequence() -> None:
    lookup = PromptLookup(range(300_000))
    started = time.perf_counter()
    for token in range(1000):
        lookup.append(token)
        lookup.propose(8)
    assert time.perf_counter() - started < 0.5
