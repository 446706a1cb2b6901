"""The engine: quantized weights, many requests together, cached prefixes, speculation, and what a routing log costs.

The peer is Transformers in float32, or, where it has nothing of the kind, the engine without the feature.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from minimax_m1.benchmark.measure import Figure, Machine
from minimax_m1.benchmark.network import DecodeOurs, DecodePeer, bytes_per_step
from minimax_m1.config import QuantizationConfig
from minimax_m1.engine import Engine
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.quantization import quantize_model
from minimax_m1.sampling import SamplingParams
from minimax_m1.settings import EngineSettings

CASES = ("quantized", "together", "prefix", "routing-log", "speculation")
CACHE_BYTES = 2 * 2**30
PREFIX = 4096  # tokens


def run(
    size: str, model: MiniMaxM1ForCausalLM, twin: Any, machine: Machine, cases: Collection[str], *, quick: bool
) -> Iterator[Figure]:
    """Yield the figures of one preset; `twin` None: without Transformers. The weights of `model` stay as they are."""
    rounds = 1 if quick else 5
    if "quantized" in cases:
        yield from _quantized(size, model, twin, machine, rounds)
    if "together" in cases:
        yield from _together(size, model, twin, 1 if quick else 3)
    if "prefix" in cases:
        length = PREFIX // 8 if quick else PREFIX
        yield _prefix(f"{size} float32", model, rounds, length)
        yield _prefix(f"{size} int8", quantized(model, "int8"), rounds, length)
    if "routing-log" in cases:
        yield _routing_log(size, model, rounds)
    if "speculation" in cases:
        yield _speculation(size, model, rounds)


def quantized(model: MiniMaxM1ForCausalLM, name: str) -> MiniMaxM1ForCausalLM:
    """Return a quantized copy of a network; what is not quantized is in bfloat16, as in the official checkpoint."""
    copy = MiniMaxM1ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    quantize_model(copy, QuantizationConfig.parse(name))
    return copy.eval()


def seconds_to_generate(engine: Engine, prompts: list[list[int]], lengths: list[int], **options: Any) -> float:
    """Run requests to their ends, so many greedy tokens each; return the seconds."""
    params = [SamplingParams(temperature=0, max_new_tokens=n, ignore_eos=True) for n in lengths]
    start = time.perf_counter()
    results = engine.generate(prompts, params, **options)
    seconds = time.perf_counter() - start
    assert [len(result.token_ids) for result in results] == lengths
    return seconds


def _quantized(size: str, model: MiniMaxM1ForCausalLM, twin: Any, machine: Machine, rounds: int) -> Iterator[Figure]:
    theirs = DecodePeer(twin, 1, 512) if twin is not None else None
    for name in ("int8", "int4"):
        small = quantized(model, name)
        ours = DecodeOurs(small, 1, 512)
        speeds = [(ours.run(32), theirs.run(12) if theirs else None) for _ in range(rounds)]
        peer = statistics.median(s for _, s in speeds if s is not None) if theirs else None
        ceiling = machine.read_bytes / bytes_per_step(small, 1)
        yield Figure(f"{size} {name} decode-1", "tok/s", statistics.median(s for s, _ in speeds), peer, ceiling)


def _together(size: str, model: MiniMaxM1ForCausalLM, twin: Any, rounds: int) -> Iterator[Figure]:
    """Sixteen prompts of 32 to 512 tokens, answers of 32 to 128; Transformers pads both to the longest."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(16, generator=generator).tolist()
    prompts = [_random_ids(model, 32 + 32 * i, i) for i in range(16)]
    lengths = [32 + 96 * i // 15 for i in order]
    networks = {"float32": model, "int8": quantized(model, "int8"), "int4": quantized(model, "int4")}
    settings = EngineSettings(max_batch_size=16, cache_bytes=CACHE_BYTES, prefix_cache=False)
    engines = {name: Engine(network, None, settings) for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*engines, "peer")}
    for _ in range(rounds):
        for name, engine in engines.items():
            seconds[name].append(seconds_to_generate(engine, prompts, lengths))
        if twin is not None:
            seconds["peer"].append(_seconds_padded(twin, prompts, max(lengths)))
    peer = sum(lengths) / statistics.median(seconds["peer"]) if twin is not None else None
    for name in engines:
        yield Figure(f"{size} {name} 16 requests", "tok/s", sum(lengths) / statistics.median(seconds[name]), peer)


@torch.inference_mode()
def _seconds_padded(twin: Any, prompts: list[list[int]], num_new: int) -> float:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    start = time.perf_counter()
    output = twin.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0)
    assert output.shape[1] == longest + num_new
    return time.perf_counter() - start


def _prefix(name: str, model: MiniMaxM1ForCausalLM, rounds: int, length: int) -> Figure:
    """Time to first token behind a system prompt that another request had before, and behind a new one."""
    engine = Engine(model, None, EngineSettings(max_batch_size=4, cache_bytes=CACHE_BYTES))
    seconds: list[tuple[float, float]] = []
    for i in range(rounds):
        shared = _random_ids(model, length, seed=100 + i)
        miss, hit = (seconds_to_generate(engine, [shared + _random_ids(model, 32, seed)], [1]) for seed in (1, 2))
        seconds.append((hit, miss))
    assert engine.prefix_cache is not None and engine.prefix_cache.stats.hit_tokens == rounds * length
    hit, miss = (statistics.median(s) for s in zip(*seconds, strict=True))
    return Figure(f"{name} first token, {length} cached", "1/s", 1 / hit, 1 / miss)


def _routing_log(size: str, model: MiniMaxM1ForCausalLM, rounds: int) -> Figure:
    """Decoding of 16 requests with a log for each; the peer is without."""
    engine = Engine(model, None, EngineSettings(max_batch_size=16, cache_bytes=CACHE_BYTES, prefix_cache=False))
    prompts = [_random_ids(model, 8, i) for i in range(16)]
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * rounds):  # each goes first as often as the other: the machine drifts by more than the log costs
        for log in (i % 2 == 0, i % 2 == 1):
            speeds[log].append(16 * 48 / seconds_to_generate(engine, prompts, [48] * 16, routing_log=log))
    ours, peer = (statistics.median(speeds[log]) for log in (True, False))
    return Figure(f"{size} 16 requests, routing logs", "tok/s", ours, peer)


def _speculation(size: str, model: MiniMaxM1ForCausalLM, rounds: int) -> Figure:
    """Text that repeats every 64 tokens, so that every draft is right; the peer is without drafts.

    A network whose layers add nothing answers token i by the next of its group of 64; it costs what any other costs.
    """
    parrot = MiniMaxM1ForCausalLM(model.config)
    parrot.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, weight in parrot.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "experts.w2")):
                weight.zero_()
        ids = torch.arange(model.config.vocab_size)
        parrot.lm_head.weight[_next_of_64(ids)] = parrot.model.embed_tokens.weight
    first = [64 * 7 + i for i in range(64)]
    engines = [
        Engine(parrot, None, EngineSettings(max_batch_size=1, cache_bytes=CACHE_BYTES, speculative_tokens=drafts))
        for drafts in (8, 0)
    ]
    speeds = [[96 / seconds_to_generate(engine, [first * 2], [96]) for engine in engines] for _ in range(rounds)]
    ours, peer = (statistics.median(s) for s in zip(*speeds, strict=True))
    return Figure(f"{size} repeated text, 8 drafts", "tok/s", ours, peer)


def _next_of_64(ids: Tensor) -> Tensor:
    return ids // 64 * 64 + (ids + 1) % 64


def _random_ids(model: MiniMaxM1ForCausalLM, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
