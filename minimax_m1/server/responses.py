"""POST /v1/responses: OpenAI's Responses, kept for later turns, in a stream, or made in the background."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from minimax_m1.errors import UserError
from minimax_m1.sampling import SamplingParams, StructuredOutput
from minimax_m1.server.answers import Answer, answer_gains
from minimax_m1.server.errors import ERROR_REPLIES, ApiError, as_api_error, logger, renamed
from minimax_m1.server.reading import read_kind, read_object, read_text, refuse, shown
from minimax_m1.server.replies import EventStream, JsonReply, encode_event, encode_json, new_id, unless_left
from minimax_m1.server.requests import (
    STRUCTURED_NAMES,
    Body,
    Effort,
    SamplingFields,
    Structured,
    check_context,
    structured_output,
)
from minimax_m1.server.response_items import ENCRYPTED, LOGPROBS, Output, as_messages, read_items
from minimax_m1.server.response_store import StoredResponse
from minimax_m1.server.schemas_responses import DeletedResponse, ResponseBody, ResponseItems
from minimax_m1.server.service import Caller, Exchange, Service, get_caller, get_service

router = APIRouter(tags=["OpenAI"])

ROUTE = "/v1/responses"

_NAMES = {"max_new_tokens": "max_output_tokens", "logprobs": "top_logprobs"}  # ours -> the client's
_FORM_NAMES = {"structured.json_schema": "text.format.schema", "structured.json_object": "text.format"}
_UNSUPPORTED = {
    "background_options": "background: true starts at once",
    "context_management": "send the items that are to be read",
    "conversation": "use previous_response_id",
    "max_tokens": "use max_output_tokens",
    "messages": "use input",
    "moderation": "answers are the model's own",
    "n": "send the request several times",
    "prompt": "prompts are not kept here; use instructions and input",
    "prompt_cache_options": "prompts are cached by themselves",
    "response_format": "use text.format",
}


class Reasoning(Body):
    """How much to think, and what to show of it."""

    inside = "reasoning."

    effort: Effort | None = None
    summary: Literal["auto"] | None = Field(default=None, description="changes nothing: the thinking is given in full")
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto", "current_turn"] | None = None
    mode: Literal["standard"] | None = None


class TextConfig(Body):
    """The form of the answer."""

    inside = "text."

    format: dict[str, Any] | None = Field(default=None, description="text, json_object or json_schema")
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Body):
    """What a stream carries beside the events."""

    inside = "stream_options."

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(SamplingFields):
    """The body of POST /v1/responses."""

    input: str | list[dict[str, Any]] | None = Field(
        None, description="a text, or items: message, reasoning, function_call, function_call_output"
    )
    instructions: str | None = None
    previous_response_id: str | None = Field(None, description="of a response whose conversation goes on")
    max_output_tokens: int | None = Field(
        None, ge=1, description="thinking included; what the context leaves if absent"
    )
    max_tool_calls: int | None = Field(None, ge=0, description="of built-in tools, of which there are none")
    tools: list[dict[str, Any]] | None = Field(None, description="functions")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, a function or allowed_tools"
    )
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    structured_outputs: Structured | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    store: bool | None = Field(None, description="keep the response for later requests; true if left out")
    background: bool | None = Field(None, description="answer at once; the response is made while the client polls")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        refuse(values, _UNSUPPORTED)
        return values

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            UserError: naming them.
        """
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options: cannot be used; accepted with stream: true")
        if self.top_logprobs is not None and not self.wants(LOGPROBS):
            raise UserError(f'top_logprobs: {self.top_logprobs} cannot be used; accepted with include: ["{LOGPROBS}"]')
        if self.background and self.stream:
            raise UserError("background: cannot be used with stream; accepted: one of them")
        if self.background and self.store is False:
            raise UserError("background: cannot be used with store: false, for then nobody could fetch the response")
        for name, text in (self.metadata or {}).items():
            if not isinstance(text, str):
                raise UserError(f"metadata.{name}: {shown(text)} cannot be used; accepted: a text")
        if self.shown_tools and self.form is not None:
            raise UserError("text.format: cannot be used with tools; accepted: one of them, or tool_choice: none")

    def wants(self, name: str) -> bool:
        """Return whether something is to be included."""
        return self.include is not None and name in self.include

    def max_thinking(self, default: int | None) -> int | None:
        """Return the most tokens of thinking, None for no limit.

        Raises:
            UserError: two fields that say different things.
        """
        effort = self.reasoning and self.reasoning.effort
        if not effort:
            return super().max_thinking(default)
        if self.reasoning_effort not in (None, effort):
            raise UserError("reasoning.effort, reasoning_effort: say different things; accepted: one of them")
        plain = self.model_copy(update={"reasoning_effort": effort, "reasoning": None})
        try:
            return plain.max_thinking(default)
        except UserError as error:
            raise renamed(error, {"reasoning_effort": "reasoning.effort"}) from None

    @property
    def names(self) -> dict[str, str]:
        """Our fields' names -> the client's, for messages."""
        return _NAMES | (_FORM_NAMES if self.structured_outputs is None else STRUCTURED_NAMES)

    @property
    def form(self) -> StructuredOutput | None:
        """The form that the text must have, None for free text.

        Raises:
            UserError: one that cannot be used.
        """
        given = self.text and self.text.format
        if given and self.structured_outputs is not None:
            raise UserError("structured_outputs: cannot be used with text.format; accepted: one of the two")
        if not given:
            return structured_output(None, self.structured_outputs)
        kind = read_kind(given, "text.format", ("text", "json_object", "json_schema"))
        if kind != "json_schema":
            return structured_output(read_object(given, "text.format", ("type",)), None)
        given = read_object(given, "text.format", ("type", "name", "schema", "strict", "description"))
        read_text(given, "name", "text.format")
        if not isinstance(given.get("schema"), Mapping):
            raise UserError(f"text.format.schema: {shown(given.get('schema'))} cannot be used; accepted: a JSON schema")
        return StructuredOutput(json_schema=given["schema"])

    @property
    def given_tools(self) -> list[dict[str, Any]]:
        """The functions, as the chat template shows them.

        Raises:
            UserError: a tool that cannot be used.
            ApiError: 400, one with a field that is not known.
        """
        tools = []
        for i, tool in enumerate(self.tools or []):
            where = f"tools[{i}]"
            read_kind(tool, where, ("function",))
            given = read_object(tool, where, ("type", "name", "description", "parameters", "strict"))
            read_text(given, "name", where)
            tools.append({name: value for name, value in given.items() if name not in ("type", "strict")})
        return tools

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The functions that the model sees: none with tool_choice "none", some with allowed_tools."""
        choice, tools = self.tool_choice, self.given_tools
        if choice == "none":
            return []
        if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
            return tools
        allowed = choice.get("tools")
        names = [tool.get("name") for tool in allowed if isinstance(tool, Mapping)] if isinstance(allowed, list) else []
        known = [tool["name"] for tool in tools]
        if not names or any(name not in known for name in names):
            raise UserError(f"tool_choice.tools: {shown(allowed)} cannot be used; accepted: functions among {known}")
        return [tool for tool in tools if tool["name"] in names]

    @property
    def choice(self) -> str | dict[str, Any] | None:
        """`tool_choice` as the engine has it.

        Raises:
            UserError: one that cannot be used.
        """
        choice = self.tool_choice
        if not isinstance(choice, Mapping):
            return choice
        kind = read_kind(choice, "tool_choice", ("function", "allowed_tools"))
        if kind == "function":
            return {"name": read_text(choice, "name", "tool_choice")}
        if choice.get("mode") not in ("auto", "required"):
            raise UserError(f"tool_choice.mode: {shown(choice.get('mode'))} cannot be used; accepted: auto, required")
        return str(choice["mode"])

    def params(self, service: Service) -> SamplingParams:
        """Return the parameters for the engine.

        Raises:
            UserError: a value that cannot be used.
        """
        tools = self.shown_tools
        return self.sampling(
            service,
            self.max_output_tokens,
            self.names,
            logprobs=(self.top_logprobs or 0) if self.wants(LOGPROBS) else None,
            structured=self.form,
            tools=tools or None,
            tool_choice=self.choice if tools or self.tool_choice not in (None, "none") else None,
            parallel_tool_calls=self.parallel_tool_calls,
        )


@router.post(ROUTE, responses={**ERROR_REPLIES, 200: {"model": ResponseBody, "content": {"text/event-stream": {}}}})
async def create_response(
    body: ResponseRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Answer an input, or what a stored response and an input make together."""
    service.check_model(body.model)
    body.check()
    params = body.params(service)
    items, num_bytes = _conversation(body, service, caller)
    messages = as_messages(items, body.instructions)
    prompt = await service.chat_prompt(messages, body.shown_tools)
    check_context(service, len(prompt), body.max_output_tokens, field="max_output_tokens", prompt_field="input")
    exchange = service.open(caller, ROUTE, [prompt], params, body.routing(service), body.names)
    await exchange.__aenter__()  # whoever runs it leaves it
    run = Run(exchange, body, items, num_bytes)
    if body.stream:
        return EventStream(run.stream(), exchange)
    if body.background:
        run.start()
        return JsonReply(run.body)
    return JsonReply(await unless_left(request, run.complete))


@router.get(f"{ROUTE}/{{response_id}}", responses={**ERROR_REPLIES, 200: {"model": ResponseBody}})
async def get_response(
    response_id: str,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
    stream: bool = False,
) -> Response:
    """Return a response that is stored; one that is being made has the items that are done."""
    _check_query(request, "stream")
    if stream:
        raise UserError(
            "stream: true cannot be used; accepted: false, and to ask again while the status is in_progress"
        )
    return JsonReply(service.responses.get(response_id, caller.key.name).body)


@router.post(f"{ROUTE}/{{response_id}}/cancel", responses={**ERROR_REPLIES, 200: {"model": ResponseBody}})
async def cancel_response(
    response_id: str,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Stop a response that is being made in the background; one that has ended stays as it is."""
    stored = service.responses.get(response_id, caller.key.name)
    if stored.task is None:
        raise ApiError(400, "response_id: cannot be cancelled; accepted: one made with background: true")
    await _stop(stored)
    return JsonReply(stored.body)


@router.delete(f"{ROUTE}/{{response_id}}", responses={**ERROR_REPLIES, 200: {"model": DeletedResponse}})
async def delete_response(
    response_id: str,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
) -> Response:
    """Forget a response; one that is being made is stopped. Later responses keep what they took from it."""
    await _stop(service.responses.get(response_id, caller.key.name))
    service.responses.remove(response_id)
    return JsonReply({"id": response_id, "object": "response", "deleted": True})


@router.get(f"{ROUTE}/{{response_id}}/input_items", responses={**ERROR_REPLIES, 200: {"model": ResponseItems}})
async def list_input_items(
    response_id: str,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
    caller: Annotated[Caller, Depends(get_caller)],
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List what a response was made from, what came before its own input included; the last item first."""
    _check_query(request, "after", "limit", "order")
    items = list(service.responses.get(response_id, caller.key.name).items)
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise UserError(f"after: {after!r} cannot be used; accepted: the id of an item of the response")
        items = items[places[0] + 1 :]
    page = items[:limit]
    return JsonReply(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else "",
            "last_id": page[-1]["id"] if page else "",
            "has_more": len(items) > len(page),
        }
    )


def _check_query(request: Request, *known: str) -> None:
    """Refuse what a query asks for in vain, such as `include[]`: what is recorded was decided with the response."""
    for name in request.query_params:
        if name not in known:
            hint = f"accepted: {', '.join(known)}"
            raise ApiError(400, f"{name}: is not known here; {hint}", param=name, code="unknown_parameter")


async def _stop(stored: StoredResponse) -> None:
    """End a response that runs; its pages are free when this returns."""
    if stored.abort is not None:
        stored.abort()
    if stored.task is not None:
        await asyncio.wait([stored.task])


# -- one response ------------------------------------------------------------------------------------------------------


class Run:
    """A response while it is made. `body` is what a client gets of it at any time."""

    def __init__(
        self, exchange: Exchange, request: ResponseRequest, items: Sequence[dict[str, Any]], num_bytes: int
    ) -> None:
        """Take an exchange that has been entered.

        Args:
            exchange: left by `complete`; who uses `events` or `stream` leaves it.
            request: what the client asked for.
            items: the input, with what came before it.
            num_bytes: of the items.
        """
        self._exchange, self._request = exchange, request
        self._answer = Answer()
        self._output = Output(
            exchange,
            top_logprobs=(request.top_logprobs or 0) if request.wants(LOGPROBS) else None,
            seals_thinking=request.wants(ENCRYPTED),
        )
        self._is_cancelled = False
        self.body = _new_body(exchange, request)
        self._num_item_bytes = num_bytes
        self._stored = StoredResponse(exchange.caller.key.name, self.body, items)

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Run to the end, and yield the events that tell of it; a list is to be used up before the next is taken.

        Raises:
            Exception: what ends it otherwise; `fail` has the event for that.
        """
        yield [
            {"type": "response.created", "response": self.body},
            {"type": "response.in_progress", "response": self.body},
        ]
        most_calls = 1 if self._request.parallel_tool_calls is False else None
        has_tools = bool(self._exchange.params.tools)
        async for gains in answer_gains(self._exchange, [self._answer], has_tools=has_tools, most_calls=most_calls):
            self.body["status"] = "in_progress"
            events = [event for gain in gains for event in self._output.take(gain)]
            self.body["output"] = self._output.items
            yield events
        is_whole = self._answer.finish_reason != "length"
        closing = self._output.end(is_whole=is_whole)
        if is_whole:
            self.body["status"], self.body["completed_at"] = "completed", int(time.time())
        else:
            self.body["status"], self.body["incomplete_details"] = "incomplete", {"reason": "max_output_tokens"}
        if self._exchange.logs_routing:
            self.body["routing"] = [self._exchange.routing_dict(0)]
        self._end()
        yield [*closing, {"type": f"response.{self.body['status']}", "response": self.body}]

    def fail(self, error: Exception) -> list[dict[str, Any]]:
        """End it otherwise; return the last events. What nobody expected goes to the log."""
        told = as_api_error(error)
        if told.status_code == 500:
            logger.error(
                "response %s of request %s failed", self.body["id"], self._exchange.caller.request_id, exc_info=error
            )
        closing = self._output.end(is_whole=False)
        if self._is_cancelled:
            self.body["status"] = "cancelled"
        else:
            code = "invalid_prompt" if told.status_code == 400 else "server_error"
            self.body["status"], self.body["error"] = "failed", {"code": code, "message": str(told.detail)}
        self._end()
        return [*closing, {"type": "response.failed", "response": self.body}]

    async def complete(self) -> dict[str, Any]:
        """Run to the end, leave the exchange, and return the body."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(self._exchange)
            async for _ in self.events():
                pass
        return self.body

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Run to the end, as server-sent events."""
        number = 0

        def encode(events: list[dict[str, Any]]) -> bytes:
            nonlocal number
            lines = []
            for event in events:
                lines.append(encode_event({**event, "sequence_number": number}, event["type"]))
                number += 1
            return b"".join(lines)

        try:
            async for events in self.events():
                if events:
                    yield encode(events)
        except Exception as error:  # noqa: BLE001 - the status is out, so it becomes an event
            yield encode(self.fail(error))

    def start(self) -> None:
        """Run to the end in a task of its own, and keep the response from now on."""
        self.body["status"] = "queued"
        self._stored.abort = self._cancel
        self._stored.task = asyncio.create_task(self._run())
        self._store()

    async def _run(self) -> None:
        try:
            await self.complete()
        except Exception as error:  # noqa: BLE001 - nobody waits; the response says it
            self.fail(error)

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._exchange.abort()

    def _end(self) -> None:
        self.body["output"] = self._output.items
        self.body["usage"] = _usage(self._exchange)
        self._stored.abort = None
        self._store()

    def _store(self) -> None:
        if self._request.store is not False:
            self._exchange.service.responses.put(self._stored, self._num_item_bytes + len(encode_json(self.body)))


def _new_body(exchange: Exchange, request: ResponseRequest) -> dict[str, Any]:
    """Return the body of a response that has no output yet."""
    params = exchange.params
    tools = [{"type": "function", "parameters": None, "strict": None, **tool} for tool in request.tools or []]
    text = request.text or TextConfig()
    reasoning = request.reasoning or Reasoning()
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": exchange.service.model_name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort or request.reasoning_effort, "summary": reasoning.summary},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": params.temperature,
        "text": {"format": text.format or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": request.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def _usage(exchange: Exchange) -> dict[str, Any]:
    """Return the usage so far. What the cache keeps of a prompt costs nothing, so none of it counts as written."""
    used = exchange.used()
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "cost": used.cost,
        "flops": used.flops,
    }


def _conversation(body: ResponseRequest, service: Service, caller: Caller) -> tuple[list[dict[str, Any]], int]:
    """Return what a response is made from, and its bytes: `previous_response_id`'s items and output, and the input."""
    items = read_items(body.input)
    num_bytes = len(encode_json(items))
    if body.previous_response_id is not None:
        earlier = _earlier(body.previous_response_id, service, caller)
        items = [*earlier.items, *earlier.body["output"], *items]
        num_bytes += earlier.num_bytes
    ids: set[str] = set()
    for item in items:  # by their ids, clients page through them
        if item["id"] in ids:
            raise UserError(
                f"input: the item {item['id']!r} is there twice; accepted: items that are not there already"
            )
        ids.add(item["id"])
    return items, num_bytes


def _earlier(name: str, service: Service, caller: Caller) -> StoredResponse:
    try:
        earlier = service.responses.get(name, caller.key.name)
    except ApiError:  # of a reference within a body, OpenAI's status is 400
        raise ApiError(
            400,
            f"previous_response_id: there is no response {name!r}; it may have gone to make room for others",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from None
    status = earlier.body["status"]
    if status not in ("completed", "incomplete"):
        raise UserError(
            f"previous_response_id: {name} is {status}; accepted: a response that is completed or incomplete"
        )
    return earlier
