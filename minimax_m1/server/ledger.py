"""The ledger: one row of usage a request in SQLite, written by a thread of its own, and sums over the rows.

Tokens are those of prompt and answer; times are Unix seconds; days are UTC's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from minimax_m1.errors import UserError

logger = logging.getLogger("minimax_m1.server")

DAY = 86_400  # seconds
BUSY_SECONDS = 5.0  # that a thread waits for another process's lock on the database
RETRY_SECONDS = 5.0  # between two tries to write, after one that failed
MAX_WAITING_ROWS = 100_000  # kept in memory while the database cannot be written; then the oldest are dropped
MAX_MEMORY_ROWS = 200_000  # remembered when there is no database file: some 40 MB
MAX_USAGE_ROWS = 10_000  # in one answer

Period = Literal["total", "key", "day", "hour"]

_APPLICATION_ID = 0x4D4D4D31  # "MMM1": how a database of ours is told from another program's
_VERSION = 1  # of the table
_COLUMNS = (
    "time REAL, key TEXT, request_id TEXT, route TEXT, finish_reason TEXT, prompt_tokens INTEGER, "
    "cached_tokens INTEGER, completion_tokens INTEGER, reasoning_tokens INTEGER, flops INTEGER, cost REAL, "
    "currency TEXT, seconds REAL"
)
_INSERT = f"INSERT INTO requests VALUES ({', '.join('?' * len(_COLUMNS.split(',')))})"
_SUMS = (
    "COUNT(*), SUM(prompt_tokens), SUM(cached_tokens), SUM(completion_tokens), SUM(reasoning_tokens), "
    "TOTAL(cost), SUM(flops >> 32), SUM(flops & 0xffffffff)"  # in halves, because a SUM above 2^63 is an error
)

Row = tuple[Any, ...]  # as _COLUMNS


class Ledger:
    """The table of requests: rows go to a thread that writes them, all that wait in one transaction."""

    def __init__(self, path: Path | None, currency: str) -> None:
        self._path, self._currency = path and path.absolute(), currency
        self._waiting: queue.SimpleQueue[Row | threading.Event | None] = queue.SimpleQueue()
        self._errors: set[str] = set()  # logged since the last time that writing worked
        self._dropped = 0
        self._lock = threading.Lock()  # of the connection: a database in memory is read through it as well
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._connection: sqlite3.Connection | None = self._connect()

    def start(self) -> None:
        self._thread.start()

    def add(self, row: Row) -> None:
        self._waiting.put(row)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    # -- reading

    def tokens_since(self, name: str, since: float) -> int:
        """Return a key's tokens of prompts and answers; only before `start`."""
        assert self._connection is not None
        sums = "SELECT TOTAL(prompt_tokens + completion_tokens) FROM requests WHERE key = ? AND time >= ?"
        return int(self._connection.execute(sums, (name, since)).fetchone()[0])

    def sums(self, name: str | None, since: float | None, until: float | None, by: Period) -> list[dict[str, Any]]:
        seconds = {"day": DAY, "hour": 3600}.get(by)
        slot = "NULL" if seconds is None else f"CAST(time / {seconds} AS INTEGER) * {seconds}"
        owner = "?" if by == "total" else "key"
        query = f"SELECT {owner}, {slot} AS slot, {_SUMS} FROM requests WHERE time >= ? AND time < ?"
        values: list[Any] = [name] if by == "total" else []
        values += [-math.inf if since is None else since, math.inf if until is None else until]
        if name is not None:
            query += " AND key = ?"
            values.append(name)
        if by != "total":
            query += " GROUP BY slot, key ORDER BY slot, key"
        rows = self._read(f"{query} LIMIT {MAX_USAGE_ROWS + 1}", values)
        if len(rows) > MAX_USAGE_ROWS:
            raise UserError(f"by: {by} makes more than {MAX_USAGE_ROWS:,} sums; accepted: a shorter time, or by = key")
        return [_describe(by, row) for row in rows]

    def _read(self, query: str, values: Sequence[Any]) -> list[Row]:
        written = threading.Event()
        if self._thread.is_alive():  # what was settled before is in the answer, unless the database is in trouble
            self._waiting.put(written)
            written.wait(BUSY_SECONDS)
        if self._path is None:
            with self._lock:
                assert self._connection is not None
                return self._connection.execute(query, values).fetchall()
        uri = f"{self._path.as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
            return connection.execute(query, values).fetchall()

    # -- writing

    def _connect(self) -> sqlite3.Connection:
        """Open the file, and make the table if it is new."""
        name = ":memory:" if self._path is None else self._path
        connection = sqlite3.connect(name, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        try:
            self._prepare(connection)
        except (sqlite3.Error, UserError):
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def value(query: str) -> Any:
            return (connection.execute(query).fetchone() or [None])[0]

        owner, version = value("PRAGMA application_id"), value("PRAGMA user_version")
        if value("SELECT COUNT(*) FROM sqlite_master") and (owner, version) != (_APPLICATION_ID, _VERSION):
            whose = "a later version's" if owner == _APPLICATION_ID else "another program's"
            raise UserError(f"usage_db: {self._path} is {whose}; accepted: a file of this server's, or a new one")
        connection.execute("PRAGMA journal_mode = WAL")  # one writes while others read
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN IMMEDIATE")  # which also says now, and not later, that the file cannot be written
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute(f"CREATE TABLE IF NOT EXISTS requests ({_COLUMNS})")
        connection.execute("CREATE INDEX IF NOT EXISTS requests_by_key ON requests (key, time)")
        connection.execute("COMMIT")
        currency = value("SELECT currency FROM requests ORDER BY rowid DESC LIMIT 1")
        if currency not in (None, self._currency):
            raise UserError(
                f"currency: {self._currency!r} cannot be used with {self._path}, which holds costs in {currency}; "
                f"accepted: {currency}, or another database"
            )

    def _run(self) -> None:
        rows: deque[Row] = deque()
        retry_at, is_open = 0.0, True
        while is_open:
            items = self._take(max(0.0, retry_at - time.monotonic()) if rows else None)
            is_open = not any(item is None for item in items)
            rows.extend(item for item in items if isinstance(item, tuple))
            if rows and (time.monotonic() >= retry_at or not is_open):
                retry_at = 0.0 if self._write(rows) else time.monotonic() + RETRY_SECONDS
            while len(rows) > MAX_WAITING_ROWS:
                rows.popleft()
                self._dropped += 1
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
        if rows:
            logger.error("usage of %d requests is lost: the database could not be written", len(rows) + self._dropped)
        if self._connection is not None:
            self._connection.close()

    def _take(self, timeout: float | None) -> list[Row | threading.Event | None]:
        """Return all that waits; nothing at the timeout."""
        items = []
        with contextlib.suppress(queue.Empty):
            items.append(self._waiting.get(timeout=timeout))
            while True:
                items.append(self._waiting.get_nowait())
        return items

    def _write(self, rows: deque[Row]) -> bool:
        """Write rows and take them out of the deque; False: they have to wait."""
        try:
            with self._lock:
                if self._connection is None:
                    self._connection = self._connect()
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(_INSERT, rows)
                if self._path is None:
                    self._connection.execute(
                        "DELETE FROM requests WHERE rowid <= (SELECT MAX(rowid) FROM requests) - ?", (MAX_MEMORY_ROWS,)
                    )
                self._connection.execute("COMMIT")
        except (sqlite3.Error, UserError) as error:
            self._note(error)
            return False
        if self._errors:
            logger.warning("usage is written again: %d requests, %d were dropped", len(rows), self._dropped)
            self._errors.clear()
            self._dropped = 0
        rows.clear()
        return True

    def _note(self, error: Exception) -> None:
        """Log what is wrong, once, and begin anew with the file: a connection may be of no use after an error."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.rollback()
            if self._path is not None:
                self._connection.close()
                self._connection = None
        if str(error) not in self._errors:
            self._errors.add(str(error))
            logger.error("usage cannot be written to %s: %s; it is kept in memory and tried again", self._path, error)


def _describe(by: Period, row: Row) -> dict[str, Any]:
    key, slot, requests, *tokens, cost, high, low = row
    start = None if slot is None else datetime.fromtimestamp(slot, timezone.utc)
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    return {
        "key": key,
        "day": start and f"{start:%Y-%m-%d}",
        "hour": start and f"{start:%Y-%m-%dT%H:00:00Z}" if by == "hour" else None,
        "requests": requests,
        **{name: count or 0 for name, count in zip(names, tokens, strict=True)},
        "cost": cost,
        "flops": ((high or 0) << 32) + (low or 0),
    }
