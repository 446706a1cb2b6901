"""POST /v1/completions: OpenAI's continuation of texts, without the chat template."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from minimax_m1.engine import GenerationResult
from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams, TokenLogprob
from minimax_m1.server.answers import finish_reason, stop_reason, token_text
from minimax_m1.server.chat import StreamOptions
from minimax_m1.server.errors import ERROR_REPLIES, failed_event
from minimax_m1.server.replies import DONE, EventStream, JsonReply, encode_event, new_id, unless_left
from minimax_m1.server.requests import (
    SamplingFields,
    Structured,
    check_context,
    form_names,
    structured_output,
)
from minimax_m1.server.schemas import Completion
from minimax_m1.server.service import Caller, Exchange, Service, get_caller, get_service

router = APIRouter()

ROUTE = "/v1/completions"
DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    # fail_fast: or a list of a million ids would be a million errors as a list of texts
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[list[int]], Field(fail_fast=True)]
    ) = Field(description="a text, in which special tokens are special, or token ids; or several")
    max_tokens: int | None = Field(None, ge=0, description="16 if left out; 0 only with echo, to score a prompt")
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="give the prompt back in front of the text")
    response_format: dict[str, Any] | None = None
    structured_outputs: Structured | None = None
    return_token_ids: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            UserError: naming them.
        """
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options: cannot be used; accepted with stream: true")
        if self.stream and self.echo and self.logprobs is not None:
            raise UserError(
                "logprobs: cannot be streamed with echo; accepted without stream, or without one of the two"
            )
        if self.max_tokens == 0 and not self.echo:
            raise UserError("max_tokens: 0 cannot be used; accepted: a whole number of at least 1, or 0 with echo")

    @property
    def most_tokens(self) -> int:
        """The most tokens that the engine is to generate; of a prompt that is only scored, one that is dropped."""
        return max(1, DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens)

    @property
    def only_scores(self) -> bool:
        """Whether the prompt is all that is wanted."""
        return self.max_tokens == 0

    def params(self, service: Service) -> SamplingParams:
        """Return the parameters for the engine.

        Raises:
            UserError: a value that cannot be used.
        """
        return self.sampling(
            service,
            self.most_tokens,
            form_names(self.response_format),
            n=self.n,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            structured=structured_output(self.response_format, self.structured_outputs),
        )


@router.post(
    ROUTE,
    responses={**ERROR_REPLIES, 200: {"model": Completion, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def completions(
    body: CompletionRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Continue texts."""
    service.check_model(body.model)
    body.check()
    params = body.params(service)
    given = _prompts(body.prompt)
    service.check_outputs(params.n, len(given))
    prompts = [await service.encode(p) if isinstance(p, str) else p for p in given]
    for prompt in prompts:
        check_context(service, len(prompt), body.most_tokens, prompt_field="prompt")
    exchange = service.open(
        caller,
        ROUTE,
        prompts,
        params,
        body.routing(service),
        form_names(body.response_format),
        only_scores=body.only_scores,
    )
    if not body.stream:
        return JsonReply(await unless_left(request, lambda: _complete(exchange, body)))
    await exchange.__aenter__()
    return EventStream(_stream(exchange, body), exchange)


async def _complete(exchange: Exchange, body: CompletionRequest) -> dict[str, Any]:
    async with exchange:
        async for _ in exchange.gains():
            pass
        completion = _envelope(exchange.service)
        completion["choices"] = [_choice(exchange, body, i) for i in range(exchange.num_outputs)]
        completion["usage"] = exchange.usage_dict()
        if exchange.logs_routing:
            completion["routing"] = [exchange.routing_dict(i) for i in range(exchange.num_outputs)]
        return completion


async def _stream(exchange: Exchange, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    service, options = exchange.service, body.stream_options or StreamOptions()
    envelope = _envelope(service)
    usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
    offsets = [0] * exchange.num_outputs  # characters that log-probabilities have covered
    has_begun = [not body.echo] * exchange.num_outputs
    try:
        async for gains in exchange.gains():
            events = []
            for index, delta in gains:
                choice = _empty_choice(index)
                if not has_begun[index]:
                    has_begun[index] = True
                    events.append(
                        {**choice, "text": service.tokenizer.decode(exchange.prompts[index // exchange.params.n])}
                    )
                if not body.only_scores:
                    choice["text"] = delta.text
                    if body.logprobs is not None:
                        choice["logprobs"] = _logprobs(service, delta.token_ids, delta.logprobs, offsets[index])
                        offsets[index] += sum(map(len, choice["logprobs"]["tokens"]))
                    if body.return_token_ids:
                        choice["token_ids"] = delta.token_ids
                if delta.result is not None:
                    choice |= _end(delta.result)
                if delta.result is not None or delta.text or choice.get("token_ids") or choice["logprobs"]:
                    events.append(choice)
            if options.continuous_usage_stats:
                usage["usage"] = exchange.usage_dict()
            if events:
                yield b"".join(encode_event({**envelope, "choices": [choice], **usage}) for choice in events)
        if options.include_usage:
            last = {**envelope, "choices": [], "usage": exchange.usage_dict()}
            if exchange.logs_routing:
                last["routing"] = [exchange.routing_dict(i) for i in range(exchange.num_outputs)]
            yield encode_event(last)
        yield DONE
    except Exception as error:  # noqa: BLE001 - the status is out, so it becomes an event
        yield failed_event(error, ROUTE, exchange.caller.request_id) + DONE


def _prompts(prompt: str | Sequence[Any]) -> list[str | list[int]]:
    """Return the prompts one by one.

    Raises:
        UserError: there is none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UserError("prompt: is empty; accepted: a text or token ids, or several")
    return [[*prompt]] if isinstance(prompt[0], int) else [*prompt]


def _envelope(service: Service) -> dict[str, Any]:
    name = new_id("cmpl-")
    return {"id": name, "object": "text_completion", "created": int(time.time()), "model": service.model_name}


def _empty_choice(index: int) -> dict[str, Any]:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}


def _end(result: GenerationResult) -> dict[str, Any]:
    return {"finish_reason": finish_reason(result.finish_reason), "stop_reason": stop_reason(result)}


def _choice(exchange: Exchange, body: CompletionRequest, index: int) -> dict[str, Any]:
    result = exchange.results[index]
    choice = _empty_choice(index) | _end(result)
    ids: list[int] = []  # of the text that goes out
    found: list[TokenLogprob | None] = []
    if body.echo:
        choice["text"] = exchange.service.tokenizer.decode(result.prompt_ids)
        ids += result.prompt_ids
        found += result.prompt_logprobs or []
    if body.only_scores:
        choice |= {"finish_reason": "length", "stop_reason": None}
    else:
        choice["text"] += result.text
        ids += result.token_ids
        found += result.logprobs or []
    if body.logprobs is not None:
        choice["logprobs"] = _logprobs(exchange.service, ids, found)
    if body.return_token_ids:
        choice |= {"prompt_token_ids": result.prompt_ids, "token_ids": [] if body.only_scores else result.token_ids}
    return choice


def _logprobs(
    service: Service, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], offset: int = 0
) -> dict[str, Any]:
    """Return the log-probabilities of tokens in OpenAI's old form, `offset` characters into the text."""
    tokens = [token_text(service, token) for token in ids]
    ends = itertools.accumulate(map(len, tokens), initial=offset)
    return {
        "tokens": tokens,
        "token_logprobs": [None if found is None else found.logprob for found in logprobs],
        "top_logprobs": [
            None if found is None else {token_text(service, token): value for token, value in found.top}
            for found in logprobs
        ],
        "text_offset": list(ends)[:-1],
    }
