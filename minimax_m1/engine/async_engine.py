"""AsyncEngine: the engine in a thread of its own, for servers; the event loop never waits for the network."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

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
        self._streams: dict[str, DeltaStream] = {}  # by request
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """What ended the engine's thread; None: it runs."""
        return self._error

    async def add(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        routing_log: bool | Literal["tokens"] | None = None,
    ) -> DeltaStream:
        """Queue prompts, all or none of them; return the stream of what their outputs gain. Close it in the end.

        Raises:
            UserError: what `Engine.add` raises for any of them; or the engine was closed.
        """
        stream = DeltaStream(self, asyncio.get_running_loop())

        def add() -> None:
            try:
                for prompt in prompts:
                    name = self._engine.add(prompt, params, routing_log=routing_log)
                    stream.request_ids.append(name)
                    stream.unfinished += self._engine.num_unfinished(name)
                    self._streams[name] = stream
            except UserError:
                self._forget(stream)
                raise

        try:
            await self.call(add)
        except asyncio.CancelledError:  # it may be running already
            await stream.aclose()
            raise
        return stream

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        routing_log: bool | Literal["tokens"] | None = None,
    ) -> AsyncIterator[Delta]:
        """Continue a prompt; yield what each step adds, for all n samples in turn, until every one has its result.

        Who stops iterating aborts the request: its slots and pages are free before the next step.

        Raises:
            UserError: what `Engine.add` raises; or the engine was closed.
        """
        stream = await self.add([prompt], params, routing_log=routing_log)
        try:
            while deltas := await stream.take():
                for delta in deltas:
                    yield delta
        finally:
            await stream.aclose()

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

    # -- in the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_calls(wait=not self._engine.has_work()):
                self._hand_out(self._engine.step())
            self._error = UserError("engine: was closed")
        except BaseException as error:  # noqa: BLE001 - every waiting request has to hear of it
            self._error = error
        for stream in set(self._streams.values()):
            self._wake({stream: self._error})
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call()

    def _hand_out(self, deltas: list[Delta]) -> None:
        """Give each stream what this step brought it, waking its event loop once."""
        gains: dict[DeltaStream, list[Delta] | BaseException] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                gain = gains.setdefault(stream, [])
                assert isinstance(gain, list)
                gain.append(delta)
        for loop in {stream.loop for stream in gains}:
            self._wake({stream: gain for stream, gain in gains.items() if stream.loop is loop})

    def _wake(self, gains: Mapping[DeltaStream, list[Delta] | BaseException]) -> None:
        """Put gains into the streams of one event loop."""

        def put() -> None:
            for stream, gain in gains.items():
                stream.put(gain)

        try:
            next(iter(gains)).loop.call_soon_threadsafe(put)
        except RuntimeError:  # that loop has been closed, so nobody listens
            for stream in gains:
                self._forget(stream)

    def _forget(self, stream: DeltaStream) -> None:
        for name in stream.request_ids:
            self._streams.pop(name, None)
        self._abort(stream)

    def _abort(self, stream: DeltaStream) -> None:
        for name in stream.request_ids:
            if self._engine.num_unfinished(name):
                self._engine.abort(name)

    def _take_calls(self, wait: bool) -> bool:
        """Run what was asked for; False: the engine is to end."""
        while wait or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            call()
            wait = False
        return True


class DeltaStream:
    """What the outputs of some requests gain, step by step. Belongs to the event loop that `AsyncEngine.add` ran in."""

    def __init__(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self.loop = loop
        self.request_ids: list[str] = []  # in the order of the prompts
        self.unfinished = 0  # outputs whose result has not been taken
        self._deltas: list[Delta] = []  # that have come and have not been taken
        self._error: BaseException | None = None  # what ended the engine
        self._num_ended = 0  # outputs whose result has come
        self._is_gathering = False  # and nobody is to be woken before the end
        self._wakes = asyncio.Event()

    def put(self, gain: list[Delta] | BaseException) -> None:
        """Take in what a step brought, or why there will be no more; called in the event loop."""
        if isinstance(gain, BaseException):
            self._error = gain
        else:
            self._deltas += gain
            self._num_ended += sum(delta.result is not None for delta in gain)
        if not self._is_gathering or self._error is not None or self._num_ended == self.unfinished:
            self._wakes.set()

    def _stop_gathering(self) -> None:
        self._is_gathering = False
        if self._deltas:
            self._wakes.set()

    async def take(self, pause: float = 0.0) -> list[Delta]:
        """Wait for the next deltas and return all that have come; an empty list once every output has its result.

        Args:
            pause: seconds to let deltas gather before, unless the last output ends meanwhile.

        Raises:
            UserError: the engine was closed. Other errors are those that ended it.
        """
        if not self.unfinished:
            return []
        if pause > 0 and self._error is None and self._num_ended < self.unfinished:
            self._is_gathering = True
            self._wakes.clear()
            self.loop.call_later(pause, self._stop_gathering)
        await self._wakes.wait()
        self._wakes.clear()
        deltas, self._deltas = self._deltas, []
        if self._error is not None:
            self._wakes.set()  # for whoever asks again
            if not deltas:
                raise self._error
        num_ended = sum(delta.result is not None for delta in deltas)
        self.unfinished -= num_ended
        self._num_ended -= num_ended
        return deltas

    def abort(self) -> None:
        """End the outputs now; their results, with finish_reason "abort", still come."""
        if self._engine.error is None:
            self._engine._post(lambda: self._engine._abort(self))

    async def aclose(self) -> None:
        """Abort what has not ended: its slots and pages are free before the next step."""
        if self._engine.error is None:
            self._engine._post(lambda: self._engine._forget(self))
