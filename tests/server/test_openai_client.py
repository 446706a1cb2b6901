"""The official openai client for Python, with its strict validation of answers, on a tour through the server."""

import asyncio
import base64
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.conftest import Server, running_server

MODEL = "m1-nano"
QUESTION = [{"role": "user", "content": "What is 384 + 729?"}]
ROUNDING = 1e-4  # of probabilities that are added up
HTTP = httpx.Client(timeout=60)  # for what the client has no methods for


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with make_client(server) as client:
        yield client


def make_client(server: Server, key: str = "any", **more: Any) -> openai.OpenAI:
    more = {"max_retries": 0, "_strict_response_validation": True, **more}
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=60, **more)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """Ask with the fields that the client knows by name, and all others through `extra_body`."""
    own = {
        "thinking_token_budget", "max_thinking_tokens", "thinking_budget_tokens", "thinking", "chat_template_kwargs",
        "structured_outputs", "top_k", "min_p", "min_tokens", "ignore_eos", "stop_token_ids", "repetition_penalty",
        "return_token_ids", "continue_final_message", "include_reasoning", "routing_log",
    }  # fmt: skip
    extra = {name: fields.pop(name) for name in own & fields.keys()}
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, **fields}
    return client.chat.completions.create(**fields, extra_body=extra)


def tokenize(server: Server, **body: Any) -> list[int]:
    response = HTTP.post(f"{server.url}/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()["tokens"]


def token_texts(server: Server, ids: Iterable[int]) -> list[str]:
    return [HTTP.post(f"{server.url}/detokenize", json={"tokens": [token]}).json()["prompt"] for token in ids]


# -- an answer at once ------------------------------------------------------------------------------------------------


def test_chat(server: Server, client: openai.OpenAI) -> None:
    before = time.time()
    answer = ask(client)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == MODEL
    assert before - 2 <= answer.created <= time.time()
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == "The answer is 1113."
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert choice.message.reasoning == choice.message.reasoning_content
    assert choice.message.reasoning.startswith("Add ")
    usage = answer.usage
    assert usage.prompt_tokens == len(tokenize(server, messages=QUESTION))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.cost > 0 and usage.flops > 0


def test_request_ids(client: openai.OpenAI) -> None:
    assert ask(client, max_tokens=1)._request_id.startswith("req_")
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "my-own-7"}
    )
    assert answer._request_id == "my-own-7"


def test_reasoning_can_be_left_out(client: openai.OpenAI) -> None:
    answer = ask(client, include_reasoning=False)
    assert answer.choices[0].message.content == "The answer is 1113."
    assert "reasoning" not in answer.choices[0].message.model_dump(exclude_unset=True)
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_ids_of_an_answer(server: Server, client: openai.OpenAI) -> None:
    answer = ask(client, return_token_ids=True)
    assert answer.prompt_token_ids == tokenize(server, messages=QUESTION)
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens
    text = "".join(token_texts(server, answer.choices[0].token_ids))
    assert answer.choices[0].message.content in text and answer.choices[0].message.reasoning in text


# -- streams ----------------------------------------------------------------------------------------------------------


def accumulate(chunks: Iterable[ChatCompletionChunk]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Put the deltas of every choice together as a client does, checking the order; return also all usages."""
    choices: dict[int, dict[str, Any]] = {}
    usages = []
    ids = set()
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk" and not (usages and usages[-1][1]), "the last was no usage chunk"
        ids.add((chunk.id, chunk.created, chunk.model))
        if chunk.usage is not None:
            usages.append((chunk.usage, not chunk.choices))
        else:
            assert chunk.choices
        for choice in chunk.choices:
            is_first = choice.index not in choices
            whole = choices.setdefault(
                choice.index,
                {"content": "", "reasoning": "", "tool_calls": [], "logprobs": [], "ids": [], "finish_reason": None},
            )
            assert (choice.delta.role == "assistant") == is_first
            assert whole["finish_reason"] is None, "something came behind the finish_reason"
            whole["finish_reason"] = choice.finish_reason
            whole["content"] += choice.delta.content or ""
            reasoning = getattr(choice.delta, "reasoning", None) or ""
            assert reasoning == (getattr(choice.delta, "reasoning_content", None) or "")
            whole["reasoning"] += reasoning
            whole["logprobs"] += choice.logprobs.content if choice.logprobs else []
            whole["ids"] += getattr(choice, "token_ids", None) or []
            for call in choice.delta.tool_calls or []:
                if call.index == len(whole["tool_calls"]):
                    assert call.id and call.type == "function"
                    whole["tool_calls"].append({"name": call.function.name, "arguments": ""})
                whole["tool_calls"][call.index]["arguments"] += call.function.arguments
    assert len(ids) == 1
    assert all(whole["finish_reason"] is not None for whole in choices.values())
    return [choices[index] for index in sorted(choices)], usages


def whole_answer(answer: ChatCompletion) -> list[dict[str, Any]]:
    """Return an answer's choices in the form of `accumulate`."""
    return [
        {
            "content": choice.message.content or "",
            "reasoning": choice.message.reasoning or "",
            "tool_calls": [
                {"name": call.function.name, "arguments": call.function.arguments}
                for call in choice.message.tool_calls or []
            ],
            "logprobs": choice.logprobs.content if choice.logprobs else [],
            "ids": getattr(choice, "token_ids", None) or [],
            "finish_reason": choice.finish_reason,
        }
        for choice in answer.choices
    ]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": f"turn {name}", "parameters": parameters}}


LAMP = {"type": "string", "enum": ["red", "green"]}
TOOLS = [tool("on", lamp=LAMP), tool("off", lamp=LAMP, seconds={"type": "integer", "minimum": 0, "maximum": 9})]
# m1-nano has never seen a tool; a budget keeps it from talking about that at length.
CALL = {"tools": TOOLS, "max_tokens": 400, "thinking_token_budget": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "seed": 4, "temperature": 2.0, "max_tokens": 60},
        {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"stop": ["answer is"], "thinking_token_budget": 9},
        {"messages": [{"role": "user", "content": "Sort 31, 4, 15."}], "max_tokens": 20},
        {**CALL, "tool_choice": "required", "n": 8, "temperature": 30.0, "top_p": 1.0, "seed": 1},
        {**CALL, "tool_choice": "auto", "max_tokens": 40, "logprobs": True},
        {"structured_outputs": {"choice": ["pear", "plum"]}, "logprobs": True},
    ],
    ids=["plain", "n", "logprobs", "stop", "length", "calls", "auto", "choice"],
)
def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    answer = ask(client, **fields)
    with ask(client, **fields, stream=True) as stream:
        choices, usages = accumulate(stream)
    assert choices == whole_answer(answer)
    assert usages == []


def test_usage_of_a_stream_comes_last_and_only_if_asked_for(client: openai.OpenAI) -> None:
    def tokens(usage: Any) -> tuple[int, int, int]:
        return usage.prompt_tokens, usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens

    wanted = tokens(ask(client).usage)
    _, usages = accumulate(ask(client, stream=True, stream_options={"include_usage": True}))
    assert [(tokens(usage), is_last) for usage, is_last in usages] == [(wanted, True)]
    _, usages = accumulate(
        ask(client, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    )
    counts = [usage.completion_tokens for usage, _ in usages]
    assert len(counts) > 2 and counts == sorted(counts) and tokens(usages[-1][0]) == wanted


def test_bytes_of_a_stream(server: Server) -> None:
    body = {"model": MODEL, "messages": QUESTION, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        events = b"".join(response.iter_bytes()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])


def test_the_clients_own_accumulation(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == "The answer is 1113."


def test_who_leaves_a_stream_leaves_nothing_behind(server: Server, client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, ignore_eos=True, max_tokens=4000, temperature=1.0)
    next(iter(stream))
    assert server.metric("vllm:num_requests_running") >= 1
    stream.close()
    end = time.monotonic() + 5
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.02)
    assert server.metric("vllm:num_requests_running") == 0


# -- thinking ---------------------------------------------------------------------------------------------------------


def thinking_tokens(texts: list[str]) -> int:
    """Count the tokens strictly between the one that completes <think> and the first of the close."""
    ends = [len("".join(texts[: i + 1])) for i in range(len(texts))]
    text = "".join(texts)
    opened = next(i for i, end in enumerate(ends) if end >= text.index("<think>") + len("<think>"))
    closed = next(i for i, end in enumerate(ends) if end > text.index("</think>"))
    return closed - opened - 1 - (texts[closed - 1] == "\n")


@pytest.mark.parametrize("question", ["What is 384 + 729?", "Hello!", "Sort 31, 4, 15."])
def test_reasoning_tokens_are_counted_exactly(server: Server, client: openai.OpenAI, question: str) -> None:
    answer = ask(client, messages=[{"role": "user", "content": question}], return_token_ids=True)
    texts = token_texts(server, answer.choices[0].token_ids)
    assert answer.usage.completion_tokens_details.reasoning_tokens == thinking_tokens(texts) > 0


def test_budgets_are_met_exactly_together(server: Server) -> None:
    async def reasoning_tokens() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            answers = await asyncio.gather(*[ask(client, thinking_token_budget=budget) for budget in range(12)])  # type: ignore[arg-type]
        return [answer.usage.completion_tokens_details.reasoning_tokens for answer in answers]

    assert asyncio.run(reasoning_tokens()) == list(range(12))


def test_names_of_the_budget(client: openai.OpenAI) -> None:
    forms = [
        {"thinking_token_budget": 7},
        {"max_thinking_tokens": 7},
        {"thinking_budget_tokens": 7},
        {"thinking": {"type": "enabled", "budget_tokens": 7}},
        {"thinking_token_budget": 7, "max_thinking_tokens": 7, "thinking": {"type": "enabled"}},
    ]
    answers = [ask(client, **form) for form in forms]
    assert all(answer.usage.completion_tokens_details.reasoning_tokens == 7 for answer in answers)
    assert all(whole_answer(answer) == whole_answer(answers[0]) for answer in answers)


def test_names_of_no_thinking(client: openai.OpenAI) -> None:
    forms = [
        {"thinking_token_budget": 0},
        {"max_thinking_tokens": 0},
        {"thinking_budget_tokens": 0},
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ]
    answers = [ask(client, **form) for form in forms]
    assert all(answer.usage.completion_tokens_details.reasoning_tokens == 0 for answer in answers)
    assert all(answer.choices[0].message.reasoning is None for answer in answers)
    assert all(whole_answer(answer) == whole_answer(answers[0]) for answer in answers)


def test_names_of_free_thinking(client: openai.OpenAI) -> None:
    wanted = whole_answer(ask(client))
    for form in (
        {"thinking_token_budget": -1},
        {"thinking": {"type": "adaptive"}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"reasoning_effort": "minimal"},  # a budget far beyond what this question needs
        {"reasoning_effort": "max"},
    ):
        assert whole_answer(ask(client, **form)) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_token_budget": 7, "max_thinking_tokens": 8},
        {"thinking_token_budget": -1, "thinking_budget_tokens": 8},
        {"thinking": {"type": "disabled"}, "thinking_budget_tokens": 8},
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}, "max_thinking_tokens": 3},
    ],
)
def test_budgets_that_contradict_each_other(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="say different things") as caught:
        ask(client, **fields)
    assert caught.value.param in fields


# -- tools ------------------------------------------------------------------------------------------------------------


class On(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    lamp: Literal["red", "green"]


class Off(On):
    seconds: int = pydantic.Field(ge=0, le=9)


def check_calls(message: Any, names: set[str]) -> int:
    """Check that a message is calls of these tools and nothing else; return how many."""
    assert message.content is None and len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    for call in message.tool_calls:
        assert call.type == "function" and call.function.name in names
        (On if call.function.name == "on" else Off).model_validate_json(call.function.arguments)
    return len(message.tool_calls)


def test_a_required_tool_and_its_result(server: Server, client: openai.OpenAI) -> None:
    answer = ask(client, **CALL, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message
    assert check_calls(message, {"on", "off"}) >= 1
    history = [*QUESTION, message.model_dump(exclude_unset=True)]
    for call in message.tool_calls:
        history.append({"role": "tool", "tool_call_id": call.id, "content": "it is done: 271828"})
    answer = ask(client, messages=history, tools=TOOLS, max_tokens=60, return_token_ids=True)
    prompt = HTTP.post(f"{server.url}/detokenize", json={"tokens": answer.prompt_token_ids}).json()["prompt"]
    for call in message.tool_calls:
        assert f'{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}' in prompt
    assert f"tool name: {message.tool_calls[-1].function.name}\ntool result: it is done: 271828" in prompt
    assert answer.choices[0].message.content


def test_parallel_calls_and_their_results(server: Server, client: openai.OpenAI) -> None:
    # so hot that every token which the grammar allows is about as likely as any other
    hot = {**CALL, "tool_choice": "required", "n": 16, "temperature": 30.0, "top_p": 1.0, "seed": 1}
    answer = ask(client, **hot)
    counts = [check_calls(choice.message, {"on", "off"}) for choice in answer.choices]
    assert max(counts) >= 2 and {choice.finish_reason for choice in answer.choices} == {"tool_calls"}
    message = next(choice.message for choice in answer.choices if len(choice.message.tool_calls) >= 2)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"result {i} of several"}
        for i, call in enumerate(message.tool_calls)
    ]
    history = [*QUESTION, message.model_dump(), *results]  # null for all that is absent
    prompt = HTTP.post(
        f"{server.url}/detokenize", json={"tokens": tokenize(server, messages=history, tools=TOOLS)}
    ).json()["prompt"]
    places = [prompt.index(f"result {i} of several") for i in range(len(results))]
    assert places == sorted(places)
    assert ask(client, messages=history, tools=TOOLS, max_tokens=5).usage.completion_tokens > 0

    answer = ask(client, **hot, parallel_tool_calls=False)
    assert [check_calls(choice.message, {"on", "off"}) for choice in answer.choices] == [1] * 16


def test_a_named_tool(client: openai.OpenAI) -> None:
    answer = ask(client, **CALL, tool_choice={"type": "function", "function": {"name": "off"}}, n=4, temperature=3.0)
    assert all(check_calls(choice.message, {"off"}) for choice in answer.choices)


def test_no_tool_is_as_if_there_were_none(client: openai.OpenAI) -> None:
    with_none, without = ask(client, tools=TOOLS, tool_choice="none"), ask(client)
    assert whole_answer(with_none) == whole_answer(without)
    assert with_none.usage.prompt_tokens == without.usage.prompt_tokens
    assert ask(client, tools=TOOLS, max_tokens=1).usage.prompt_tokens > without.usage.prompt_tokens


def test_tools_parsed_by_the_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(Off)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=300,
        reasoning_effort="none",
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Off)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "of"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0]"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "on"}]}, "functions"),
    ],
)
def test_tools_that_cannot_be_used(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.param == param


# -- form -------------------------------------------------------------------------------------------------------------


class Fruit(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    kind: Literal["pear", "plum"]
    count: int = pydantic.Field(ge=0, le=99)
    ripe: bool


def test_a_json_schema(client: openai.OpenAI) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "fruit", "strict": True, "schema": Fruit.model_json_schema()},
    }
    answer = ask(client, response_format=form, max_tokens=400, n=4, temperature=2.0, seed=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        Fruit.model_validate_json(choice.message.content)
    assert answer.choices[0].message.reasoning  # the thinking stays free


def test_a_model_parsed_by_the_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Fruit, temperature=0, max_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Fruit)


def test_a_json_object(server: Server, client: openai.OpenAI) -> None:
    # m1-nano would fill an endless string, so the bias closes what can be closed
    close = {str(token): 100 for token in tokenize(server, prompt="}")}
    answer = ask(
        client, response_format={"type": "json_object"}, logit_bias=close, max_tokens=300, thinking_token_budget=0
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]{2}"}, r"[ab]{3}-[0-9]{2}"),
        ({"choice": ["pear", "plum"]}, r"pear|plum"),
        ({"grammar": 'start: "x" /[0-9]{1,3}/ "y"'}, r"x[0-9]{1,3}y"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, r"[1-9][0-9]"),
    ],
)
def test_structured_outputs(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    answer = ask(client, structured_outputs=form, max_tokens=200, n=4, temperature=2.0, seed=0)
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and re.fullmatch(pattern, choice.message.content)


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs(server: Server, client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=5, return_token_ids=True)
    choice = answer.choices[0]
    found = choice.logprobs.content
    assert len(found) == answer.usage.completion_tokens
    for place in found:
        probabilities = [math.exp(other.logprob) for other in place.top_logprobs]
        assert len(probabilities) == 5 and sum(probabilities) <= 1 + ROUNDING
        assert probabilities == sorted(probabilities, reverse=True)
        assert place.token == place.top_logprobs[0].token
        assert place.logprob == pytest.approx(place.top_logprobs[0].logprob, abs=ROUNDING)
    assert [place.token for place in found] == token_texts(server, choice.token_ids)
    text = b"".join(bytes(place.bytes) for place in found).decode()
    assert text == f"<think>\n{choice.message.reasoning}\n</think>\n{choice.message.content}<end_of_sentence>"


def test_logprobs_without_top(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, max_tokens=5, temperature=2.0, seed=1)
    assert [place.top_logprobs for place in answer.choices[0].logprobs.content] == [[]] * 5
    assert all(place.logprob <= 0 for place in answer.choices[0].logprobs.content)
    assert ask(client, max_tokens=5).choices[0].logprobs is None


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_seeds_of_samples(client: openai.OpenAI) -> None:
    fields = {"temperature": 3.0, "top_p": 1.0, "max_tokens": 40}
    first = whole_answer(ask(client, **fields, n=3, seed=11))
    assert len({choice["reasoning"] + choice["content"] for choice in first}) == 3
    assert whole_answer(ask(client, **fields, n=3, seed=11)) == first
    assert [whole_answer(ask(client, **fields, seed=11 + i))[0] for i in range(3)] == first


def test_without_a_seed_every_draw_is_another(client: openai.OpenAI) -> None:
    answers = [whole_answer(ask(client, temperature=5.0, max_tokens=40))[0] for _ in range(2)]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_limits_that_leave_one_token_are_greedy(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    assert whole_answer(ask(client, temperature=5.0, **fields)) == whole_answer(ask(client))


def test_stop_strings(client: openai.OpenAI) -> None:
    choice = ask(client, stop=["answer", "never"]).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.stop_reason) == ("The ", "stop", "answer")


def test_stop_token_ids(server: Server, client: openai.OpenAI) -> None:
    (token,) = tokenize(server, prompt=";")
    answer = ask(client, stop_token_ids=[token], return_token_ids=True)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)
    assert choice.token_ids.index(token) == answer.usage.completion_tokens - 1


def test_lengths(server: Server, client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{name: 6})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "length")
    natural = ask(client).usage.completion_tokens
    answer = ask(client, min_tokens=natural + 7, max_tokens=natural + 9)
    assert natural + 7 <= answer.usage.completion_tokens <= natural + 9
    answer = ask(client, ignore_eos=True, max_tokens=natural + 20)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (natural + 20, "length")


def test_logit_bias_forbids_and_forces(server: Server, client: openai.OpenAI) -> None:
    first = ask(client, return_token_ids=True, max_tokens=1).choices[0].token_ids[0]
    assert ask(client, return_token_ids=True, max_tokens=1, logit_bias={first: -100}).choices[0].token_ids[0] != first
    (token,) = tokenize(server, prompt="7")
    assert ask(client, logit_bias={token: 100}, max_tokens=9).choices[0].message.content == "7" * 9


def test_penalties(server: Server, client: openai.OpenAI) -> None:
    one, two = tokenize(server, prompt="1") + tokenize(server, prompt="2")

    def counts(**penalties: float) -> list[int]:
        completion = client.completions.create(
            model=MODEL, prompt="1 2 ", max_tokens=40, temperature=0, logit_bias={str(one): 100, str(two): 100},
            extra_body={"ignore_eos": True}, **penalties,
        )  # fmt: skip
        return sorted(Counter(completion.choices[0].text).values())

    assert counts(frequency_penalty=-2.0) == [40]
    fewest, most = counts(frequency_penalty=2.0)
    assert fewest + most == 40 and most <= 30
    assert counts(presence_penalty=-2.0) == [40]
    completion = client.completions.create(
        model=MODEL, prompt="The answer is", max_tokens=30, temperature=0,
        extra_body={"ignore_eos": True, "repetition_penalty": 1000.0, "return_token_ids": True},
    )  # fmt: skip
    choice = completion.choices[0]
    assert len(set(choice.token_ids)) == 30 and not set(choice.token_ids) & set(choice.prompt_token_ids)


# -- conversations ----------------------------------------------------------------------------------------------------


def test_forms_of_messages(server: Server, client: openai.OpenAI) -> None:
    def prompt(*messages: dict[str, Any]) -> list[int]:
        return ask(client, messages=list(messages), max_tokens=1, return_token_ids=True).prompt_token_ids

    assert prompt({"role": "developer", "content": "Be brief."}, *QUESTION) == prompt(
        {"role": "system", "content": "Be brief."}, *QUESTION
    )
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "384 + 729?"}]
    assert prompt({"role": "user", "content": parts}) == prompt(*QUESTION)
    plain = {"role": "assistant", "content": "The answer is 1113."}
    again = {"role": "user", "content": "And 1 + 1?"}
    wanted = prompt(*QUESTION, plain, again)
    nulls = {"tool_calls": None, "function_call": None, "refusal": None, "audio": None, "annotations": None}
    assert prompt(*QUESTION, {**plain, **nulls}, again) == wanted
    # thinking of earlier turns is accepted under both names, and is not shown to the model again
    for name in ("reasoning", "reasoning_content"):
        assert prompt(*QUESTION, {**plain, name: "Add."}, again) == wanted


def test_reasoning_of_this_turn_goes_back_to_the_model(client: openai.OpenAI) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "on", "arguments": '{"lamp": "red"}'}}

    def prompt(**more: Any) -> list[int]:
        turn = {"role": "assistant", "content": None, "tool_calls": [call], **more}
        result = {"role": "tool", "tool_call_id": "call-1", "content": "done"}
        messages = [*QUESTION, turn, result]
        return ask(client, messages=messages, tools=TOOLS, max_tokens=1, return_token_ids=True).prompt_token_ids

    with_one, with_other = prompt(reasoning="Add a3."), prompt(reasoning_content="Add a3.")
    assert with_one == with_other and len(with_one) > len(prompt())


def test_the_last_message_is_continued(server: Server, client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message
    for size in (3, len("The answer is 11")):
        begun = {"role": "assistant", "reasoning": whole.reasoning, "content": whole.content[:size]}
        messages = [*QUESTION, begun]
        answer = ask(client, messages=messages, continue_final_message=True, return_token_ids=True)
        assert begun["content"] + answer.choices[0].message.content == whole.content
        assert answer.choices[0].message.reasoning is None
        form = {"continue_final_message": True, "add_generation_prompt": False}
        assert answer.prompt_token_ids == tokenize(server, messages=messages, **form)


def test_an_image_is_refused(client: openai.OpenAI) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match="text") as caught:
        ask(client, messages=[{"role": "user", "content": content}])
    assert caught.value.param == "messages[0].content[1]"


# -- completions ------------------------------------------------------------------------------------------------------


# OpenAI itself sends null for the finish_reason of chunks and for the log-probability of a first token, which the
# client's types do not have; so these tests are not strict.


@pytest.fixture(scope="module")
def lenient(server: Server) -> Iterator[openai.OpenAI]:
    with make_client(server, _strict_response_validation=False) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any, *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"model": MODEL, "temperature": 0, **fields}
    return client.completions.create(prompt=prompt, extra_body=extra or {}, **fields)


def test_completions_of_several_prompts(server: Server, client: openai.OpenAI) -> None:
    prompts = ["Add a3 b8", "The answer", "Sort 3, 1"]
    together = complete(client, prompts, n=2, temperature=1.5, seed=5)
    assert [choice.index for choice in together.choices] == list(range(6))
    alone = [complete(client, prompt, n=2, temperature=1.5, seed=5) for prompt in prompts]
    texts = [choice.text for completion in alone for choice in completion.choices]
    assert [choice.text for choice in together.choices] == texts
    assert together.usage.completion_tokens == sum(completion.usage.completion_tokens for completion in alone)
    assert together.usage.prompt_tokens == sum(len(tokenize(server, prompt=prompt)) for prompt in prompts)


def test_prompts_of_ids(server: Server, client: openai.OpenAI) -> None:
    texts = ["Add a3 b8", "The answer"]
    ids = [tokenize(server, prompt=text) for text in texts]
    wanted = [choice.text for choice in complete(client, texts).choices]
    assert [choice.text for choice in complete(client, ids).choices] == wanted
    assert complete(client, ids[0]).choices[0].text == wanted[0]


def test_the_default_length_is_16(client: openai.OpenAI) -> None:
    completion = complete(client, "Add a3 b8", extra={"ignore_eos": True})
    assert (completion.usage.completion_tokens, completion.choices[0].finish_reason) == (16, "length")


def test_echo_and_scores(server: Server, lenient: openai.OpenAI) -> None:
    client = lenient
    prompt = "Add a3 b8 c4, g7"
    echoed = complete(client, prompt, echo=True, logprobs=2, max_tokens=5).choices[0]
    plain = complete(client, prompt, logprobs=2, max_tokens=5).choices[0]
    assert echoed.text == prompt + plain.text
    num_tokens = len(tokenize(server, prompt=prompt))
    assert len(echoed.logprobs.tokens) == num_tokens + 5
    assert echoed.logprobs.token_logprobs[num_tokens:] == plain.logprobs.token_logprobs
    scored = complete(client, prompt, echo=True, logprobs=2, max_tokens=0)
    assert scored.usage.completion_tokens == 0 and scored.choices[0].text == prompt
    scores = scored.choices[0].logprobs
    assert scores.token_logprobs == echoed.logprobs.token_logprobs[:num_tokens]
    assert scores.top_logprobs == echoed.logprobs.top_logprobs[:num_tokens]
    assert scores.token_logprobs[0] is None and all(value <= 0 for value in scores.token_logprobs[1:])
    for choice in (echoed, plain):
        for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
            assert choice.text[offset:].startswith(token)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"echo": True}, {"n": 2, "seed": 3, "temperature": 2.0}])
def test_a_completion_streams(lenient: openai.OpenAI, fields: dict[str, Any]) -> None:
    client = lenient
    prompts = ["Add a3 b8", "The answer"]
    wanted = complete(client, prompts, **fields)
    stream = complete(client, prompts, **fields, stream=True, stream_options={"include_usage": True})
    texts = [""] * len(wanted.choices)
    tokens: list[list[Any]] = [[] for _ in wanted.choices]
    ends: list[Any] = [[] for _ in wanted.choices]
    usage = None
    for chunk in stream:
        assert usage is None
        usage = chunk.usage
        assert bool(chunk.choices) == (usage is None)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += zip(
                    choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset, strict=True
                )
            if choice.finish_reason is not None:
                ends[choice.index].append(choice.finish_reason)
    assert texts == [choice.text for choice in wanted.choices]
    assert ends == [[choice.finish_reason] for choice in wanted.choices]
    assert usage is not None and usage.completion_tokens == wanted.usage.completion_tokens
    if "logprobs" in fields:
        for choice, found in zip(wanted.choices, tokens, strict=True):
            logprobs = choice.logprobs
            assert found == list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=True))


# -- models and errors ------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL and model.max_model_len == 4096
    assert client.models.retrieve(MODEL) == model


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    (folder / "keys.toml").write_text(
        '[[keys]]\nname = "free"\nkey = "sk-free"\n\n'
        '[[keys]]\nname = "small"\nkey = "sk-small"\ntokens_per_minute = 60\n'
    )
    with running_server("--keys", str(folder / "keys.toml"), usage_db=folder / "usage.sqlite") as server:
        yield server


def test_errors_by_status(guarded: Server) -> None:
    client = make_client(guarded, "sk-free")
    assert ask(client, max_tokens=1).choices
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, max_tokens=-1)
    assert bad.value.param == "max_tokens" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, model="m1-nan")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    assert "m1-nano" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError) as stranger:
        ask(make_client(guarded, "sk-wrong"))
    assert stranger.value.code == "invalid_api_key" and "sk-wrong" not in stranger.value.message
    with pytest.raises(openai.APIStatusError) as embeddings:
        client.embeddings.create(model=MODEL, input="text")
    assert embeddings.value.status_code == 501


def test_a_quota_is_a_rate_limit(guarded: Server) -> None:
    client = make_client(guarded, "sk-small")
    assert ask(client, max_tokens=20).usage.total_tokens < 60  # all of the minute's tokens but a few
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, max_tokens=20)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.type == "rate_limit_error" and caught.value.request_id
