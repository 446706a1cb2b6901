"""The bodies of /v1/messages, for /openapi.json. The routes build plain dicts; tests hold them to these."""

from __future__ import annotations

from typing import Any, Literal

from minimax_m1.server.schemas import Reply, Routing


class TextBlock(Reply):
    """What the model says."""

    type: Literal["text"]
    text: str
    citations: None


class ThinkingBlock(Reply):
    """What the model thought; the signature carries it for clients that asked to have it omitted."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Reply):
    """One call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(Reply):
    """Of the output."""

    thinking_tokens: int


class MessageUsage(Reply):
    """Tokens of a message, its price in the server's currency, and its floating-point operations.

    What the prefix cache held is in `cache_read_input_tokens` alone.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    cost: float
    flops: int


class Message(Reply):
    """The body of an answer to POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage
    routing: Routing | None = None


class TokenCount(Reply):
    """The body of an answer to POST /v1/messages/count_tokens."""

    input_tokens: int
