"""The day of the week some days on, and the time of day some minutes on."""

from __future__ import annotations

import random
import re

from minimax_m1.tasks.columns import FIRST, SECOND, copied, labelled
from minimax_m1.tasks.division import divide
from minimax_m1.tasks.lists import integers
from minimax_m1.tasks.problem import Problem, Task, score_by
from minimax_m1.tasks.wording import word

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def generate_weekday(rng: random.Random) -> Problem:
    """Draw a day of the week and how many days, one to 365, before or after it to look.

    The worked solution numbers the days from 1, divides by 7, and adds or subtracts the remainder.
    """
    day, days, later = rng.randint(1, 7), rng.randint(1, rng.choice((30, 365, 365))), rng.random() < 0.65
    steps, _, remainder = divide(labelled(days, FIRST), 7)
    found = (day - 1 + (remainder if later else -remainder)) % 7 + 1
    name = DAYS[found - 1]
    if later:
        templates: tuple[str, ...] = (
            "What day is it {n} after {d}?",
            "What day is {n} after {d}?",
            "Today is {d}. What day will it be in {n}?",
            "If today is {d}, what day is it in {n}?",
            "Which day of the week comes {n} after {d}?",
            "It is {d}. Which day is it in {n}?",
        )
    else:
        templates = (
            "What day is it {n} before {d}?",
            "What day was {n} before {d}?",
            "Today is {d}. What day was it {n} ago?",
            "If today is {d}, which day was it {n} ago?",
        )
    prompt = word(rng, *templates, n=f"{days} day{'' if days == 1 else 's'}", d=DAYS[day - 1])
    sign = "+" if later else "-"
    thinking = f"Day {day}{sign}{copied(labelled(days, FIRST))} by 7;{steps}; {day}{sign}{remainder}={found} {name}"
    return Problem("day of the week", prompt, thinking, f"It is {name}.", f"weekday:{day}{sign}{days}")


def generate_clock(rng: random.Random) -> Problem:
    """Draw a time of day on the 24-hour clock, and up to 59 minutes to go forward or back.

    The worked solution adds or subtracts in columns, of which the tens of minutes have six digits, then the hour.
    """
    hour, minute, minutes, later = rng.randint(0, 23), rng.randint(0, 59), rng.randint(1, 59), rng.random() < 0.65
    sign, way = ("+", 1) if later else ("-", -1)
    found = (60 * hour + minute + way * minutes) % 1440
    carry = int(not 0 <= minute % 10 + way * (minutes % 10) < 10)
    wraps = int(not 0 <= minute + way * minutes < 60)
    time = "".join(f" {label}{digit}" for label, digit in zip(FIRST, f"{hour:02d}{minute:02d}", strict=False))
    step = "".join(f" {label}{digit}" for label, digit in zip(SECOND, f"{minutes:02d}", strict=False))
    columns = (
        f" d{minute % 10} h{minutes % 10}{sign}0={carry} p{found % 10};"
        f" c{minute // 10} g{minutes // 10}{sign}{carry}={wraps} q{found % 60 // 10}"
    )
    start, end = f"{hour}:{minute:02d}", f"{found // 60}:{found % 60:02d}"
    if later:
        templates: tuple[str, ...] = (
            "What time is it {n} after {t}?",
            "It is {t}. What time will it be in {n}?",
            "{t} plus {n}",
            "Add {n} to {t}.",
            "A film starts at {t} and takes {n}. When does it end?",
            "A train leaves at {t} and arrives {n} later. When does it arrive?",
        )
    else:
        templates = (
            "What time is it {n} before {t}?",
            "It is {t}. What time was it {n} ago?",
            "{t} minus {n}",
            "A film ends at {t} and takes {n}. When does it start?",
        )
    prompt = word(rng, *templates, n=f"{minutes} minute{'' if minutes == 1 else 's'}", t=start)
    thinking = f"Time{time} {sign}{step};{columns}; a{hour // 10} b{hour % 10}{sign}{wraps}={found // 60:02d}; {end}"
    return Problem("time of day", prompt, thinking, f"It is {end}.", f"clock:{start}{sign}{minutes}")


def day_name(answer: str) -> str | None:
    """Return the day of the week that is named last, None if there is none."""
    found = re.findall("|".join(DAYS), answer)
    return found[-1] if found else None


WEEKDAY = Task("day of the week", generate_weekday, score_by(day_name))
CLOCK = Task("time of day", generate_clock, score_by(integers))
