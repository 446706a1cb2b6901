"""Keys, quotas, prices, and the usage: its table, through a restart and with a database in trouble, and its route."""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from minimax_m1.engine import Engine
from minimax_m1.errors import UserError
from minimax_m1.server import accounts as accounts_module
from minimax_m1.server import ledger as ledger_module
from minimax_m1.server.accounts import (
    ANONYMOUS,
    DAY,
    DEFAULT_PRICES,
    Accounts,
    Admission,
    Key,
    Prices,
    QuotaExceeded,
    Tier,
    Used,
    key_of,
    read_keys,
    read_prices,
)
from minimax_m1.server.app import create_app
from minimax_m1.server.service import Service
from minimax_m1.settings import ServeSettings

PROJECT = Path(__file__).resolve().parents[2]
NOON = 20_000 * DAY + DAY / 2  # 2024-10-04T12:00:00Z


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def used(prompt_tokens: int, completion_tokens: int = 0, *, cached: int = 0, reasoning: int = 0) -> Used:
    cost = DEFAULT_PRICES.cost(prompt_tokens, cached, completion_tokens)
    return Used(prompt_tokens, completion_tokens, cached, reasoning, 10**17 + prompt_tokens, cost)


def settle(admission: Admission, what: Used | None, request_id: str = "r") -> None:
    admission.settle(what, request_id=request_id, route="/v1/completions", seconds=0.5, finish_reason="stop")


@contextlib.contextmanager
def opened(*args: Any, **kwargs: Any) -> Iterator[Accounts]:
    accounts = Accounts(*args, **kwargs)
    try:
        yield accounts
    finally:
        accounts.close()


def count_rows(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT COUNT(*) FROM requests").fetchone()[0]


def total(accounts: Accounts) -> dict[str, Any]:
    (row,) = accounts.usage(None, by="total")
    return row


# -- keys ---------------------------------------------------------------------------------------------------------


def test_identify() -> None:
    keys = [key_of("sk-first", "first"), key_of("sk-second", "second"), key_of("sk-third", "third")]
    with opened(keys, DEFAULT_PRICES, None) as accounts:
        assert not accounts.is_open
        assert [accounts.identify(secret) for secret in ("sk-first", "sk-second", "sk-third")] == keys
        for secret in ("", None, "sk-", "sk-First", "sk-first ", "sk-fïrst", "\ud800", "\0", "x" * 100_000):
            assert accounts.identify(secret) is None
    with opened([Key("empty", digest=hashlib.sha256(b"").digest())], DEFAULT_PRICES, None) as accounts:
        assert accounts.identify("") is None and accounts.identify(None) is None


def test_identify_compares_with_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []
    compare = accounts_module.hmac.compare_digest

    def counted(left: bytes, right: bytes) -> bool:
        visited.append(left)
        return compare(left, right)

    monkeypatch.setattr(accounts_module.hmac, "compare_digest", counted)
    keys = [key_of(f"sk-{i}", f"key{i}") for i in range(5)]
    with opened(keys, DEFAULT_PRICES, None) as accounts:
        for secret in ("sk-0", "sk-4", "wrong", "", None):
            visited.clear()
            accounts.identify(secret)
            assert visited == [key.digest for key in keys]


def test_without_keys_everybody_is_anonymous() -> None:
    with opened([], DEFAULT_PRICES, None) as accounts:
        assert accounts.is_open
        assert {accounts.identify(secret) for secret in (None, "", "anything", "\ud800")} == {ANONYMOUS}


def test_nothing_shows_a_secret() -> None:
    key = key_of("sk-hidden")
    assert "sk-hidden" not in repr(key) and key.digest.hex() not in repr(key) and repr(key.digest) not in repr(key)
    with pytest.raises(UserError) as caught:
        key_of("sk hidden")
    assert "hidden" not in str(caught.value)


def test_read_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f"""
        [[keys]]
        name = "team"
        key = "sk-team"
        tokens_per_minute = 100
        tokens_per_day = 1000
        max_concurrency = 4

        [[keys]]
        name = "运维"
        sha256 = "{hashlib.sha256(b"sk-ops").hexdigest().upper()}"
        admin = true
        """)
    team, ops = keys = read_keys(path)
    assert (team.name, team.tokens_per_minute, team.tokens_per_day, team.max_concurrency) == ("team", 100, 1000, 4)
    assert (ops.tokens_per_minute, ops.tokens_per_day, ops.max_concurrency) == (None, None, None)
    assert (team.admin, ops.admin) == (False, True)
    with opened(keys, DEFAULT_PRICES, None) as accounts:
        assert accounts.identify("sk-team") == team and accounts.identify("sk-ops") == ops


GOOD_KEY = '[[keys]]\nname = "a"\nkey = "sk-a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"keys: there are none; accepted: a table \[\[keys\]\]"),
        ("keys = []", "keys: there are none"),
        ('keys = ["sk-a"]', "keys: there are none"),
        ("[[key]]\n", "'key' is not known; did you mean keys"),
        ("[[keys]]\n", r"keys\[1\].name: None cannot be used; accepted: text"),
        ("[[keys]]\nname = 5", r"keys\[1\].name: 5 cannot be used"),
        ('[[keys]]\nname = " "', r"keys\[1\].name: ' ' cannot be used"),
        ('[[keys]]\nname = "a"', r"keys\[1\]: needs one of key and sha256"),
        (GOOD_KEY + f'sha256 = "{"0" * 64}"', r"keys\[1\]: needs one of key and sha256"),
        ('[[keys]]\nname = "a"\nsha256 = "12"', r"keys\[1\].sha256: '12' cannot be used; accepted: 64 hexadecimal"),
        ('[[keys]]\nname = "a"\nsha256 = 12', r"keys\[1\].sha256: 12 cannot be used"),
        ('[[keys]]\nname = "a"\nkey = ""', r"keys\[1\].key: cannot be used; accepted: text of ASCII"),
        ('[[keys]]\nname = "a"\nkey = "schlüssel"', r"keys\[1\].key: cannot be used"),
        (
            GOOD_KEY + "tokens_per_minute = 0",
            r"keys\[1\].tokens_per_minute: 0 cannot be used; accepted: a whole number",
        ),
        (GOOD_KEY + "tokens_per_day = 1.5", r"keys\[1\].tokens_per_day: 1.5 cannot be used"),
        (GOOD_KEY + "max_concurrency = true", r"keys\[1\].max_concurrency: True cannot be used"),
        (GOOD_KEY + 'admin = "yes"', r"keys\[1\].admin: 'yes' cannot be used; accepted: true or false"),
        (
            GOOD_KEY + "token_per_minute = 5",
            r"keys\[1\]: 'token_per_minute' is not known; did you mean tokens_per_minute",
        ),
        (GOOD_KEY + "colour = 5", r"keys\[1\]: 'colour' is not known; accepted: name, key, sha256"),
        (GOOD_KEY + '[[keys]]\nname = "a"\nkey = "sk-b"', "name: 'a' is there twice"),
        (GOOD_KEY + '[[keys]]\nname = "b"\nkey = "sk-a"', "key: 'a' and 'b' have the same"),
        ("[[keys]", "is not TOML"),
    ],
)
def test_bad_keys(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_keys(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "sk-" not in str(caught.value)


def test_no_file_of_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.toml: No such file"):
        read_keys(tmp_path / "none.toml")


def test_keys_from_two_places_must_differ() -> None:
    with pytest.raises(UserError, match="name: 'default' is there twice"):
        Accounts([key_of("sk-a"), key_of("sk-b")], DEFAULT_PRICES, None)


# -- prices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_tokens", "price_in", "price_out"),
    [
        (0, 0.8, 8),
        (1, 0.8, 8),
        (32_000, 0.8, 8),
        (32_001, 1.2, 16),
        (128_000, 1.2, 16),
        (128_001, 2.4, 24),
        (1_000_000, 2.4, 24),
        (4_000_000, 2.4, 24),
    ],
)
def test_default_prices(prompt_tokens: int, price_in: float, price_out: float) -> None:
    tier = DEFAULT_PRICES.tier(prompt_tokens)
    assert (tier.input, tier.cached_input, tier.output) == (price_in, price_in, price_out)
    cost = DEFAULT_PRICES.cost(prompt_tokens, prompt_tokens // 2, 1_000)
    assert cost == pytest.approx(prompt_tokens * price_in / 1e6 + price_out / 1e3, rel=1e-12)
    assert DEFAULT_PRICES.currency == "CNY"


def test_cached_tokens_choose_no_tier_but_have_a_price() -> None:
    prices = Prices("EUR", (Tier(10, 1.0, 0.25, 4.0), Tier(None, 2.0, 0.5, 8.0)))
    assert prices.cost(10, 8, 1) == pytest.approx((2 * 1.0 + 8 * 0.25 + 1 * 4.0) / 1e6, rel=1e-12)
    assert prices.cost(11, 10, 1) == pytest.approx((1 * 2.0 + 10 * 0.5 + 1 * 8.0) / 1e6, rel=1e-12)


def test_read_prices(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text("""
        currency = "USD"
        [[tiers]]
        max_input_tokens = 1000
        input = 1
        output = 2.5
        cached_input = 0
        [[tiers]]
        input = 3
        output = 4
        """)
    assert read_prices(path) == Prices("USD", (Tier(1000, 1.0, 0.0, 2.5), Tier(None, 3.0, 3.0, 4.0)))


def test_a_last_tier_that_ends_is_for_longer_prompts_too(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('currency = "USD"\n[[tiers]]\nmax_input_tokens = 10\ninput = 1\noutput = 2\n')
    assert read_prices(path).tier(11) == Tier(10, 1.0, 1.0, 2.0)


TIER = "[[tiers]]\ninput = 1\noutput = 2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TIER, "currency: None cannot be used; accepted: text of 1 to 16"),
        ("currency = 5\n" + TIER, "currency: 5 cannot be used"),
        ('currency = "USD"', r"tiers: there are none; accepted: a table \[\[tiers\]\]"),
        ('curency = "USD"\n' + TIER, "'curency' is not known; did you mean currency"),
        (
            'currency = "USD"\n[[tiers]]\noutput = 2',
            r"tiers\[1\].input: None cannot be used; accepted: a number from 0",
        ),
        ('currency = "USD"\n[[tiers]]\ninput = 2', r"tiers\[1\].output: None cannot be used"),
        ('currency = "USD"\n[[tiers]]\ninput = -1\noutput = 2', r"tiers\[1\].input: -1 cannot be used"),
        ('currency = "USD"\n[[tiers]]\ninput = nan\noutput = 2', r"tiers\[1\].input: nan cannot be used"),
        ('currency = "USD"\n[[tiers]]\ninput = inf\noutput = 2', r"tiers\[1\].input: inf cannot be used"),
        ('currency = "USD"\n[[tiers]]\ninput = true\noutput = 2', r"tiers\[1\].input: True cannot be used"),
        ('currency = "USD"\n' + TIER + "cached_input = '1'", r"tiers\[1\].cached_input: '1' cannot be used"),
        (
            'currency = "USD"\n' + TIER + "cached_inputs = 1",
            r"tiers\[1\]: 'cached_inputs' .* did you mean cached_input\?",
        ),
        (
            'currency = "USD"\n' + TIER + TIER,
            r"tiers\[1\].max_input_tokens: None cannot be used; accepted: a whole number",
        ),
        ('currency = "USD"\n' + TIER + "max_input_tokens = 0", r"tiers\[1\].max_input_tokens: 0 cannot be used"),
        (
            'currency = "USD"\n' + 2 * (TIER + "max_input_tokens = 9\n"),
            r"tiers\[2\].max_input_tokens: 9 cannot be used; accepted: more than the tier before it has, 9",
        ),
    ],
)
def test_bad_prices(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_prices(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# -- quotas -------------------------------------------------------------------------------------------------------


def test_parallel_prompts_cannot_overshoot() -> None:
    key = Key("team", tokens_per_minute=100, tokens_per_day=1000)
    with opened([key], DEFAULT_PRICES, None, clock=Clock()) as accounts:
        for _ in range(4):
            accounts.admit(key, 25)  # none of them is settled
        with pytest.raises(
            QuotaExceeded, match=r"100 tokens a minute, 100 are used, and the prompt has 1; try again in 60 s"
        ):
            accounts.admit(key, 1)


def test_answers_count_when_they_are_settled() -> None:
    key, clock = Key("team", tokens_per_minute=100), Clock()
    with opened([key], DEFAULT_PRICES, None, clock=clock) as accounts:
        admission = accounts.admit(key, 10)
        clock.now += 59
        settle(admission, used(10, 85))
        with pytest.raises(QuotaExceeded) as caught:
            accounts.admit(key, 6)
        assert caught.value.retry_after == 1  # the prompt's tokens are a minute old then, the answer's stay
        clock.now += 1
        accounts.admit(key, 15)
        with pytest.raises(QuotaExceeded) as caught:
            accounts.admit(key, 1)
        assert caught.value.retry_after == 59


def test_a_request_of_more_than_a_minute_gives_back_nothing_twice() -> None:
    key, clock = Key("team", tokens_per_minute=100), Clock()
    with opened([key], DEFAULT_PRICES, None, clock=clock) as accounts:
        admissions = [accounts.admit(key, 50), accounts.admit(key, 50)]
        clock.now += 61
        settle(admissions[0], None)
        settle(admissions[1], used(30, 10))
        accounts.admit(key, 90)
        with pytest.raises(QuotaExceeded, match="100 are used"):
            accounts.admit(key, 1)


def test_what_never_fits_is_told_so() -> None:
    key = Key("team", tokens_per_minute=100, tokens_per_day=50)
    with opened([key], DEFAULT_PRICES, None, clock=Clock()) as accounts:
        with pytest.raises(QuotaExceeded, match=r"prompt's 101 tokens can never fit: .* 100 tokens a minute") as caught:
            accounts.admit(key, 101)
        assert not caught.value.fits_later and caught.value.retry_after >= 1
        with pytest.raises(QuotaExceeded, match=r"prompt's 51 tokens can never fit: .* 50 tokens a day"):
            accounts.admit(key, 51)
        accounts.admit(key, 50)  # a refused request has used nothing
        with pytest.raises(QuotaExceeded) as caught:
            accounts.admit(key, 1)
        assert caught.value.fits_later


def test_the_day_ends_at_midnight() -> None:
    key, clock = Key("team", tokens_per_day=100), Clock(NOON + 0.25)
    with opened([key], DEFAULT_PRICES, None, clock=clock) as accounts:
        early = accounts.admit(key, 60)
        with pytest.raises(QuotaExceeded, match="100 tokens a day, 60 are used") as caught:
            accounts.admit(key, 41)
        assert caught.value.retry_after == DAY // 2
        clock.now = NOON + DAY / 2 - 0.001
        with pytest.raises(QuotaExceeded) as caught:
            accounts.admit(key, 41)
        assert caught.value.retry_after == 1
        clock.now = NOON + DAY / 2
        accounts.admit(key, 41)
        settle(early, used(60, 1000))  # of the day before
        accounts.admit(key, 59)


def test_concurrency() -> None:
    key, other = Key("team", max_concurrency=2, digest=b"1"), Key("other", max_concurrency=1, digest=b"2")
    with opened([key, other], DEFAULT_PRICES, None, clock=Clock()) as accounts:
        first, second = accounts.admit(key, 5), accounts.admit(key, 5)
        for _ in range(3):  # being refused takes no place
            with pytest.raises(QuotaExceeded, match=r"2 requests at once, and 2 run; try again in 1 second$") as caught:
                accounts.admit(key, 5)
            assert caught.value.retry_after == 1
        accounts.admit(other, 5)
        settle(first, used(5))
        third = accounts.admit(key, 5)
        settle(second, None)
        settle(third, None)
        accounts.admit(key, 5)
        accounts.admit(key, 5)


def test_the_longest_wait_is_told() -> None:
    key = Key("team", tokens_per_minute=10, tokens_per_day=10, max_concurrency=1)
    with opened([key], DEFAULT_PRICES, None, clock=Clock()) as accounts:
        accounts.admit(key, 10)
        with pytest.raises(QuotaExceeded, match="tokens a day") as caught:
            accounts.admit(key, 1)
        assert caught.value.retry_after == DAY // 2


def test_settled_once() -> None:
    with opened([], DEFAULT_PRICES, None) as accounts:
        admission = accounts.admit(ANONYMOUS, 5)
        settle(admission, None)
        with pytest.raises(AssertionError, match="settled before"):
            settle(admission, used(5))


def test_a_clock_that_is_set_back_blocks_nobody_for_long() -> None:
    key, clock = Key("team", tokens_per_minute=10), Clock()
    with opened([key], DEFAULT_PRICES, None, clock=clock) as accounts:
        accounts.admit(key, 10)
        clock.now -= 7 * DAY
        with pytest.raises(QuotaExceeded) as caught:
            accounts.admit(key, 10)
        assert caught.value.retry_after == 60
        clock.now += 60
        accounts.admit(key, 10)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 60)),
        st.tuples(st.just("settle"), st.integers(0, 30)),  # with so many tokens of answer
        st.tuples(st.just("give back"), st.just(0)),
        st.tuples(st.just("wait"), st.floats(0, 45, allow_nan=False)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([NOON, NOON + 0.1, NOON + DAY / 2 - 40.7, 0.1, 1_791_234_567.123457]),
    minute=st.integers(1, 100),
    day=st.integers(1, 400),
    concurrency=st.integers(1, 5),
    steps=steps,
)
def test_quotas_against_plain_sums(
    start: float, minute: int, day: int, concurrency: int, steps: list[tuple[str, Any]]
) -> None:
    """Who is admitted is who fits by plain sums; Retry-After is exact; what ran nothing leaves no trace."""
    key, clock = Key("k", minute, day, concurrency), Clock(start)
    running: list[tuple[float, int, Admission]] = []  # admitted at, tokens
    spent: list[tuple[float, float, int]] = []  # at, of whose day, tokens

    def fits(now: float, tokens: int, *, alone: bool = False) -> bool:
        charges = [*spent, *((at, at, size) for at, size, _ in running)]
        in_minute = sum(size for at, _, size in charges if now < at + 60)
        in_day = sum(size for _, of, size in charges if of // DAY == now // DAY)
        free = alone or len(running) < concurrency
        return free and in_minute + tokens <= minute and in_day + tokens <= day

    with opened([key], DEFAULT_PRICES, None, clock=clock) as accounts:
        for what, value in steps:
            if what == "wait":
                clock.now += value
            elif what == "admit":
                if fits(clock.now, value):
                    running.append((clock.now, value, accounts.admit(key, value)))
                    continue
                with pytest.raises(QuotaExceeded) as caught:
                    accounts.admit(key, value)
                wait = caught.value.retry_after
                assert wait >= 1 and caught.value.fits_later == (value <= min(minute, day))
                if caught.value.fits_later:
                    assert fits(clock.now + wait, value, alone=True)
                    assert wait == 1 or not fits(clock.now + wait - 1, value, alone=True)
            elif running:
                at, size, admission = running.pop(0)
                settle(admission, used(size, value) if what == "settle" else None)
                if what == "settle":
                    spent += [(at, at, size), (clock.now, at, value)]
        for _, _, admission in running:
            settle(admission, None)
        running.clear()
        assert total(accounts)["requests"] == len(spent) / 2
        clock.now += 60
        left = min(minute, day - sum(size for _, of, size in spent if of // DAY == clock.now // DAY))
        if left >= 0:  # answers may have overshot the day
            accounts.admit(key, left)  # every reservation was given back
        with pytest.raises(QuotaExceeded):
            accounts.admit(key, 1)


# -- usage --------------------------------------------------------------------------------------------------------

FIRST, SECOND = Key("first", digest=b"1"), Key("second", digest=b"2")


def test_sums(tmp_path: Path) -> None:
    clock = Clock()
    with opened([FIRST, SECOND], DEFAULT_PRICES, tmp_path / "usage.db", clock=clock) as accounts:
        for key, hours, what in (
            (FIRST, 0, used(40_000, 7, cached=39_000, reasoning=5)),
            (FIRST, 1, used(10, 20)),
            (SECOND, 1, used(1, 2)),
            (FIRST, 13, used(100, 200, reasoning=199)),
        ):
            clock.now = NOON + 3600 * hours
            settle(accounts.admit(key, what.prompt_tokens), what)
        settle(accounts.admit(FIRST, 5), None)  # nothing ran: no row
        by_key = accounts.usage(None, by="key")
        assert by_key[1] == {
            "key": "second",
            "day": None,
            "hour": None,
            "requests": 1,
            "prompt_tokens": 1,
            "cached_tokens": 0,
            "completion_tokens": 2,
            "reasoning_tokens": 0,
            "cost": pytest.approx((1 * 0.8 + 2 * 8) / 1e6),
            "flops": 10**17 + 1,
        }
        assert [(row["key"], row["requests"], row["prompt_tokens"]) for row in by_key] == [
            ("first", 3, 40_110),
            ("second", 1, 1),
        ]
        assert [(row["key"], row["day"], row["hour"], row["completion_tokens"]) for row in accounts.usage(None)] == [
            ("first", "2024-10-04", None, 27),
            ("second", "2024-10-04", None, 2),
            ("first", "2024-10-05", None, 200),
        ]
        assert [
            (row["key"], row["day"], row["hour"], row["cached_tokens"]) for row in accounts.usage(FIRST, by="hour")
        ] == [
            ("first", "2024-10-04", "2024-10-04T12:00:00Z", 39_000),
            ("first", "2024-10-04", "2024-10-04T13:00:00Z", 0),
            ("first", "2024-10-05", "2024-10-05T01:00:00Z", 0),
        ]
        (everything,) = accounts.usage(None, by="total")
        assert (everything["key"], everything["requests"], everything["reasoning_tokens"]) == (None, 4, 204)
        assert everything["flops"] == 4 * 10**17 + 40_111
        (between,) = accounts.usage(None, since=NOON + 3600, until=NOON + 13 * 3600, by="total")
        assert (between["requests"], between["prompt_tokens"]) == (2, 11)
        (nothing,) = accounts.usage(Key("nobody"), by="total")
        assert (nothing["key"], nothing["requests"], nothing["cost"], nothing["flops"]) == ("nobody", 0, 0, 0)
        assert accounts.usage(Key("nobody"), by="day") == []


@settings(max_examples=25, deadline=None)
@given(
    what=st.lists(
        st.builds(
            Used,
            prompt_tokens=st.integers(0, 10**6),
            completion_tokens=st.integers(0, 10**6),
            cached_tokens=st.integers(0, 10**6),
            reasoning_tokens=st.integers(0, 10**6),
            flops=st.integers(0, 2**63 - 1),  # whose sum is more than SQLite's integers hold
            cost=st.floats(0, 1000),
        ),
        max_size=20,
    )
)
def test_usage_is_what_was_settled(what: list[Used]) -> None:
    with opened([], DEFAULT_PRICES, None) as accounts:
        for one in what:
            settle(accounts.admit(ANONYMOUS, one.prompt_tokens), one)
        sums = total(accounts)
        assert sums["requests"] == len(what)
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "flops"):
            assert sums[name] == sum(getattr(one, name) for one in what)
        assert sums["cost"] == pytest.approx(math.fsum(one.cost for one in what))


def test_a_row_has_everything(tmp_path: Path) -> None:
    database = tmp_path / "usage.db"
    with opened([], DEFAULT_PRICES, database, clock=Clock()) as accounts:
        accounts.admit(ANONYMOUS, 3).settle(
            used(3, 4, cached=2, reasoning=1), request_id="id", route="/v1/x", seconds=1.5, finish_reason="length"
        )
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        (row,) = map(dict, connection.execute("SELECT * FROM requests"))
        plan = connection.execute("EXPLAIN QUERY PLAN SELECT 1 FROM requests WHERE key = 'a' AND time >= 5").fetchall()
    assert row == {
        "time": NOON,
        "key": "anonymous",
        "request_id": "id",
        "route": "/v1/x",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "completion_tokens": 4,
        "reasoning_tokens": 1,
        "flops": 10**17 + 3,
        "cost": DEFAULT_PRICES.cost(3, 2, 4),
        "currency": "CNY",
        "seconds": 1.5,
    }
    assert "INDEX requests_by_key (key=? AND time>?)" in plan[0][3]


def test_nothing_that_a_client_sends_spoils_a_batch() -> None:
    with opened([], DEFAULT_PRICES, None) as accounts:
        for request_id in ("\ud800", "\0", "'; DROP TABLE requests; --", "x" * 100_000):
            settle(accounts.admit(ANONYMOUS, 1), used(1), request_id)
        settle(accounts.admit(ANONYMOUS, 1), Used(1, 1, 0, 0, 2**70, math.nan))
        assert total(accounts)["requests"] == 5


def test_too_many_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_USAGE_ROWS", 2)
    clock = Clock()
    with opened([], DEFAULT_PRICES, None, clock=clock) as accounts:
        for _ in range(3):
            settle(accounts.admit(ANONYMOUS, 1), used(1))
            clock.now += 3600
        with pytest.raises(UserError, match="by: hour makes more than 2 sums; accepted: a shorter time"):
            accounts.usage(None, by="hour")
        assert len(accounts.usage(None, since=NOON + 1, by="hour")) == 2


def test_the_event_loop_settles_and_close_writes_all(tmp_path: Path) -> None:
    database = tmp_path / "usage.db"

    async def serve() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        accounts = Accounts([], DEFAULT_PRICES, database)
        for i in range(10_000):
            settle(accounts.admit(ANONYMOUS, i), used(i, 1), str(i))
            if i % 100 == 0:
                await asyncio.sleep(0)
        ticking.cancel()
        await asyncio.to_thread(accounts.close)
        return ticks

    assert asyncio.run(serve()) >= 100
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ids = [int(row[0]) for row in connection.execute("SELECT request_id FROM requests ORDER BY rowid")]
    assert ids == list(range(10_000))


def test_without_a_file_the_last_requests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_MEMORY_ROWS", 10)
    with opened([], DEFAULT_PRICES, None) as accounts:
        for i in range(25):
            settle(accounts.admit(ANONYMOUS, i), used(i))
        assert (total(accounts)["requests"], total(accounts)["prompt_tokens"]) == (10, sum(range(15, 25)))


def test_a_restart_keeps_the_day(tmp_path: Path) -> None:
    database, clock = tmp_path / "usage.db", Clock(NOON - DAY)
    key, other = Key("team", tokens_per_day=100, digest=b"1"), Key("other", tokens_per_day=100, digest=b"2")
    with opened([key, other], DEFAULT_PRICES, database, clock=clock) as accounts:
        settle(accounts.admit(key, 50), used(50))  # yesterday
        clock.now = NOON
        settle(accounts.admit(key, 30), used(30, 40))
        settle(accounts.admit(other, 3), used(3))
    clock.now += 100
    with opened([other, key], DEFAULT_PRICES, database, clock=clock) as accounts:
        with pytest.raises(QuotaExceeded, match="100 tokens a day, 70 are used, and the prompt has 31"):
            accounts.admit(key, 31)
        accounts.admit(key, 30)
        accounts.admit(other, 97)
    clock.now += DAY
    with opened([key], DEFAULT_PRICES, database, clock=clock) as accounts:
        accounts.admit(key, 100)
        assert total(accounts)["requests"] == 3


def test_two_servers_share_a_file(tmp_path: Path) -> None:
    database = tmp_path / "usage.db"
    with opened([], DEFAULT_PRICES, database) as one, opened([], DEFAULT_PRICES, database) as two:
        for i in range(50):
            settle((one, two)[i % 2].admit(ANONYMOUS, 1), used(1))
        total(one)
        assert total(two)["requests"] == 50


# -- a database in trouble ----------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Waits of a twentieth of a second."""
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(ledger_module, "RETRY_SECONDS", 0.05)
    caplog.set_level(logging.INFO, "minimax_m1.server")


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.mark.usefixtures("hasty")
def test_a_locked_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database, key = tmp_path / "usage.db", Key("team", tokens_per_day=100)
    with opened([key], DEFAULT_PRICES, database) as accounts:
        for _ in range(2):
            caplog.clear()
            before = count_rows(database)
            with locked(database):
                for _ in range(3):
                    settle(accounts.admit(key, 10), used(10))
                    time.sleep(0.15)
                wait_for(lambda: caplog.messages)
                assert count_rows(database) == before
                assert total(accounts)["requests"] == before  # reading goes on
            wait_for(lambda before=before: count_rows(database) == before + 3)
            wait_for(lambda: len(caplog.messages) == 2)
            assert "database is locked; it is kept in memory" in caplog.messages[0]  # once for all tries
            assert caplog.messages[1] == "usage is written again: 3 requests, 0 were dropped"
        with pytest.raises(QuotaExceeded, match="60 are used"):
            accounts.admit(key, 41)


@pytest.mark.usefixtures("hasty")
def test_what_waits_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_WAITING_ROWS", 5)
    database = tmp_path / "usage.db"
    with opened([], DEFAULT_PRICES, database) as accounts:
        with locked(database):
            for i in range(20):
                settle(accounts.admit(ANONYMOUS, i), used(i))
            wait_for(lambda: caplog.messages)
            total(accounts)  # the writer has taken all of them
        wait_for(lambda: count_rows(database) == 5)
        assert total(accounts)["prompt_tokens"] == sum(range(15, 20))
        assert caplog.messages[-1] == "usage is written again: 5 requests, 15 were dropped"


@pytest.mark.usefixtures("hasty")
def test_what_is_lost_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = tmp_path / "usage.db"
    accounts = Accounts([], DEFAULT_PRICES, database)
    with locked(database):
        settle(accounts.admit(ANONYMOUS, 1), used(1))
        settle(accounts.admit(ANONYMOUS, 1), used(1))
        accounts.close()
    assert caplog.messages[-1] == "usage of 2 requests is lost: the database could not be written"
    assert count_rows(database) == 0


@pytest.mark.usefixtures("hasty")
def test_a_dead_connection_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = tmp_path / "usage.db"
    with opened([], DEFAULT_PRICES, database) as accounts:
        accounts._ledger._connection.close()
        settle(accounts.admit(ANONYMOUS, 1), used(1))
        wait_for(lambda: count_rows(database) == 1)
    assert "Cannot operate on a closed database" in caplog.messages[0]


def test_a_full_disk(tmp_path: Path) -> None:
    code = """
import logging, pathlib, resource, sys
from minimax_m1.server import ledger as module
from minimax_m1.server.accounts import ANONYMOUS, DEFAULT_PRICES, Accounts, Used
module.RETRY_SECONDS = 0.01
logging.basicConfig(format="%(message)s", stream=sys.stdout)
accounts = Accounts([], DEFAULT_PRICES, pathlib.Path("usage.db"))
no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
def settle(n):
    for _ in range(n):
        accounts.admit(ANONYMOUS, 1).settle(
            Used(1, 1, 0, 0, 1, 1.0), request_id="r" * 500, route="/", seconds=1.0, finish_reason="stop"
        )
settle(10)
assert accounts.usage(None, by="total")[0]["requests"] == 10
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, no_limit[1]))  # no file may grow beyond
settle(500)
print("saved while full:", accounts.usage(None, by="total")[0]["requests"])
resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
accounts.close()
"""
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "saved while full: 10" in lines
    errors = [line for line in lines if "usage cannot be written" in line]
    assert errors and len(errors) == len(set(errors))
    assert count_rows(tmp_path / "usage.db") == 510


@pytest.mark.parametrize("kind", ["folder", "no folder", "no database", "another program's", "a later version's"])
def test_a_database_that_cannot_be_opened(tmp_path: Path, kind: str) -> None:
    database = tmp_path / "usage.db"
    if kind == "folder":
        database.mkdir()
    elif kind == "no folder":
        database = tmp_path / "none" / "usage.db"
    elif kind == "no database":
        database.write_bytes(b"nothing that SQLite knows" * 100)
    elif kind == "another program's":
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE requests (a)")
    else:
        Accounts([], DEFAULT_PRICES, database).close()
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA user_version = 2")
    before = database.read_bytes() if database.is_file() else None
    with pytest.raises(UserError, match=r"usage_db: .*usage.db (cannot be used: .*|is .*); accepted: a ") as caught:
        Accounts([], DEFAULT_PRICES, database)
    assert "\n" not in str(caught.value)
    assert kind in str(caught.value) or kind in ("folder", "no folder", "no database")
    assert (database.read_bytes() if database.is_file() else None) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file(tmp_path: Path) -> None:
    database = tmp_path / "usage.db"
    Accounts([], DEFAULT_PRICES, database).close()
    database.chmod(0o444)
    with pytest.raises(UserError, match=r"usage_db: .* readonly database"):
        Accounts([], DEFAULT_PRICES, database)


def test_costs_of_two_currencies_are_not_added(tmp_path: Path) -> None:
    database, dollars = tmp_path / "usage.db", Prices("USD", DEFAULT_PRICES.tiers)
    Accounts([], DEFAULT_PRICES, database).close()
    with opened([], dollars, database) as accounts:  # no costs yet
        settle(accounts.admit(ANONYMOUS, 1), used(1))
    with pytest.raises(
        UserError, match=r"currency: 'CNY' cannot be used with .*usage.db, which holds costs in USD; accepted"
    ):
        Accounts([], DEFAULT_PRICES, database)


# -- GET /v1/usage ------------------------------------------------------------------------------------------------

MINE, THEIRS = key_of("sk-mine", "mine"), key_of("sk-theirs", "theirs")
ADMIN = dataclasses.replace(key_of("sk-admin", "admin"), admin=True)


@contextlib.contextmanager
def serving(checkpoint: Path, accounts: Accounts) -> Iterator[TestClient]:
    engine = Engine.from_pretrained(checkpoint, max_batch_size=2, cache_bytes=16 << 20, routing_log=True)
    service = Service(engine, "tiny", ServeSettings(access_log=False), accounts)
    try:
        with TestClient(create_app(service)) as client:
            yield client
    finally:
        asyncio.run(service.close())


@pytest.fixture(scope="module")
def client(tiny_checkpoint: Path) -> Iterator[TestClient]:
    """An app with three keys, of which two have used it on two days."""
    clock = Clock(NOON)
    accounts = Accounts([MINE, THEIRS, ADMIN], DEFAULT_PRICES, None, clock=clock)
    for key, now, tokens in ((MINE, NOON, 10), (THEIRS, NOON + 3600, 20), (MINE, NOON + DAY, 40)):
        clock.now = now
        settle(accounts.admit(key, tokens), used(tokens, 1, cached=2))
    with serving(tiny_checkpoint, accounts) as client:
        yield client


def prompts(client: TestClient, secret: str, **query: str) -> list[tuple[str | None, str | None, int]]:
    """Ask for usage; return each sum's key, its hour or day, and its tokens of prompts."""
    reply = client.get("/v1/usage", params=query, headers={"Authorization": f"Bearer {secret}"})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["object"], body["currency"]) == ("list", "CNY")
    return [(row["key"], row["hour"] or row["day"], row["prompt_tokens"]) for row in body["data"]]


def test_a_key_sees_its_own_usage(client: TestClient) -> None:
    assert prompts(client, "sk-mine") == [("mine", "2024-10-04", 10), ("mine", "2024-10-05", 40)]
    assert prompts(client, "sk-mine", key="mine", by="total") == [("mine", None, 50)]
    assert prompts(client, "sk-theirs", by="key") == [("theirs", None, 20)]
    assert prompts(client, "sk-theirs", by="hour") == [("theirs", "2024-10-04T13:00:00Z", 20)]


def test_an_admin_sees_all(client: TestClient) -> None:
    assert prompts(client, "sk-admin", by="key") == [("mine", None, 50), ("theirs", None, 20)]
    assert prompts(client, "sk-admin", by="total") == [(None, None, 70)]
    assert prompts(client, "sk-admin", key="theirs") == [("theirs", "2024-10-04", 20)]
    assert prompts(client, "sk-admin", key="gone") == []


@pytest.mark.parametrize(
    ("query", "tokens"),
    [
        ({"since": "2024-10-04"}, 70),
        ({"since": "2024-10-05"}, 40),
        ({"until": "2024-10-04"}, 30),  # the whole day
        ({"since": "2024-10-05", "until": "2024-10-05"}, 40),
        ({"until": "2024-10-04T13:00:00Z"}, 10),
        ({"since": "2024-10-04T13:00:00Z"}, 60),
        ({"since": "2024-10-04T15:00:00.000001+02:00"}, 40),
        ({"since": "2024-10-04T13:00:00"}, 60),
        ({"since": f"{NOON + 3600:.0f}", "until": f"{NOON + 3600.5}"}, 20),
        ({"until": "0"}, 0),
    ],
)
def test_since_and_until(client: TestClient, query: dict[str, str], tokens: int) -> None:
    ((_, _, found),) = prompts(client, "sk-admin", by="total", **query)
    assert found == tokens


@pytest.mark.parametrize(
    ("key", "query", "message"),
    [
        ("sk-mine", {"key": "theirs"}, "key: 'theirs' cannot be used with this key; accepted: its own name, 'mine'"),
        ("sk-mine", {"by": "week"}, "by: 'week' cannot be used; accepted: 'total', 'key', 'day' or 'hour'"),
        ("sk-mine", {"since": "yesterday"}, "since: 'yesterday' cannot be used; accepted: a date"),
        ("sk-mine", {"since": ""}, "since: '' cannot be used"),
        ("sk-mine", {"since": "2024-02-30"}, "since: '2024-02-30' cannot be used"),
        ("sk-mine", {"until": "9999-12-31"}, "until: '9999-12-31' cannot be used"),
        ("sk-mine", {"until": "nan"}, "until: 'nan' cannot be used"),
        ("sk-mine", {"from": "2024-01-01"}, "from: is not known here"),
    ],
)
def test_bad_questions(client: TestClient, key: str, query: dict[str, str], message: str) -> None:
    reply = client.get("/v1/usage", params=query, headers={"Authorization": f"Bearer {key}"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)
    assert reply.json()["error"]["param"] == next(iter(query))


def test_usage_needs_a_key(client: TestClient) -> None:
    assert client.get("/v1/usage").status_code == 401
    assert client.get("/v1/usage", headers={"Authorization": "Bearer sk-other"}).status_code == 401


def test_usage_is_documented(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/usage"]["get"]
    assert [parameter["name"] for parameter in operation["parameters"]] == ["by", "since", "until", "key"]
    reply = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    assert set(document["components"]["schemas"][reply]["properties"]) == {"object", "currency", "data"}


def test_an_open_server_shows_what_its_answers_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    database = tmp_path / "usage.db"
    with serving(tiny_checkpoint, Accounts([], DEFAULT_PRICES, database)) as client:
        said = []
        for text in ("pear apple plum", "quince cherry"):
            reply = client.post("/v1/completions", json={"prompt": text, "max_tokens": 3, "temperature": 0})
            assert reply.status_code == 200, reply.text
            said.append(reply.json()["usage"])
        reply = client.get("/v1/usage", params={"by": "key"})
        (row,) = reply.json()["data"]
        assert (row["key"], row["requests"]) == ("anonymous", 2)
        for name in ("prompt_tokens", "completion_tokens", "flops"):
            assert row[name] == sum(usage[name] for usage in said) > 0
        assert row["cost"] == pytest.approx(sum(usage["cost"] for usage in said))

        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("DROP TABLE requests")
        reply = client.get("/v1/usage")
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "5"


def test_a_quota_over_http(tiny_checkpoint: Path) -> None:
    key = dataclasses.replace(key_of("sk-small", "small"), tokens_per_minute=5)
    with serving(tiny_checkpoint, Accounts([key], DEFAULT_PRICES, None, clock=Clock())) as client:
        for prompt, status in (([5, 6, 7, 8], 200), ([5, 6], 429), ([5] * 6, 429)):
            reply = client.post(
                "/v1/completions",
                json={"prompt": prompt, "max_tokens": 1},
                headers={"Authorization": "Bearer sk-small"},
            )
            assert reply.status_code == status, reply.text
            assert status == 200 or int(reply.headers["Retry-After"]) >= 60
        assert "can never fit" in reply.json()["error"]["message"]
