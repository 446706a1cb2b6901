"""64 clients at once: every answer is the one that the same request gets alone, and nothing is left behind.

MINIMAX_M1_LOAD_SECONDS=120 makes the long form of it.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Server, running_server

SECONDS = float(os.environ.get("MINIMAX_M1_LOAD_SECONDS", "8"))
CLIENTS = 64
REQUESTS = 60 if SECONDS < 60 else 400  # different ones
# What may come on top of the resident memory behind the first third of a run, for fragments of freed memory. In the
# long form, 250 bytes of every generated token, kept by mistake, would be more.
GROWTH = 32 << 20
# oneDNN keeps code for up to 1,024 shapes, one for every number of tokens in a step, and glibc keeps what was freed in
# case it is wanted again. Both fill up over many minutes, to a level; with these bounds they do so within seconds.
MEMORY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 10),
}
GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "minimax_m1:state_slots_used",
)

Request = tuple[str, dict[str, Any]]  # route and body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # fewer slots than clients, and a cache that is soon full: requests wait, and prefixes are evicted
    flags = ["--cache-bytes", str(48 << 20), "--max-batch-size", "24", "--no-access-log"]
    database = tmp_path_factory.mktemp("usage") / "usage.sqlite"
    with running_server(*flags, usage_db=database, env=MEMORY) as running:
        yield running


def make_requests(seed: int) -> list[Request]:
    """Return different requests of all kinds, each with a seed, so that its answer is settled."""
    draw = random.Random(seed)
    return [make_request(draw) for _ in range(REQUESTS)]


def make_request(draw: random.Random) -> Request:
    numbers = [draw.randrange(1, 1000) for _ in range(5)]
    text = draw.choice(
        [
            f"What is {numbers[0]} + {numbers[1]}?",
            f"Sort {', '.join(map(str, numbers))}.",
            f"How many times does the letter r appear in {draw.choice(['strawberry', 'mirror', 'pear'])}?",
            "Hello! " * draw.randrange(1, 40),
            "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x4E00, 0x9000)])) for _ in range(50)),
        ]
    )
    body: dict[str, Any] = {
        "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
        "seed": draw.randrange(2**40), "temperature": draw.choice([0.0, 0.0, 1.0, 3.0]),
        "top_p": draw.choice([0.9, 1.0]), "max_tokens": draw.randrange(1, 120),
    }  # fmt: skip
    maybe: list[dict[str, Any]] = [
        {"n": draw.randrange(2, 4)},
        {"top_k": draw.randrange(1, 40)},
        {"stop": ["1", "th"]},
        {"frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1},
        {"logit_bias": {str(draw.randrange(600)): 20}},
        {"thinking_token_budget": draw.randrange(30)},
        {"expert_threshold": 0.6},
        {"ignore_eos": True},
    ]
    for fields in draw.sample(maybe, draw.randrange(3)):
        body |= fields
    if draw.random() < 0.3:
        return "/v1/completions", body | {"prompt": text, "logprobs": draw.choice([None, 2])}
    body["messages"] = [{"role": "user", "content": text}]
    if draw.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 1}
    if draw.random() < 0.2:
        body |= {"structured_outputs": draw.choice([{"choice": ["pear", "plum"]}, {"regex": "[0-9]{3,9}"}])}
    elif draw.random() < 0.2:
        schema = {"type": "object", "properties": {"lamp": {"enum": [1, 2]}}, "required": ["lamp"]}
        body |= {"tools": [{"function": {"name": "on", "parameters": schema}}], "tool_choice": "required"}
    return "/v1/chat/completions", body


async def ask(client: httpx.AsyncClient, request: Request, most_events: int | None = None) -> dict[int, Any] | None:
    """Return by choice all that a stream brings but ids and times; after `most_events`, leave and return None."""
    route, body = request
    whole: dict[int, Any] = {}
    events = 0
    async with client.stream("POST", route, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if events == most_events:
                return None
            events += 1
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                take(whole.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": [], "calls": []}), choice)
    assert len(whole) == body.get("n", 1)
    return whole


def take(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    """Add a chunk's choice to what has come."""
    delta = choice.get("delta", {})
    whole["text"] += choice.get("text") or delta.get("reasoning") or delta.get("content") or ""
    whole["calls"] += [call["function"] for call in delta.get("tool_calls", [])]
    whole["ids"] += choice.get("token_ids") or []
    logprobs = choice["logprobs"] or {}
    whole["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or []
    if choice["finish_reason"] is not None:
        assert "end" not in whole
        whole["end"] = (choice["finish_reason"], choice["stop_reason"])


def with_client(server: Server, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await work(client)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def alone(server: Server) -> list[tuple[Request, dict[int, Any]]]:
    """Requests with the answers that they get one by one."""

    async def work(client: httpx.AsyncClient) -> list[tuple[Request, dict[int, Any]]]:
        return [(request, await ask(client, request)) for request in make_requests(1)]  # type: ignore[misc]

    return with_client(server, work)


def memory(server: Server) -> int:
    """Return the resident memory of the server in bytes."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_nothing_is_left(server: Server, seconds: float) -> None:
    """Check that the gauges are, or within some seconds come to be, what they are without requests."""
    end = time.monotonic() + seconds
    while any(values := {name: server.metric(name) for name in GAUGES}.values()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(values), values


@pytest.mark.slow
def test_64_clients_get_what_each_would_get_alone(server: Server, alone: list[tuple[Request, dict[int, Any]]]) -> None:
    end = time.monotonic() + SECONDS
    memories: list[int] = []
    counts = [0] * CLIENTS

    async def client_of(client: httpx.AsyncClient, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            request, wanted = draw.choice(alone)
            found = await ask(client, request)
            assert found == wanted, (request, found, wanted)
            counts[number] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memories.append(memory(server))
            await asyncio.sleep(0.1)

    async def work(client: httpx.AsyncClient) -> None:
        await asyncio.gather(watch(), *(client_of(client, i) for i in range(CLIENTS)))

    with_client(server, work)
    third = len(memories) // 3
    before, after = statistics.median(memories[third : third + 9]), statistics.median(memories[-9:])
    print(f"{sum(counts)} answers in {SECONDS:.0f} s; {before / 2**20:.1f} MiB, in the end {after / 2**20:.1f} MiB")
    assert min(counts) >= 1
    check_nothing_is_left(server, 10)
    assert after - before <= GROWTH
    assert server.process.poll() is None and not any("Traceback" in line for line in server.stderr)


@pytest.mark.slow
def test_half_of_the_clients_leave(server: Server, alone: list[tuple[Request, dict[int, Any]]]) -> None:
    end = time.monotonic() + SECONDS / 2
    left = stayed = 0

    async def leaver(client: httpx.AsyncClient, number: int) -> None:
        nonlocal left
        draw = random.Random(number)
        while time.monotonic() < end:
            request, _ = draw.choice(alone)
            if draw.random() < 0.3:  # at any time, perhaps before the server has read the request
                try:
                    await asyncio.wait_for(ask(client, request), draw.random())
                except asyncio.TimeoutError:
                    left += 1
            else:  # in mid-stream; httpx closes the connection, for the rest of the answer is still on its way
                found = await ask(client, request, draw.randrange(20))
                left += found is None

    async def stayer(client: httpx.AsyncClient, number: int) -> None:
        nonlocal stayed
        draw = random.Random(number)
        while time.monotonic() < end:
            request, wanted = draw.choice(alone)
            assert await ask(client, request) == wanted
            stayed += 1

    async def work(client: httpx.AsyncClient) -> None:
        half = CLIENTS // 2
        await asyncio.gather(
            *(leaver(client, i) for i in range(half)), *(stayer(client, i) for i in range(half, CLIENTS))
        )

    with_client(server, work)
    print(f"{left} left, {stayed} stayed")
    assert left >= CLIENTS / 2 and stayed >= CLIENTS / 2
    check_nothing_is_left(server, 10)
    assert server.process.poll() is None and not any("Traceback" in line for line in server.stderr)


@pytest.mark.slow
def test_who_leaves_is_forgotten(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "ignore_eos": True, "max_tokens": 4000, "stream": True}
    for streaming in (True, False) * 5:
        with httpx.Client(base_url=server.url) as client:
            if streaming:
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    lines = response.iter_lines()
                    assert all(next(lines) is not None for _ in range(10))
                    assert server.metric("minimax_m1:state_slots_used") == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json={**body, "stream": False}, timeout=0.2)
        check_nothing_is_left(server, 10)
