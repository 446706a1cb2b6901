"""What all routes share: `Service`, the engine with accounts and metrics; and `Exchange`, one request through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from fastapi import Request

from minimax_m1 import accounting
from minimax_m1.engine import AsyncEngine, Delta, Engine, GenerationResult
from minimax_m1.engine.async_engine import DeltaStream
from minimax_m1.engine.outputs import joined
from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams
from minimax_m1.server.accounts import Accounts, Admission, Key, Used
from minimax_m1.server.errors import ApiError, nearest, renamed
from minimax_m1.server.metrics import Metrics, Timeline
from minimax_m1.server.response_store import ResponseStore
from minimax_m1.settings import ServeSettings
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

# Between two events of one stream, but for its end: tokens that come faster share one. Fifty a second are more than an
# eye can follow, and a small model makes several hundred, each of which would cost as much to send as to compute.
EVENT_SECONDS = 0.02
LONG_TEXT = 20_000  # characters; longer ones are tokenized in another thread, for the event loop is everybody's

RoutingDetail = bool | Literal["tokens"]  # what the engine is to record of a request
DEFAULT_TOP_P = 0.95  # where a request says nothing: M1's authors' recommendation


@dataclass
class Caller:
    """Who sent an HTTP request; `log` gathers what its line in the access log is to say."""

    key: Key
    request_id: str
    log: dict[str, Any] = field(default_factory=dict)


class Service:
    """The model with everything around it. Belongs to the event loop, but for what `AsyncEngine` runs in its thread."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        settings: ServeSettings,
        accounts: Accounts,
        *,
        is_shipped: bool = False,
    ) -> None:
        """Start the engine's thread.

        Args:
            engine: made with a tokenizer, and with `routing_log` for the metrics of experts.
            model_name: the model's id for clients.
            settings: as given to `minimax-m1 serve`.
            accounts: keys, prices and usage; closed by `close`.
            is_shipped: whether it is the model that ships with the package, whose abilities are known.
        """
        self.engine, self.model_name, self.settings, self.accounts = engine, model_name, settings, accounts
        self.is_shipped = is_shipped
        self.tokenizer: MiniMaxM1Tokenizer = engine.needs_tokenizer("model")
        self.metrics = Metrics(engine, model_name)
        self.async_engine = AsyncEngine(engine)
        self.created = int(time.time())
        self.draining = False
        self.failed = False  # the engine ended by itself
        self.exchanges: set[Exchange] = set()  # with the engine now
        self.responses = ResponseStore()

    @property
    def max_outputs(self) -> int:
        """Outputs that may run or wait at once."""
        return self.engine.plan.num_slots + self.settings.max_queue_size

    @property
    def num_outputs(self) -> int:
        """Outputs that run or wait now."""
        return sum(exchange.num_outputs for exchange in self.exchanges)

    @property
    def default_temperature(self) -> float:
        """Where a request says nothing: greedy for the shipped model, the authors' recommendation for others."""
        return 0.0 if self.is_shipped else 1.0

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served; None means the one that is.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"model: {name!r} is not served here; accepted: {self.model_name}{nearest(name, [self.model_name])}",
                param="model",
                code="model_not_found",
            )

    def check_outputs(self, n: int, num_prompts: int) -> None:
        """Refuse more outputs than this server can hold, before anything is made for them.

        Raises:
            UserError: naming the field.
        """
        if n * num_prompts > self.max_outputs:
            field = "n" if n > 1 else "prompt"
            raise UserError(
                f"{field}: makes {n * num_prompts} outputs, which are too many; accepted: up to {self.max_outputs} here"
            )

    def check_length(self, num_chars: int, field: str) -> None:
        """Refuse a text that cannot fit into the context however its tokens fall, before it is tokenized.

        Raises:
            ApiError: 400, with OpenAI's code for it.
        """
        most = self.engine.max_model_len * self.tokenizer.longest_token_bytes
        if num_chars > most:
            raise ApiError(
                400,
                f"{field}: {num_chars} characters are too many for a context of {self.engine.max_model_len} tokens",
                param=field,
                code="context_length_exceeded",
            )

    async def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the ids of a conversation through the chat template; special tokens in its texts are texts.

        Raises:
            UserError: messages or tools that the template cannot take.
        """

        def render() -> list[int]:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )

        size = sum(map(_num_chars, messages)) + _num_chars(tools)
        self.check_length(size, "messages")
        return await asyncio.to_thread(render) if size > LONG_TEXT else render()

    async def encode(self, text: str, field: str = "prompt") -> list[int]:
        """Return the ids of a text in which special tokens are special; `field` is the client's name of it.

        Raises:
            ApiError: it cannot fit into the context.
        """
        self.check_length(len(text), field)
        if len(text) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text)
        return self.tokenizer.encode(text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return what each token adds to the text; one that ends within a character adds nothing yet."""
        decoder = self.tokenizer.stream_decoder()
        return [decoder.push(token) for token in ids]

    def open(
        self,
        caller: Caller,
        route: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        routing_log: RoutingDetail = False,
        names: Mapping[str, str] | None = None,
        *,
        only_scores: bool = False,
    ) -> Exchange:
        """Return the exchange of a request, to be entered with `async with`.

        Args:
            route: its path, for the books.
            prompts: ids of each.
            params: for all of them.
            routing_log: see `Engine.add`.
            names: our fields' names -> the client's, for messages.
            only_scores: the prompts are all that is wanted; what the engine has to add to them costs nothing.

        Raises:
            UserError: more outputs than this server can hold.
        """
        self.check_outputs(params.n, len(prompts))
        return Exchange(self, caller, route, prompts, params, routing_log, names or {}, only_scores)

    async def drain(self, seconds: float, is_urgent: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests; give those in flight some time, or until it is urgent, then abort them."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.exchanges and time.monotonic() < end and not is_urgent():
            await asyncio.sleep(0.05)
        for exchange in list(self.exchanges):
            exchange.abort()
        end = time.monotonic() + 1
        while self.exchanges and time.monotonic() < end:  # they tell their clients
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """End the engine's thread and write the last usage."""
        await self.async_engine.close()
        await asyncio.to_thread(self.accounts.close)


class Exchange:
    """One HTTP request's outputs, from admission to booking. Prompt p's sample s is choice p * n + s.

    async with service.open(...) as exchange:      # ApiError 503, QuotaExceeded, UserError: nothing has run
        async for gains in exchange.gains():       # what has come since the last time: (choice, Delta) pairs
            ...
        exchange.usage_dict()
    """

    def __init__(
        self,
        service: Service,
        caller: Caller,
        route: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        routing_log: RoutingDetail,
        names: Mapping[str, str],
        only_scores: bool,
    ) -> None:
        self.service, self.caller, self.route = service, caller, route
        self.prompts, self.params = prompts, params
        self.results: dict[int, GenerationResult] = {}  # by choice, as they end
        self.num_outputs = params.n * len(prompts)
        self._routing_log, self._names, self._only_scores = routing_log, names, only_scores
        self._num_tokens = [0] * self.num_outputs
        self._started = time.monotonic()
        self._admission: Admission | None = None
        self._stream: DeltaStream | None = None
        self._timelines: list[Timeline] = []
        self._aborted = False

    async def __aenter__(self) -> Exchange:
        try:
            if self.params.structured is not None or self.params.forced_tools:
                prepare = self.service.engine.prepare
                await asyncio.to_thread(prepare, self.params)  # or all would wait for a large grammar
            await self._begin()
        except UserError as error:
            raise renamed(error, self._names) from None
        return self

    async def _begin(self) -> None:
        self._check_room()  # with nothing awaited before the exchange is among those that take room
        service = self.service
        self._admission = service.accounts.admit(self.caller.key, sum(map(len, self.prompts)))
        service.exchanges.add(self)
        self._timelines = [service.metrics.begin(len(prompt)) for prompt in self.prompts]
        try:
            self._stream = await service.async_engine.add(self.prompts, self.params, routing_log=self._routing_log)
        except BaseException:
            self._end("error")
            raise

    def _check_room(self) -> None:
        service = self.service
        if service.async_engine.error is not None:
            raise ApiError(503, "the engine has stopped; the server is about to end")
        if service.draining:
            raise ApiError(
                503, "the server is about to stop", retry_after=max(1, round(service.settings.drain_seconds))
            )
        if service.num_outputs + self.num_outputs > service.max_outputs:
            raise ApiError(503, f"{service.num_outputs} outputs run or wait already; come again later", retry_after=1)

    async def gains(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Yield what the outputs have gained, as (choice, delta) pairs, until every one has its result.

        Raises:
            ApiError: the server aborted the request, as it is about to stop.
        """
        assert self._stream is not None
        places = {name: i for i, name in enumerate(self._stream.request_ids)}
        pause = 0.0
        while deltas := await self._stream.take(pause):
            taken = time.monotonic()
            gains: dict[int, Delta] = {}
            for delta in deltas:
                prompt = places[delta.request_id]
                choice = prompt * self.params.n + delta.index
                self._count(prompt, choice, delta)
                gains[choice] = joined(gains[choice], delta) if choice in gains else delta
            yield list(gains.items())
            pause = taken + EVENT_SECONDS - time.monotonic()
            if self._aborted:
                raise ApiError(503, "the server had to stop before this was complete", code="aborted")

    def _count(self, prompt: int, choice: int, delta: Delta) -> None:
        timeline = self._timelines[prompt]
        if delta.token_ids:
            timeline.tokens(delta.index, len(delta.token_ids), delta.time)
            self._num_tokens[choice] += 0 if self._only_scores else len(delta.token_ids)
        if delta.result is not None:
            self.results[choice] = delta.result
            usage = delta.result.usage
            timeline.finish(
                delta.result.finish_reason, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
            )

    def abort(self) -> None:
        """End the outputs now; `gains` raises behind what has come."""
        self._aborted = True
        if self._stream is not None:
            self._stream.abort()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if len(self.results) < self.num_outputs:
            reason = "abort"
        else:
            reason = max(result.finish_reason for result in self.results.values())
        assert self._stream is not None
        left = self._stream.unfinished > 0
        await self._stream.aclose()
        if left:
            for timeline in self._timelines:
                timeline.leave()
        self._end(reason)

    def _end(self, reason: str) -> None:
        """Book what ran. The caller sees it in the access log."""
        self.service.exchanges.discard(self)
        used = None if self._stream is None else self.used()
        assert self._admission is not None
        seconds = time.monotonic() - self._started
        self._admission.settle(
            used, request_id=self.caller.request_id, route=self.route, seconds=seconds, finish_reason=reason
        )
        if used is not None:
            self.caller.log |= {
                "prompt_tokens": used.prompt_tokens,
                "cached_tokens": used.cached_tokens,
                "completion_tokens": used.completion_tokens,
                "finish_reason": reason,
            }

    @property
    def logs_routing(self) -> bool:
        """Whether its answers are to say which experts they went to."""
        return self._routing_log is not False

    # -- what it cost -----------------------------------------------------------------------------------------------

    def used(self) -> Used:
        """Return the tokens so far, with their FLOPs and price. A prompt counts once, however many its samples."""
        config, n = self.service.engine.model.config, self.params.n
        prompt_tokens = cached_tokens = reasoning_tokens = flops = 0
        cost = 0.0
        for i, prompt in enumerate(self.prompts):
            results = [self.results[c] for c in range(i * n, (i + 1) * n) if c in self.results]
            cached = results[0].usage.cached_tokens if results else 0
            outputs = self._num_tokens[i * n : (i + 1) * n]
            prompt_tokens += len(prompt)
            cached_tokens += cached
            reasoning_tokens += 0 if self._only_scores else sum(result.usage.reasoning_tokens for result in results)
            cost += self.service.accounts.prices.cost(len(prompt), cached, sum(outputs))
            flops += accounting.prefill_flops(config, len(prompt) - cached, past_len=cached)
            # the first token comes from the prompt's own run, and the last one is never run
            flops += sum(accounting.generation_flops(config, max(0, k - 1), prompt_len=len(prompt)) for k in outputs)
        return Used(
            prompt_tokens=prompt_tokens,
            completion_tokens=sum(self._num_tokens),
            cached_tokens=cached_tokens,
            reasoning_tokens=reasoning_tokens,
            flops=flops,
            cost=cost,
        )

    def usage_dict(self) -> dict[str, Any]:
        """Return `usage` as OpenAI's API has it, with our `cost` and `flops`."""
        used = self.used()
        return {
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
            "cost": used.cost,
            "flops": used.flops,
        }

    def routing_dict(self, choice: int) -> dict[str, Any]:
        """Return the routing log of a choice that has ended; with "tokens", each output token's experts by layer.

        The last token is left out: nothing came after it, so it never went through the network.
        """
        result = self.results[choice]
        assert result.routing is not None
        log = result.routing.to_dict()
        rows = log.pop("token_expert_ids", None)
        if rows is not None:
            ids = result.token_ids[:-1]
            texts = self.service.token_texts(ids)
            experts = rows[len(rows) - len(ids) :]
            log["tokens"] = [{"text": text, "experts": row} for text, row in zip(texts, experts, strict=True)]
        return log


def _num_chars(value: Any) -> int:
    """Return the characters of all texts in lists and dicts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_chars, value.values()))
    return sum(map(_num_chars, value)) if isinstance(value, list) else 0


# Dependencies that are not async would each run in another thread.


async def get_service(request: Request) -> Service:
    """Return the service that an app was made for (a FastAPI dependency)."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def get_caller(request: Request) -> Caller:
    """Return who sent a request (a FastAPI dependency); `gate.Gate` has found it out."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


async def get_key(request: Request) -> Key:
    """Return the key that a request came with (a FastAPI dependency)."""
    return (await get_caller(request)).key
