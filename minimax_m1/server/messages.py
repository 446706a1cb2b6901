"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, with thinking, tools and JSON schemas."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams, StructuredOutput
from minimax_m1.server.answers import Answer, Gain, answer_gains
from minimax_m1.server.errors import ANTHROPIC_ERROR_REPLIES, failed_event
from minimax_m1.server.reading import read_kind, read_object, read_parts, read_text, seal, shown, unseal
from minimax_m1.server.replies import EventStream, JsonReply, encode_event, new_id, unless_left
from minimax_m1.server.requests import EFFORTS, Body, SamplingFields, ThinkingFields, check_context
from minimax_m1.server.schemas_messages import Message, TokenCount
from minimax_m1.server.service import Caller, Exchange, Service, get_caller, get_service
from minimax_m1.tokenizer import ToolCall

router = APIRouter(tags=["Anthropic"])

ROUTE = "/v1/messages"
PING_SECONDS = 10.0  # of a stream with nothing to show, after which a ping says that it lives

_NAMES = {  # ours -> the client's
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "structured.json_schema": "output_config.format.schema",
}
_TEXT = {"text": ("text", "cache_control", "citations")}
_USER_BLOCKS = {**_TEXT, "tool_result": ("tool_use_id", "content", "is_error", "cache_control")}
_ASSISTANT_BLOCKS = {
    **_TEXT,
    "tool_use": ("id", "name", "input", "cache_control", "caller"),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
}


class OutputConfig(Body):
    """The form of the answer, and the effort for it."""

    inside = "output_config."

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="most tokens of thinking, where no budget is given"
    )
    format: dict[str, Any] | None = Field(default=None, description='{"type": "json_schema", "schema": a schema}')


class ToolChoice(Body):
    """Whether and which tools are to be called."""

    inside = "tool_choice."

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(ThinkingFields):
    """The body of POST /v1/messages/count_tokens: what the model is to read. How it is to think changes nothing."""

    model: str | None = Field(None, description="the served model's id")
    messages: list[dict[str, Any]] = Field(
        min_length=1, description="role (user, assistant, system) and content: a text or blocks"
    )
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description="changes nothing: prompts are cached by themselves")
    speed: Literal["standard"] | None = None

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model sees: with tool_choice none it sees none, and so calls none.

        Raises:
            UserError: a tool that cannot be used.
            ApiError: 400, one with a field that is not known.
        """
        tools = []
        for i, tool in enumerate(self.tools or []):
            where = f"tools[{i}]"
            read_kind(tool, where, ("custom",), default="custom")
            fields = ("type", "name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming")
            given = read_object(tool, where, fields)
            shape = {"name": read_text(given, "name", where)}
            if "description" in given:
                shape["description"] = read_text(given, "description", where)
            if not isinstance(given.get("input_schema"), Mapping):
                schema = shown(given.get("input_schema"))
                raise UserError(f"{where}.input_schema: {schema} cannot be used; accepted: a JSON schema of an object")
            tools.append({**shape, "parameters": given["input_schema"]})
        return [] if self.tool_choice is not None and self.tool_choice.type == "none" else tools

    @property
    def form(self) -> StructuredOutput | None:
        """The form that the text must have, None for free text.

        Raises:
            UserError: one that cannot be used.
        """
        given = self.output_config and self.output_config.format
        if not given:
            return None
        read_kind(given, "output_config.format", ("json_schema",))
        given = read_object(given, "output_config.format", ("type", "schema"))
        if not isinstance(given.get("schema"), Mapping):
            schema = shown(given.get("schema"))
            raise UserError(f"output_config.format.schema: {schema} cannot be used; accepted: a JSON schema")
        return StructuredOutput(json_schema=given["schema"])

    @property
    def is_prefilled(self) -> bool:
        """Whether the model is to go on with the assistant's last message."""
        return self.messages[-1].get("role") == "assistant"

    async def prompt(self, service: Service) -> list[int]:
        """Return the ids of the conversation.

        Raises:
            UserError: a message that cannot be used.
            ApiError: 400, one with a field that is not known.
        """
        return await service.chat_prompt(
            as_messages(self.messages, self.system),
            self.shown_tools,
            add_generation_prompt=not self.is_prefilled,
            continue_final_message=self.is_prefilled,
        )


class MessagesRequest(CountTokensRequest, SamplingFields):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, description="of the output, thinking included")
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            UserError: naming them.
        """
        if self.stop is not None and self.stop_sequences is not None:
            raise UserError("stop: cannot be used with stop_sequences; accepted: one of them")
        if self.tool_choice is not None and self.tool_choice.type == "tool" and self.tool_choice.name is None:
            raise UserError("tool_choice.name: is missing")
        if self.shown_tools and self.form is not None:
            raise UserError(
                "output_config.format: cannot be used with tools; accepted: one of them, or tool_choice none"
            )

    def max_thinking(self, default: int | None) -> int | None:
        """Return the most tokens of thinking, None for no limit; a budget counts before an effort.

        Raises:
            UserError: two fields that say different things.
        """
        effort = self.output_config and self.output_config.effort
        return super().max_thinking(EFFORTS[effort] if effort else default)

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer has blocks of thinking: clients that do not ask for them take the first block for text."""
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def omits_thinking(self) -> bool:
        """Whether the blocks of thinking are to be without their text."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def has_one_call(self) -> bool:
        """Whether the answer may have one call at most."""
        return self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use is True

    def params(self, service: Service) -> SamplingParams:
        """Return the parameters for the engine.

        Raises:
            UserError: a value that cannot be used.
        """
        tools = self.shown_tools
        choice: str | dict[str, Any] | None = None
        if self.tool_choice is not None and self.tool_choice.type != "none":
            kind, name = self.tool_choice.type, self.tool_choice.name
            choice = {"name": name} if kind == "tool" else {"any": "required", "auto": "auto"}[kind]
        return self.sampling(
            service,
            self.max_tokens,
            _NAMES,
            stop=self.stop_sequences or self.stop,
            structured=self.form,
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=not self.has_one_call,
        )


@router.post(
    ROUTE, responses={**ANTHROPIC_ERROR_REPLIES, 200: {"model": Message, "content": {"text/event-stream": {}}}}
)
async def create_message(
    body: MessagesRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    body.check()
    params = body.params(service)
    prompt = await body.prompt(service)
    check_context(service, len(prompt), None)  # max_tokens may reach beyond it: then stop_reason says so
    exchange = service.open(caller, ROUTE, [prompt], params, body.routing(service), _NAMES)
    if not body.stream:
        return JsonReply(await unless_left(request, lambda: _complete(exchange, body)))
    await exchange.__aenter__()
    return EventStream(_stream(exchange, body), exchange)


@router.post(f"{ROUTE}/count_tokens", responses={**ANTHROPIC_ERROR_REPLIES, 200: {"model": TokenCount}})
async def count_tokens(body: CountTokensRequest, service: Annotated[Service, Depends(get_service)]) -> Response:
    """Return the tokens of a conversation, as POST /v1/messages would count them."""
    service.check_model(body.model)
    return JsonReply({"input_tokens": len(await body.prompt(service))})


async def _complete(exchange: Exchange, body: MessagesRequest) -> dict[str, Any]:
    answer, blocks = Answer(), Blocks(body)
    async with exchange:
        async for gains in _gains(exchange, answer, body):
            for gain in gains:
                blocks.take(gain)
        blocks.end()
        message = {**_envelope(exchange), "content": blocks.done, **_end(exchange, answer), "usage": _usage(exchange)}
        if exchange.logs_routing:
            message["routing"] = exchange.routing_dict(0)
        return message


async def _stream(exchange: Exchange, body: MessagesRequest) -> AsyncGenerator[bytes, None]:
    answer, blocks = Answer(), Blocks(body)
    try:
        # what of the prompt was cached is known at the end, and said there
        start = {**_envelope(exchange), "content": [], "stop_reason": None, "stop_sequence": None}
        yield _encode([{"type": "message_start", "message": {**start, "usage": _usage(exchange)}}, {"type": "ping"}])
        last = time.monotonic()
        async for gains in _gains(exchange, answer, body):
            events = [event for gain in gains for event in blocks.take(gain)]
            if not events and time.monotonic() > last + PING_SECONDS:  # it thinks, and does not show it
                events = [{"type": "ping"}]
            if events:
                last = time.monotonic()
                yield _encode(events)
        delta = {"type": "message_delta", "delta": _end(exchange, answer), "usage": _usage(exchange)}
        if exchange.logs_routing:
            delta["routing"] = exchange.routing_dict(0)
        yield _encode([*blocks.end(), delta, {"type": "message_stop"}])
    except Exception as error:  # noqa: BLE001 - the status is out, so it becomes an event
        yield failed_event(error, ROUTE, exchange.caller.request_id, "error")


def _encode(events: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(encode_event(event, event["type"]) for event in events)


def _gains(exchange: Exchange, answer: Answer, body: MessagesRequest) -> AsyncIterator[list[Gain]]:
    most_calls = 1 if body.has_one_call else None
    return answer_gains(exchange, [answer], has_tools=bool(exchange.params.tools), most_calls=most_calls)


def _envelope(exchange: Exchange) -> dict[str, Any]:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": exchange.service.model_name}


def _end(exchange: Exchange, answer: Answer) -> dict[str, Any]:
    """Return why an answer ended."""
    assert answer.result is not None
    reason, sequence = "end_turn", None
    if answer.finish_reason == "tool_calls":
        reason = "tool_use"
    elif answer.finish_reason == "length":
        num_tokens = len(exchange.prompts[0]) + len(answer.token_ids)
        reason = "max_tokens"
        if (
            num_tokens >= exchange.service.engine.max_model_len
            and len(answer.token_ids) < exchange.params.max_new_tokens
        ):
            reason = "model_context_window_exceeded"
    elif isinstance(answer.result.stop_reason, str):
        reason, sequence = "stop_sequence", answer.result.stop_reason
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(exchange: Exchange) -> dict[str, Any]:
    """Return the usage so far. What the cache keeps of a prompt costs nothing, so none of it counts as written."""
    used = exchange.used()
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"thinking_tokens": used.reasoning_tokens},
        "cost": used.cost,
        "flops": used.flops,
    }


class Blocks:
    """The content of a message as it grows: blocks that are done, and the one that is open."""

    def __init__(self, body: MessagesRequest) -> None:
        self.done: list[dict[str, Any]] = []
        self._shows_thinking, self._omits_thinking = body.shows_thinking, body.omits_thinking
        self._kind: Literal["thinking", "text"] | None = None  # of the open block
        self._texts: list[str] = []  # of the open block

    def take(self, gain: Gain) -> list[dict[str, Any]]:
        """Let the blocks grow; return the events that tell of it."""
        events: list[dict[str, Any]] = []
        for event in gain.events:
            if event.tool_call is not None:
                events += self.end() + self._call(event.tool_call)
            elif event.kind == "content":
                events += self._grow("text", event.text)
            elif self._shows_thinking:
                events += self._grow("thinking", event.text)
        return events

    def end(self) -> list[dict[str, Any]]:
        """Close the block that is open, if there is one."""
        if self._kind is None:
            return []
        text, events = "".join(self._texts), []
        if self._kind == "text":
            block = {"type": "text", "text": text, "citations": None}
        else:
            signature = seal(text if self._omits_thinking else "")
            block = {"type": "thinking", "thinking": "" if self._omits_thinking else text, "signature": signature}
            events.append(self._delta({"type": "signature_delta", "signature": signature}))
        events.append({"type": "content_block_stop", "index": len(self.done)})
        self.done.append(block)
        self._kind, self._texts = None, []
        return events

    def _grow(self, kind: Literal["thinking", "text"], text: str) -> list[dict[str, Any]]:
        events = []
        if self._kind != kind:
            events = self.end()
            rest = {"citations": None} if kind == "text" else {"signature": ""}
            events.append(self._start({"type": kind, kind: "", **rest}))
            self._kind = kind
        self._texts.append(text)
        if kind == "text" or not self._omits_thinking:
            events.append(self._delta({"type": f"{kind}_delta", kind: text}))
        return events

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        """Return the events of a call, which comes whole."""
        block = {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": call.arguments}
        events = [
            self._start({**block, "input": {}}),
            self._delta({"type": "input_json_delta", "partial_json": json.dumps(call.arguments, ensure_ascii=False)}),
            {"type": "content_block_stop", "index": len(self.done)},
        ]
        self.done.append(block)
        return events

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_start", "index": len(self.done), "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.done), "delta": delta}


# -- the conversation --------------------------------------------------------------------------------------------------


def as_messages(messages: Sequence[Any], system: str | Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return Anthropic's messages as the chat template has them.

    Raises:
        UserError: a message or block that cannot be used.
        ApiError: 400, one with a field that is not known.
    """
    given = [] if system is None else [_text("system", system)]
    turns: list[dict[str, Any]] = []
    call_ids: set[str] = set()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        message = read_object(message, where, ("role", "content"))
        role, content = message.get("role"), message.get("content")
        if role == "system":
            given.append(_text(f"{where}.content", content))
        elif role == "assistant":
            turns.append(_assistant_turn(f"{where}.content", content, call_ids))
        elif role == "user":
            turns += _user_turns(f"{where}.content", content, call_ids)
        else:
            raise UserError(f"{where}.role: {shown(role)} cannot be used; accepted: user, assistant, system")
    if turns and "tool_calls" in turns[-1]:
        raise UserError(f"messages[{len(messages) - 1}]: ends with a call; accepted: a tool_result for it behind it")
    if given:  # the template has one place for it, at the top
        turns.insert(0, {"role": "system", "content": "\n\n".join(given)})
    return turns


def _assistant_turn(where: str, content: Any, call_ids: set[str]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
    for i, block in enumerate(read_parts(content, where, _ASSISTANT_BLOCKS)):
        place = f"{where}[{i}]"
        if block["type"] == "text":
            turn["content"] += _block_text(block, place)
        elif block["type"] == "thinking":
            turn["reasoning_content"] += read_text(block, "thinking", place) or unseal(
                read_text(block, "signature", place)
            )
        elif block["type"] == "tool_use":
            name, call_id = read_text(block, "name", place), read_text(block, "id", place)
            if not isinstance(block.get("input"), Mapping):
                raise UserError(f"{place}.input: {shown(block.get('input'))} cannot be used; accepted: an object")
            call_ids.add(call_id)
            call = {"id": call_id, "function": {"name": name, "arguments": block["input"]}}
            turn.setdefault("tool_calls", []).append(call)
        # redacted thinking is left out: only the server that made it can read it
    return turn


def _user_turns(where: str, content: Any, call_ids: set[str]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for i, block in enumerate(read_parts(content, where, _USER_BLOCKS)):
        place = f"{where}[{i}]"
        if block["type"] == "text":
            if not turns or turns[-1]["role"] != "user":
                turns.append({"role": "user", "content": ""})
            turns[-1]["content"] += _block_text(block, place)
            continue
        call_id = read_text(block, "tool_use_id", place)
        if call_id not in call_ids:
            raise UserError(f"{place}.tool_use_id: {shown(call_id)} cannot be used; accepted: a tool_use's before it")
        text = _text(f"{place}.content", block.get("content", ""))
        if block.get("is_error") not in (None, False, True):
            raise UserError(f"{place}.is_error: {shown(block['is_error'])} cannot be used; accepted: true, false")
        if block.get("is_error"):  # M1's format has no other place for it
            text = f"Error: {text}"
        turns.append({"role": "tool", "tool_call_id": call_id, "content": text})
    if not turns:
        raise UserError(f"{where}: is empty; accepted: a text, or at least one block")
    return turns


def _text(where: str, value: Any) -> str:
    """Return a text that may have been given as blocks."""
    return "".join(_block_text(part, f"{where}[{i}]") for i, part in enumerate(read_parts(value, where, _TEXT)))


def _block_text(block: Mapping[str, Any], where: str) -> str:
    if block.get("citations"):
        raise UserError(
            f"{where}.citations: {shown(block['citations'])} cannot be used; accepted: none, for M1 has none"
        )
    return read_text(block, "text", where)
