"""What the processes of test_parallel do: the same few steps in one layout after another; rank 0 writes what came out.

Run by torchrun with the name of a JSON file to write. The layouts are those whose product is the number of processes.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
    gradient_norms,
    init_world,
    load_weights,
    materialize,
    parallelize,
    sum_over_ranks,
)
from minimax_m1.training.settings import TrainSettings

NUM_STEPS, NUM_SLOTS = 6, 4
# name -> settings; what is not there is on one rank. Each is compared with the same on one process.
LAYOUTS: dict[str, dict[str, Any]] = {
    "shard 2": {"dp_shard": 2},
    "replicate 2": {"dp_replicate": 2, "activation_checkpointing": True},
    "expert 2": {"expert_parallel": 2},
    "context 2": {"context_parallel": 2, "activation_checkpointing": True},
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


def make_settings(**layout: Any) -> TrainSettings:
    return TrainSettings(**{"dp_shard": 1, "batches_per_step": NUM_SLOTS, **layout})


def make_batch(step: int, slot: int) -> PackedBatch:
    """A micro-batch of random tokens; the loss falls on some of them."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    layout = ForwardBatch.packed(LENGTHS[(step + slot) % len(LENGTHS)])
    num_tokens = int(layout.cu_seqlens[-1])
    ids = torch.randint(CONFIG.vocab_size, (num_tokens,), generator=generator)
    targets = torch.randint(CONFIG.vocab_size, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < 0.3] = -100
    return PackedBatch(ids, targets, layout)


def run(model: MiniMaxM1ForCausalLM, world: World) -> dict[str, Any]:
    """Take the steps; return each one's loss, balance and gradient norms, and the sum of the weights at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
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


def run_layout(layout: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Build the network by each of the ways there are, check that they agree, and run the last."""
    settings = make_settings(**layout)
    world = init_world(settings)
    model = MiniMaxM1ForCausalLM(CONFIG)
    model.init_weights(seed=1)
    parallelize(model, world, settings)
    with torch.device("meta"):
        other = MiniMaxM1ForCausalLM(CONFIG)
    parallelize(other, world, settings)
    materialize(other, world.device)
    same = {}
    for way, fill in (("init", lambda: other.init_weights(seed=1)), ("load", lambda: load_weights(other, checkpoint))):
        for parameter in other.parameters():
            parameter.detach().zero_()
        fill()
        pairs = zip(full_weights(model), full_weights(other), strict=True)
        same[way] = all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    result = {**run(other, world), "same": same}
    other.eval()
    batch = make_batch(0, 0)
    with torch.no_grad():
        hidden, _ = other.forward_packed(batch.input_ids, batch.layout)
        result["logits"] = other.compute_logits(hidden).norm().item()
    result["weights"] = {name: whole.norm().item() for name, whole in full_weights(other)}
    return result


def main() -> None:
    output = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        whole = MiniMaxM1ForCausalLM(CONFIG)
        whole.init_weights(seed=1)
        whole.save_pretrained(folder)
        for name in sys.argv[2:]:
            result = run_layout(LAYOUTS[name], Path(folder))
            if dist.get_rank() == 0:
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, **result}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
