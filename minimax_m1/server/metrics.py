"""Metrics: what /metrics shows to Prometheus, under vLLM's names where vLLM has one, so that its dashboards work.

An output is one of a request's n samples; vLLM counts each as a request, and so do we. Names and buckets are those of
vLLM's V1 engine. Shapes: L layers, E experts of each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from minimax_m1.cache import PAGE_SIZE
from minimax_m1.engine import Engine
from minimax_m1.engine.prefix_cache import PrefixCacheStats
from minimax_m1.engine.routing_log import RoutingLog

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
HTTP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
EXPERT_LOADS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0, 8.0)  # 1: as many tokens as if all were used alike

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
FINISH_REASONS = ("stop", "length", "repetition", "abort")  # shown as 0 before there is one


class Metrics(Collector):
    """Counts of a server, and its engine's state at the moment of a scrape.

    `begin`, `count_http` and the methods of `Timeline` take some microseconds and belong to the event loop's thread;
    `render` may run in any.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        vllm = {"model_name": model_name, "engine": "0"}
        self._vllm, self._own = vllm, {"model_name": model_name}

        def counter(name: str, help: str) -> Counter:
            return Counter(name, help, tuple(vllm), registry=self._registry).labels(**vllm)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, tuple(vllm), buckets=buckets, registry=self._registry).labels(**vllm)

        sizes = _steps_of_1_2_5(engine.max_model_len)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts that have run or were found cached.")
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Tokens of prompts found in the prefix cache.")
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self.first_token_seconds = histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to an output's token.", FIRST_TOKEN_SECONDS
        )
        self.token_seconds = histogram(
            "vllm:inter_token_latency_seconds",
            "From one token of an output to the next; tokens that come together share the time.",
            TOKEN_SECONDS,
        )
        self.mean_token_seconds = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of an output's inter-token latencies.", TOKEN_SECONDS
        )
        self.request_seconds = histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to an output's end.", REQUEST_SECONDS
        )
        self.decode_seconds = histogram(
            "vllm:request_decode_time_seconds", "From an output's first token to its last.", REQUEST_SECONDS
        )
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of an output.", sizes)
        self.request_generation_tokens = histogram("vllm:request_generation_tokens", "Tokens of an output.", sizes)
        self._finished = Counter(
            "vllm:request_success", "Outputs by what ended them.", (*vllm, "finished_reason"), registry=self._registry
        )
        for reason in FINISH_REASONS:
            self._finished.labels(**vllm, finished_reason=reason)
        self._http_requests = Counter(
            "minimax_m1:http_requests",
            "Finished HTTP exchanges.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            "minimax_m1:http_request_seconds",
            "From an HTTP request's first byte to its answer's last.",
            ("route", "method"),
            buckets=HTTP_SECONDS,
            registry=self._registry,
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def begin(self, prompt_tokens: int) -> Timeline:
        """Return the timeline of a request that goes to the engine now."""
        return Timeline(self, prompt_tokens)

    def count_finish(self, reason: str, count: int = 1) -> None:
        """Count outputs that have ended."""
        self._finished.labels(**self._vllm, finished_reason=reason).inc(count)

    def count_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a finished HTTP exchange.

        Args:
            route: the path's template, such as /v1/models/{model}, never what a client made up: each is a series.
            method: what HTTP does not know is counted as "other".
            status: of the answer.
            seconds: from the request's first byte to the answer's last.
        """
        method = method if method in METHODS else "other"
        self._http_requests.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route, method).observe(seconds)

    # -- what the engine has now --------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's state, for the registry.

        The engine's thread goes on meanwhile: what is read are numbers, lengths, and copies of lists.
        """
        engine, vllm, own = self._engine, self._vllm, self._own
        scheduler, cache = engine.scheduler, engine.cache
        prefixes = PrefixCacheStats() if engine.prefix_cache is None else engine.prefix_cache.stats
        pages_of_slots = [list(pages) for pages in cache.pages]
        # What only the prefix cache holds is evicted when a sequence needs it, so it is not in use.
        num_used = len(set().union(*pages_of_slots))

        yield _gauge("vllm:num_requests_running", "Outputs that have a slot.", vllm, len(scheduler.running))
        yield _gauge("vllm:num_requests_waiting", "Requests without a slot.", vllm, len(scheduler.waiting))
        yield _gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the pages that sequences hold; 1 is all. Pages of cached prefixes alone are free for use.",
            vllm,
            num_used / max(1, cache.pool.num_pages),
        )
        yield _counter(
            "vllm:num_preemptions", "Times that an output had to give up its slot.", vllm, scheduler.num_preemptions
        )
        yield _counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", vllm, prefixes.query_tokens
        )
        yield _counter("vllm:prefix_cache_hits", "Prompt tokens found in it.", vllm, prefixes.hit_tokens)
        yield _gauge("vllm:cache_config_info", "How the cache was planned.", vllm | self._cache_config(), 1)

        yield _gauge(
            "minimax_m1:state_slots_used",
            "Slots of lightning states that sequences hold.",
            own,
            sum(map(bool, pages_of_slots)),
        )
        yield _gauge("minimax_m1:state_slots_total", "Slots of lightning states.", own, cache.max_seqs)
        yield _gauge("minimax_m1:state_checkpoints", "Cached prefixes' states.", own, prefixes.checkpoints)
        yield _gauge("minimax_m1:state_checkpoint_bytes", "Memory that they take.", own, prefixes.num_bytes)
        yield _counter("minimax_m1:state_checkpoint_queries", "Requests that looked for one.", own, prefixes.queries)
        yield _counter("minimax_m1:state_checkpoint_hits", "Requests that went on from one.", own, prefixes.hits)
        yield _counter("minimax_m1:state_checkpoint_evictions", "Dropped to make room.", own, prefixes.evictions)
        if engine.routing is not None:
            yield from self._expert_loads(engine.routing)

    def _cache_config(self) -> dict[str, str]:
        """The labels of `vllm:cache_config_info`: routers read block_size and num_gpu_blocks, on a CPU too."""
        plan, settings = self._engine.plan, self._engine.settings
        return {
            "block_size": str(PAGE_SIZE),
            "num_gpu_blocks": str(plan.num_pages),
            "kv_cache_size_tokens": str(plan.num_pages * PAGE_SIZE),
            "kv_cache_memory_bytes": str(plan.num_pages * plan.page_bytes),
            "cache_dtype": str(self._engine.model.compute_dtype).removeprefix("torch."),
            "enable_prefix_caching": str(settings.prefix_cache),
            "state_slot_bytes": str(plan.slot_bytes),
            "state_checkpoint_bytes": str(plan.checkpoint_bytes),
        }

    def _expert_loads(self, routing: RoutingLog) -> Iterator[Metric]:
        """How evenly each layer's experts are used since the start. Not a series per expert, for M1 has 2,560."""
        names = [*self._own, "layer"]
        entropy = GaugeMetricFamily(
            "minimax_m1:expert_load_entropy", "1: a layer's experts are used alike; 0: one is, or none.", labels=names
        )
        load = HistogramMetricFamily(
            "minimax_m1:expert_load",
            "A layer's experts by their tokens, as a multiple of what uniform use would give. Read it without rate().",
            labels=names,
        )
        log = RoutingLog(routing.counts.copy(), routing.weight_sums, routing.num_tokens)
        num_experts = log.counts.shape[1]
        loads = log.counts * num_experts / np.maximum(log.counts.sum(1, keepdims=True), 1)  # [L, E]
        below = (loads[:, :, None] <= np.array(EXPERT_LOADS)).sum(1)  # [L, buckets]
        for i, value in enumerate(log.load_balance_entropy):
            labels = [*self._own.values(), str(i)]
            entropy.add_metric(labels, float(value))
            buckets = [(str(bound), float(n)) for bound, n in zip(EXPERT_LOADS, below[i], strict=True)]
            load.add_metric(labels, [*buckets, ("+Inf", float(num_experts))], sum_value=float(loads[i].sum()))
        yield entropy
        yield load


class Timeline:
    """When a request's tokens came. Belongs to the event loop's thread."""

    __slots__ = ("_begin", "_latest", "_metrics", "_num_finished", "_prompt_tokens", "_times")

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._begin = time.monotonic()
        self._times: dict[int, tuple[float, float]] = {}  # output -> when its first and its newest token came
        self._latest: tuple[float, float] | None = None  # those of the output that gained last
        self._num_finished = 0

    def tokens(self, index: int, num_tokens: int, now: float) -> None:
        """Count the tokens that an output has gained, now by `time.monotonic`."""
        if num_tokens == 0:
            return
        metrics = self._metrics
        metrics.generation_tokens.inc(num_tokens)
        times = self._times.get(index)
        if times is None:
            if not self._times:
                metrics.prompt_tokens.inc(self._prompt_tokens)
            metrics.first_token_seconds.observe(now - self._begin)
            self._latest = self._times[index] = now, now
            return
        first, before = times
        for _ in range(num_tokens):
            metrics.token_seconds.observe((now - before) / num_tokens)
        self._latest = self._times[index] = first, now

    def finish(self, finish_reason: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """Count an output that has ended, right behind its last tokens; one that was aborted by its reason alone."""
        metrics = self._metrics
        metrics.count_finish(finish_reason)
        self._num_finished += 1
        if finish_reason == "abort":
            return
        if self._num_finished == 1:
            metrics.cached_tokens.inc(cached_tokens)
        now = time.monotonic()
        first, last = self._latest or (now, now)
        metrics.request_seconds.observe(now - self._begin)
        metrics.request_prompt_tokens.observe(prompt_tokens)
        metrics.request_generation_tokens.observe(completion_tokens)
        metrics.decode_seconds.observe(last - first)
        if completion_tokens > 1:
            metrics.mean_token_seconds.observe((last - first) / (completion_tokens - 1))

    def leave(self) -> None:
        """Count what has begun and not finished as aborted, or one if nothing has begun; again, it counts nothing."""
        num_left = len(self._times) - self._num_finished
        if not self._times and not self._num_finished:
            num_left = 1
        if num_left > 0:
            self._num_finished += num_left
            self._metrics.count_finish("abort", num_left)


def _gauge(name: str, help: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, help: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _steps_of_1_2_5(largest: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50 and so on, as far as `largest`."""
    powers = [10**i for i in range(len(str(largest)))]
    return tuple(float(step) for power in powers for step in (power, 2 * power, 5 * power) if step <= largest)
