"""One layer of the full-size model on a GPU: decoding, and a prompt of a million tokens in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minimax_m1.accounting import prefill_flops
from minimax_m1.benchmark.gpu_measure import Case, measure
from minimax_m1.benchmark.measure import Figure, Machine
from minimax_m1.cache import HybridCache
from minimax_m1.config import LIGHTNING, SOFTMAX, MiniMaxM1Config, QuantizationConfig
from minimax_m1.model import MiniMaxM1ForCausalLM, rotary_angles
from minimax_m1.quantization import quantize_model, quantized_matrices

BATCH_SIZES = (1, 8, 64)
CHUNK = 8192  # tokens of a prompt that run together
CONTEXT = 8192  # behind which a softmax layer decodes
KINDS = {LIGHTNING: "lightning", SOFTMAX: "softmax"}


@torch.inference_mode()
def decoding(
    config: MiniMaxM1Config,
    device: torch.device,
    machine: Machine,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    context: int = CONTEXT,
) -> Iterator[Figure]:
    """Yield, for a layer of each kind in bfloat16 and int8, the tokens per second of steps of decoding."""
    for kind, name in KINDS.items():
        for quantization in (None, "int8"):
            model = one_layer(config, kind, device, quantization)
            for count in batch_sizes:
                case = f"{name} layer {quantization or 'bfloat16'} decode {count}"
                yield measure(_step(case, model, count, context), machine, device)
            del model


def _step(name: str, model: MiniMaxM1ForCausalLM, count: int, context: int) -> Case:
    """Return a step of `count` sequences behind `context` tokens each, with the bytes that it must move."""
    config, layer = model.config, model.model.layers[0]
    cache = HybridCache(config, count, context + 1, torch.bfloat16, model.device)
    for slot in range(count):
        assert cache.reserve(slot, context + 1)
        cache.lens[slot] = context
    for pool in (*cache.keys.values(), *cache.values.values(), *cache.states.values()):
        pool.normal_()
    batch = cache.batch(list(range(count)), [1] * count)
    rotary, x = rotary_angles(batch.positions, config), _random_rows(count, model)
    used = int(layer(x, batch, rotary, cache)[1].expert_ids.unique().numel()) / config.num_local_experts
    moved = sum(size * (used if ".experts." in part else 1) for part, size in _layer_bytes(model).items())
    if cache.states:
        moved += 2 * sum(states[:count].nbytes for states in cache.states.values())
    else:
        moved += sum(pool[:, : -(-context // pool.shape[2]) * count].nbytes for pool in cache.keys.values()) * 2
    flops = prefill_flops(config, context + 1, num_logits=0) - prefill_flops(config, context, num_logits=0)
    run: Callable[[], Tensor] = lambda: layer(x, batch, rotary, cache)[0]  # noqa: E731
    return Case(name, "tok/s", count, count * flops, moved, run, as_graph=True)


@torch.inference_mode()
def long_prefill(
    config: MiniMaxM1Config, device: torch.device, machine: Machine, length: int = 1 << 20, chunk: int = CHUNK
) -> Iterator[Figure]:
    """Yield the tokens per second of a lightning layer on the first chunks of a prompt, and on its last ones.

    The peer of each line is the first: flat is 1.00x.
    """
    model = one_layer(config, LIGHTNING, device)
    cache = HybridCache(model.config, 1, length, torch.bfloat16, device)
    x, layer = _random_rows(chunk, model), model.model.layers[0]
    ceiling = chunk * machine.gemm_flops / prefill_flops(model.config, chunk, num_logits=0)

    def run_to(end: int) -> float:
        _wait(device)
        start, first = time.perf_counter(), cache.lens[0]
        while cache.lens[0] < end:
            batch = cache.batch([0], [chunk])
            layer(x, batch, rotary_angles(batch.positions, model.config), cache)
            cache.commit(batch)
        _wait(device)
        return (cache.lens[0] - first) / (time.perf_counter() - start)

    run_to(2 * chunk)  # compiles
    cache.reset(0)
    first = None
    for end in (length // 16, length // 8, length // 2, length):
        run_to(end - length // 16)
        speed = run_to(end)
        first = first or speed
        yield Figure(f"lightning layer prefill to {end // 1024}k", "tok/s", speed, first, ceiling)


@torch.no_grad()
def one_layer(config: MiniMaxM1Config, kind: int, device: torch.device, quantization: str | None = None) -> Any:
    """Return a bfloat16 `MiniMaxM1ForCausalLM` of one layer of this kind, its matrices rounded to fewer bits or not."""
    config = config.replace(num_hidden_layers=1, attn_type_list=(kind,), vocab_size=64)
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    if quantization is not None:
        quantize_model(model, QuantizationConfig.parse(quantization))
    return model


def _layer_bytes(model: MiniMaxM1ForCausalLM) -> dict[str, int]:
    """Return the bytes of each weight of the layer."""
    sizes = {name: weight.nbytes for name, weight in model.named_parameters()}
    sizes |= {name: w.tiles.nbytes + w.scales.nbytes for name, w in quantized_matrices(model).items()}
    return {name: size for name, size in sizes.items() if ".layers." in name}


def _random_rows(count: int, model: MiniMaxM1ForCausalLM) -> Tensor:
    return torch.randn(count, model.config.hidden_size, device=model.device, dtype=model.compute_dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
