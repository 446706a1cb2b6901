"""/v1/messages through the official anthropic client with its strict validation, and piece by piece."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import pydantic
import pytest

from minimax_m1.errors import UserError
from minimax_m1.server.messages import as_messages
from minimax_m1.server.schemas_messages import Message, TokenCount
from tests.server.conftest import Server, running_server

MODEL = "m1-nano"
QUESTION = {"role": "user", "content": "What is 17 * 23?"}
ANSWER = "The answer is 391."
ENABLED = {"type": "enabled", "budget_tokens": 2000}
DISABLED = {"type": "disabled"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "Look out of the window.", "input_schema": SCHEMA}
SHOWN = {"name": "weather", "description": "Look out of the window.", "parameters": SCHEMA}  # to the model
ENDLESS = {"ignore_eos": True, "repetition_penalty": 1.3}  # until the context is full


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with make_client(server) as client:
        yield client


def make_client(server: Server, key: str = "any") -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=server.url, api_key=key, timeout=60, max_retries=0, _strict_response_validation=True
    )


def ask(client: anthropic.Anthropic, *messages: dict[str, Any], extra: Any = None, **fields: Any) -> Any:
    fields = {"max_tokens": 1000, "messages": list(messages) or [QUESTION], **fields}
    return client.messages.create(model=MODEL, **fields, extra_body={"temperature": 0, **(extra or {})})


def without_ids(message: Any) -> list[dict[str, Any]]:
    """Return the content without what differs from one message to the next, and what the client adds to it."""
    mine = ("id", "parsed_output")
    return [
        {name: value for name, value in block.items() if name not in mine} for block in message.to_dict()["content"]
    ]


def post(server: Server, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def count_tokens(server: Server, messages: list[dict[str, Any]], **more: Any) -> int:
    response = post(server, "/tokenize", messages=messages, **more)
    assert response.status_code == 200, response.text
    return response.json()["count"]


def num_input(message: Any) -> int:
    usage = message.usage
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def raw_events(server: Server, **body: Any) -> list[dict[str, Any]]:
    body = {"max_tokens": 1000, "messages": [QUESTION], "stream": True, **body}
    events = []
    for block in post(server, **body).text.strip().split("\n\n"):
        name, data = re.fullmatch(r"event: (\S+)\ndata: (.*)", block).groups()
        events.append(json.loads(data))
        assert events[-1]["type"] == name
    return events


# -- an answer at once ------------------------------------------------------------------------------------------------


def test_an_answer_is_what_chat_says(client: anthropic.Anthropic, server: Server) -> None:
    message = ask(client)
    chat = post(server, "/v1/chat/completions", messages=[QUESTION], temperature=0).json()
    assert message.id.startswith("msg_") and (message.type, message.role) == ("message", "assistant")
    (block,) = message.content  # thinking is only for those who ask for it
    assert block.type == "text" and block.text == chat["choices"][0]["message"]["content"] == ANSWER
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert num_input(message) == count_tokens(server, [QUESTION]) == chat["usage"]["prompt_tokens"]
    assert message.usage.output_tokens == chat["usage"]["completion_tokens"]
    reasoning_tokens = chat["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert message.usage.output_tokens_details.thinking_tokens == reasoning_tokens > 0
    assert message.usage.cost == pytest.approx(chat["usage"]["cost"]) and message.usage.flops > 0


def test_thinking_is_shown_bounded_or_left_out(client: anthropic.Anthropic, server: Server) -> None:
    chat = post(server, "/v1/chat/completions", messages=[QUESTION], temperature=0).json()
    for thinking in (ENABLED, {"type": "adaptive"}):
        message = ask(client, thinking=thinking)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert (
            message.content[0].thinking == chat["choices"][0]["message"]["reasoning"] and message.content[0].signature
        )
    bounded = ask(client, thinking={"type": "enabled", "budget_tokens": 7})
    assert bounded.usage.output_tokens_details.thinking_tokens == 7
    off = ask(client, thinking=DISABLED)
    assert off.usage.output_tokens_details.thinking_tokens == 0 and off.content[0].type == "text"
    both = ask(client, thinking={"type": "enabled", "budget_tokens": 7}, output_config={"effort": "max"})
    assert both.usage.output_tokens_details.thinking_tokens == 7


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thinking": ENABLED},
        {"thinking": ENABLED, "max_tokens": 20},
        {"tools": [WEATHER], "tool_choice": {"type": "any"}, "thinking": ENABLED},
        {"stop_sequences": ["is"], "thinking": DISABLED},
        {"routing_log": "tokens"},
    ],
)
def test_bodies_are_as_openapi_says(server: Server, fields: dict[str, Any]) -> None:
    body = post(server, **{"max_tokens": 1000, "messages": [QUESTION], **fields}).json()
    Message.model_validate(body, strict=True)


def test_why_an_answer_ended(client: anthropic.Anthropic) -> None:
    stopped = ask(client, stop_sequences=["never", "is"], thinking=DISABLED)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "is")
    assert "is" not in stopped.content[0].text
    cut = ask(client, max_tokens=5)
    assert (cut.stop_reason, cut.content, cut.usage.output_tokens) == ("max_tokens", [], 5)
    long = {"role": "user", "content": "7" * 3800}  # a token each, so that few are left to be written
    full = ask(client, long, max_tokens=20_000, extra=ENDLESS)
    assert full.stop_reason == "model_context_window_exceeded"
    assert num_input(full) + full.usage.output_tokens == 4096


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]


def test_the_text_has_the_form_that_is_asked_for(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(model=MODEL, max_tokens=1000, messages=[QUESTION], output_format=Place)
    assert isinstance(message.parsed_output, Place)


def test_a_repeated_prompt_is_read_from_the_cache(client: anthropic.Anthropic) -> None:
    text = {
        "type": "text",
        "text": "Numbers: " + ", ".join(map(str, range(300))),
        "cache_control": {"type": "ephemeral"},
    }
    first, second = (ask(client, system=[text], thinking=DISABLED, max_tokens=3) for _ in range(2))
    assert second.usage.cache_read_input_tokens > 0 and num_input(first) == num_input(second)
    assert without_ids(first) == without_ids(second)


def test_tokens_are_counted_before(client: anthropic.Anthropic, server: Server) -> None:
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": " Please."}]
    fields = {"system": system, "tools": [WEATHER], "thinking": ENABLED, "tool_choice": {"type": "auto"}}
    counted = client.messages.count_tokens(model=MODEL, messages=[QUESTION], **fields).input_tokens
    messages = [{"role": "system", "content": "Be brief. Please."}, QUESTION]
    assert counted == count_tokens(server, messages, tools=[SHOWN]) == num_input(ask(client, **fields))
    body = post(server, "/v1/messages/count_tokens", messages=[QUESTION]).json()
    TokenCount.model_validate(body, strict=True)


def test_the_model_goes_on_with_the_last_message(client: anthropic.Anthropic, server: Server) -> None:
    begun = {"role": "assistant", "content": "The answer is 39"}
    message = ask(client, QUESTION, begun, thinking=DISABLED, max_tokens=1)
    expected = count_tokens(server, [QUESTION, begun], continue_final_message=True, add_generation_prompt=False)
    assert num_input(message) == expected


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thinking": ENABLED},
        {"thinking": ENABLED, "max_tokens": 20},
        {"thinking": {**ENABLED, "display": "omitted"}},
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "thinking": ENABLED},
        {"stop_sequences": ["is"], "thinking": DISABLED},
    ],
)
def test_a_stream_ends_with_the_same_message(client: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields)
    fields = {"max_tokens": 1000, "messages": [QUESTION], **fields}
    with client.messages.stream(model=MODEL, **fields, extra_body={"temperature": 0}) as stream:
        final = stream.get_final_message()
    assert without_ids(final) == without_ids(whole)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert num_input(final) == num_input(whole) and final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.output_tokens_details == whole.usage.output_tokens_details


def test_events_come_in_their_order(server: Server) -> None:
    events = raw_events(server, thinking=ENABLED)
    kinds = [event["type"] for event in events]
    shape = [kind for i, kind in enumerate(kinds) if kind != "content_block_delta" or kinds[i - 1] != kind]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert shape == ["message_start", "ping", *block, *block, "message_delta", "message_stop"]
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    first_text = deltas.index("text_delta")
    assert deltas[first_text - 1] == "signature_delta" and set(deltas[: first_text - 1]) == {"thinking_delta"}
    assert events[0]["message"]["content"] == [] and events[0]["message"]["stop_reason"] is None
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1]
    assert events[-2]["usage"]["output_tokens"] > 0 and events[-2]["delta"]["stop_reason"] == "end_turn"


def test_thinking_that_is_not_shown_leaves_no_trace_in_a_stream(server: Server) -> None:
    events = raw_events(server)
    assert {event["delta"]["type"] for event in events if event["type"] == "content_block_delta"} == {"text_delta"}
    assert events[-2]["usage"]["output_tokens_details"]["thinking_tokens"] > 0


def test_a_client_that_leaves_ends_its_message(server: Server) -> None:
    body = {"max_tokens": 4000, "messages": [QUESTION], "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=60) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while server.metric("vllm:num_requests_running") or server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_error", [None, True])
def test_results_are_sent_back(client: anthropic.Anthropic, server: Server, is_error: bool | None) -> None:
    first = ask(client, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"}, thinking=ENABLED)
    thinking, call = first.content
    assert first.stop_reason == "tool_use" and call.type == "tool_use" and call.id.startswith("toolu_")
    assert call.input in ({"city": "Paris"}, {"city": "Rome"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    if is_error is not None:
        result["is_error"] = is_error
    told = {"role": "user", "content": [result, {"type": "text", "text": "So?"}]}
    second = ask(client, QUESTION, {"role": "assistant", "content": first.content}, told, tools=[WEATHER])
    turn = {"role": "assistant", "content": None, "reasoning_content": thinking.thinking}
    turn["tool_calls"] = [{"id": "c", "function": {"name": "weather", "arguments": call.input}}]
    text = "Error: rain" if is_error else "rain"
    history = [
        QUESTION,
        turn,
        {"role": "tool", "tool_call_id": "c", "content": text},
        {"role": "user", "content": "So?"},
    ]
    assert num_input(second) == count_tokens(server, history, tools=[SHOWN])


def test_thinking_can_be_carried_unseen(client: anthropic.Anthropic) -> None:
    fields = {"tools": [WEATHER], "tool_choice": {"type": "any"}}
    sizes = {}
    for display in ("summarized", "omitted"):
        first = ask(client, thinking={**ENABLED, "display": display}, **fields)
        assert bool(first.content[0].thinking) == (display == "summarized")
        told = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": first.content[1].id}]}
        for name, content in ((display, first.content), ("lost", first.content[1:])):
            messages = [QUESTION, {"role": "assistant", "content": content}, told]
            counted = client.messages.count_tokens(model=MODEL, messages=messages, tools=[WEATHER])
            sizes[name] = counted.input_tokens
    assert sizes["omitted"] == sizes["summarized"] > sizes["lost"]


def test_several_calls_or_one(client: anthropic.Anthropic, server: Server) -> None:
    (brace,) = post(server, "/tokenize", prompt="{").json()["tokens"]
    extra = {"logit_bias": {str(brace): 100}}  # rather one more call than the end
    fields = {"tools": [WEATHER], "thinking": DISABLED, "max_tokens": 200, "extra": extra}
    several = ask(client, tool_choice={"type": "any"}, **fields)
    calls = [block for block in several.content if block.type == "tool_use"]
    assert len(calls) > 1 and len({call.id for call in calls}) == len(calls)
    one = ask(client, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **fields)
    assert [block.type for block in one.content] == ["tool_use"] and one.stop_reason == "tool_use"


def test_tools_are_hidden_where_none_is_to_be_called(client: anthropic.Anthropic) -> None:
    hidden = ask(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert num_input(hidden) == num_input(ask(client)) and hidden.content[0].text == ANSWER


# -- errors -----------------------------------------------------------------------------------------------------------


def user(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}


def called(**fields: Any) -> list[dict[str, Any]]:
    return [QUESTION, {"role": "assistant", "content": [{**CALL, **fields}]}]


def form(**fields: Any) -> dict[str, Any]:
    return {"output_config": {"format": {"type": "json_schema", **fields}}}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{**QUESTION, "name": "x"}]}, "messages[0].name"),
        ({"messages": user()}, "messages[0].content"),
        ({"messages": user({"type": "image", "source": {}})}, "messages[0].content[0].type"),
        ({"messages": user({"type": "text", "text": 1})}, "messages[0].content[0].text"),
        ({"messages": user({"type": "text", "text": "x", "colour": 1})}, "messages[0].content[0].colour"),
        ({"messages": user({"type": "tool_result", "tool_use_id": "x"})}, "messages[0].content[0].tool_use_id"),
        ({"messages": called()}, "messages[1]"),
        ({"messages": called(input="x")}, "messages[1].content[0].input"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tools": [{"name": "w"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "minimal"}}, "output_config.effort"),
        (form(type="json_object"), "output_config.format.type"),
        (form(), "output_config.format.schema"),
        (form(schema={"type": "x"}), "output_config.format.schema"),
        ({**form(schema=SCHEMA), "tools": [WEATHER]}, "output_config.format"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"], "stop": "b"}, "stop"),
        ({"mcp_servers": []}, "mcp_servers"),
    ],
)
def test_what_cannot_be_used_is_named(server: Server, fields: dict[str, Any], field: str) -> None:
    response = post(server, **{"max_tokens": 5, "messages": [QUESTION], **fields})
    assert response.status_code == 400
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error") and body["request_id"]
    assert body["error"]["message"].startswith(f"{field}: ")


def test_errors_have_their_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="m1-nano"):
        client.messages.create(model="claude", max_tokens=5, messages=[QUESTION])
    with pytest.raises(anthropic.BadRequestError, match="temprature"):
        ask(client, extra={"temprature": 1})
    with pytest.raises(anthropic.BadRequestError, match="max_thinking_tokens"):
        client.messages.count_tokens(model=MODEL, messages=[QUESTION], extra_body={"max_tokens": 5})


def test_a_stream_that_the_server_ends_says_so(tmp_path: Path) -> None:
    env = {"MINIMAX_M1_API_KEY": "sk-test"}
    with running_server("--drain-seconds", "0.2", usage_db=tmp_path / "usage.sqlite", env=env) as server:
        with make_client(server, "sk-other") as client, pytest.raises(anthropic.AuthenticationError):
            ask(client)
        with make_client(server, "sk-test") as client:
            stream = ask(client, stream=True, max_tokens=4000, thinking=ENABLED, extra=ENDLESS)
            kinds = [next(iter(stream)).type]
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(anthropic.APIStatusError) as caught:
                kinds += [event.type for event in stream]
        assert kinds[0] == "message_start" and caught.value.body["error"]["type"] == "overloaded_error"


# -- piece by piece ---------------------------------------------------------------------------------------------------


def test_blocks_become_turns() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "T", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R", "citations": None}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "H", "signature": "from elsewhere"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "A"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "2", "content": "O2", "is_error": True},
                {"type": "tool_result", "tool_use_id": "1"},
                {"type": "text", "text": "V"},
            ],
        },
        {"role": "assistant", "content": "W"},
    ]
    calls = [
        {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "2", "function": {"name": "g", "arguments": {}}},
    ]
    assert as_messages(messages, "S") == [
        {"role": "system", "content": "S\n\nT"},
        {"role": "user", "content": "QR"},
        {"role": "assistant", "content": "A", "reasoning_content": "H", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "Error: O2"},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "W", "reasoning_content": ""},
    ]
    with pytest.raises(UserError, match="citations"):
        as_messages([{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{}]}]}], None)
