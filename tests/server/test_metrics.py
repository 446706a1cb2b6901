"""Metrics of a small engine, read back from what a scrape gets."""

import asyncio
import math
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from minimax_m1.cache import PAGE_SIZE
from minimax_m1.engine import AsyncEngine, Engine
from minimax_m1.server.metrics import EXPERT_LOADS, Metrics, Timeline

MODEL = "tiny"
VLLM = {"model_name": MODEL, "engine": "0"}
OWN = {"model_name": MODEL}
GAUGES_OF_WORK = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@pytest.fixture
def engine(tiny_checkpoint) -> Engine:
    return Engine.from_pretrained(tiny_checkpoint, routing_log=True, max_batch_size=4, cache_bytes=8 << 20)


@pytest.fixture
def metrics(engine: Engine) -> Metrics:
    return Metrics(engine, MODEL)


def scrape(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, _ = metrics.render()
    samples = [s for family in text_string_to_metric_families(body.decode()) for s in family.samples]
    found = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
    assert len(found) == len(samples)
    return found


def value(metrics: Metrics, name: str, labels: dict[str, str] = VLLM, **more: str) -> float:
    return scrape(metrics)[name, frozenset({**labels, **more}.items())]


@dataclass
class Client:
    """Requests as the server sends them: a timeline each, fed by the deltas."""

    engine: Engine
    metrics: Metrics
    timelines: dict[str, Timeline] = field(default_factory=dict)

    def ask(self, prompt: list[int], **params) -> str:
        params = {"max_new_tokens": 5, "temperature": 0.0, **params}
        name = self.engine.add(prompt, params)
        self.timelines[name] = self.metrics.begin(len(prompt))
        return name

    def step(self) -> None:
        for delta in self.engine.step():
            timeline = self.timelines[delta.request_id]
            if delta.token_ids:
                timeline.tokens(delta.index, len(delta.token_ids), delta.time)
            if delta.result is not None:
                usage = delta.result.usage
                timeline.finish(
                    delta.result.finish_reason, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
                )

    def drain(self) -> None:
        while self.engine.has_work():
            self.step()


@pytest.fixture
def client(engine: Engine, metrics: Metrics) -> Client:
    return Client(engine, metrics)


def prompt_of(length: int, first: int = 5) -> list[int]:
    return [first, *(7 + i % 50 for i in range(length - 1))]


def test_before_the_first_request(metrics: Metrics, engine: Engine) -> None:
    for name in (*GAUGES_OF_WORK, "vllm:prompt_tokens_total", "vllm:generation_tokens_total"):
        assert value(metrics, name) == 0
    for reason in ("stop", "length", "repetition", "abort"):
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert value(metrics, f"vllm:{name}_count") == 0
    assert value(metrics, "minimax_m1:state_slots_total", OWN) == engine.plan.num_slots == 4
    _, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=")


def test_every_name_of_vllm_that_dashboards_read(metrics: Metrics) -> None:
    names = {name for name, _ in scrape(metrics)}
    for name in (
        "num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total cache_config_info "
        "prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total prompt_tokens_cached_total "
        "generation_tokens_total request_success_total time_to_first_token_seconds_bucket "
        "inter_token_latency_seconds_bucket request_time_per_output_token_seconds_bucket "
        "e2e_request_latency_seconds_bucket request_decode_time_seconds_bucket request_prompt_tokens_bucket "
        "request_generation_tokens_bucket"
    ).split():
        assert f"vllm:{name}" in names


def test_one_request(client: Client, metrics: Metrics) -> None:
    client.ask(prompt_of(20), max_new_tokens=5)
    client.drain()
    assert value(metrics, "vllm:prompt_tokens_total") == 20
    assert value(metrics, "vllm:generation_tokens_total") == 5
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 1
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 4
    for name in ("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert value(metrics, f"vllm:{name}_count") == 1
    assert value(metrics, "vllm:request_prompt_tokens_bucket", le="10.0") == 0
    assert value(metrics, "vllm:request_prompt_tokens_bucket", le="20.0") == 1
    assert value(metrics, "vllm:request_generation_tokens_sum") == 5


def test_the_times_of_an_output_add_up(client: Client, metrics: Metrics) -> None:
    client.ask(prompt_of(20), max_new_tokens=9)
    client.drain()
    between = value(metrics, "vllm:inter_token_latency_seconds_sum")
    assert 0 < between == pytest.approx(value(metrics, "vllm:request_decode_time_seconds_sum"))
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == pytest.approx(between / 8)
    whole = value(metrics, "vllm:e2e_request_latency_seconds_sum")
    first = value(metrics, "vllm:time_to_first_token_seconds_sum")
    assert first + between <= whole < first + between + 1


def test_samples_count_as_outputs_and_their_prompt_once(client: Client, metrics: Metrics) -> None:
    client.ask(prompt_of(20), n=2, max_new_tokens=6)
    client.step()
    assert value(metrics, "vllm:num_requests_running") == value(metrics, "minimax_m1:state_slots_used", OWN) == 2
    client.drain()
    assert value(metrics, "vllm:prompt_tokens_total") == 20
    assert value(metrics, "vllm:generation_tokens_total") == 12
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 2
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 10
    assert value(metrics, "vllm:request_prompt_tokens_count") == 2
    assert value(metrics, "vllm:request_generation_tokens_sum") == 12
    decode, mean = (
        value(metrics, f"vllm:request_{name}_seconds_sum") for name in ("decode_time", "time_per_output_token")
    )
    assert mean == pytest.approx(decode / 5)


def test_prefixes_are_counted_in_tokens_and_in_requests(client: Client, metrics: Metrics, engine: Engine) -> None:
    length = 3 * PAGE_SIZE + 10
    client.ask(prompt_of(length))
    client.drain()
    assert value(metrics, "vllm:prefix_cache_queries_total") == length
    assert value(metrics, "vllm:prefix_cache_hits_total") == value(metrics, "vllm:prompt_tokens_cached_total") == 0
    checkpoints = value(metrics, "minimax_m1:state_checkpoints", OWN)
    assert checkpoints >= 1
    assert value(metrics, "minimax_m1:state_checkpoint_bytes", OWN) == checkpoints * engine.plan.slot_bytes

    client.ask(prompt_of(length), n=2)  # its samples share one look-up
    client.ask(prompt_of(30, first=6))
    client.drain()
    assert value(metrics, "vllm:prefix_cache_queries_total") == 2 * length + 30
    assert value(metrics, "vllm:prefix_cache_hits_total") == 3 * PAGE_SIZE
    assert value(metrics, "vllm:prompt_tokens_cached_total") == 3 * PAGE_SIZE
    assert value(metrics, "vllm:prompt_tokens_total") == 2 * length + 30
    assert value(metrics, "minimax_m1:state_checkpoint_queries_total", OWN) == 3
    assert value(metrics, "minimax_m1:state_checkpoint_hits_total", OWN) == 1
    assert engine.prefix_cache is not None
    engine.prefix_cache.evict(engine.plan.num_pages)
    assert value(metrics, "minimax_m1:state_checkpoint_evictions_total", OWN) == checkpoints
    assert value(metrics, "minimax_m1:state_checkpoints", OWN) == 0


def test_pages_in_use_are_those_of_sequences(client: Client, metrics: Metrics, engine: Engine) -> None:
    client.ask(prompt_of(3 * PAGE_SIZE + 10))
    client.step()
    assert value(metrics, "vllm:kv_cache_usage_perc") == pytest.approx(4 / engine.plan.num_pages)
    client.ask(prompt_of(3 * PAGE_SIZE + 10))  # shares three of them
    client.step()
    assert engine.scheduler.running[-1].cached_tokens == 3 * PAGE_SIZE
    assert value(metrics, "vllm:kv_cache_usage_perc") == pytest.approx(5 / engine.plan.num_pages)
    assert value(metrics, "minimax_m1:state_slots_used", OWN) == 2
    client.drain()
    assert engine.cache.pool.num_free < engine.plan.num_pages  # the cached prefix has some
    assert [value(metrics, name) for name in GAUGES_OF_WORK] == [0, 0, 0]
    assert value(metrics, "minimax_m1:state_slots_used", OWN) == 0


def test_who_waits_and_who_runs(client: Client, metrics: Metrics) -> None:
    for i in range(6):
        client.ask(prompt_of(20, first=5 + i), max_new_tokens=20)
    assert value(metrics, "vllm:num_requests_waiting") == 6
    client.step()
    assert value(metrics, "vllm:num_requests_running") == 4
    assert value(metrics, "vllm:num_requests_waiting") == 2
    client.drain()
    assert [value(metrics, name) for name in GAUGES_OF_WORK] == [0, 0, 0]


def test_an_aborted_request_is_no_success(client: Client, metrics: Metrics, engine: Engine) -> None:
    name = client.ask(prompt_of(20), n=2, max_new_tokens=50)
    for _ in range(3):
        client.step()
    engine.abort(name)
    client.drain()
    client.timelines[name].leave()  # all outputs had their results
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 2
    assert sum(v for (n, _), v in scrape(metrics).items() if n == "vllm:request_success_total") == 2
    assert value(metrics, "vllm:generation_tokens_total") == 6
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 0
    assert value(metrics, "vllm:request_generation_tokens_count") == 0
    assert [value(metrics, gauge) for gauge in GAUGES_OF_WORK] == [0, 0, 0]


def test_a_client_that_leaves(client: Client, metrics: Metrics, engine: Engine) -> None:
    timeline = metrics.begin(20)  # before anything came
    timeline.leave()
    timeline.leave()
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:prompt_tokens_total") == 0
    timeline = metrics.begin(20)  # one output is complete, two have begun
    for index in range(3):
        timeline.tokens(index, 1, time.monotonic())
    timeline.tokens(0, 1, time.monotonic())
    timeline.finish("stop", 20, 0, 2)
    timeline.leave()
    timeline.leave()
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 3
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:generation_tokens_total") == 4
    assert value(metrics, "vllm:prompt_tokens_total") == 20


def test_tokens_that_come_together_share_the_time(metrics: Metrics) -> None:
    timeline = metrics.begin(20)
    timeline.tokens(0, 1, time.monotonic())
    timeline.tokens(0, 4, time.monotonic())
    timeline.tokens(0, 0, time.monotonic())
    timeline.finish("stop", 20, 0, 5)
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 4
    between = value(metrics, "vllm:inter_token_latency_seconds_sum")
    assert between == pytest.approx(value(metrics, "vllm:request_decode_time_seconds_sum"))


def test_drafted_tokens_are_counted_as_they_are_accepted(tiny_checkpoint) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, speculative_tokens=3, cache_bytes=8 << 20)
    metrics = Metrics(engine, MODEL)
    client = Client(engine, metrics)
    client.ask([5, 6, 7, 8] * 20, max_new_tokens=40)
    num_steps = 0
    while engine.has_work():
        client.step()
        num_steps += 1
    assert num_steps < 40  # some steps gave several tokens
    assert value(metrics, "vllm:generation_tokens_total") == 40
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 39


def test_preemptions(tiny_checkpoint) -> None:
    engine = Engine.from_pretrained(
        tiny_checkpoint, max_batch_size=3, max_model_len=2 * PAGE_SIZE, cache_bytes=48_000, prefix_cache=False
    )
    assert engine.plan.num_slots == 3 and engine.plan.num_pages < 6, engine.plan
    metrics = Metrics(engine, MODEL)
    client = Client(engine, metrics)
    for i in range(3):
        client.ask(prompt_of(PAGE_SIZE - 5, first=5 + i), max_new_tokens=20)
    client.drain()
    assert value(metrics, "vllm:num_preemptions_total") == engine.scheduler.num_preemptions > 0
    assert value(metrics, "vllm:generation_tokens_total") == 60  # what was computed anew is not counted anew
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 3
    assert value(metrics, "vllm:prefix_cache_queries_total") == 0
    assert value(metrics, "vllm:cache_config_info", labels_of(metrics, "vllm:cache_config_info")) == 1
    assert labels_of(metrics, "vllm:cache_config_info")["enable_prefix_caching"] == "False"
    assert not any(name.startswith("minimax_m1:expert") for name, _ in scrape(metrics))  # nobody counts them


def labels_of(metrics: Metrics, name: str) -> dict[str, str]:
    (labels,) = (labels for found, labels in scrape(metrics) if found == name)
    return dict(labels)


def test_the_plan_of_the_cache(metrics: Metrics, engine: Engine) -> None:
    labels = labels_of(metrics, "vllm:cache_config_info")
    assert labels["block_size"] == str(PAGE_SIZE)
    assert labels["num_gpu_blocks"] == str(engine.plan.num_pages)
    assert labels["state_slot_bytes"] == str(engine.plan.slot_bytes)
    assert (labels["cache_dtype"], labels["enable_prefix_caching"]) == ("float32", "True")


def test_experts_before_anything_has_run(metrics: Metrics) -> None:
    for layer in ("0", "1"):
        assert value(metrics, "minimax_m1:expert_load_entropy", OWN, layer=layer) == 0
        assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer=layer, le="0.0") == 4
        assert value(metrics, "minimax_m1:expert_load_sum", OWN, layer=layer) == 0


def test_loads_of_experts(client: Client, metrics: Metrics, engine: Engine) -> None:
    client.ask(prompt_of(100), max_new_tokens=10)
    client.drain()
    assert engine.routing is not None
    for layer, counts in enumerate(engine.routing.counts.tolist()):
        loads = [count * 4 / sum(counts) for count in counts]
        for bound in EXPERT_LOADS:
            expected = sum(load <= bound for load in loads)
            assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer=str(layer), le=str(bound)) == expected
        assert value(metrics, "minimax_m1:expert_load_count", OWN, layer=str(layer)) == 4
        assert value(metrics, "minimax_m1:expert_load_sum", OWN, layer=str(layer)) == pytest.approx(4)
        shares = [count / sum(counts) for count in counts if count]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(4)
        assert value(metrics, "minimax_m1:expert_load_entropy", OWN, layer=str(layer)) == pytest.approx(entropy)


def test_even_and_lone_experts(metrics: Metrics, engine: Engine) -> None:
    assert engine.routing is not None
    engine.routing.counts = np.array([[7, 7, 7, 7], [0, 12, 0, 0]])
    assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer="0", le="0.75") == 0
    assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer="0", le="1.0") == 4
    assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer="1", le="0.0") == 3
    assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer="1", le="2.0") == 3
    assert value(metrics, "minimax_m1:expert_load_bucket", OWN, layer="1", le="4.0") == 4
    assert value(metrics, "minimax_m1:expert_load_entropy", OWN, layer="0") == pytest.approx(1)
    assert value(metrics, "minimax_m1:expert_load_entropy", OWN, layer="1") == 0


def test_http_exchanges(metrics: Metrics) -> None:
    metrics.count_http("/v1/models/{model}", "GET", 200, 0.004)
    metrics.count_http("/v1/models/{model}", "GET", 404, 0.003)
    metrics.count_http("/v1/chat/completions", "POST", 200, 2000.0)
    metrics.count_http("/", "BREW", 405, 0.001)
    models = {"route": "/v1/models/{model}", "method": "GET"}
    assert value(metrics, "minimax_m1:http_requests_total", models, status="200") == 1
    assert value(metrics, "minimax_m1:http_requests_total", models, status="404") == 1
    assert value(metrics, "minimax_m1:http_request_seconds_count", models) == 2
    assert value(metrics, "minimax_m1:http_request_seconds_sum", models) == pytest.approx(0.007)
    chat = {"route": "/v1/chat/completions", "method": "POST"}
    assert value(metrics, "minimax_m1:http_request_seconds_bucket", chat, le="1800.0") == 0
    assert value(metrics, "minimax_m1:http_request_seconds_bucket", chat, le="+Inf") == 1
    strange = {"route": "/", "method": "other"}  # what a client makes up makes no series
    assert value(metrics, "minimax_m1:http_requests_total", strange, status="405") == 1


def test_two_engines_do_not_share_counts(engine: Engine, metrics: Metrics) -> None:
    other = Metrics(engine, 'a "name"\nof two lines')
    metrics.begin(3).tokens(0, 1, time.monotonic())
    labels = {"model_name": 'a "name"\nof two lines', "engine": "0"}
    assert value(metrics, "vllm:generation_tokens_total") == 1
    assert value(other, "vllm:generation_tokens_total", labels) == 0


def test_scrapes_while_the_engine_runs(engine: Engine, metrics: Metrics) -> None:
    """A scrape reads what another thread changes: it never fails, and shows no more than there is."""
    done = threading.Event()
    seen: list[float] = []
    errors: list[BaseException] = []

    def scrape_on() -> None:
        try:
            while not done.is_set():
                seen.append(value(metrics, "vllm:kv_cache_usage_perc"))
        except BaseException as error:  # noqa: BLE001 - the test tells
            errors.append(error)

    async def ask(running: AsyncEngine, i: int) -> None:
        timeline = metrics.begin(150)
        async for delta in running.generate(prompt_of(150, first=5 + i), {"max_new_tokens": 30, "temperature": 0.0}):
            timeline.tokens(delta.index, len(delta.token_ids), delta.time)
            if delta.result is not None:
                timeline.finish("length", 150, delta.result.usage.cached_tokens, 30)

    async def ask_all() -> None:
        async with AsyncEngine(engine) as running:
            await asyncio.gather(*(ask(running, i) for i in range(12)))

    thread = threading.Thread(target=scrape_on)
    thread.start()
    try:
        asyncio.run(ask_all())
    finally:
        done.set()
        thread.join()
    assert not errors and seen and min(seen) >= 0 and 0 < max(seen) <= 1
    assert [value(metrics, name) for name in GAUGES_OF_WORK] == [0, 0, 0]
    assert value(metrics, "vllm:generation_tokens_total") == 12 * 30
    assert value(metrics, "vllm:prompt_tokens_total") == 12 * 150
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 12 * 29
