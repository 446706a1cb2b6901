"""The settings of `minimax-m1 train`: one line a field, the same keys as in a recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.settings import Backend, option
from minimax_m1.tasks import NANO_TASKS

LoraTarget = Literal["attention", "experts", "shared"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides a training run."""

    output: Path = option(Path("runs/m1-nano"), "folder for checkpoints, metrics, report and the exported model")
    resume: bool = option(True, "continue from the newest checkpoint in output, if there is one")
    init: Path | None = option(None, "checkpoint folder whose weights and tokenizer to start from [default: random]")
    seed: int = option(0, "decides weights and data")
    device: str = option("cpu", "cpu or cuda; under torchrun every rank takes its own")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the products; weights and optimizer stay float32")
    backend: Backend | None = option(None, "kernels to run with; reference is the plain formula [default: fastest]")
    threads: int = option(0, "CPU threads; 0: what torch chooses")

    mixture: dict[str, float] = option(
        dict.fromkeys(NANO_TASKS, 1.0), "family, or data file or pattern -> its share of the tokens"
    )
    vocab_size: int = option(0, "build a vocabulary of this size from the mixture, or extend init's; 0: init's")
    window: tuple[int, ...] = option(
        (), "most tokens of one sample, in each stage of context extension [default: tokens_per_batch]"
    )
    stage_steps: tuple[int, ...] = option((), "step at which each further stage begins: one less than windows")
    stage_rope_theta: tuple[float, ...] = option((), "rope_theta of each stage [default: the model's]")
    long_samples: Literal["cut", "skip", "stop"] = option(
        "cut", "samples above the window: texts become several, chats lose their end; or leave out; or stop"
    )
    bad_records: Literal["skip", "stop"] = option("stop", "records of data files that cannot be read")

    steps: int = option(3000, "optimizer steps in all")
    tokens_per_batch: int = option(4096, "most tokens of one packed micro-batch")
    batches_per_step: int = option(1, "micro-batches of one optimizer step, divided over the ranks")
    lr: float = option(2e-3, "highest learning rate of AdamW")
    muon_lr: float = option(0.0, "highest learning rate of Muon on the matrices inside the layers; 0: AdamW there too")
    warmup_steps: int = option(100, "steps in which the learning rate rises linearly from 0")
    decay_steps: int = option(600, "last steps, in which it falls linearly")
    final_lr_factor: float = option(0.0, "share of the learning rate that is left at the end")
    weight_decay: float = option(0.05, "on matrices only")
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.95, "AdamW's")
    eps: float = option(1e-15, "AdamW's; M1's gradients go down to 1e-18")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    aux_loss: tuple[float, ...] = option(
        (),
        "coefficient of the routers' balance loss; two: it goes linearly from one to the other [default: the model's]",
    )
    z_loss: float = option(0.0, "coefficient of the squared log of the softmax's normaliser; 0: off")
    activation_checkpointing: bool = option(False, "keep only each layer's input and compute the rest again")
    max_grad_growth: float = option(
        0.0, "stop if after a new stage gradients stay this many times above the stage before; 0: do not look"
    )
    bad_steps: Literal["skip", "stop"] = option("stop", "steps with a loss or gradient that is not finite")

    dp_replicate: int = option(1, "ranks that hold copies of the weights, in groups")
    dp_shard: int = option(0, "ranks over which weights and optimizer are divided (FSDP2); 0: all that are left")
    expert_parallel: int = option(1, "ranks over which the experts are divided")
    context_parallel: int = option(1, "ranks over which each micro-batch's tokens are divided")

    lora_rank: int = option(
        0, "train low-rank additions to init's frozen weights instead of the weights; 0: the weights"
    )
    lora_alpha: float = option(16.0, "the additions count lora_alpha / lora_rank")
    lora_targets: tuple[LoraTarget, ...] = option(("attention", "experts", "shared"), "matrices that get additions")

    log_every: int = option(20, "steps between lines of metrics")
    tensorboard: bool = option(False, "write events for TensorBoard as well, into output/tensorboard")
    eval_every: int = option(500, "steps between evaluations; 0: none")
    eval_problems: int = option(50, "unseen problems of each family of the mixture in an evaluation")
    eval_data: tuple[Path, ...] = option((), "data files whose loss is part of an evaluation")
    eval_tokens: int = option(65_536, "most tokens of each of them")
    sample_prompts: tuple[str, ...] = option((), "prompts answered at every evaluation, into output/samples.jsonl")
    sample_tokens: int = option(200, "most tokens of such an answer")
    save_every: int = option(250, "steps between checkpoints")
    keep: int = option(2, "newest checkpoints that are kept")
    bad_saves: Literal["skip", "stop"] = option("stop", "checkpoints that cannot be written, as on a full disk")
    export_dtype: Literal["float32", "bfloat16"] = option("bfloat16", "of the exported model")
    model: dict[str, Any] = option({}, "fields of MiniMaxM1Config, without init; sizes of the vocabulary are filled in")

    def __post_init__(self) -> None:
        if not self.window:
            object.__setattr__(self, "window", (self.tokens_per_batch,))
        at_least_1 = "steps tokens_per_batch batches_per_step log_every save_every keep eval_problems eval_tokens"
        at_least_1 += " sample_tokens dp_replicate expert_parallel context_parallel"
        for name in at_least_1.split():
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("lr", "eps", "max_grad_norm", "lora_alpha"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        at_least_0 = (
            "warmup_steps decay_steps eval_every weight_decay final_lr_factor muon_lr threads vocab_size z_loss"
        )
        at_least_0 += " max_grad_growth dp_shard lora_rank"
        for name in at_least_0.split():
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number from 0, below 1")
        for name, accepted in _CHOICES.items():
            _require(getattr(self, name) in accepted, name, getattr(self, name), " or ".join(accepted))
        for name, share in self.mixture.items():
            is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
            _require(is_number, f"mixture.{name}", share, "a number from 0: a share of the tokens")
            if name not in NANO_TASKS and not re.search(r"[./\\*]", name):  # nor does it look like a file
                near = difflib.get_close_matches(name, NANO_TASKS, n=1, cutoff=0.0)[0]
                _require(False, "mixture", name, f"families (the nearest: {near!r}), and data files or patterns")
        weights = self.mixture.values()
        _require(min(weights, default=-1) >= 0 < sum(weights), "mixture", self.mixture, "weights from 0, one above it")
        _require(len(self.aux_loss) <= 2 and min(self.aux_loss, default=0) >= 0, "aux_loss", self.aux_loss, "up to two")
        self._check_stages()
        if self.lora_rank:
            _require(self.init is not None, "init", None, "the checkpoint to add to, where lora_rank is above 0")
            _require(not self.vocab_size, "vocab_size", self.vocab_size, "0 with lora_rank: embeddings are frozen")
            _require(not self.stage_rope_theta, "stage_rope_theta", self.stage_rope_theta, "none with lora_rank")

    def _check_stages(self) -> None:
        """Each stage has its window, a later beginning and, if any has, its rope_theta."""
        _require(min(self.window) >= 2, "window", self.window, "numbers of at least 2")
        _require(max(self.window) <= self.tokens_per_batch, "window", self.window, "at most tokens_per_batch")
        bounds = (0, *self.stage_steps)
        rises = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
        _require(
            len(bounds) == len(self.window) and rises,
            "stage_steps",
            self.stage_steps,
            "rising steps, one less than windows",
        )
        _require(
            len(self.stage_rope_theta) in (0, len(bounds)), "stage_rope_theta", self.stage_rope_theta, "one a window"
        )

    def stage(self, step: int) -> int:
        """Return the stage of context extension that step 0, 1, … belongs to."""
        return sum(step >= begin for begin in self.stage_steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Build settings from the keys of a recipe.

        Raises:
            UserError: an unknown key, or a value that cannot be used.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        _require(not unknown, "recipe", ", ".join(unknown), ", ".join(f.name for f in fields(cls)))
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        given.update({name: Path(given[name]) for name in ("output", "init") if name in given})
        given["eval_data"] = tuple(map(Path, given.get("eval_data", ())))
        return cls(**given)

    def model_config(self, vocab_size: int, **token_ids: int) -> MiniMaxM1Config:
        """Return the config of the model to train.

        Raises:
            UserError: an unknown key, or a value that cannot describe a network.
        """
        config = MiniMaxM1Config.from_dict({**self.model, "vocab_size": vocab_size, **token_ids})
        # A checkpoint's unknown keys are kept; in a recipe such a key is a mistake.
        _require(not config.extra, "model", ", ".join(config.extra), "fields of MiniMaxM1Config")
        return config


_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "long_samples": ("cut", "skip", "stop"),
    "bad_records": ("skip", "stop"),
    "bad_steps": ("skip", "stop"),
    "bad_saves": ("skip", "stop"),
    "export_dtype": ("float32", "bfloat16"),
}


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise UserError(f"{name}: {value!r} cannot be used; accepted: {accepted}")
