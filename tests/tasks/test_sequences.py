"""Sequences, sums and lists without duplicates against Python's own arithmetic."""

import random
import re

from minimax_m1.tasks import NANO_TASKS


def draw(family, count, seed=0):
    rng = random.Random(seed)
    return [NANO_TASKS[family].sample(rng, "train") for _ in range(count)]


def numbers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


def test_next_in_a_sequence():
    falling = 0
    for problem in draw("next in a sequence", 500):
        terms = numbers(problem.prompt) + numbers(problem.answer)
        assert 4 <= len(terms) <= 6
        assert len({y - x for x, y in zip(terms, terms[1:], strict=False)}) == 1
        falling += terms[1] < terms[0]
        assert numbers(re.sub("[^0-9]", "", problem.thinking.rsplit(";", 1)[1])) == terms[-1:]
    assert 100 < falling < 300


def test_sum_of_a_list():
    for problem in draw("sum of a list", 500):
        values = numbers(problem.prompt)
        assert numbers(problem.answer) == [sum(values)]
        ones, tens, _ = (re.findall(r"=(\d\d)", part) for part in problem.thinking.split(";")[1:])
        assert int(ones[-1]) == sum(value % 10 for value in values)
        assert 10 * int(tens[-1]) + int(ones[-1]) % 10 == sum(values)


def test_removing_duplicates():
    for problem in draw("removing duplicates", 500):
        values = numbers(problem.prompt)
        assert numbers(problem.answer) == list(dict.fromkeys(values))
        repeats = [one != other for one, other in re.findall(r" (\w)\d\d(\w)", problem.thinking)]
        assert sum(repeats) == len(values) - len(set(values)) > 0 and len(repeats) == len(values)
