"""Responses that are kept for GET, cancel and previous_response_id: in memory, the oldest go first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minimax_m1.server.errors import ApiError

MOST_RESPONSES = 10_000
MOST_BYTES = 256 << 20  # as JSON


@dataclass
class StoredResponse:
    """A response, and what it was made from."""

    owner: str  # the name of the key that made it
    body: dict[str, Any]  # as GET gives it; while it runs, as it stands
    items: Sequence[dict[str, Any]]  # its input, what came before it included
    num_bytes: int = 0  # of the items and the body
    abort: Callable[[], None] | None = None  # while it runs in the background
    task: asyncio.Task[None] | None = None  # that makes it there

    @property
    def is_running(self) -> bool:
        """Whether it is being made in the background."""
        return self.task is not None and not self.task.done()


class ResponseStore:
    """Bounded in number and in bytes. Belongs to the event loop."""

    def __init__(self, most_responses: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._most_responses, self._most_bytes = most_responses, most_bytes
        self._responses: dict[str, StoredResponse] = {}  # the oldest first
        self._num_bytes = 0

    def put(self, response: StoredResponse, num_bytes: int) -> None:
        """Keep a response, or what has become of one; the oldest that do not run go, until all are within bounds."""
        self.remove(response.body["id"])
        response.num_bytes = num_bytes
        self._responses[response.body["id"]] = response
        self._num_bytes += response.num_bytes
        while self._is_full:
            oldest = next((name for name, other in self._responses.items() if not other.is_running), None)
            if oldest is None:
                break
            self.remove(oldest)

    def get(self, name: str, owner: str) -> StoredResponse:
        """Return a response to the key that made it.

        Raises:
            ApiError: 404; another key's is not told from one that never was.
        """
        response = self._responses.get(name)
        if response is None or response.owner != owner:
            raise ApiError(
                404,
                f"response_id: there is no response {name!r}; it may have gone to make room for others",
                param="response_id",
            )
        return response

    def remove(self, name: str) -> None:
        """Forget a response, if it is there."""
        response = self._responses.pop(name, None)
        if response is not None:
            self._num_bytes -= response.num_bytes

    @property
    def _is_full(self) -> bool:
        return len(self._responses) > self._most_responses or self._num_bytes > self._most_bytes
