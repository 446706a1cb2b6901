"""Long division by one digit, remainders, divisibility, even and odd.

A quotient is labelled from the left, since long division finds its highest digit first.
"""

from __future__ import annotations

import random
import re

from minimax_m1.tasks.columns import FIRST, Number, copied, labelled, read_out
from minimax_m1.tasks.problem import Problem, Task, score_by
from minimax_m1.tasks.wording import number, word

QUOTIENT = "pqrst"  # labels of the quotient, from the left


def divide(x: Number, divisor: int) -> tuple[str, Number, int]:
    """Divide digit by digit; return the text, the quotient and the remainder.

    " a7 07/4=p1:04-3 b3 33/4=q8:32-1" is: digit, remainder so far and digit, over the divisor, labelled digit of the
    quotient, its product, new remainder.
    """
    text, remainder, quotient = "", 0, Number()
    for (label, digit), result in zip(reversed(x), QUOTIENT, strict=False):
        value = 10 * remainder + digit
        quotient.insert(0, (result, value // divisor))
        remainder = value % divisor
        text += f" {label}{digit} {value:02d}/{divisor}={result}{value // divisor}:{value - remainder:02d}-{remainder}"
    return text, quotient, remainder


def draw_division(rng: random.Random, exact: float) -> tuple[int, int]:
    """Draw a number of up to four digits and a digit to divide it by; a share `exact` leaves no remainder."""
    x, divisor = number(rng, 4), rng.randint(2, 9) if rng.random() < 0.95 else 1
    return (x - x % divisor if rng.random() < exact else x), divisor


def generate_division(rng: random.Random) -> Problem:
    """Draw a quotient of a number of up to four digits and one digit; about half leave a remainder."""
    x, divisor = draw_division(rng, 0.4)
    steps, quotient, remainder = divide(labelled(x, FIRST), divisor)
    prompt = word(
        rng,
        "What is {x} / {y}?",
        "What is {x} divided by {y}?",
        "{x}/{y}",
        "{x} / {y}",
        "{x}/{y}=",
        "{x} divided by {y}",
        "Divide {x} by {y}.",
        "Calculate {x} / {y}.",
        "How much is {x} divided by {y}?",
        "How many times does {y} go into {x}?",
        "What is the quotient of {x} and {y}?",
        "What's {x}/{y}?",
        x=x,
        y=divisor,
    )
    thinking = f"Divide{copied(labelled(x, FIRST))} by {divisor};{steps};{read_out(quotient)}-{remainder}"
    answer = f"The answer is {x // divisor}{f' remainder {remainder}' if remainder else ''}."
    return Problem("division", prompt, thinking, answer, f"divide:{x}:{divisor}")


def generate_remainder(rng: random.Random) -> Problem:
    """Draw a division by one digit of which only the remainder is asked for, or whether there is one."""
    if rng.random() < 0.25:
        return _generate_parity(rng)
    divisible = rng.random() < 0.35
    x, divisor = draw_division(rng, 0.5 if divisible else 0.1)
    steps, _, remainder = divide(labelled(x, FIRST), divisor)
    thinking = f"Divide{copied(labelled(x, FIRST))} by {divisor};{steps};"
    if divisible:
        templates: tuple[str, ...] = (
            "Is {x} divisible by {y}?",
            "Is {x} a multiple of {y}?",
            "Can {x} be divided by {y}?",
        )
        answer = "No." if remainder else "Yes."
        thinking += f" {remainder}=0? {answer}"
    else:
        templates = (
            "What is the remainder of {x} / {y}?",
            "What is the remainder when {x} is divided by {y}?",
            "Find the remainder of {x} divided by {y}.",
            "What is {x} mod {y}?",
            "{x} mod {y}",
            "{x} % {y}",
            "What is left when {x} is divided by {y}?",
        )
        answer = f"The remainder is {remainder}."
        thinking += f" -{remainder}"
    prompt = word(rng, *templates, x=x, y=divisor)
    return Problem("remainder", prompt, thinking, answer, f"divide:{x}:{divisor}")


def _generate_parity(rng: random.Random) -> Problem:
    x = number(rng, 6)
    digits = labelled(x, FIRST)
    parity = "odd" if x % 2 else "even"
    label, digit = digits[0]
    thinking = f"Even or odd{copied(digits)}; {label}{digit} {parity}"
    if rng.random() < 0.5:
        prompt = word(rng, "Is {x} even or odd?", "Is {x} odd or even?", "{x}: even or odd?", x=x)
        return Problem("remainder", prompt, thinking, f"It is {parity}.", f"divide:{x}:2")
    asked = rng.choice(("even", "odd"))
    prompt = word(rng, "Is {x} {a}?", "Is {x} an {a} number?", "Is the number {x} {a}?", x=x, a=asked)
    answer = "Yes." if asked == parity else "No."
    return Problem("remainder", prompt, f"{thinking}; {asked}? {answer}", answer, f"divide:{x}:2")


def quotient_and_remainder(answer: str) -> tuple[int, int] | None:
    """Return the two numbers of "58 remainder 3" or "58", None if there is none."""
    found = [int(digits) for digits in re.findall(r"\d+", answer)]
    return (found[0], found[1] if len(found) > 1 else 0) if found else None


def remainder_verdict(answer: str) -> str | None:
    """Return the number that is named last, or "even", "odd", "yes" or "no"; None if there is none of them."""
    found = re.findall(r"\d+|\b(?:even|odd|yes|no)\b", answer.lower())
    return found[-1] if found else None


DIVISION = Task("division", generate_division, score_by(quotient_and_remainder))
REMAINDER = Task("remainder", generate_remainder, score_by(remainder_verdict))
