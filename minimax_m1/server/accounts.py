"""Who may use the server, how much, and what it cost: keys, quotas and prices; `ledger.py` keeps the rows.

Tokens are those of prompt and answer; times are Unix seconds; days are UTC's. Everything here is called in the event
loop's thread and never waits, but for `Accounts.usage`, which reads the database and is called in another thread, and
for `Accounts.close`.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import logging
import math
import re
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimax_m1.errors import UserError
from minimax_m1.server.ledger import DAY, Ledger, Period
from minimax_m1.settings import read_toml

logger = logging.getLogger("minimax_m1.server")

MINUTE = 60  # seconds


# -- keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """Somebody who may use the server, and their quotas; None: no limit."""

    name: str
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrency: int | None = None  # requests that run at once
    admin: bool = False  # sees everybody's usage
    digest: bytes = field(default=b"", repr=False)  # SHA-256 of the secret


ANONYMOUS = Key("anonymous")


def key_of(secret: str, name: str = "default") -> Key:
    """Return an unlimited key for one secret, such as `--api-key`'s.

    Raises:
        UserError: the secret cannot stand in a header; the message does not show it.
    """
    return Key(name, digest=_digest_of("api_key", secret))


def read_keys(path: Path) -> list[Key]:
    """Return the keys of a TOML file.

    Each is a table `[[keys]]` with `name`, with `key` (the secret) or `sha256` (its digest in hex, so that the file
    holds no secret), and if wanted with `tokens_per_minute`, `tokens_per_day`, `max_concurrency` and `admin`.

    Raises:
        UserError: anything else, or no key at all: that would open the server to everybody.
    """
    values = read_toml(path)
    _check_names(str(path), values, ("keys",))
    keys = [_read_key(f"{path}: keys[{i}]", table) for i, table in enumerate(_tables(path, values, "keys"), 1)]
    _check_unique(f"{path}: ", keys)
    return keys


def _read_key(where: str, table: Mapping[str, Any]) -> Key:
    quotas = ("tokens_per_minute", "tokens_per_day", "max_concurrency")
    _check_names(where, table, ("name", "key", "sha256", *quotas, "admin"))
    name = _read_text(f"{where}.name", table.get("name"), 64)
    if ("key" in table) == ("sha256" in table):
        raise UserError(f"{where}: needs one of key and sha256; accepted: the secret, or its SHA-256 in hex")
    if "key" in table:
        digest = _digest_of(f"{where}.key", table["key"])
    elif isinstance(table["sha256"], str) and re.fullmatch("[0-9a-fA-F]{64}", table["sha256"]):
        digest = bytes.fromhex(table["sha256"])
    else:
        raise UserError(f"{where}.sha256: {table['sha256']!r} cannot be used; accepted: 64 hexadecimal digits")
    limits = {quota: _read_whole(f"{where}.{quota}", table[quota]) for quota in quotas if quota in table}
    admin = table.get("admin", False)
    if not isinstance(admin, bool):
        raise UserError(f"{where}.admin: {admin!r} cannot be used; accepted: true or false")
    return Key(name, **limits, admin=admin, digest=digest)


def _digest_of(field_name: str, secret: object) -> bytes:
    if not isinstance(secret, str) or not re.fullmatch("[!-~]+", secret):  # what a header can carry
        raise UserError(f"{field_name}: cannot be used; accepted: text of ASCII letters, digits and signs, no spaces")
    return hashlib.sha256(secret.encode()).digest()


def _check_unique(where: str, keys: Iterable[Key]) -> None:
    names: dict[str, bytes] = {}
    for key in keys:
        if key.name in names:
            raise UserError(f"{where}name: {key.name!r} is there twice; accepted: another name for each key")
        for other, digest in names.items():
            if digest == key.digest:
                raise UserError(f"{where}key: {other!r} and {key.name!r} have the same; accepted: one for each name")
        names[key.name] = key.digest


# -- prices -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier:
    """Prices of a million tokens, for prompts of up to `max_input_tokens`."""

    max_input_tokens: int | None  # None: of any length
    input: float
    cached_input: float  # of the prompt's tokens that the prefix cache had
    output: float


@dataclass(frozen=True)
class Prices:
    """A price list. A prompt's whole length chooses the tier; one longer than all of them pays the last."""

    currency: str
    tiers: tuple[Tier, ...]

    def tier(self, prompt_tokens: int) -> Tier:
        """Return the tier of a prompt."""
        for tier in self.tiers:
            if tier.max_input_tokens is None or prompt_tokens <= tier.max_input_tokens:
                return tier
        return self.tiers[-1]

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Return the price of a request, of whose prompt `cached_tokens` came out of the cache."""
        tier = self.tier(prompt_tokens)
        uncached = (prompt_tokens - cached_tokens) * tier.input
        return (uncached + cached_tokens * tier.cached_input + completion_tokens * tier.output) / 1_000_000


# MiniMax's prices when M1 came out.
DEFAULT_PRICES = Prices("CNY", (Tier(32_000, 0.8, 0.8, 8.0), Tier(128_000, 1.2, 1.2, 16.0), Tier(None, 2.4, 2.4, 24.0)))


def read_prices(path: Path) -> Prices:
    """Return the price list of a TOML file.

    It has `currency`, and for each tier a table `[[tiers]]` with `max_input_tokens` (the last one needs none), with
    `input` and `output`, and where it differs from `input`, with `cached_input`: prices of a million tokens.

    Raises:
        UserError: anything else.
    """
    values = read_toml(path)
    _check_names(str(path), values, ("currency", "tiers"))
    currency = _read_text(f"{path}: currency", values.get("currency"), 16)
    tables = _tables(path, values, "tiers")
    tiers = [_read_tier(f"{path}: tiers[{i}]", table, last=i == len(tables)) for i, table in enumerate(tables, 1)]
    longest = 0
    for i, tier in enumerate(tiers, 1):
        if tier.max_input_tokens is not None and tier.max_input_tokens <= longest:
            raise UserError(
                f"{path}: tiers[{i}].max_input_tokens: {tier.max_input_tokens} cannot be used; "
                f"accepted: more than the tier before it has, {longest}"
            )
        longest = tier.max_input_tokens or 0
    return Prices(currency, tuple(tiers))


def _read_tier(where: str, table: Mapping[str, Any], *, last: bool) -> Tier:
    _check_names(where, table, ("max_input_tokens", "input", "output", "cached_input"))
    longest = None
    if "max_input_tokens" in table or not last:
        longest = _read_whole(f"{where}.max_input_tokens", table.get("max_input_tokens"))
    prices = dict(table)
    prices.setdefault("cached_input", prices.get("input"))
    for name in ("input", "output", "cached_input"):
        price = prices.get(name)
        if not isinstance(price, int | float) or isinstance(price, bool) or not 0 <= price < math.inf:
            raise UserError(f"{where}.{name}: {price!r} cannot be used; accepted: a number from 0")
    return Tier(longest, float(prices["input"]), float(prices["cached_input"]), float(prices["output"]))


# -- TOML ---------------------------------------------------------------------------------------------------------


def _tables(path: Path, values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the `[[name]]` tables of a TOML file, of which there must be one at least."""
    tables = values.get(name)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: {name}: there are none; accepted: a table [[{name}]] for each")
    return tables


def _check_names(where: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"accepted: {', '.join(known)}"
            raise UserError(f"{where}: {name!r} is not known; {hint}")


def _read_text(where: str, value: object, most: int) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value.strip()) <= most:
        raise UserError(f"{where}: {value!r} cannot be used; accepted: text of 1 to {most} characters")
    return value.strip()


def _read_whole(where: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {value!r} cannot be used; accepted: a whole number of at least 1")
    return value


# -- quotas -------------------------------------------------------------------------------------------------------


class QuotaExceeded(Exception):  # noqa: N818 - it is no error of anybody's
    """A request that does not fit into its key's quotas now.

    Attributes:
        message: one line that says which quota, and when to come again.
        retry_after: whole seconds, at least 1, after which it fits if the key is not used meanwhile. For a request that
            waits for others of its key to end, nobody knows, and it is 1.
        fits_later: False: the prompt alone is larger than a quota, so that waiting does not help.
    """

    def __init__(self, message: str, retry_after: int, *, fits_later: bool = True) -> None:
        super().__init__(message)
        self.message, self.retry_after, self.fits_later = message, retry_after, fits_later


@dataclass(eq=False)
class _Charge:
    tokens: int
    expires: float
    counted: bool = True  # False: its minute is over


class _Meter:
    """What a key has in use: requests that run, tokens of the last 60 seconds, tokens of the day.

    A prompt is charged when it is admitted, its answer when it is settled. The day is that of the admission.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.running = 0
        self.charges: deque[_Charge] = deque()  # the oldest first
        self.minute_tokens = 0
        self.day = 0  # since 1970
        self.day_tokens = 0

    def admit(self, now: float, tokens: int) -> _Charge:
        """Charge a prompt; raise QuotaExceeded where it does not fit."""
        key = self.key
        self.turn_to(now)
        for period, quota in (("minute", key.tokens_per_minute), ("day", key.tokens_per_day)):
            if quota is not None and tokens > quota:
                reason = f"key {key.name!r} may use {quota:,} tokens a {period}"
                raise QuotaExceeded(f"the prompt's {tokens:,} tokens can never fit: {reason}", DAY, fits_later=False)
        waits = []
        if key.max_concurrency is not None and self.running >= key.max_concurrency:
            waits.append(
                (1, f"key {key.name!r} may run {key.max_concurrency} requests at once, and {self.running} run")
            )
        if key.tokens_per_minute is not None and self.minute_tokens + tokens > key.tokens_per_minute:
            waits.append((self._minute_wait(now, tokens), self._full("minute", key.tokens_per_minute, tokens)))
        if key.tokens_per_day is not None and self.day_tokens + tokens > key.tokens_per_day:
            waits.append((_seconds_until((self.day + 1) * DAY, now), self._full("day", key.tokens_per_day, tokens)))
        if waits:
            seconds, reason = max(waits)
            raise QuotaExceeded(f"{reason}; try again in {seconds} second{'s' * (seconds > 1)}", seconds)
        self.running += 1
        self.day_tokens += tokens
        return self.charge(now, tokens)

    def charge(self, now: float, tokens: int) -> _Charge:
        """Count tokens in the minute from `now` on."""
        charge = _Charge(tokens, now + MINUTE)
        if self.key.tokens_per_minute is not None:
            self.charges.append(charge)
            self.minute_tokens += tokens
        return charge

    def change(self, charge: _Charge, tokens: int) -> None:
        """Give a charge another size, if its minute is not over."""
        if self.key.tokens_per_minute is not None and charge.counted:
            self.minute_tokens += tokens - charge.tokens
        charge.tokens = tokens

    def turn_to(self, now: float) -> None:
        """Forget the day and the charges that are over."""
        if self.charges and self.charges[-1].expires > now + MINUTE:  # the clock was set back
            for charge in self.charges:
                charge.expires = min(charge.expires, now + MINUTE)
        while self.charges and self.charges[0].expires <= now:
            charge = self.charges.popleft()
            charge.counted = False
            self.minute_tokens -= charge.tokens
        if self.day != now // DAY:
            self.day, self.day_tokens = int(now // DAY), 0

    def _minute_wait(self, now: float, tokens: int) -> int:
        assert self.key.tokens_per_minute is not None
        excess = self.minute_tokens + tokens - self.key.tokens_per_minute
        for charge in self.charges:
            excess -= charge.tokens
            if excess <= 0:
                return _seconds_until(charge.expires, now)
        raise AssertionError("the charges do not add up to the minute's tokens")

    def _full(self, period: str, quota: int, tokens: int) -> str:
        used = self.minute_tokens if period == "minute" else self.day_tokens
        quota_text = f"key {self.key.name!r} may use {quota:,} tokens a {period}"
        return f"{quota_text}, {used:,} are used, and the prompt has {tokens:,}"


def _seconds_until(then: float, now: float) -> int:
    """Return the least whole number of seconds, at least 1, that brings the clock from `now` to `then`."""
    seconds = max(1, math.floor(then - now) - 1)
    while now + seconds < then:  # as floats add up
        seconds += 1
    return seconds


# -- accounts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What a request used, all of its answers together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt's
    reasoning_tokens: int  # of the completion's
    flops: int
    cost: float


class Admission:
    """Leave for one request. Its prompt's tokens are charged; whoever holds it settles it exactly once."""

    def __init__(self, accounts: Accounts, meter: _Meter, now: float, prompt_tokens: int) -> None:
        """Charge the prompt.

        Raises:
            QuotaExceeded: it does not fit; nothing is charged.
        """
        self._charge = meter.admit(now, prompt_tokens)
        self._accounts, self._meter, self._admitted = accounts, meter, now
        self._settled = False

    def settle(self, used: Used | None, *, request_id: str, route: str, seconds: float, finish_reason: str) -> None:
        """Book what the request used; never waits and never fails.

        Args:
            used: None: nothing ran; what was charged is given back, and no row is written.
            route: its path.
            seconds: that it took.
        """
        assert not self._settled, f"{request_id} was settled before"
        self._settled = True
        accounts, meter = self._accounts, self._meter
        now = accounts.clock()
        meter.turn_to(now)
        meter.running -= 1
        prompt_tokens, completion_tokens = (used.prompt_tokens, used.completion_tokens) if used is not None else (0, 0)
        if meter.day == self._admitted // DAY:
            meter.day_tokens += prompt_tokens + completion_tokens - self._charge.tokens
        meter.change(self._charge, prompt_tokens)
        if completion_tokens:
            meter.charge(now, completion_tokens)
        if used is not None:
            texts = (meter.key.name, *map(_as_utf8, (request_id, route, finish_reason)))
            counts = (used.prompt_tokens, used.cached_tokens, used.completion_tokens, used.reasoning_tokens)
            flops = min(used.flops, 2**63 - 1)  # SQLite has no larger integers
            accounts._ledger.add((self._admitted, *texts, *counts, flops, used.cost, accounts.prices.currency, seconds))


def _as_utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class Accounts:
    """The keys, what they have in use, and what they have used."""

    def __init__(
        self,
        keys: Sequence[Key],
        prices: Prices = DEFAULT_PRICES,
        database: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the database and read from it what each key used today.

        Args:
            keys: none: the server is open to everybody.
            prices: what costs are in the database in; `Used.cost` is the caller's.
            database: a SQLite file, made if it is not there, in a folder that is. None: the last MAX_MEMORY_ROWS
                requests are kept in memory.
            clock: Unix seconds.

        Raises:
            UserError: two keys with one name or one secret; a database that cannot be used.
        """
        _check_unique("", keys)
        self.prices, self.clock = prices, clock
        self.is_open = not keys
        self._keys = tuple(keys)
        self._meters = {key.name: _Meter(key) for key in keys or (ANONYMOUS,)}
        try:
            self._ledger = Ledger(database, prices.currency)
            now = clock()
            for meter in self._meters.values():
                meter.turn_to(now)
                if meter.key.tokens_per_day is not None:
                    meter.day_tokens = self._ledger.tokens_since(meter.key.name, meter.day * DAY)
        except sqlite3.Error as error:
            raise UserError(
                f"usage_db: {database} cannot be used: {error}; accepted: a SQLite file that this server made, "
                "or a new one in a folder that is there"
            ) from None
        self._ledger.start()

    def identify(self, secret: str | None) -> Key | None:
        """Return whose secret this is, in a time that does not tell how near it came; None: nobody's."""
        if self.is_open:
            return ANONYMOUS
        digest = hashlib.sha256((secret or "").encode("utf-8", "surrogatepass")).digest()
        found = None
        for key in self._keys:  # all of them, whichever it is
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found if secret else None

    def admit(self, key: Key, prompt_tokens: int) -> Admission:
        """Let a request in and charge its prompt, so that many at once cannot overshoot by their prompts.

        Raises:
            QuotaExceeded: it does not fit; nothing is charged.
        """
        return Admission(self, self._meters[key.name], self.clock(), prompt_tokens)

    def usage(
        self, key: Key | None, *, since: float | None = None, until: float | None = None, by: Period = "day"
    ) -> list[dict[str, Any]]:
        """Return sums over requests; not for the event loop's thread.

        Args:
            key: whose; None: everybody's.
            since: Unix seconds of the first admission; until: of the first that is too late. None: no bound.
            by: total: one sum; key: one a key; day, hour: one for each key in each UTC day or hour with requests.

        Returns:
            Of each sum, the oldest first, `key`, `day` (such as 2026-01-31) and `hour` (2026-01-31T23:00:00Z), None
            where it goes over them; `requests`, `prompt_tokens`, `cached_tokens`, `completion_tokens`,
            `reasoning_tokens`, `cost` and `flops`.

        Raises:
            UserError: more than MAX_USAGE_ROWS sums.
            sqlite3.Error: the database cannot be read now.
        """
        return self._ledger.sums(None if key is None else key.name, since, until, by)

    def close(self) -> None:
        """Write what waits to be written, and close the database."""
        self._ledger.close()
