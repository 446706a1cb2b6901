"""Expressions against Python's own evaluation; who is the tallest against all orders that the facts allow."""

import itertools
import random
import re

from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tasks.logic import COMPARISONS, first_name, truth
from minimax_m1.tasks.wording import NAMES


def draw(family, count, seed=0):
    rng = random.Random(seed)
    return [NANO_TASKS[family].sample(rng, "train") for _ in range(count)]


def test_true_or_false():
    for problem in draw("true or false", 500):
        expression = problem.key.removeprefix("logic:")
        assert expression in problem.prompt.lower()
        value = eval(expression.replace("true", "True").replace("false", "False"))
        assert truth(problem.answer) == str(value).lower()


def test_every_step_of_an_expression_is_right():
    for problem in draw("true or false", 500):
        signs, *steps, verdict = problem.thinking.removeprefix("Evaluate ").split(";")
        for step in steps:
            operation = re.sub(r"([a-j])([01])", r"\2", step[:-2]).replace("~", " not ").replace("&", " and ")
            assert int(bool(eval(operation.replace("|", " or ")))) == int(step[-1]), step
        # "~0b1" is not 0, which is 1 and is called b
        assert all(one != other for one, other in re.findall(r"~([01])[a-d]([01])", signs))
        python = re.sub(r"~[01](?=[a-d])|[a-d](?=[01])", "", signs)
        python = re.sub("[a-d]", "", python).replace("~", " not ").replace("&", " and ").replace("|", " or ")
        assert str(bool(eval(python))).lower() == verdict.strip()


def test_who_is_the_tallest():
    more = {word[0]: word for word in COMPARISONS}
    less = {word[1]: word for word in COMPARISONS}
    for problem in draw("who is the tallest", 500):
        facts = re.findall(r"(\w+) is (\w+) than (\w+)", problem.prompt)
        people = {name for fact in facts for name in (fact[0], fact[2])}
        people = {name[0].upper() + name[1:] for name in people}  # a prompt may begin in lower case
        assert people <= set(NAMES) and len(facts) == len(people) - 1
        above = [(x, y) if word in more else (y, x) for x, word, y in facts]
        above = [tuple(name[0].upper() + name[1:] for name in pair) for pair in above]
        orders = [o for o in itertools.permutations(people) if all(o.index(x) < o.index(y) for x, y in above)]
        assert len(orders) == 1
        adjectives = more.get(facts[0][1]) or less[facts[0][1]]
        asked = adjectives[2] if adjectives[2] in problem.prompt else adjectives[3]
        assert asked in problem.prompt and asked in problem.answer
        assert first_name(problem.answer) == orders[0][0 if asked == adjectives[2] else -1]


def test_another_name_or_verdict_scores_nothing():
    names, verdicts = NANO_TASKS["who is the tallest"], NANO_TASKS["true or false"]
    for problem in draw("who is the tallest", 50):
        other = next(name for name in NAMES if name != first_name(problem.answer))
        assert names.score(problem, f"{other} is the tallest.") == 0.0
    for problem in draw("true or false", 50):
        assert verdicts.score(problem, "False." if problem.answer == "True." else "True.") == 0.0
