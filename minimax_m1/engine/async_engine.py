"""AsyncEngine: the engine in a thread of its own, for servers; the event loop never waits for the network."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from minimax_m1.engine.engine import Engine
from minimax_m1.engine.outputs import Delta
from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams

T = TypeVar("T")


class AsyncEngine:
    """Runs `engine.step` in a thread while there is work; only that thread touches the engine.

    Usable from any event loop, and from several. `close` it, or use it as an async context manager.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Callable[[Delta | BaseException], None]] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        request_id: str | None = None,
        routing_log: bool | None = None,
    ) -> AsyncIterator[Delta]:
        """Continue a prompt; yield what each step adds, for all n samples in turn, until every one has its result.

        Who stops iterating aborts the request: its slots and pages are free before the next step.

        Raises:
            UserError: what `Engine.add` raises; or the engine was closed.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def listen(delta: Delta | BaseException) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        def add() -> tuple[str, int]:
            name = self._engine.add(prompt, params, request_id=request_id, routing_log=routing_log)
            self._listeners[name] = listen
            return name, self._engine.num_unfinished(name)

        name, unfinished = await self.call(add)
        try:
            while unfinished:
                delta = await deltas.get()
                if isinstance(delta, BaseException):
                    raise delta
                unfinished -= delta.result is not None
                yield delta
        finally:
            if self._error is None:
                self._post(lambda: self._forget(name))

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps, and return what it returns.

        Raises:
            UserError: the engine was closed.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
                    future.set_exception(error)

        self._post(run)
        return await asyncio.wrap_future(future)

    async def close(self) -> None:
        """End the thread after the step that is running; unfinished requests raise UserError."""
        self._calls.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _post(self, call: Callable[[], None]) -> None:
        if self._error is not None:
            raise UserError(f"engine: has stopped: {self._error}")
        self._calls.put(call)

    def _forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)
        if self._engine.num_unfinished(request_id):
            self._engine.abort(request_id)

    # -- in the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_calls(wait=not self._engine.has_work()):
                for delta in self._engine.step():
                    listener = self._listeners.get(delta.request_id)
                    if listener is not None:
                        listener(delta)
            self._error = UserError("engine: was closed")
        except BaseException as error:  # noqa: BLE001 - every waiting request has to hear of it
            self._error = error
        for listener in self._listeners.values():
            listener(self._error)
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call()

    def _take_calls(self, wait: bool) -> bool:
        """Run what was asked for; False: the engine is to end."""
        while wait or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            call()
            wait = False
        return True
