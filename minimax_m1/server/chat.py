"""POST /v1/chat/completions: OpenAI's chat, with thinking, tools, forms and log-probabilities."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams
from minimax_m1.server.answers import Answer, Gain, answer_gains, chat_logprobs, stop_reason
from minimax_m1.server.errors import ERROR_REPLIES, failed_event
from minimax_m1.server.replies import DONE, EventStream, JsonReply, encode_event, new_id, unless_left
from minimax_m1.server.requests import (
    Body,
    SamplingFields,
    Structured,
    check_context,
    form_names,
    structured_output,
)
from minimax_m1.server.schemas import ChatCompletion
from minimax_m1.server.service import Caller, Exchange, Service, get_caller, get_service

router = APIRouter()

ROUTE = "/v1/chat/completions"


# For /openapi.json; `tokenizer.chat_template` checks the messages.
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                ],
                "description": "null, or absent, in an assistant's message that calls tools",
            },
            "reasoning_content": {"type": "string", "description": "of the assistant; also as reasoning"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string", "description": "of a tool's message: the call that it answers"},
            "name": {"type": "string"},
        },
    },
}


class StreamOptions(Body):
    """What a stream carries beside the text."""

    inside = "stream_options."

    include_usage: bool | None = Field(default=None, description="a last chunk with the usage and no choices")
    continuous_usage_stats: bool | None = Field(default=None, description="the usage so far in every chunk")
    include_obfuscation: Literal[False] | None = None


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions. Field by field in docs/server.md."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(MESSAGES_SCHEMA)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="of the output, thinking included")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same; give one of the two")
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = Field(None, description="none, auto, required, or a tool")
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema")
    structured_outputs: Structured | None = None
    include_reasoning: bool | None = Field(None, description="false leaves the thinking out of the answer")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="let the model go on with the last message")
    return_token_ids: bool | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the output, None for what the context leaves."""
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise UserError("max_tokens, max_completion_tokens: say different things; accepted: one of them")
        return next(iter(given), None)

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            UserError: naming them.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError(f"top_logprobs: {self.top_logprobs} cannot be used; accepted with logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options: cannot be used; accepted with stream: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise UserError("continue_final_message: cannot be used with add_generation_prompt; accepted: one of them")
        if self.tools and self.tool_choice != "none" and self.form is not None:
            raise UserError("response_format: cannot be used with tools; accepted: one of them, or tool_choice: none")

    @property
    def form(self) -> Any:
        """The form that the content must have, None for free text."""
        return structured_output(self.response_format, self.structured_outputs)

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model sees: with tool_choice "none" it sees none, and so calls none."""
        return [] if self.tool_choice == "none" else self.tools or []

    def params(self, service: Service) -> SamplingParams:
        """Return the parameters for the engine.

        Raises:
            UserError: a value that cannot be used.
        """
        tools = self.shown_tools
        return self.sampling(
            service,
            self.most_tokens,
            form_names(self.response_format),
            n=self.n,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            structured=self.form,
            tools=tools or None,
            tool_choice=_tool_choice(self.tool_choice) if tools or self.tool_choice not in (None, "none") else None,
            parallel_tool_calls=self.parallel_tool_calls,
        )


@router.post(
    ROUTE,
    responses={**ERROR_REPLIES, 200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def chat_completions(
    body: ChatRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    body.check()
    params = body.params(service)
    prompt = await service.chat_prompt(
        body.messages,
        body.shown_tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
    )
    check_context(service, len(prompt), body.most_tokens)
    exchange = service.open(caller, ROUTE, [prompt], params, body.routing(service), form_names(body.response_format))
    if not body.stream:
        return JsonReply(await unless_left(request, lambda: _complete(exchange, body)))
    await exchange.__aenter__()  # before the first byte goes out, for then the status is fixed
    return EventStream(_stream(exchange, body), exchange)


async def _complete(exchange: Exchange, body: ChatRequest) -> dict[str, Any]:
    answers = [Answer() for _ in range(exchange.num_outputs)]
    async with exchange:
        async for _ in _gains(exchange, answers, body):
            pass
        completion = _envelope(exchange.service, "chat.completion")
        completion["choices"] = [_choice(exchange, body, i, answer) for i, answer in enumerate(answers)]
        completion["usage"] = exchange.usage_dict()
        if body.return_token_ids:
            completion["prompt_token_ids"] = exchange.prompts[0]
        if exchange.logs_routing:
            completion["routing"] = [exchange.routing_dict(i) for i in range(len(answers))]
        return completion


async def _stream(exchange: Exchange, body: ChatRequest) -> AsyncGenerator[bytes, None]:
    options = body.stream_options or StreamOptions()
    answers = [Answer() for _ in range(exchange.num_outputs)]
    envelope = _envelope(exchange.service, "chat.completion.chunk")
    usage: dict[str, Any] = {}  # what every chunk says of it
    try:
        if options.include_usage:
            usage["usage"] = None
        first = [{**envelope, "choices": [_first_choice(i)], **usage} for i in range(len(answers))]
        if body.return_token_ids:
            first[0]["prompt_token_ids"] = exchange.prompts[0]
        yield b"".join(map(encode_event, first))
        async for gains in _gains(exchange, answers, body):
            if options.continuous_usage_stats:
                usage["usage"] = exchange.usage_dict()
            chunks = [choice for gain in gains for choice in _chunk_choices(exchange.service, body, gain, answers)]
            if chunks:
                yield b"".join(encode_event({**envelope, "choices": [choice], **usage}) for choice in chunks)
        if options.include_usage:
            last = {**envelope, "choices": [], "usage": exchange.usage_dict()}
            if exchange.logs_routing:
                last["routing"] = [exchange.routing_dict(i) for i in range(len(answers))]
            yield encode_event(last)
        yield DONE
    except Exception as error:  # noqa: BLE001 - the status is out, so it becomes an event
        yield failed_event(error, ROUTE, exchange.caller.request_id) + DONE


def _gains(exchange: Exchange, answers: list[Answer], body: ChatRequest) -> AsyncIterator[list[Gain]]:
    most_calls = 1 if body.parallel_tool_calls is False else None
    return answer_gains(exchange, answers, has_tools=bool(body.shown_tools), most_calls=most_calls)


def _envelope(service: Service, kind: str) -> dict[str, Any]:
    return {"id": new_id("chatcmpl-"), "object": kind, "created": int(time.time()), "model": service.model_name}


def _choice(exchange: Exchange, body: ChatRequest, index: int, answer: Answer) -> dict[str, Any]:
    assert answer.result is not None
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.tool_calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for name, call in answer.tool_calls
        ]
    if body.include_reasoning is not False:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning or None
    choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
    if body.logprobs:
        content = chat_logprobs(exchange.service, answer.logprobs, body.top_logprobs or 0)
        choice["logprobs"] = {"content": content, "refusal": None}
    choice["finish_reason"] = answer.finish_reason
    choice["stop_reason"] = stop_reason(answer.result)
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


def _first_choice(index: int) -> dict[str, Any]:
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def _chunk_choices(service: Service, body: ChatRequest, gain: Gain, answers: list[Answer]) -> list[dict[str, Any]]:
    """Return the choices of the chunks that carry a gain: one an event, then the end."""
    answer = answers[gain.choice]
    deltas = _event_deltas(body, gain, first_call=len(answer.tool_calls) - len(gain.call_ids))
    has_news = (body.logprobs and gain.delta.logprobs) or (body.return_token_ids and gain.delta.token_ids)
    if (has_news and not deltas) or gain.delta.result is not None:
        deltas.append({})
    choices: list[dict[str, Any]] = [
        {"index": gain.choice, "delta": d, "logprobs": None, "finish_reason": None} for d in deltas
    ]
    if choices and body.logprobs and gain.delta.logprobs:
        content = chat_logprobs(service, gain.delta.logprobs, body.top_logprobs or 0)
        choices[0]["logprobs"] = {"content": content, "refusal": None}
    if choices and body.return_token_ids:
        choices[0]["token_ids"] = gain.delta.token_ids
    if gain.delta.result is not None:
        choices[-1]["finish_reason"] = answer.finish_reason
        choices[-1]["stop_reason"] = stop_reason(gain.delta.result)
    return choices


def _event_deltas(body: ChatRequest, gain: Gain, first_call: int) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = []
    call_ids = iter(gain.call_ids)
    for event in gain.events:
        if event.tool_call is not None:
            function = {"name": event.tool_call.name, "arguments": event.tool_call.arguments_json}
            call = {"index": first_call, "id": next(call_ids), "type": "function", "function": function}
            first_call += 1
            deltas.append({"tool_calls": [call]})
        elif event.kind == "content":
            deltas.append({"content": event.text})
        elif body.include_reasoning is not False:
            deltas.append({"reasoning_content": event.text, "reasoning": event.text})
    return deltas


def _tool_choice(choice: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """Return OpenAI's choice among some of the tools as ours."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        raise UserError("tool_choice: allowed_tools cannot be used; accepted: none, auto, required, or one tool")
    return choice
