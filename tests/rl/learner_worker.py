"""Updates of a small random network on made-up answers, alone or as one of the ranks of test_learner.

`main`, which tests.ranks.launch calls, runs every case as one rank; rank 0 writes weights-CASE.pt and results.json.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, or torch loads it in every rank when it first divides a tensor
from torch import Tensor

from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.rl.learner import Learner
from minimax_m1.rl.rollout import Group, Prompt, Rollout
from minimax_m1.rl.settings import RLSettings
from minimax_m1.tasks import Problem
from minimax_m1.training.parallel import World, close_world, full_weights, init_world
from tests.training.parallel_worker import CONFIG

PROBLEM = Problem("addition", "1 + 1", "", "2", "1 + 1")
# With as large an eps as a rate, and no bound on the norm, AdamW's first step is the gradient itself: a step of its
# usual size would be as long by a gradient that is rounding alone.
PLAIN = {"lr": 1e4, "eps": 1e4, "weight_decay": 0.0, "max_grad_norm": float("inf")}
# name -> number of answers in each group, settings
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "even": ((3, 5), {}),
    "micro-batches": ((3, 5), {"tokens_per_batch": 40}),
    "fewer on one rank": ((3,), {"tokens_per_batch": 40}),
    "none on one rank": ((1,), {}),
    "KL and checkpointing": ((3, 2), {"kl_coefficient": 0.3, "activation_checkpointing": True}),
    "spare with balance loss": ((1,), {"aux_loss": 0.5}),
}


def make_settings(**changes: Any) -> RLSettings:
    sizes = {"max_prompt_tokens": 8, "window": (30,), "tokens_per_batch": 4096, "prompts_per_step": 2, "group_size": 2}
    return RLSettings(**{"tasks": {"addition": 1.0}, **sizes, **PLAIN, **changes})


def make_model(seed: int = 0) -> MiniMaxM1ForCausalLM:
    model = MiniMaxM1ForCausalLM(CONFIG)
    model.init_weights(seed)
    return model


def make_groups(sizes: tuple[int, ...], seed: int = 0) -> list[Group]:
    """Answers of 1 to 20 tokens, some tokens of which were forced; old probabilities around 1/96, as the model's."""
    rng = random.Random(seed)
    groups = []
    for number, size in enumerate(sizes):
        ids = [rng.randrange(96) for _ in range(rng.randint(2, 8))]
        rollouts = []
        for _ in range(size):
            length = rng.randint(1, 20)
            tokens = [rng.randrange(96) for _ in range(length)]
            free = [True, *(rng.random() < 0.8 for _ in range(length - 1))]
            rollouts.append(Rollout(tokens, [rng.gauss(-4.56, 0.3) for _ in tokens], free, "", "stop"))
        prompt = Prompt("addition", 0, PROBLEM, ids, number)
        groups.append(Group(prompt, rollouts, 0, advantages=[rng.gauss(0, 1) for _ in range(size)]))
    return groups


def run_case(name: str, world: World, ranks: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the weights after one update, and what the update reports."""
    sizes, changes = CASES[name]
    cluster = {"rollout_workers": 1, "trainer_ranks": ranks} if ranks > 1 else {}
    learner = Learner(make_model(), make_settings(**changes, **cluster), world)
    result = learner.update(make_groups(sizes))
    return {key: weight.clone() for key, weight in full_weights(learner.model)}, result


def main(folder: str) -> None:
    settings = make_settings(rollout_workers=1, trainer_ranks=2)
    world = init_world(settings.training())
    results = {}
    for name in CASES:
        weights, results[name] = run_case(name, world, 2)
        if world.is_main:
            torch.save(weights, Path(folder, f"weights-{name}.pt"))
    if world.is_main:
        Path(folder, "results.json").write_text(json.dumps(results))
    close_world(world)
