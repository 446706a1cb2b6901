"""/v1/responses through the official openai client with its strict validation, and piece by piece."""

import asyncio
import json
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from minimax_m1 import shipped
from minimax_m1.engine import Engine
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import TokenLogprob
from minimax_m1.server.accounts import DEFAULT_PRICES, Accounts
from minimax_m1.server.app import create_app
from minimax_m1.server.errors import ApiError
from minimax_m1.server.reading import seal, unseal
from minimax_m1.server.response_items import TextTokens, as_messages, read_items
from minimax_m1.server.response_store import ResponseStore, StoredResponse
from minimax_m1.server.schemas_responses import ResponseBody, ResponseItems
from minimax_m1.server.service import Service
from minimax_m1.settings import EngineSettings, ServeSettings
from minimax_m1.tokenizer import AnswerParser, MiniMaxM1Tokenizer
from tests.server.conftest import Server, running_server

MODEL = "m1-nano"
QUESTION = "What is 17 * 23?"
ANSWER = "The answer is 391."
LOGPROBS = "message.output_text.logprobs"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Look out of the window.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK = {"type": "function", "name": "clock", "parameters": NOTHING, "strict": None}
ENDLESS = {"ignore_eos": True, "repetition_penalty": 1.3}  # until the context is full


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with make_client(server) as client:
        yield client


def make_client(server: Server, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=key, timeout=60, max_retries=0, _strict_response_validation=True
    )


def ask(client: openai.OpenAI, input: Any = QUESTION, **fields: Any) -> Any:
    return client.responses.create(model=MODEL, input=input, temperature=0, **fields)


def without_ids(response: Any) -> Any:
    """Return an output without what differs from one response to the next, and what the client adds to it."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            mine = ("id", "call_id", "parsed", "parsed_arguments")
            return {name: strip(item) for name, item in value.items() if name not in mine}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(response.to_dict()["output"])


def post(server: Server, path: str = "/v1/responses", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def count_tokens(server: Server, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> int:
    response = post(server, "/tokenize", messages=messages, tools=tools)
    assert response.status_code == 200, response.text
    return response.json()["count"]


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 10
    while server.metric("vllm:num_requests_running") or server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- an answer at once ------------------------------------------------------------------------------------------------


def test_an_answer_is_what_chat_says_in_items(client: openai.OpenAI, server: Server) -> None:
    response = ask(client)
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    reasoning, message = response.output
    assert response.status == "completed" and response.completed_at >= response.created_at
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert reasoning.content[0].text == chat.choices[0].message.reasoning and reasoning.summary == []
    assert response.output_text == message.content[0].text == chat.choices[0].message.content == ANSWER
    assert response.usage.input_tokens == count_tokens(server, messages) == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    details = chat.usage.completion_tokens_details
    assert response.usage.output_tokens_details.reasoning_tokens == details.reasoning_tokens > 0
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.usage.cost == pytest.approx(chat.usage.cost) and response.usage.flops > 0


def test_a_response_says_what_was_asked_for(client: openai.OpenAI) -> None:
    response = ask(
        client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=2000, top_p=0.5, tools=[CLOCK],
        tool_choice="none", parallel_tool_calls=False, reasoning={"effort": "low"}, user="me", service_tier="auto",
        truncation="disabled",
    )  # fmt: skip
    assert (response.instructions, response.metadata, response.user) == ("Be brief.", {"a": "b"}, "me")
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0, 0.5, 2000)
    assert response.tools[0].name == "clock" and response.tool_choice == "none" and not response.parallel_tool_calls
    assert response.reasoning.effort == "low" and response.service_tier == "default"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 5},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"include": [LOGPROBS, "reasoning.encrypted_content"], "top_logprobs": 3, "routing_log": "tokens"},
        {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 40, "reasoning": {"effort": "none"}},
    ],
)
def test_bodies_are_as_openapi_says(server: Server, fields: dict[str, Any]) -> None:
    body = post(server, input=QUESTION, **fields).json()
    ResponseBody.model_validate(body, strict=True)
    assert httpx.get(f"{server.url}/v1/responses/{body['id']}").json() == body
    items = httpx.get(f"{server.url}/v1/responses/{body['id']}/input_items").json()
    ResponseItems.model_validate(items, strict=True)


def test_what_is_too_long_is_incomplete(client: openai.OpenAI) -> None:
    thinking = ask(client, max_output_tokens=10)
    assert thinking.status == "incomplete" and thinking.incomplete_details.reason == "max_output_tokens"
    assert [(item.type, item.status) for item in thinking.output] == [("reasoning", "incomplete")]
    assert thinking.usage.output_tokens == 10 and thinking.completed_at is None
    whole = ask(client)
    cut = ask(client, max_output_tokens=whole.usage.output_tokens - 4)
    assert [item.status for item in cut.output] == ["completed", "incomplete"]
    assert ANSWER.startswith(cut.output_text) and 0 < len(cut.output_text) < len(ANSWER)


def test_thinking_has_a_budget(client: openai.OpenAI) -> None:
    assert [item.type for item in ask(client, reasoning={"effort": "none"}).output] == ["message"]
    response = ask(client, extra_body={"thinking_token_budget": 7})
    assert response.usage.output_tokens_details.reasoning_tokens == 7


def test_log_probabilities_are_those_of_the_text(client: openai.OpenAI) -> None:
    logprobs = ask(client, include=[LOGPROBS], top_logprobs=2).output[1].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == ANSWER
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in logprobs)
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, logprobs=True)
    values = [entry.logprob for entry in chat.choices[0].logprobs.content[-1 - len(logprobs) : -1]]
    assert [entry.logprob for entry in logprobs] == pytest.approx(values, abs=1e-5)


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    size: Literal["small", "large"]


def test_the_text_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Place, temperature=0)
    assert isinstance(parsed.output_parsed, Place)
    chosen = ask(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert chosen.output_text in ("yes", "no")


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 30},
        {"tools": [WEATHER, CLOCK], "tool_choice": "required"},
        {"include": [LOGPROBS], "top_logprobs": 2},
        {"reasoning": {"effort": "none"}},
    ],
)
def test_a_stream_ends_with_the_same_response(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields)
    events = []
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, **fields) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{whole.status}"
    assert whole.status == ("incomplete" if "max_output_tokens" in fields else "completed")
    assert without_ids(events[-1].response) == without_ids(whole)
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    if whole.status == "completed":
        assert without_ids(stream.get_final_response()) == without_ids(whole)


def test_events_make_the_output_one_by_one(server: Server) -> None:
    events = []
    body = {"input": QUESTION, "stream": True, "include": [LOGPROBS], "stream_options": {"include_obfuscation": False}}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for block in "".join(response.iter_text()).strip().split("\n\n"):
            name, data = re.fullmatch(r"event: (\S+)\ndata: (.*)", block).groups()
            events.append(json.loads(data))
            assert events[-1]["type"] == name
    items: list[dict[str, Any]] = []
    logprobs = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
        elif kind == "response.content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind in ("response.reasoning_text.delta", "response.output_text.delta"):
            assert event["item_id"] == items[-1]["id"]
            items[-1]["content"][event["content_index"]]["text"] += event["delta"]
            logprobs += event.get("logprobs", [])
        elif kind in ("response.reasoning_text.done", "response.output_text.done"):
            assert event["text"] == items[-1]["content"][0]["text"]
        elif kind == "response.content_part.done":
            items[-1]["content"][0] |= {"logprobs": logprobs} if items[-1]["type"] == "message" else {}
            assert event["part"] == items[-1]["content"][0]
        elif kind == "response.output_item.done":
            items[-1]["status"] = "completed"
            assert event["item"] == items[-1]
    assert items == events[-1]["response"]["output"]
    assert "".join(entry["token"] for entry in logprobs) == ANSWER


def test_a_client_that_leaves_ends_its_response(server: Server) -> None:
    body = {"input": QUESTION, "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if "reasoning_text.delta" in line:
                break
        name = next(iter(re.findall(r"resp_\w+", line)), None)
    wait_until_idle(server)
    assert name is None or httpx.get(f"{server.url}/v1/responses/{name}").status_code == 404


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "name": "weather"}, {"weather"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}, {"clock"}),
    ],
)
def test_forced_calls(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    response = ask(client, tools=[WEATHER, CLOCK], tool_choice=choice, reasoning={"effort": "none"})
    (call,) = response.output
    assert call.type == "function_call" and call.name in names and call.status == "completed"
    arguments = json.loads(call.arguments)
    assert arguments.get("city") in ("Paris", "Rome") if call.name == "weather" else isinstance(arguments, dict)


def test_results_are_sent_back_as_items_or_behind_the_response(client: openai.OpenAI, server: Server) -> None:
    question = {"role": "user", "content": "Weather in Paris?"}
    first = ask(client, [question], tools=[WEATHER], tool_choice="required", instructions="Be brief.")
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    by_items = ask(client, [question, *first.output, result], tools=[WEATHER], instructions="Be brief.")
    by_id = ask(client, [result], previous_response_id=first.id, tools=[WEATHER], instructions="Be brief.")
    assert without_ids(by_items) == without_ids(by_id)
    turn = {
        "role": "assistant",
        "content": None,
        "reasoning_content": first.output[0].content[0].text,
        "tool_calls": [{"id": "c", "function": {"name": call.name, "arguments": call.arguments}}],
    }
    told = {"role": "tool", "tool_call_id": "c", "content": "rain"}
    shown = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    messages = [{"role": "system", "content": "Be brief."}, question, turn, told]
    assert by_items.usage.input_tokens == by_id.usage.input_tokens == count_tokens(server, messages, [shown])


def test_several_calls_or_one(client: openai.OpenAI, server: Server) -> None:
    (brace,) = post(server, "/tokenize", prompt="{").json()["tokens"]
    fields = {"tools": [WEATHER], "tool_choice": "required", "reasoning": {"effort": "none"}, "max_output_tokens": 200}
    extra = {"logit_bias": {str(brace): 100}}  # rather one more call than the end
    several = ask(client, **fields, extra_body=extra)
    calls = [item for item in several.output if item.type == "function_call"]
    assert len(calls) > 1 and len({call.call_id for call in calls}) == len({call.id for call in calls}) == len(calls)
    assert several.status == "incomplete"
    one = ask(client, **fields, parallel_tool_calls=False, extra_body=extra)
    assert [item.type for item in one.output] == ["function_call"] and one.status == "completed"


def test_thinking_can_be_carried_unseen(client: openai.OpenAI) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "store": False, "include": ["reasoning.encrypted_content"]}
    first = ask(client, **fields)
    reasoning, call = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    given = {"type": "reasoning", "id": reasoning.id, "summary": []}
    sealed = {**given, "encrypted_content": reasoning.encrypted_content}
    question = {"role": "user", "content": QUESTION}
    carried = ask(client, [question, sealed, call, result], tools=[WEATHER])
    seen = ask(client, [question, reasoning, call, result], tools=[WEATHER])
    lost = ask(client, [question, {**given, "encrypted_content": "gAAAAB"}, call, result], tools=[WEATHER])
    assert carried.usage.input_tokens == seen.usage.input_tokens > lost.usage.input_tokens
    assert without_ids(carried) == without_ids(seen)


# -- history ----------------------------------------------------------------------------------------------------------


def test_a_response_goes_on_from_another(client: openai.OpenAI, server: Server) -> None:
    first = ask(client, instructions="Speak of numbers.")
    second = ask(client, "What is 12 + 30?", previous_response_id=first.id)
    third = ask(client, [{"role": "developer", "content": "Now."}, {"role": "user", "content": "And?"}],
                previous_response_id=second.id, instructions="Be brief.")  # fmt: skip
    assert second.output_text == "The answer is 42." and second.previous_response_id == first.id
    history = [  # without the first instructions, and without the thinking that came before the last question
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "What is 12 + 30?"},
    ]
    assert second.usage.input_tokens == count_tokens(server, history)
    system = {"role": "system", "content": "Be brief.\n\nNow."}
    turn = {"role": "assistant", "content": second.output_text}
    history = [system, *history, turn, {"role": "user", "content": "And?"}]
    assert third.usage.input_tokens == count_tokens(server, history)


def test_input_items_come_page_by_page(client: openai.OpenAI) -> None:
    first = ask(client, [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}], "id": "mine"}])
    second = ask(client, "Why?", previous_response_id=first.id)
    items = list(client.responses.input_items.list(second.id, limit=1, order="asc"))
    assert [item.type for item in items] == ["message", "reasoning", "message", "message"]
    assert items[0].id == "mine" and items[0].content[0].text == QUESTION
    assert [item.id for item in items[1:3]] == [item.id for item in first.output]
    newest = client.responses.input_items.list(second.id, limit=1)
    assert newest.data[0].content[0].text == "Why?" and newest.has_more
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.input_items.list(second.id, after="other")
    assert caught.value.param == "after"


def test_what_is_not_stored_is_not_there(client: openai.OpenAI) -> None:
    response = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, previous_response_id=response.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_a_deleted_response_is_gone(client: openai.OpenAI, server: Server) -> None:
    response = ask(client)
    later = ask(client, "Why?", previous_response_id=response.id)
    deleted = httpx.delete(f"{server.url}/v1/responses/{response.id}")
    assert deleted.json() == {"id": response.id, "object": "response", "deleted": True}
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    assert ask(client, "Why?", previous_response_id=later.id).status == "completed"


# -- in the background ------------------------------------------------------------------------------------------------


def test_a_background_response_is_polled(client: openai.OpenAI) -> None:
    started = ask(client, background=True)
    assert started.status == "queued" and started.background and started.output == []
    response = started
    deadline = time.monotonic() + 30
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        response = client.responses.retrieve(started.id)
    assert response.status == "completed" and without_ids(response) == without_ids(ask(client))
    assert client.responses.cancel(started.id) == response  # too late


def test_cancelling_frees_what_it_used(client: openai.OpenAI, server: Server) -> None:
    wait_until_idle(server)
    started = ask(client, background=True, extra_body=ENDLESS)
    while client.responses.retrieve(started.id).status == "queued":
        time.sleep(0.01)
    assert server.metric("vllm:num_requests_running") == 1
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        ask(client, previous_response_id=started.id)
    cancelled = client.responses.cancel(started.id)
    assert server.metric("vllm:num_requests_running") == 0
    assert cancelled.status == "cancelled" and cancelled.error is None
    assert cancelled.output[-1].status == "incomplete" and cancelled.usage.output_tokens > 0
    assert client.responses.cancel(started.id) == cancelled == client.responses.retrieve(started.id)
    started = ask(client, background=True, extra_body=ENDLESS)
    client.responses.delete(started.id)
    assert server.metric("vllm:num_requests_running") == 0
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(ask(client).id)


def test_a_failure_in_the_background_is_told() -> None:
    async def fail() -> tuple[dict[str, Any], dict[str, Any]]:
        model = MiniMaxM1ForCausalLM.from_pretrained(shipped.path())
        tokenizer = MiniMaxM1Tokenizer.from_pretrained(shipped.path())
        engine = Engine(model, tokenizer, EngineSettings(cache_bytes=64 << 20, routing_log=True))
        service = Service(engine, MODEL, ServeSettings(access_log=False), Accounts([], DEFAULT_PRICES, None))
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            started = (await http.post("/v1/responses", json={"input": "Hi", "background": True, **ENDLESS})).json()
            await service.drain(0)
            failed = (await http.get(f"/v1/responses/{started['id']}")).json()
        await service.close()
        return started, failed

    started, failed = asyncio.run(fail())
    assert started["status"] == "queued" and failed["status"] == "failed"
    assert failed["error"]["code"] == "server_error" and "stop" in failed["error"]["message"]
    ResponseBody.model_validate(failed, strict=True)


def test_a_stream_that_the_server_ends_says_so(tmp_path: Path) -> None:
    with (
        running_server("--drain-seconds", "0.2", usage_db=tmp_path / "usage.sqlite") as server,
        make_client(server) as client,
    ):
        kinds = []
        for event in client.responses.create(model=MODEL, input=QUESTION, stream=True, extra_body=ENDLESS):
            if not kinds:
                server.process.send_signal(signal.SIGTERM)
            kinds.append(event.type)
        assert kinds[-1] == "response.failed" and kinds.count("response.output_item.done") >= 1
        assert event.response.error.code == "server_error" and event.response.output[-1].status == "incomplete"


# -- keys -------------------------------------------------------------------------------------------------------------


def test_responses_belong_to_their_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[keys]]\nname = "a"\nkey = "sk-a"\nmax_concurrency = 1\n[[keys]]\nname = "b"\nkey = "sk-b"\n',
        encoding="utf-8",
    )
    with (
        running_server("--keys", str(keys), usage_db=tmp_path / "usage.sqlite") as server,
        make_client(server, "sk-a") as mine,
        make_client(server, "sk-b") as other,
    ):
        response = ask(mine, background=True, extra_body=ENDLESS)
        for call in (
            other.responses.retrieve, other.responses.cancel, other.responses.delete, other.responses.input_items.list,
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                call(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(other, previous_response_id=response.id)
        assert caught.value.code == "previous_response_not_found"
        with pytest.raises(openai.RateLimitError) as limited:  # what runs in the background counts
            ask(mine)
        assert int(limited.value.response.headers["retry-after"]) >= 1
        assert mine.responses.cancel(response.id).status == "cancelled"
        assert ask(mine, "Hi").status == "completed"
        rows = httpx.get(f"{server.url}/v1/usage", headers={"Authorization": "Bearer sk-a"}).json()["data"]
        assert sum(row["requests"] for row in rows) == 2


# -- errors -----------------------------------------------------------------------------------------------------------


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x", "id": 1}]}, "input[0].id"),
        ({"input": [{"role": "user", "content": "x", "contents": 1}]}, "input[0].contents"),
        ({"input": user({"type": "input_image", "image_url": "x"})}, "input[0].content[0].type"),
        ({"input": user({"type": "input_text", "text": 1})}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": "x", "id": "i"}] * 2}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]}, "input[0].arguments"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "x"}]}]}, "input[0].summary[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**CLOCK, "colour": 1}]}, "tools[0].colour"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice.tools",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [CLOCK]}, "text.format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"min_tokens": 9, "max_output_tokens": 8}, "min_tokens"),
        ({"input": "a " * 5000}, "input"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_be_used_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    response = post(server, **({"input": "Hi"} if fields and "input" not in fields else {}), **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(param)


def test_queries_are_not_swallowed(client: openai.OpenAI, server: Server) -> None:
    url = f"{server.url}/v1/responses/{ask(client).id}"
    for query, param in (
        ("stream=true", "stream"),
        ("include[]=x", "include[]"),
        ("starting_after=1", "starting_after"),
    ):
        response = httpx.get(f"{url}?{query}")
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert httpx.get(f"{url}/input_items?limit=0").status_code == 400
    assert post(server, input="Hi", model="other").status_code == 404


# -- piece by piece ---------------------------------------------------------------------------------------------------


def stored(name: str, status: str = "completed") -> StoredResponse:
    return StoredResponse("key", {"id": name, "status": status}, [])


def test_the_store_is_bounded_in_number_and_bytes() -> None:
    store = ResponseStore(most_responses=2, most_bytes=100)
    for name in "abc":
        store.put(stored(name), 10)
    with pytest.raises(ApiError) as caught:
        store.get("a", "key")
    assert caught.value.status_code == 404
    assert store.get("b", "key").body["id"] == "b"
    store.put(store.get("c", "key"), 95)  # what has become of it
    with pytest.raises(ApiError):
        store.get("b", "key")
    store.put(stored("d"), 5)
    assert store.get("c", "key").num_bytes == 95 and store.get("d", "key")
    store.put(stored("huge"), 101)
    for name in ("c", "d", "huge"):
        with pytest.raises(ApiError):
            store.get(name, "key")
    store.put(stored("e"), 100)  # nothing is counted of those that are gone
    with pytest.raises(ApiError):
        store.get("e", "other key")
    assert store.get("e", "key")


def test_what_runs_stays_in_the_store() -> None:
    async def run() -> None:
        store = ResponseStore(most_responses=1)
        running = stored("running", "in_progress")
        running.task = asyncio.create_task(asyncio.sleep(60))  # type: ignore[assignment]
        store.put(running, 1)
        store.put(stored("later"), 1)
        assert store.get("running", "key") is running
        with pytest.raises(ApiError):
            store.get("later", "key")
        running.task.cancel()
        await asyncio.wait([running.task])
        store.put(stored("last"), 1)
        with pytest.raises(ApiError):
            store.get("running", "key")

    asyncio.run(run())


def test_items_become_turns() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"}

    items = read_items(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "R1"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "T", "annotations": []}]},
            call("1"),
            call("2"),
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "O1"}]},
            {"type": "function_call_output", "call_id": "2", "output": "O2"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "R2"}]},
            call("3"),
            {"role": "assistant", "content": "U"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "cut off"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "V"}, {"type": "input_text", "text": "W"}]},
        ]
    )

    def calls(*names: str) -> list[dict[str, Any]]:
        return [{"id": name, "function": {"name": "f", "arguments": "{}"}} for name in names]

    assert as_messages(items, "I") == [
        {"role": "system", "content": "I\n\nS"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "T", "reasoning_content": "R1", "tool_calls": calls("1", "2")},
        {"role": "tool", "tool_call_id": "1", "content": "O1"},
        {"role": "tool", "tool_call_id": "2", "content": "O2"},
        {"role": "assistant", "content": "", "reasoning_content": "R2", "tool_calls": calls("3")},
        {"role": "assistant", "content": "U", "reasoning_content": ""},
        {"role": "user", "content": "VW"},
    ]
    with pytest.raises(UserError, match="call_id"):
        as_messages(read_items([{"type": "function_call_output", "call_id": "1", "output": "x"}]), None)


def test_a_seal_opens_again() -> None:
    for text in ("", "a", "<think>é\n"):
        assert unseal(seal(text)) == text
    assert unseal("gAAAAABm") == unseal("minimax-m1:?") == ""


@pytest.mark.parametrize("thinking", ["", "<think>\nHow? </tool_calls> é\n</think>\n\n", "  <think>a</think>"])
@pytest.mark.parametrize("content", ["Hello, <b>wörld</b>!", "\N{FAMILY}é: 1 < 2", "<", "a\n\n"])
@pytest.mark.parametrize("calls", ["", '\n<tool_calls>\n{"name": "f", "arguments": {"x": "Hello"}}\n</tool_calls>'])
def test_tokens_of_the_text_are_found_however_it_comes(thinking: str, content: str, calls: str) -> None:
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(shipped.path())
    behind = "Hello, again" if calls else ""
    ids = [*tokenizer.encode(thinking + content + calls + behind), tokenizer.eos_token_id]
    for seed in range(5):
        draw = random.Random(seed)
        parser, tokens, decoder = AnswerParser(), TextTokens(tokenizer, [1]), tokenizer.stream_decoder()
        texts: list[str] = []  # of messages, and what their tokens say
        found: list[list[int]] = []
        is_open, lag = False, ""
        while_left = list(ids)
        while while_left:
            step = [while_left.pop(0) for _ in range(min(len(while_left), draw.randint(1, 4)))]
            tokens.push([TokenLogprob(token, -1.0, 1) for token in step])
            lag += "".join(decoder.push(token) for token in step if token != tokenizer.eos_token_id)
            cut = len(lag) if not while_left else draw.randint(0, len(lag))  # the engine holds text back
            events = parser.push(lag[:cut]) + (parser.finish() if not while_left else [])
            lag = lag[cut:]
            for event in events:
                if event.kind != "content":
                    is_open = False
                    tokens.lose()
                    continue
                if not is_open:
                    texts.append("")
                    found.append([])
                    is_open = True
                texts[-1] += event.text
                found[-1] += [entry.token for entry in tokens.take(event.text)]
        assert "".join(texts).strip() == (content + behind).strip()
        for text, ids_of_text in zip(texts, found, strict=True):
            said = tokenizer.decode(ids_of_text)
            assert text in said and len(said) - len(text) <= 12, (said, text)  # markup that shares a token
