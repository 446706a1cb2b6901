"""Training a model of 0.9 billion parameters on one GPU, beside Transformers' port of the same network.

Both take AdamW steps in bfloat16 on the same tokens, samples of one length, so that nobody pads; ours is the trainer's
own step, the port's a plain loop with its own loss, bfloat16 weights and PyTorch's fused AdamW.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from minimax_m1.accounting import training_flops
from minimax_m1.benchmark.measure import Figure, Machine
from minimax_m1.benchmark.network import transformers_twin
from minimax_m1.benchmark.training import random_samples
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.data import Sample, pack
from minimax_m1.training.optimizer import build_optimizers
from minimax_m1.training.parallel import close_world, init_world, materialize, parallelize
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.trainer import peak_flops, train_step

SAMPLES, LENGTH = 8, 4096  # of a step
ROUNDS = 12
SIZE: dict[str, Any] = dict(
    hidden_size=2048,
    intermediate_size=1536,
    num_hidden_layers=8,
    attn_type_list=(0, 0, 0, 0, 0, 0, 0, 1),
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    rotary_dim=128,  # the port turns whole heads
    num_local_experts=8,
    vocab_size=32_768,
    max_position_embeddings=LENGTH,
)


def training(
    device: torch.device,
    machine: Machine,
    *,
    with_peer: bool,
    samples: int = SAMPLES,
    length: int = LENGTH,
    **size: Any,
) -> Iterator[Figure]:
    """Yield tokens per second of a step, and the share of the GPU's peak (as its vendor states it) that this is."""
    config = MiniMaxM1Config.preset("small").replace(**{**SIZE, **size})
    batch = random_samples(config.vocab_size, [length] * samples)
    tokens, flops = samples * length, training_flops(config, [length] * samples)
    ours = statistics.median(_ours(config, batch, device))
    theirs = statistics.median(_port(config, batch, device)) if with_peer else None
    ceiling = tokens * machine.gemm_flops / flops
    yield Figure("training, 0.9 billion", "tok/s", tokens / ours, theirs and tokens / theirs, ceiling)
    peak = peak_flops(device, "bfloat16")
    if peak is not None:
        yield Figure(
            "training, 0.9 billion", "% MFU", 100 * flops / ours / peak, theirs and 100 * flops / theirs / peak
        )


def _ours(config: MiniMaxM1Config, batch: list[Sample], device: torch.device) -> list[float]:
    """Return the seconds of steps as `minimax-m1 train` takes them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            output=Path(folder), device=str(device), dtype="bfloat16", tokens_per_batch=sum(len(s.ids) for s in batch)
        )
        world = init_world(settings)
        try:
            with torch.device("meta"):
                model = MiniMaxM1ForCausalLM(config)
            parallelize(model, world, settings)
            materialize(model, world.device)
            model.init_weights(seed=0)
            optimizers = build_optimizers(model, settings)
            packed = pack(batch)  # on the host, as `minimax-m1 train` does ahead of a GPU
            return _seconds(lambda: train_step(model, optimizers, [packed.to(device)], world, settings, 1), device)
        finally:
            close_world(world)


def _port(config: MiniMaxM1Config, batch: list[Sample], device: torch.device) -> list[float]:
    """Return the seconds of the port's steps."""
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    twin = transformers_twin(model).to(device, torch.bfloat16).train()
    twin.config.output_router_logits = True
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-6, fused=device.type == "cuda")
    ids = torch.tensor([sample.ids for sample in batch], device=device)

    def step() -> None:
        twin(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _seconds(step, device)


def _seconds(step: Callable[[], Any], device: torch.device) -> list[float]:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]  # behind the warm-up
