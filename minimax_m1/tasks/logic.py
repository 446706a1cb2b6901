"""True or false, and who is the tallest: small expressions and chains of comparisons, resolved one step at a time."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from minimax_m1.tasks.problem import Problem, Task, score_by
from minimax_m1.tasks.wording import NAMES, word

SIGNS = {"and": "&", "or": "|"}
COMPARISONS = (  # more than, less than, most, least
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
)

Term = tuple[str, str, str, bool]  # letter, signs, words, value


def generate_logic(rng: random.Random) -> Problem:
    """Draw an expression of two to four times true or false with and, or, not and at most two parentheses.

    The worked solution writes it in signs with a letter for every value, "a1&~(~0b1|c0)", then joins two at a time and
    gives each result a letter: "b1|c0e1;~e1f0;a1&f0g0".
    """
    steps: list[str] = []
    labels = iter("efghij")
    terms = [_draw_term(rng, letter) for letter in "abcd"[: rng.choice((2, 3, 3, 3, 4, 4))]]
    one, two = rng.choice(tuple(SIGNS)), rng.choice(tuple(SIGNS))
    if len(terms) == 2:
        result = _join(terms[0], one, terms[1], steps, labels)
        if rng.random() < 0.3:
            result = _negate(_enclose(result), steps, labels)
    elif len(terms) == 3 and rng.random() < 0.5:
        group = _join(terms[0], one, terms[1], steps, labels)
        if (one, two) == ("or", "and") or rng.random() < 0.4:
            group = _draw_negated(rng, _enclose(group), steps, labels)
        result = _join(group, two, terms[2], steps, labels)
    elif len(terms) == 3:
        group = _join(terms[1], two, terms[2], steps, labels)
        if (one, two) != ("or", "and") or rng.random() < 0.4:
            group = _draw_negated(rng, _enclose(group), steps, labels)
        result = _join(terms[0], one, group, steps, labels)
    else:
        left = _draw_negated(rng, _enclose(_join(terms[0], one, terms[1], steps, labels)), steps, labels)
        sign = rng.choice(tuple(SIGNS))
        right = _draw_negated(rng, _enclose(_join(terms[2], two, terms[3], steps, labels)), steps, labels)
        result = _join(left, sign, right, steps, labels)
    _, signs, words, value = result
    typed = words.replace("true", "True").replace("false", "False") if rng.random() < 0.25 else words
    prompt = word(
        rng,
        "What is {e}?",
        "Evaluate {e}.",
        "Is {e} true or false?",
        "Compute {e}.",
        "{e}",
        "{e}?",
        "What is the value of {e}?",
        e=typed,
    )
    thinking = f"Evaluate {signs};{';'.join(steps)}; {str(value).lower()}"
    return Problem("true or false", prompt, thinking, f"{value}.", f"logic:{words}")


def _draw_term(rng: random.Random, letter: str) -> Term:
    value = rng.random() < 0.5
    if rng.random() < 0.35:
        return letter, f"~{value:d}{letter}{not value:d}", f"not {str(value).lower()}", not value
    return letter, f"{letter}{value:d}", str(value).lower(), value


def _join(x: Term, sign: str, y: Term, steps: list[str], labels: Iterator[str]) -> Term:
    value, label = (x[3] and y[3]) if sign == "and" else (x[3] or y[3]), next(labels)
    steps.append(f"{x[0]}{x[3]:d}{SIGNS[sign]}{y[0]}{y[3]:d}{label}{value:d}")
    return label, f"{x[1]}{SIGNS[sign]}{y[1]}", f"{x[2]} {sign} {y[2]}", value


def _enclose(x: Term) -> Term:
    return x[0], f"({x[1]})", f"({x[2]})", x[3]


def _negate(x: Term, steps: list[str], labels: Iterator[str]) -> Term:
    label = next(labels)
    steps.append(f"~{x[0]}{x[3]:d}{label}{not x[3]:d}")
    return label, f"~{x[1]}", f"not {x[2]}", not x[3]


def _draw_negated(rng: random.Random, x: Term, steps: list[str], labels: Iterator[str]) -> Term:
    return _negate(x, steps, labels) if rng.random() < 0.25 else x


def generate_ordering(rng: random.Random) -> Problem:
    """Draw three or four names, in order but for the facts, which say who is taller than whom; asked is an end.

    The worked solution writes each fact with initials and turns it so that the step from one to the next leads to the
    end that is asked for: " A< T:at M< A:ma"; then it walks ":ma:at:t" until an initial leads no further.
    """
    names = rng.sample(NAMES, rng.randint(3, 4))  # from the most to the least
    while len({name[0] for name in names}) < len(names):
        names = rng.sample(NAMES, len(names))
    more, less, most, least = rng.choice(COMPARISONS)
    upwards = rng.random() < 0.5
    pairs = list(zip(names, names[1:], strict=False))
    rng.shuffle(pairs)
    facts, shown = [], []
    for high, low in pairs:
        turned = rng.random() < 0.5
        facts.append(f"{low} is {less} than {high}" if turned else f"{high} is {more} than {low}")
        path = (low[0] + high[0] if upwards else high[0] + low[0]).lower()
        shown.append(f"{f' {low[0]}< {high[0]}' if turned else f' {high[0]}> {low[0]}'}:{path}")
    start = pairs[0][1] if upwards else pairs[0][0]
    route = names[names.index(start) :: -1] if upwards else names[names.index(start) :]
    initials = [name[0].lower() for name in route]
    walk = "".join(f":{one}{two}" for one, two in zip(initials, initials[1:], strict=False)) + f":{initials[-1]}."
    asked = most if upwards else least
    prompt = word(
        rng,
        "{s}. Who is the {a}?",
        "{s}. Who is {a}?",
        "Who is the {a} if {c}?",
        "If {c}, who is the {a}?",
        s=". ".join(facts),
        c=", ".join(facts[:-1]) + " and " + facts[-1],
        a=asked,
    )
    thinking = f"Order {'up' if upwards else 'down'}{''.join(shown)};{walk} {route[-1]}"
    key = "order:" + ":".join(names)
    return Problem("who is the tallest", prompt, thinking, f"{route[-1]} is the {asked}.", key)


def truth(answer: str) -> str | None:
    """Return "true" or "false", whichever is named last; None if neither is."""
    found = re.findall(r"\b(?:true|false)\b", answer.lower())
    return found[-1] if found else None


def first_name(answer: str) -> str | None:
    """Return the first of the known names in a text, None if there is none."""
    found = re.search(rf"\b(?:{'|'.join(NAMES)})\b", answer)
    return found.group() if found else None


LOGIC = Task("true or false", generate_logic, score_by(truth))
ORDERING = Task("who is the tallest", generate_ordering, score_by(first_name))
