"""Every family: its own solutions score 1, wrong answers 0; splits are disjoint; the seed decides everything."""

import random
import re

import pytest

from minimax_m1 import shipped
from minimax_m1.tasks import NANO_TASKS, final_answer
from minimax_m1.tasks.arithmetic import generate_word_problem
from minimax_m1.tasks.columns import labelled, multiply, read_out, solve_difference
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

FAMILIES = list(NANO_TASKS)
ARITHMETIC = ("addition", "subtraction", "multiplication", "chain", "word problem")


def draw(family, split, count, seed=0):
    rng = random.Random(seed)
    return [NANO_TASKS[family].sample(rng, split) for _ in range(count)]


def wrong(answer):
    """Change what an answer says: another last digit, another word, the opposite."""
    if re.search(r"\d", answer):
        return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit.group()) + 1) % 10), answer)
    opposites = {"Yes.": "No.", "No.": "Yes.", "They are equal.": "5 is larger.", "True.": "False.", "False.": "True."}
    return opposites.get(answer, answer.replace('"', '"q', 1) if '"' in answer else "I am not sure.")


@pytest.mark.parametrize("family", FAMILIES)
def test_own_solution_scores_one_and_others_zero(family):
    task = NANO_TASKS[family]
    for problem in draw(family, "train", 200):
        assert task.score(problem, problem.response) == 1.0
        assert task.score(problem, problem.answer) == 1.0, "an answer without thinking counts"
        assert task.score(problem, problem.response.replace(problem.answer, wrong(problem.answer))) == 0.0
        assert task.score(problem, "<think>\n" + problem.answer) == 0.0, "thinking that never ends is no answer"
        assert task.score(problem, "") == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint(family):
    train, test = draw(family, "train", 3000), draw(family, "test", 300)
    assert not {p.key for p in train} & {p.key for p in test}
    assert {p.split for p in train} == {"train"}
    assert {p.split for p in test} == {"test"}


def test_operands_are_on_one_side_whatever_the_family():
    sums = {p.key: p.split for p in draw("addition", "train", 2000)}
    for story in draw("word problem", "test", 2000):
        assert story.key not in sums


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_many_unseen_problems(family):
    rng, keys, draws = random.Random(2), set(), 0
    while len(keys) < 200:
        problem = NANO_TASKS[family].generate(rng)
        keys |= {problem.key} if problem.split == "test" else set()
        draws += 1
        assert draws < 60_000, f"{len(keys)} different test problems"


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_short(family):
    # m1-nano is trained on packed batches of 4,096 tokens and generates at most 300.
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(shipped.path())
    problems = draw(family, "train", 200)
    lengths = [len(tokenizer.encode(problem.prompt)) + len(tokenizer.encode(problem.response)) for problem in problems]
    assert max(lengths) < 250 and sum(lengths) / len(lengths) < 170
    assert {problem.family for problem in problems} == {family}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_the_problems(family):
    assert draw(family, "train", 20, seed=5) == draw(family, "train", 20, seed=5)
    assert draw(family, "train", 20, seed=5) != draw(family, "train", 20, seed=6)


def test_the_split_never_changes():
    # Were this to change, a released model would be measured on problems it was trained on.
    keys = [p.key for p in draw("addition", "test", 3)]
    assert keys == PINNED_TEST_KEYS


PINNED_TEST_KEYS = ["add:1645:23227", "add:1816:4080", "add:71:535271"]


@pytest.mark.parametrize("family", ARITHMETIC)
def test_answers_are_right(family):
    for problem in draw(family, "train", 500):
        operation, _, operands = problem.key.partition(":")
        if operation == "chain":
            value = eval(operands)
        else:
            x, y = map(int, operands.split(":"))
            value = {"add": x + y, "subtract": x - y, "times": x * y}[operation]
        assert problem.answer == f"The answer is {value}."


@pytest.mark.parametrize("family", ARITHMETIC)
def test_the_solution_ends_in_the_answer(family):
    for problem in draw(family, "train", 500):
        last = problem.thinking.rsplit(";", 1)[1]
        value = int(re.sub(r"[^0-9-]", "", last))
        assert problem.answer == f"The answer is {value}."


def test_columns():
    _, product = multiply(labelled(999, "abc"), labelled(99, "gh"))
    assert read_out(product) == " t9 s8 r9 q0 p1"
    assert solve_difference(703, 698).endswith(" r_ q_ p5")
    assert solve_difference(23, 121).endswith("; - r_ q9 p8")


def test_sorting_and_largest():
    for problem in draw("sorting", "train", 300):
        values = [int(v) for v in re.findall(r"\d+", problem.prompt)]
        down = " down " in problem.thinking
        assert problem.answer == ", ".join(map(str, sorted(values, reverse=down))) + "."
    for problem in draw("largest of a list", "train", 300):
        values = [int(v) for v in re.findall(r"\d+", problem.prompt)]
        largest = "largest" in problem.answer
        assert problem.answer.endswith(f" {max(values) if largest else min(values)}.")


def test_counting_and_reversing():
    for problem in draw("counting letters", "train", 300):
        _, letter, text = problem.key.split(":")
        assert problem.answer.startswith(f"It appears {text.count(letter)} time")
    for problem in draw("reversing a word", "train", 300):
        assert problem.answer == f'It reads "{problem.key.split(":")[1][::-1]}".'


def test_stories_do_not_go_below_zero():
    rng = random.Random(1)
    for _ in range(500):
        assert "-" not in generate_word_problem(rng).answer


def test_final_answer():
    assert final_answer("<think>\n1</think> 2</think>\n3 ") == "3"
    assert final_answer("<think>\n1") == ""
    assert final_answer(" 7") == "7"


def test_what_everybody_says_is_trained_on():
    greetings = {p.prompt.lower().strip("!. ") for p in draw("conversation", "train", 2000)}
    assert {"hello", "hi", "thanks", "how are you?", "who are you?"} <= greetings
