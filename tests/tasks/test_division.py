"""Long division and remainders against Python's own arithmetic."""

import random
import re

import pytest

from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tasks.columns import labelled, read_out
from minimax_m1.tasks.division import divide, quotient_and_remainder, remainder_verdict


def draw(family, count, split="train", seed=0):
    rng = random.Random(seed)
    return [NANO_TASKS[family].sample(rng, split) for _ in range(count)]


def operands(problem):
    x, y = (int(found) for found in problem.key.split(":")[1:])
    assert str(x) in re.findall(r"\d+", problem.prompt)
    return x, y


@pytest.mark.parametrize("x", [0, 7, 10, 99, 100, 999, 1000, 9999])
@pytest.mark.parametrize("divisor", range(1, 10))
def test_every_step_divides(x, divisor):
    text, quotient, remainder = divide(labelled(x, "abcd"), divisor)
    assert (int(re.sub(r"[^0-9]", "", read_out(quotient))), remainder) == divmod(x, divisor)
    steps = re.findall(r" .(\d) (\d\d)/(\d)=.(\d):(\d\d)-(\d)", text)
    assert len(steps) == len(str(x))
    for digit, value, by, result, product, left in steps:
        assert value[1] == digit
        assert divmod(int(value), int(by)) == (int(result), int(left))
        assert int(product) == int(result) * divisor


def test_division():
    for problem in draw("division", 500):
        x, y = operands(problem)
        assert quotient_and_remainder(problem.answer) == divmod(x, y)
        assert ("remainder" in problem.answer) == (x % y > 0)


def test_remainder():
    asked = set()
    for problem in draw("remainder", 500):
        x, y = operands(problem)
        verdict = remainder_verdict(problem.answer)
        if verdict in ("even", "odd"):
            assert verdict == ("odd" if x % 2 else "even")
        elif verdict in ("yes", "no"):
            odd = "odd" in problem.prompt
            assert (verdict == "yes") == ((x % y == 0) != odd)
        else:
            assert int(verdict) == x % y
        asked.add("number" if verdict.isdigit() else verdict)
    assert asked == {"number", "even", "odd", "yes", "no"}


def test_a_remainder_of_nothing_may_be_said_or_not():
    assert quotient_and_remainder("The answer is 27 remainder 0.") == quotient_and_remainder("27") == (27, 0)


def test_operands_are_on_one_side_in_both_families():
    trained = {problem.key for problem in draw("division", 3000)}
    assert not trained & {problem.key for problem in draw("remainder", 500, "test")}
