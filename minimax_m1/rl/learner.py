"""The learner: the weights, their optimizer, and one update on answers, alone or as one of several ranks.

Shapes: T packed tokens of a micro-batch, n of them written by the model and chosen freely; D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_m1.batch import ForwardBatch
from minimax_m1.model import MiniMaxM1ForCausalLM, load_balancing_loss
from minimax_m1.rl.loss import aggregation_weights, policy_loss
from minimax_m1.rl.rollout import Group
from minimax_m1.rl.settings import RLSettings
from minimax_m1.training.optimizer import build_optimizers, optimizer_state
from minimax_m1.training.parallel import World, clip_gradients, gradient_norms, parallelize, sum_over_ranks


@dataclass(frozen=True)
class Answer:
    """One answer as the loss sees it."""

    prompt_ids: list[int]
    token_ids: list[int]
    old_logprobs: list[float]
    is_free: list[bool]
    advantage: float
    group: int
    weight: float = 0.0  # of each of its free tokens


@dataclass(frozen=True)
class AnswerBatch:
    """Answers behind their prompts, end to end."""

    input_ids: Tensor  # [T] int64
    layout: ForwardBatch
    rows: Tensor  # [n] int64: which row of the hidden states a free token is predicted from
    targets: Tensor  # [n] int64: these tokens
    old_logprobs: Tensor  # [n] float32
    advantages: Tensor  # [n] float32
    weights: Tensor  # [n] float32


def pack_answers(answers: Sequence[Answer], device: torch.device, backend: str | None = None) -> AnswerBatch:
    """Lay answers end to end, each behind its prompt; tokens that were not chosen freely are not in the loss."""
    ids: list[int] = []
    rows: list[int] = []
    columns: list[tuple[int, float, float, float]] = []
    for answer in answers:
        first = len(ids) + len(answer.prompt_ids) - 1
        ids += [*answer.prompt_ids, *answer.token_ids]
        for place, token in enumerate(answer.token_ids):
            if answer.is_free[place]:
                rows.append(first + place)
                columns.append((token, answer.old_logprobs[place], answer.advantage, answer.weight))
    targets, old_logprobs, advantages, weights = zip(*columns, strict=True) if columns else ((), (), (), ())
    lengths = [len(answer.prompt_ids) + len(answer.token_ids) for answer in answers]
    return AnswerBatch(
        torch.tensor(ids, device=device),
        ForwardBatch.packed(lengths, device=device, backend=backend),
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(targets, dtype=torch.int64, device=device),
        torch.tensor(old_logprobs, dtype=torch.float32, device=device),
        torch.tensor(advantages, dtype=torch.float32, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
    )


def micro_batches(answers: Sequence[Answer], budget: int) -> list[list[Answer]]:
    """Divide answers in order into micro-batches of at most `budget` tokens; one that is longer has its own."""
    batches: list[list[Answer]] = []
    filled = budget
    for answer in answers:
        length = len(answer.prompt_ids) + len(answer.token_ids)
        if filled + length > budget:
            batches.append([])
            filled = 0
        batches[-1].append(answer)
        filled += length
    return batches


def split_groups(groups: Sequence[Group], updates: int) -> list[list[Group]]:
    """Divide groups into parts of nearly the same size, at most `updates`, none of them empty."""
    updates = min(updates, len(groups))
    bounds = [round(i * len(groups) / updates) for i in range(updates + 1)]
    return [list(groups[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


class Learner:
    """The model that is trained, on one rank; every rank makes the same calls."""

    def __init__(self, model: MiniMaxM1ForCausalLM, settings: RLSettings, world: World) -> None:
        """Take over the model, dividing it where there are several ranks; keep a copy of it if there is a KL term."""
        self.model, self.settings, self.world = model, settings, world
        self.reference: MiniMaxM1ForCausalLM | None = None
        if settings.kl_coefficient:
            self.reference = MiniMaxM1ForCausalLM(model.config).to(world.device)
            self.reference.load_state_dict(model.state_dict())
            self.reference.lm_head.product_dtype = model.lm_head.product_dtype
            parallelize(self.reference.requires_grad_(False), world, settings.training())
        parallelize(model, world, settings.training())
        self.optimizers = build_optimizers(model, settings.training())
        self.updates = 0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the live tensors, as `Checkpoints` takes them."""
        return {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": optimizer_state(self.model, self.optimizers),
        }

    def learn(self, groups: list[Group]) -> list[dict[str, float]]:
        """Take the updates of one batch of rollouts, each on a part of its groups; return what is reported of each."""
        return [self.update(part) for part in split_groups(groups, self.settings.updates_per_step)]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Take one optimizer step on the answers to some prompts.

        Where the gradient is not finite nothing is updated, and the result says "skipped".
        """
        settings, world = self.settings, self.world
        self.model.train()
        batches = self._batches(_answers(groups, settings))
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in self._accumulate(batch).items():
                together = torch.maximum if name.endswith("_max") else torch.add
                sums[name] = together(sums[name], value) if name in sums else value
        totals = self._over_ranks(sums)
        norm = gradient_norms(self.model, world)["all"]
        skipped = not math.isfinite(norm)
        lr = settings.lr * (min(1.0, (self.updates + 1) / settings.warmup_updates) if settings.warmup_updates else 1.0)
        if not skipped:
            clip_gradients(self.model, min(1.0, settings.max_grad_norm / (norm + 1e-12)))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.updates += 1
        return {**_reported(totals), "grad_norm": norm, "lr": lr, **({"skipped": 1.0} if skipped else {})}

    def _batches(self, answers: list[Answer]) -> list[AnswerBatch]:
        """Return this rank's micro-batches: as many as every other rank's, for all of them meet in every layer."""
        world, settings = self.world, self.settings
        own = micro_batches(answers[world.data_rank :: world.num_data_ranks], settings.tokens_per_batch)
        count = len(own)
        if world.size > 1:
            most = torch.tensor(count)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            count = int(most)
        spare = Answer([0], [0], [0.0], [False], 0.0, 0)  # nothing of it is in the loss
        own += [[spare]] * (count - len(own))
        return [pack_answers(batch, world.device, settings.backend) for batch in own]

    def _accumulate(self, batch: AnswerBatch) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; return the sums of its tokens that are reported."""
        settings = self.settings
        hidden, routings = self.model.forward_packed(batch.input_ids, batch.layout)
        logprobs, entropy = self.model.lm_head.token_logprobs(hidden[batch.rows], batch.targets, settings.backend)
        result = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.weights,
            ratio_min=settings.ratio_min,
            ratio_max=settings.ratio_max,
            mask_min=settings.mask_min,
            mask_max=settings.mask_max,
            ref_logprobs=self._reference_logprobs(batch),
            kl_coefficient=settings.kl_coefficient,
        )
        loss = result.loss
        if settings.aux_loss:  # a micro-batch's balance counts as much as its tokens do: a spare one's nothing
            loss = loss + settings.aux_loss * batch.weights.sum() * load_balancing_loss(routings)
        (loss + 0.0 * hidden.sum()).backward()  # every weight takes part, also where a micro-batch has no free token
        errors = (logprobs.detach() - batch.old_logprobs).abs()
        return {
            **result.sums,
            "loss": result.loss.detach(),
            "entropy": entropy.sum(),
            "error_max": errors.max() if len(errors) else errors.new_zeros(()),
            **_moments(logprobs.detach().exp(), batch.old_logprobs.exp()),
        }

    @torch.no_grad()
    def _reference_logprobs(self, batch: AnswerBatch) -> Tensor | None:
        if self.reference is None:
            return None
        hidden, _ = self.reference.forward_packed(batch.input_ids, batch.layout)
        return self.reference.lm_head.token_logprobs(hidden[batch.rows], batch.targets, self.settings.backend)[0]

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        values = {name: float(value) for name, value in sums.items()}
        if self.world.size == 1:
            return values
        most = [name for name in values if name.endswith("_max")]
        largest = torch.tensor([values[name] for name in most])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        totals = dict(zip(values, sum_over_ranks(list(values.values()), self.world), strict=True))
        return {**totals, **dict(zip(most, largest.tolist(), strict=True))}


def _answers(groups: Sequence[Group], settings: RLSettings) -> list[Answer]:
    """Return the answers of some groups, with what each of their tokens counts among all of these."""
    answers = [
        Answer(group.prompt.ids, r.token_ids, r.logprobs, r.is_free, advantage, index)
        for index, group in enumerate(groups)
        for r, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]
    weights = aggregation_weights(
        [sum(answer.is_free) for answer in answers],
        [answer.group for answer in answers],
        settings.aggregation,
        settings.sample_share,
    )
    return [
        Answer(a.prompt_ids, a.token_ids, a.old_logprobs, a.is_free, a.advantage, a.group, weight)
        for a, weight in zip(answers, weights, strict=True)
    ]


def _moments(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the sums that a correlation needs."""
    x, y = x.double(), y.double()
    return {"x": x.sum(), "y": y.sum(), "xx": (x * x).sum(), "yy": (y * y).sum(), "xy": (x * y).sum()}


def _reported(totals: dict[str, float]) -> dict[str, float]:
    """Return an update's sums as means and shares of its tokens."""
    tokens = max(1.0, totals["tokens"])
    dropped = max(1.0, totals["dropped"])
    mean = {name: totals[name] / tokens for name in ("x", "y", "xx", "yy", "xy")}
    spread = (mean["xx"] - mean["x"] ** 2) * (mean["yy"] - mean["y"] ** 2)
    reported = {
        "loss": totals["loss"],
        "entropy": totals["entropy"] / tokens,
        "ratio_mean": totals["ratio"] / tokens,
        "ratio_max": totals["ratio_max"],
        "clipped_low": totals["clipped_low"] / tokens,
        "clipped_high": totals["clipped_high"] / tokens,
        "masked": totals["masked"] / tokens,
        "low_probability": totals["low_probability"] / tokens,
        "masked_low_probability": totals["dropped_low_probability"] / dropped,
        "dropped": totals["dropped"] / tokens,
        "kl_old": totals["kl_old"] / tokens,
        "logprob_error": totals["error_max"],
        "logprob_correlation": (mean["xy"] - mean["x"] * mean["y"]) / math.sqrt(spread) if spread > 0 else 1.0,
        "tokens": totals["tokens"],
    }
    if "kl_ref" in totals:
        reported["kl_ref"] = totals["kl_ref"] / tokens
    return reported
