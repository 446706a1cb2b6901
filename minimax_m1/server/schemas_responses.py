"""The bodies of /v1/responses, for /openapi.json. The routes build plain dicts; tests hold them to these."""

from __future__ import annotations

from typing import Any, Literal

from minimax_m1.server.schemas import ReasoningTokens, Reply, Routing, TokenLogprob

Status = Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Reply):
    """A text that was given."""

    type: Literal["input_text"]
    text: str


class OutputText(Reply):
    """A text that the model wrote."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class MessageItem(Reply):
    """What somebody said."""

    id: str
    type: Literal["message"]
    role: Literal["user", "system", "developer", "assistant"]
    status: ItemStatus
    content: list[InputText | OutputText]


class ReasoningText(Reply):
    """Thinking, word for word."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Reply):
    """A summary of thinking; this server makes none."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(Reply):
    """What the model thought."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: str | None = None


class FunctionCallItem(Reply):
    """One call of a function, with its arguments as JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Reply):
    """What a call gave."""

    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str


class ResponseErrorBody(Reply):
    """Why a response failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(Reply):
    """Why a response was cut off."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(Reply):
    """Of the input."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(Reply):
    """Tokens of a response, its price in the server's currency, and its floating-point operations."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int
    cost: float
    flops: int


class ResponseReasoning(Reply):
    """What was asked for."""

    effort: str | None
    summary: str | None


class ResponseText(Reply):
    """What was asked for."""

    format: dict[str, Any]
    verbosity: str


class ResponseBody(Reply):
    """A response: what was asked for, and what has come of it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: bool
    error: ResponseErrorBody | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[MessageItem | ReasoningItem | FunctionCallItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    routing: list[Routing] | None = None


class DeletedResponse(Reply):
    """A response that is no more."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseItems(Reply):
    """What a response was made from, page by page."""

    object: Literal["list"]
    data: list[MessageItem | ReasoningItem | FunctionCallItem | FunctionCallOutputItem]
    first_id: str
    last_id: str
    has_more: bool
