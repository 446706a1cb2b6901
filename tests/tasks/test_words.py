"""Words against sorted() and indexing, Roman numerals against the rule of subtraction."""

import random
import re

import pytest

from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tasks.words import ORDINALS, ROMAN, all_words, letter_or_count, numeral_or_number

VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


def draw(family, count, seed=0):
    rng = random.Random(seed)
    return [NANO_TASKS[family].sample(rng, "train") for _ in range(count)]


def read_numeral(numeral):
    """A letter before a larger one is subtracted."""
    values = [VALUES[letter] for letter in numeral]
    return sum(-x if x < y else x for x, y in zip(values, [*values[1:], 0], strict=False))


def test_alphabetical_order():
    for problem in draw("alphabetical order", 500):
        given = problem.key.split(":")[1:]
        assert all(f"{word}" in problem.prompt for word in given)
        assert all_words(problem.answer) == tuple(sorted(given))
        assert len({word[0] for word in given}) == len(given), "initials decide"


def test_letters_of_a_word():
    kinds = set()
    for problem in draw("letters of a word", 500):
        text = problem.key.removeprefix("letter:")
        found = letter_or_count(problem.answer)
        if "owel" in problem.prompt:
            assert int(found) == sum(text.count(vowel) for vowel in "aeiou")
            kinds.add("vowels")
            continue
        named = [place for place, name in enumerate(ORDINALS) if name in problem.prompt.lower().split()]
        digits = re.search(r"(\d)(?:st|nd|rd|th)", problem.prompt)
        place = named[0] if named else int(digits.group(1)) - 1 if digits else -1
        assert place >= 0 or "last" in problem.prompt.lower()
        assert found == text[place]
        kinds.add("named" if named else "digit" if digits else "last")
    assert kinds == {"vowels", "named", "digit", "last"}


def test_roman_numerals():
    directions = set()
    for problem in draw("Roman numerals", 500):
        value = int(problem.key.removeprefix("roman:"))
        found = numeral_or_number(problem.answer)
        reading = found.isdigit()
        directions.add(reading)
        if reading:
            numeral = next(
                word for word in re.findall(r"\b[MDCLXVI]+\b", problem.prompt) if read_numeral(word) == value
            )
            assert int(found) == value
            spelled = re.findall(r"\d([MDCLXVI])[pqrs]\d", problem.thinking)
            assert "".join(spelled) == numeral
        else:
            assert str(value) in problem.prompt and read_numeral(found) == value
    assert directions == {True, False}


@pytest.mark.parametrize("place", range(4))
def test_numerals_of_a_place(place):
    for digit, numeral in enumerate(ROMAN[place]):
        assert read_numeral(numeral) == digit * 10**place


def test_a_pronoun_is_no_numeral():
    assert numeral_or_number("I am not sure.") is None
    assert numeral_or_number("It is I.") == "I"
