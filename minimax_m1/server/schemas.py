"""The bodies of answers, for /openapi.json. The routes build plain dicts; tests hold them to these."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """A body with exactly these fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class CachedTokens(Reply):
    """Of the prompt."""

    cached_tokens: int


class ReasoningTokens(Reply):
    """Of the completion."""

    reasoning_tokens: int


class Usage(Reply):
    """Tokens of a request, its price in the server's currency, and its floating-point operations."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens
    cost: float
    flops: int


class LayerRouting(Reply):
    """The experts of one layer that were used, the most used first, in lists side by side."""

    layer: int
    experts: list[int]
    counts: list[int]
    mean_weights: list[float]
    load_balance_entropy: float


class TokenRouting(Reply):
    """The experts of one token, layer by layer, the most probable first; -1 is one that was not needed."""

    text: str
    experts: list[list[int]]


class Routing(Reply):
    """Which experts an output went to."""

    num_tokens: int
    num_experts: int
    layers: list[LayerRouting]
    tokens: list[TokenRouting] | None = None


class TopLogprob(Reply):
    """One token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that came."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply):
    """Of every token of the output, thinking and markup included."""

    content: list[TokenLogprob] | None
    refusal: None


class CalledFunction(Reply):
    """A tool's name, and its arguments as JSON text."""

    name: str
    arguments: str


class MessageToolCall(Reply):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Reply):
    """The answer; `reasoning` and `reasoning_content` are the same."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(Reply):
    """One of n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    """The body of an answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    routing: list[Routing] | None = None


class CompletionLogprobs(Reply):
    """Lists side by side; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Reply):
    """The body of an answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    routing: list[Routing] | None = None


class Generated(Reply):
    """The body of an answer to POST /v1/minimax-m1/generate."""

    id: str
    object: Literal["minimax_m1.generation"]
    created: int
    model: str
    output: str
    reasoning: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    routing: Routing


class Model(Reply):
    """A served model, in OpenAI's form and Anthropic's at once."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["model"]
    display_name: str
    created_at: str


class ModelList(Reply):
    """The served models: one."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool
    first_id: str
    last_id: str


class Tokenized(Reply):
    """The ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Reply):
    """The text of ids."""

    prompt: str


class Status(BaseModel):
    """Whether the server works."""

    status: str


class Version(Reply):
    """Of the package."""

    version: str
