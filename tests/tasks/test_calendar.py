"""Days and times against datetime."""

import random
import re
from datetime import datetime, timedelta

from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tasks.calendar import DAYS, day_name

MONDAY = datetime(2024, 1, 1)


def draw(family, count, seed=0):
    rng = random.Random(seed)
    return [NANO_TASKS[family].sample(rng, "train") for _ in range(count)]


def backwards(prompt):
    return any(f" {said}" in prompt for said in ("before", "ago", "minus")) or "start?" in prompt + "?"


def test_day_of_the_week():
    directions = set()
    for problem in draw("day of the week", 500):
        days = int(re.search(r"(\d+) days?\b", problem.prompt).group(1)) * (-1 if backwards(problem.prompt) else 1)
        start = next(place for place, name in enumerate(DAYS) if name in problem.prompt)
        expected = (MONDAY + timedelta(days=start + days)).strftime("%A")
        assert day_name(problem.answer) == expected
        assert problem.thinking.endswith(expected)
        directions.add(days > 0)
    assert directions == {True, False}


def test_time_of_day():
    directions = set()
    for problem in draw("time of day", 500):
        hour, minute = map(int, re.search(r"(\d+):(\d\d)", problem.prompt).groups())
        minutes = int(re.search(r"(\d+) minutes?\b", problem.prompt).group(1))
        minutes *= -1 if backwards(problem.prompt) else 1
        end = MONDAY + timedelta(hours=hour, minutes=minute + minutes)
        assert problem.answer == f"It is {end.hour}:{end.minute:02d}."
        hours, read = problem.thinking.split(";")[-2:]
        assert int(hours[-2:]) == end.hour and read == f" {end.hour}:{end.minute:02d}"
        assert re.findall(r"[pq](\d)", problem.thinking) == [str(end.minute % 10), str(end.minute // 10)]
        directions.add(minutes > 0)
    assert directions == {True, False}


def test_a_time_may_be_written_with_two_digits():
    problem = next(p for p in draw("time of day", 200) if re.search(r" \d:", p.answer))
    assert NANO_TASKS["time of day"].score(problem, problem.answer.replace("is ", "is 0")) == 1.0
