"""What the processes of test_parallel do: the same few steps in one layout after another.

Run by `tests.ranks.launch` with the name of a folder and those of the layouts. Rank 0 writes results.jsonl there, and
all together a checkpoint of each layout.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, or torch loads it in every rank when it first divides a tensor
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from minimax_m1.batch import ForwardBatch
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM, load_balancing_loss
from minimax_m1.training.data import PackedBatch
from minimax_m1.training.parallel import (
    World,
    clip_gradients,
    context_balance_loss,
    context_part,
    full_weights,
    gather_weights,
    gradient_norms,
    init_world,
    load_weights,
    materialize,
    on_whole_matrices,
    parallelize,
    sum_over_ranks,
)
from minimax_m1.training.settings import TrainSettings

NUM_STEPS, NUM_SLOTS = 3, 4
# The layouts whose ways of making and storing weights are tested: one, two and three ways of being divided.
STORED = ("shard 2", "expert 2, shard 2", "replicate 2, expert 2")
# name -> settings; what is not there is on one rank. Each is compared with the same on one process.
LAYOUTS: dict[str, dict[str, Any]] = {
    "shard 2": {"dp_shard": 2},
    "replicate 2": {"dp_replicate": 2, "activation_checkpointing": True},
    "expert 2": {"expert_parallel": 2},
    "context 2": {"context_parallel": 2, "activation_checkpointing": True},
    "shard 2, 3 experts": {"dp_shard": 2, "experts": 3},
    "shard 2, bfloat16": {"dp_shard": 2, "dtype": "bfloat16"},
    "shard 4": {"dp_shard": 4},
    "replicate 2, shard 2": {"dp_replicate": 2, "dp_shard": 2},
    "expert 4": {"expert_parallel": 4},
    "context 4": {"context_parallel": 4},
    "expert 2, shard 2": {"expert_parallel": 2, "dp_shard": 2, "activation_checkpointing": True},
    "context 2, shard 2": {"context_parallel": 2, "dp_shard": 2},
    "expert 2, context 2": {"expert_parallel": 2, "context_parallel": 2},
    "replicate 2, expert 2": {"dp_replicate": 2, "expert_parallel": 2},
    "replicate 2, context 2": {"dp_replicate": 2, "context_parallel": 2},
}
CONFIG = MiniMaxM1Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    attn_type_list=(0, 1, 0, 1),
    num_local_experts=4,
    num_experts_per_tok=2,
    shared_intermediate_size=16,
    max_position_embeddings=512,
)
# Sequences of a micro-batch: one over all ranks, short ones, a cut at every place, fewer than a rank's share.
LENGTHS = ([61], [20, 1, 33, 7], [5, 6, 4, 30, 3, 2, 9], [2, 50, 1, 1, 9])


def make_settings(experts: int = 4, **layout: Any) -> TrainSettings:
    return TrainSettings(**{"dp_shard": 1, "batches_per_step": NUM_SLOTS, **layout})


def make_model(experts: int = 4, **layout: Any) -> MiniMaxM1ForCausalLM:
    model = MiniMaxM1ForCausalLM(CONFIG.replace(num_local_experts=experts))
    model.init_weights(seed=1)
    return model


def make_batch(step: int, slot: int) -> PackedBatch:
    """A micro-batch of random tokens; the loss falls on some of them."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    layout = ForwardBatch.packed(LENGTHS[(step + slot) % len(LENGTHS)])
    num_tokens = int(layout.cu_seqlens[-1])
    ids = torch.randint(CONFIG.vocab_size, (num_tokens,), generator=generator)
    targets = torch.randint(CONFIG.vocab_size, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < 0.3] = -100
    targets[: num_tokens // 2 if slot == 1 else 0] = -100  # a prompt so long that some rank has nothing to learn
    return PackedBatch(ids, targets, layout)


def run(model: MiniMaxM1ForCausalLM, world: World) -> dict[str, Any]:
    """Take the steps; return each one's loss, balance and gradient norms."""
    # eps well above rounding: AdamW would take a step of full length by a gradient that is nothing else
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, fused=True)
    steps = []
    for step in range(NUM_STEPS):
        batches = [make_batch(step, slot) for slot in range(world.data_rank, NUM_SLOTS, world.num_data_ranks)]
        parts = [context_part(batch, world) for batch in batches]
        (num_targets,) = sum_over_ranks([sum(part.num_targets for part in parts)], world)
        sums = torch.zeros(2)
        for part in parts:
            hidden, routings = model.forward_packed(part.input_ids, part.layout)
            learned = part.targets != -100
            loss = model.lm_head.token_losses(hidden[learned], part.targets[learned])[0] / num_targets
            if world.num_context_ranks > 1:
                assert world.context_group is not None
                balance = context_balance_loss(routings, world.context_group) / NUM_SLOTS
            else:
                balance = load_balancing_loss(routings) / NUM_SLOTS
            (loss + 0.1 * balance).backward()
            sums += torch.stack((loss.detach(), balance.detach() / world.num_context_ranks))
        loss, balance = sum_over_ranks(sums, world).tolist()
        norms = gradient_norms(model, world)
        clip_gradients(model, min(1.0, 0.5 / norms["all"]))
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss, "balance": balance, **norms})
    return {"steps": steps}


def run_layout(name: str, folder: Path) -> dict[str, Any]:
    """Run the steps; of some layouts also store the weights, and see whether all ways of making them agree."""
    settings = make_settings(**LAYOUTS[name])
    world = init_world(settings)
    model = make_model(**LAYOUTS[name])
    parallelize(model, world, settings)
    if name not in STORED:
        return {**run(model, world), "sums": probe(model)}
    same = ways_agree(model, world, settings, folder)
    result = {**run(model, world), "sums": probe(model), "same": same}
    dcp.save({"model": {name: p.detach() for name, p in model.named_parameters()}}, checkpoint_id=folder / name)
    return result


def ways_agree(model: MiniMaxM1ForCausalLM, world: World, settings: TrainSettings, folder: Path) -> dict[str, bool]:
    """Say of each way to make the weights of `model` whether it gives the same, and of products of whole matrices."""
    with torch.device("meta"):
        other = MiniMaxM1ForCausalLM(CONFIG)
    parallelize(other, world, settings)
    materialize(other, world.device)
    same = {"matrices": True}
    for way, fill in (
        ("init", lambda: other.init_weights(seed=1)),
        ("load", lambda: load_weights(other, folder / "whole")),
    ):
        for parameter in other.parameters():
            parameter.detach().zero_()
        fill()
        pairs = zip(full_weights(model), full_weights(other), strict=True)
        same[way] = all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    original, copy = make_model(), MiniMaxM1ForCausalLM(CONFIG)
    gather_weights(model, copy if world.is_main else None)
    same["gather"] = all(torch.equal(x, y) for x, y in zip(original.parameters(), copy.parameters(), strict=True))
    for weight, (_, whole) in zip(model.parameters(), full_weights(model), strict=True):
        if weight.dim() > 1:
            squared = on_whole_matrices(lambda x: x @ x.mT @ x, weight.detach())
            assert squared.placements == weight.placements
            same["matrices"] &= torch.equal(squared.full_tensor(), whole @ whole.mT @ whole)
    return same


@torch.no_grad()
def probe(model: MiniMaxM1ForCausalLM) -> list[float]:
    """Return what depends on every weight and its place: the logits of a few tokens, summed over tokens."""
    batch = make_batch(0, 0)
    hidden, _ = model.eval().forward_packed(batch.input_ids, batch.layout)
    return model.compute_logits(hidden).sum(0).tolist()


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        result = run_layout(name, Path(folder))
        if dist.get_rank() == 0:
            with Path(folder, "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **result}) + "\n")
    dist.destroy_process_group()
