"""Bodies of responses: JSON, and streams of server-sent events whose work ends when the client leaves."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
SEND_SECONDS = 60.0  # that a client may let a stream wait before it counts as gone
DONE = b"data: [DONE]\n\n"  # the end of a stream in OpenAI's API


def new_id(prefix: str) -> str:
    """Return a new id, such as chatcmpl-1f0c… for the prefix chatcmpl-."""
    return prefix + secrets.token_hex(12)


def encode_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8. Half of a surrogate pair, which UTF-8 cannot write, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def encode_event(value: Any, name: str | None = None) -> bytes:
    """Return a value as one server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + encode_json(value) + b"\n\n"


class JsonReply(Response):
    """A body of JSON."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode_json(content), status, headers)


class ClientLeftError(Exception):
    """The client closed its connection before the response was complete."""


async def unless_left(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Do the work of a response; stop it when the client leaves.

    Raises:
        ClientLeftError: the client left. Otherwise what the work raises.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            try:
                outcome.append(await work())
            except Exception as error:  # noqa: BLE001 - raised below, out of the group that would wrap it
                failure.append(error)
            group.cancel_scope.cancel()

        group.start_soon(run)
        await _wait_for_leaving(request.receive)
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    if not outcome:
        raise ClientLeftError
    return outcome[0]


class EventStream(Response):
    """Server-sent events as they come; what makes them ends when the client leaves.

    Errors are the business of the events: once the first is out, the status cannot be taken back.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], context: AbstractAsyncContextManager[Any]) -> None:
        """Take the events, and the context that they need: it has been entered, and is left here."""
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._context = events, context
        self._waits_since: float | None = None  # for the client to take an event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with anyio.create_task_group() as group:
                group.start_soon(self._send_all, send, group.cancel_scope)
                group.start_soon(self._watch, group.cancel_scope)
                await _wait_for_leaving(receive)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._context.__aexit__(None, None, None)

    async def _send_all(self, send: Send, scope: anyio.CancelScope) -> None:
        async for events in self._events:
            self._waits_since = anyio.current_time()
            await send({"type": "http.response.body", "body": events, "more_body": True})
            self._waits_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        scope.cancel()

    async def _watch(self, scope: anyio.CancelScope) -> None:
        """Give up a client that has taken nothing for so long; cheaper than a time limit on every event."""
        while self._waits_since is None or anyio.current_time() < self._waits_since + SEND_SECONDS:
            await anyio.sleep(SEND_SECONDS / 4)
        scope.cancel()


async def _wait_for_leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
