"""From what the engine adds to what a client reads: thinking, content, tool calls and log-probabilities by choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from minimax_m1.engine import Delta, GenerationResult
from minimax_m1.sampling import TokenLogprob
from minimax_m1.server.replies import new_id
from minimax_m1.server.service import Exchange, Service
from minimax_m1.thinking import opens_thinking
from minimax_m1.tokenizer import AnswerEvent, AnswerParser, ToolCall

Finish = Literal["stop", "length", "tool_calls"]


@dataclass
class Answer:
    """One choice as it grows."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[tuple[str, ToolCall]] = field(default_factory=list)  # (id, call)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    result: GenerationResult | None = None

    @property
    def finish_reason(self) -> Finish:
        """Why it ended, in OpenAI's words; an output that repeated itself was cut off as one that was too long."""
        assert self.result is not None
        return finish_reason(self.result.finish_reason, bool(self.tool_calls))


@dataclass(frozen=True)
class Gain:
    """What one choice gained: events in the order of the text, and the tokens behind them (text may lag)."""

    choice: int
    events: list[AnswerEvent]
    call_ids: list[str]  # of the tool calls in `events`
    delta: Delta


async def answer_gains(
    exchange: Exchange, answers: Sequence[Answer], *, has_tools: bool, most_calls: int | None = None
) -> AsyncIterator[list[Gain]]:
    """Take the outputs of a chat apart as they come; `answers` grow along.

    Args:
        exchange: has been entered.
        answers: one for each choice.
        has_tools: whether the client gave any; without, what looks like a call is content.
        most_calls: later calls of a choice are dropped.
    """
    service = exchange.service
    is_open = opens_thinking(exchange.prompts[0], service.tokenizer)
    parsers = [AnswerParser(thinking_open=is_open, tool_calls=has_tools) for _ in answers]
    async for deltas in exchange.gains():
        gains = []
        for choice, delta in deltas:
            answer, parser = answers[choice], parsers[choice]
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs
            events = parser.push(delta.text)
            if delta.result is not None:
                answer.result = delta.result
                events += parser.finish()
            gains.append(_take(answer, choice, events, delta, most_calls))
        yield gains


def _take(answer: Answer, choice: int, events: list[AnswerEvent], delta: Delta, most_calls: int | None) -> Gain:
    kept, call_ids = [], []
    for event in events:
        if event.tool_call is not None:
            if most_calls is not None and len(answer.tool_calls) >= most_calls:
                continue
            call_ids.append(new_id("call_"))
            answer.tool_calls.append((call_ids[-1], event.tool_call))
        elif event.kind == "reasoning":
            answer.reasoning += event.text
        else:
            answer.content += event.text
        kept.append(event)
    return Gain(choice, kept, call_ids, delta)


def finish_reason(reason: str, has_calls: bool = False) -> Finish:
    """Return the engine's reason in OpenAI's words."""
    if reason == "stop":
        return "tool_calls" if has_calls else "stop"
    return "length"


def token_text(service: Service, token: int) -> str:
    """Return one token's text; bytes that are not whole characters become U+FFFD."""
    return service.tokenizer.token_bytes(token).decode("utf-8", "replace")


def stop_reason(result: GenerationResult) -> int | str | None:
    """Return what ended an output, as in vLLM: the stop string or id; "repetition" if it went in circles."""
    return "repetition" if result.finish_reason == "repetition" else result.stop_reason


def chat_logprobs(service: Service, logprobs: Sequence[TokenLogprob], most: int) -> list[dict[str, Any]]:
    """Return log-probabilities as chat completions have them, with the `most` most probable tokens at each place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = service.tokenizer.token_bytes(token)
        return {"token": token_text(service, token), "logprob": logprob, "bytes": list(data)}

    return [
        {**entry(found.token, found.logprob), "top_logprobs": [entry(*other) for other in found.top[:most]]}
        for found in logprobs
    ]
