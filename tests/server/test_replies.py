"""Streams end with their clients, and with clients that take nothing."""

import asyncio
import contextlib

import pytest

from minimax_m1.server import replies
from minimax_m1.server.replies import EventStream

SCOPE = {"type": "http"}


class Context(contextlib.AbstractAsyncContextManager):
    """Counts how often it is left."""

    def __init__(self) -> None:
        self.left = 0

    async def __aexit__(self, *_: object) -> None:
        self.left += 1


async def endless():
    while True:
        yield b"data: 1\n\n"
        await asyncio.sleep(0)


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    raise AssertionError


def run(receive, send) -> Context:
    """Serve an endless stream; it has to end by itself."""
    context = Context()

    async def main() -> None:
        await asyncio.wait_for(EventStream(endless(), context)(SCOPE, receive, send), 10)

    asyncio.run(main())
    return context


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "SEND_SECONDS", 0.2)
    sent = []

    async def send(message) -> None:
        sent.append(message)
        if len(sent) == 4:
            await never()

    assert run(never, send).left == 1 and len(sent) == 4


def test_a_client_that_takes_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "SEND_SECONDS", 0.2)
    leaves = asyncio.Event()
    num_sent = 0

    async def send(message) -> None:
        nonlocal num_sent
        await asyncio.sleep(0.1)
        num_sent += 1
        if num_sent == 8:
            leaves.set()

    async def receive() -> dict[str, str]:
        await leaves.wait()
        return {"type": "http.disconnect"}

    assert run(receive, send).left == 1 and num_sent >= 8


def test_a_client_that_leaves_before_the_first_event() -> None:
    async def send(message) -> None:
        await asyncio.sleep(0)

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    assert run(receive, send).left == 1
