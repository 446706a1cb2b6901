"""POST /v1/minimax-m1/generate: text in, text out, with the usage and the routing log of the request."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from minimax_m1.errors import UserError
from minimax_m1.server.answers import Answer, answer_gains, finish_reason
from minimax_m1.server.errors import ERROR_REPLIES, failed_event
from minimax_m1.server.replies import DONE, EventStream, JsonReply, encode_event, new_id, unless_left
from minimax_m1.server.requests import SamplingFields
from minimax_m1.server.schemas import Generated
from minimax_m1.server.service import Caller, Exchange, Service, get_caller, get_service

router = APIRouter()

ROUTE = "/v1/minimax-m1/generate"


class GenerateRequest(SamplingFields):
    """The body of POST /v1/minimax-m1/generate."""

    input: str = Field(description="what to say to the model")
    max_output_tokens: int | None = Field(
        None, ge=1, description="thinking included; what the context leaves if absent"
    )
    context_window: int | None = Field(None, ge=2, description="most tokens of input and output together")
    raw: bool | None = Field(None, description="continue the input as it is, without the chat template")
    stream: bool | None = None

    def most_tokens(self, service: Service, prompt_len: int) -> int:
        """Return how many tokens the output may have behind a prompt of so many.

        Raises:
            UserError: the window is larger than this server's, or the input does not fit into it.
        """
        most = service.engine.max_model_len
        window = most if self.context_window is None else self.context_window
        if window > most:
            raise UserError(f"context_window: {window} cannot be used; accepted: up to {most}, this server's own")
        if prompt_len >= window:
            raise UserError(f"input: {prompt_len} tokens are too many; accepted: up to {window - 1}, within the window")
        return min(window - prompt_len, self.max_output_tokens or window)


@router.post(
    ROUTE,
    responses={**ERROR_REPLIES, 200: {"model": Generated, "content": {"text/event-stream": {}}}},
    tags=["MiniMax-M1"],
)
async def generate(
    body: GenerateRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Answer one input."""
    service.check_model(body.model)
    if body.raw:
        prompt = await service.encode(body.input, "input")
    else:
        prompt = await service.chat_prompt([{"role": "user", "content": body.input}])
    max_tokens = body.most_tokens(service, len(prompt))
    names = {"max_new_tokens": "max_output_tokens", "prompt": "input"}
    params = body.sampling(service, max_tokens, names)
    exchange = service.open(caller, ROUTE, [prompt], params, body.routing(service) or True, names)
    if not body.stream:
        return JsonReply(await unless_left(request, lambda: _complete(exchange)))
    await exchange.__aenter__()
    return EventStream(_stream(exchange), exchange)


async def _complete(exchange: Exchange) -> dict[str, Any]:
    answer = Answer()
    async with exchange:
        async for _ in answer_gains(exchange, [answer], has_tools=False):
            pass
        return _generated(exchange, answer)


async def _stream(exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """Yield {"reasoning": …} and {"output": …} pieces, and the whole body at the end."""
    answer = Answer()
    try:
        async for gains in answer_gains(exchange, [answer], has_tools=False):
            for event in (event for gain in gains for event in gain.events):
                yield encode_event({"output" if event.kind == "content" else "reasoning": event.text})
        yield encode_event(_generated(exchange, answer))
        yield DONE
    except Exception as error:  # noqa: BLE001 - the status is out, so it becomes an event
        yield failed_event(error, ROUTE, exchange.caller.request_id) + DONE


def _generated(exchange: Exchange, answer: Answer) -> dict[str, Any]:
    assert answer.result is not None
    return {
        "id": new_id("gen-"),
        "object": "minimax_m1.generation",
        "created": int(time.time()),
        "model": exchange.service.model_name,
        "output": answer.content,
        "reasoning": answer.reasoning,
        "finish_reason": finish_reason(answer.result.finish_reason),
        "usage": exchange.usage_dict(),
        "routing": exchange.routing_dict(0),
    }
