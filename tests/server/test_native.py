"""POST /v1/minimax-m1/generate, as a client that wants to know which experts its request went to."""

import json
from typing import Any

import httpx
import pytest

LAYERS, EXPERTS, TOP_K = 4, 8, 2  # of m1-nano
QUESTION = "What is 384 + 729?"


def generate(server, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/minimax-m1/generate", json=fields, timeout=60)


def test_text_usage_and_routing(server):
    answer = generate(server, input=QUESTION, max_output_tokens=1024, context_window=4096, expert_threshold=1.0).json()
    assert "1113" in answer["output"] and "1113" not in answer["reasoning"] and answer["finish_reason"] == "stop"
    usage, routing = answer["usage"], answer["routing"]
    ran = usage["total_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] - 1  # the last token never ran
    assert routing["num_tokens"] == ran and routing["num_experts"] == EXPERTS
    assert [layer["layer"] for layer in routing["layers"]] == list(range(LAYERS))
    for layer in routing["layers"]:
        assert sum(layer["counts"]) == TOP_K * ran and layer["counts"] == sorted(layer["counts"], reverse=True)
        weight = sum(c * w for c, w in zip(layer["counts"], layer["mean_weights"], strict=True))
        assert weight == pytest.approx(ran, rel=1e-4)  # each token's weights sum to 1
        assert 0 <= layer["load_balance_entropy"] <= 1
    assert "tokens" not in routing or routing["tokens"] is None


def test_the_experts_of_each_token(server):
    answer = generate(server, input=QUESTION, routing_log="tokens").json()
    tokens = answer["routing"]["tokens"]
    assert len(tokens) == answer["usage"]["completion_tokens"] - 1
    text = "".join(token["text"] for token in tokens)
    assert text.startswith("<think>") and answer["reasoning"] in text and text.endswith(answer["output"])
    for token in tokens:
        assert [len(ids) for ids in token["experts"]] == [TOP_K] * LAYERS
        assert all(0 <= expert < EXPERTS for ids in token["experts"] for expert in ids)


def test_a_lower_threshold_uses_fewer_experts(server):
    full, frugal = (generate(server, input=QUESTION, expert_threshold=t).json()["routing"] for t in (1.0, 0.6))
    used = [sum(sum(layer["counts"]) for layer in log["layers"]) / log["num_tokens"] for log in (full, frugal)]
    assert used[0] == TOP_K * LAYERS and LAYERS <= used[1] < used[0]


def test_the_window_holds_input_and_output(server):
    prompt = generate(server, input=QUESTION).json()["usage"]["prompt_tokens"]
    answer = generate(server, input=QUESTION, context_window=prompt + 7).json()
    assert answer["usage"]["completion_tokens"] == 7 and answer["finish_reason"] == "length"
    answer = generate(server, input=QUESTION, context_window=prompt + 7, max_output_tokens=3).json()
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": QUESTION, "context_window": 500_000}, "context_window"),  # m1-nano's is 4,096
        ({"input": QUESTION, "context_window": 5}, "input"),
        ({"input": QUESTION, "expert_threshold": 0}, "expert_threshold"),
        ({"input": QUESTION, "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": QUESTION, "max_tokens": 5}, "max_tokens"),
        ({"input": "", "raw": True}, "input"),
        ({"input": ["What is", "384 + 729?"]}, "input"),
        ({"max_output_tokens": 5}, "input"),
    ],
)
def test_what_cannot_be_used(server, fields, param):
    answer = generate(server, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_stream_ends_with_the_whole(server):
    request = {"input": QUESTION, "stream": True}
    pieces: dict[str, str] = {"reasoning": "", "output": ""}
    with httpx.stream("POST", f"{server.url}/v1/minimax-m1/generate", json=request, timeout=60) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    whole = json.loads(events.pop())
    for event in map(json.loads, events):
        ((kind, text),) = event.items()
        pieces[kind] += text
    assert pieces == {"reasoning": whole["reasoning"], "output": whole["output"]}


def test_without_the_template(server):
    answer = generate(server, input="<beginning_of_document>The pear", raw=True, max_output_tokens=4).json()
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "<beginning_of_document>The pear"}).json()["tokens"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
