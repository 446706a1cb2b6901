"""What a run measures of itself: unseen problems, the loss on data files, and answers to fixed prompts.

Shapes: T packed tokens of unseen samples.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import torch

from minimax_m1.generation import generate_batch
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams
from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.data import PackedBatch, make_sample, pack, prompt_ids
from minimax_m1.training.loss import packed_losses
from minimax_m1.training.parallel import World, gather_weights
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import SampleStream


class Evaluation:
    """The evaluations of a run. Every rank runs the same, because a sharded model needs all of them for each layer."""

    def __init__(self, settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer, world: World) -> None:
        self.settings, self.tokenizer, self.world = settings, tokenizer, world
        families = [name for name, weight in settings.mixture.items() if weight > 0 and name in NANO_TASKS]
        self.problems = {family: self._problems(family) for family in families}
        self.files = {str(path): self._file(str(path)) for path in settings.eval_data}

    def run(self, model: MiniMaxM1ForCausalLM, step: int) -> dict[str, Any]:
        """Return {"solved": {family: share}, "eval_loss": {file: loss}}; append the samples to output/samples.jsonl."""
        model.eval()
        result: dict[str, Any] = {}
        if self.problems:
            result["solved"] = {family: solved(model, batch) for family, batch in self.problems.items()}
        if self.files:
            result["eval_loss"] = {name: self._loss(model, batches) for name, batches in self.files.items()}
        if self.settings.sample_prompts:
            self._sample(model, step)
        return result

    def _problems(self, family: str) -> PackedBatch:
        rng = random.Random(f"evaluation:{self.settings.seed}:{family}")
        problems = [NANO_TASKS[family].sample(rng, "test") for _ in range(self.settings.eval_problems)]
        samples = [make_sample(self.tokenizer, problem) for problem in problems]
        return pack(samples, self.world.device, self.settings.backend)

    def _file(self, name: str) -> list[PackedBatch]:
        """Return the beginning of a data file as packed batches, the same at every evaluation."""
        alone = replace(self.settings, mixture={name: 1.0}, batches_per_step=1, seed=0)
        stream = SampleStream(alone, self.tokenizer, 0, self.settings.window[-1])
        count = max(1, self.settings.eval_tokens // self.settings.tokens_per_batch)
        return [stream.next_batch(self.world.device, self.settings.backend) for _ in range(count)]

    @torch.no_grad()
    def _loss(self, model: MiniMaxM1ForCausalLM, batches: list[PackedBatch]) -> float:
        losses = [packed_losses(model, batch).cross_entropy for batch in batches]
        return float(sum(losses)) / sum(batch.num_targets for batch in batches)

    @torch.no_grad()
    def _sample(self, model: MiniMaxM1ForCausalLM, step: int) -> None:
        if self.world.mesh is not None:
            model = self._whole(model)
        if not self.world.is_main:
            return
        prompts = [prompt_ids(self.tokenizer, prompt) for prompt in self.settings.sample_prompts]
        params = SamplingParams(temperature=0.0, max_new_tokens=self.settings.sample_tokens)
        outputs = generate_batch(model, prompts, params, tokenizer=self.tokenizer, backend=self.settings.backend)
        with (self.settings.output / "samples.jsonl").open("a", encoding="utf-8") as file:
            for prompt, ids in zip(self.settings.sample_prompts, outputs, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")

    def _whole(self, model: MiniMaxM1ForCausalLM) -> MiniMaxM1ForCausalLM:
        """Return on the main rank a network with all weights of one that is divided: generation needs it."""
        if not self.world.is_main:
            gather_weights(model, None)
            return model
        whole = MiniMaxM1ForCausalLM(model.config).to(self.world.device)
        if self.settings.lora_rank:
            from minimax_m1.training.lora import add_lora

            add_lora(whole, self.settings)
        gather_weights(model, whole)
        return whole.eval()


@torch.no_grad()
def solved(model: MiniMaxM1ForCausalLM, batch: PackedBatch) -> float:
    """Return the share of a batch's samples whose every learned token is the model's first choice.

    One forward pass instead of a generation: where all of them are, greedy generation writes exactly this solution. So
    it is a lower bound of the accuracy.
    """
    hidden, _ = model.forward_packed(batch.input_ids, batch.layout)
    wrong = torch.zeros_like(batch.targets, dtype=torch.bool)
    logits = model.compute_logits(hidden[batch.learned], batch.layout.backend)
    wrong[batch.learned] = logits.argmax(-1) != batch.targets[batch.learned]
    parts = wrong.split(batch.layout.seqlens)
    return sum(not part.any() for part in parts) / len(parts)
