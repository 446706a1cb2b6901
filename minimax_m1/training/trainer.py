"""The training loop, from a recipe to an exported model, on one process or under torchrun on many.

Shapes: T packed tokens of one micro-batch, L layers, E experts; G micro-batches a step, over all ranks.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minimax_m1.accounting import training_flops
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.planning import GPUS
from minimax_m1.settings import read_toml, to_toml, tomllib
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.checkpoint import Checkpoints, SaveError, list_steps
from minimax_m1.training.data import PackedBatch
from minimax_m1.training.evaluation import Evaluation
from minimax_m1.training.export import export, write_recipe
from minimax_m1.training.feed import Feed
from minimax_m1.training.loss import packed_losses
from minimax_m1.training.metrics import RunLog
from minimax_m1.training.optimizer import (
    aux_loss_coefficient,
    build_optimizers,
    learning_rate_factor,
    optimizer_state,
    set_learning_rates,
)
from minimax_m1.training.parallel import (
    World,
    clip_gradients,
    close_world,
    context_part,
    gradient_squares,
    init_world,
    keep_weights,
    load_weights,
    materialize,
    norms_by_layer,
    parallelize,
    sum_over_ranks,
)
from minimax_m1.training.report import write_report
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import SampleStream
from minimax_m1.training.vocabulary import build_tokenizer, extend_embeddings

MAX_SKIPPED = 20  # steps in a row that may be left out; more, and the weights are lost
WATCHED_STEPS = 50  # steps at the beginning of a stage whose gradients are compared with as many before it


def train(settings: TrainSettings) -> MiniMaxM1ForCausalLM:
    """Train a model as a recipe says, resuming where an earlier run stopped, and export it to output/model.

    Raises:
        UserError: settings that cannot be used, data or folders that cannot be read or written, and what the settings
            say to stop at (bad_records, long_samples, bad_steps, bad_saves, max_grad_growth).
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    world = init_world(settings)
    try:
        return _run(settings, world)
    except KeyboardInterrupt:
        if world.is_main:
            saved = max(list_steps(settings.output / "checkpoints"), default=0)
            print(f"stopped; the same command continues after step {saved}", file=sys.stderr)
        raise
    finally:
        close_world(world)


def _run(settings: TrainSettings, world: World) -> MiniMaxM1ForCausalLM:
    output = settings.output
    with Checkpoints(output / "checkpoints", settings.keep, world) as checkpoints:
        newest, changes = checkpoints.newest(), ""
        if newest is not None and not settings.resume:
            raise UserError(f"output: {output} holds checkpoints of another run; choose another folder, or resume it")
        tokenizer = build_tokenizer(settings)
        model = build_model(settings, tokenizer, world)
        optimizers = build_optimizers(model, settings)
        slots = range(world.data_rank, settings.batches_per_step, world.num_data_ranks)
        streams = {slot: SampleStream(settings, tokenizer, slot, settings.window[0]) for slot in slots}
        feed = Feed(streams, settings, is_ahead=world.device.type == "cuda")
        run = RunState(model, optimizers, feed, Progress())
        if newest is not None:
            changes = changed_settings(settings)
            state = run.state()
            checkpoints.load(newest, state)
            run.load(state)
            if newest > settings.steps:
                raise UserError(
                    f"steps: {settings.steps} cannot be used; accepted: at least {newest}, which {output} has"
                )
        sum_over_ranks([0.0], world)  # every rank has looked into output: now it may be written
        if world.is_main:
            write_recipe(output, settings, tokenizer)
        with closing(feed):
            _loop(run, settings, world, checkpoints, Evaluation(settings, tokenizer, world), changes)
    export(model, tokenizer, settings, output / "model", world)
    if world.is_main:
        _write_report(output)
    return model


def _loop(
    run: RunState,
    settings: TrainSettings,
    world: World,
    checkpoints: Checkpoints,
    evaluation: Evaluation,
    changes: str,
) -> None:
    """Train from where `run` stands to the last step."""
    model, progress = run.model, run.progress
    meter, is_main = Meter(model, world, settings.dtype), world.is_main
    run.enter_stage(settings)
    with RunLog(
        settings.output, settings.steps, resume_step=progress.step, tensorboard=settings.tensorboard, is_main=is_main
    ) as log:
        if changes:
            log.write({"step": progress.step, "event": f"resumed with other settings: {changes}"})
            if is_main:
                print(f"step {progress.step}: resumed with other settings: {changes}", file=sys.stderr)
        while progress.step < settings.steps:
            if settings.stage(progress.step) != progress.stage:
                progress.stage = settings.stage(progress.step)
                run.enter_stage(settings)
                log.write({"step": progress.step + 1, "event": f"window {settings.window[progress.stage]:,}"})
            batches = run.feed.next_batches(progress.step, world.device)
            result = train_step(model, run.optimizers, batches, world, settings, progress.step)
            progress.step += 1
            progress.tokens += round(result["step_tokens"])
            meter.add(result, batches)
            log.advance(progress.step)
            watch_gradients(progress, result, settings, log)
            is_last = progress.step == settings.steps
            if progress.step % settings.log_every == 0 or progress.step == 1 or is_last:
                log.write({**meter.line(progress, settings), **left_out(run, world, log)})
            if settings.eval_every and (progress.step % settings.eval_every == 0 or is_last):
                log.write({"step": progress.step, **evaluation.run(model, progress.step)})
            save(run, checkpoints, settings, log)


def train_step(
    model: MiniMaxM1ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batches: list[PackedBatch],
    world: World,
    settings: TrainSettings,
    step: int,
) -> dict[str, Any]:
    """Take one optimizer step on the micro-batches of all ranks as if they were one batch; return its metrics.

    Every micro-batch's loss is divided by the learned tokens of all of them, its balance loss by their number. Where
    the loss or a gradient is not finite, nothing is updated and the result says "skipped".

    Args:
        batches: this data rank's micro-batches, whole; under context parallelism only its part of each is run.
        step: steps before this one; decides learning rates and coefficients.
    """
    model.train()
    set_learning_rates(optimizers, settings, learning_rate_factor(step, settings))
    aux_coefficient = aux_loss_coefficient(step, settings, model.config.router_aux_loss_coef)
    parts = [context_part(batch, world) for batch in batches]
    counts = [sum(part.num_targets for part in parts), sum(len(part.input_ids) for part in parts)]
    num_targets, num_tokens = sum_over_ranks(counts, world)
    if num_targets == 0:
        raise UserError("mixture: a whole step has no token that the loss falls on; accepted: data with some")

    sums, loads = torch.zeros(4, dtype=torch.float64, device=world.device), torch.zeros((), device=world.device)
    keep_weights(model, world, True)
    for part in parts:
        losses = packed_losses(model, part, settings.z_loss, world)
        balance = losses.balance / settings.batches_per_step
        (losses.loss / num_targets + aux_coefficient * balance).backward()
        values = losses.cross_entropy, losses.squares, losses.hits
        sums += torch.stack([*values, balance.detach() * num_targets / world.num_context_ranks])
        loads = loads + losses.expert_counts
    keep_weights(model, world, False)
    # The one place where the host waits for the device.
    results = sums, loads.double().flatten(), gradient_squares(model)
    totals = sum_over_ranks(torch.cat(results), world).cpu().split([len(part) for part in results])
    loss, squares, accuracy, balance = (total / num_targets for total in totals[0].tolist())

    norms = norms_by_layer(model, totals[2].tolist(), world)
    skipped = not (math.isfinite(loss) and math.isfinite(norms["all"]))
    if not skipped:
        clip_gradients(model, min(1.0, settings.max_grad_norm / (norms["all"] + 1e-12)))
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return {
        "loss": loss,
        "balance": balance,
        **({"z_loss": settings.z_loss * squares} if settings.z_loss else {}),
        "aux_loss": aux_coefficient,
        "token_accuracy": accuracy,
        "grad_norm": norms.pop("all"),
        "grad_norm_by_layer": norms,
        "lr": optimizers[-1].param_groups[0]["lr"],
        "expert_counts": totals[1].view(loads.shape),
        "step_tokens": num_tokens,
        **({"skipped": True} if skipped else {}),
    }


def _write_report(output: Path) -> None:
    """Write report.html; where it cannot be drawn the run has ended well all the same."""
    try:
        print(f"{output / 'model'}: the model; {write_report(output)}: the report", file=sys.stderr)
    except UserError as error:
        print(f"{output / 'model'}: the model; no report: {error}", file=sys.stderr)


# -- what a checkpoint holds ------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    stage: int = 0
    recent_norms: tuple[float, ...] = ()  # of the gradient, in the last steps of this stage
    norm_before: float = 0.0  # their median in the stage before; 0: there is none
    skipped_in_a_row: int = 0  # steps that were not finite, up to now
    told: list[str] = field(default_factory=list)  # kinds of records left out that the log has an example of


@dataclass
class RunState:
    """Everything that changes while training."""

    model: MiniMaxM1ForCausalLM
    optimizers: list[torch.optim.Optimizer]
    feed: Feed
    progress: Progress

    def state(self) -> dict[str, Any]:
        """Return it as `Checkpoints` takes it; the tensors are the live ones. Frozen parameters are init's."""
        parameters = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "model": parameters,
            "optimizer": optimizer_state(self.model, self.optimizers),
            "progress": {**vars(self.progress), "config": self.model.config.to_dict()},
            "slots": self.feed.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `Checkpoints.load` has filled in beside the tensors."""
        saved = {name: value for name, value in state["progress"].items() if name != "config"}
        self.progress.__dict__.update({**saved, "recent_norms": tuple(saved["recent_norms"])})
        self.feed.load(state["slots"])

    def enter_stage(self, settings: TrainSettings) -> None:
        """Set rope_theta to that of the stage; the window is the feed's business."""
        if settings.stage_rope_theta:
            theta = settings.stage_rope_theta[self.progress.stage]
            self.model.config = self.model.model.config = self.model.config.replace(rope_theta=theta)


def watch_gradients(progress: Progress, result: dict[str, Any], settings: TrainSettings, log: RunLog) -> None:
    """Report or stop at a step that was not finite, and at gradients that a longer window has made explode.

    The median of the first WATCHED_STEPS of a stage is compared with that of the last ones of the stage before.

    Raises:
        UserError: bad_steps or max_grad_growth say so, or MAX_SKIPPED steps in a row were left out.
    """
    step, norm = progress.step, result["grad_norm"]
    if result.get("skipped"):
        what = f"loss {result['loss']:.4g}, gradient norm {norm:.4g}: not finite, so not applied"
        if settings.bad_steps == "stop":
            raise UserError(f'step {step}: {what}; a lower lr may help, bad_steps = "skip" goes on')
        log.write({"step": step, "event": what})
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == MAX_SKIPPED:
            raise UserError(f"step {step}: {what}, as {MAX_SKIPPED} steps in a row; a lower lr may help")
        return
    progress.skipped_in_a_row = 0
    begins = settings.stage_steps[progress.stage - 1] if progress.stage else 0
    if step == begins + 1 and progress.stage:
        progress.norm_before = statistics.median(progress.recent_norms) if progress.recent_norms else 0.0
        progress.recent_norms = ()
    progress.recent_norms = (*progress.recent_norms[1 - WATCHED_STEPS :], norm)
    growth = statistics.median(progress.recent_norms) / progress.norm_before if progress.norm_before else 0.0
    is_watched = settings.max_grad_growth > 0 and step - begins in (10, 20, WATCHED_STEPS)
    if is_watched and growth > settings.max_grad_growth:
        before, window = settings.window[progress.stage - 1], settings.window[progress.stage]
        raise UserError(
            f"max_grad_growth: {step - begins} steps after the window grew from {before:,} to {window:,}, gradients "
            f"are {growth:.1f} times as large; accepted: {settings.max_grad_growth:g} times; take more stages"
        )


def left_out(run: RunState, world: World, log: RunLog) -> dict[str, int]:
    """Return how many records of all ranks were skipped and cut so far, if any; the first of each kind is an event."""
    kinds: Counter[str] = Counter()
    for note, times, place in run.feed.notes():
        kinds[note.split(":")[0]] += times
        if place and note not in run.progress.told:
            run.progress.told.append(note)
            log.write({"step": run.progress.step, "event": f"record {note}, as {place}"})
    counts = sum_over_ranks([kinds["skipped"], kinds["cut"]], world)
    per_rank = world.num_context_ranks  # that share their streams
    names = ("records_skipped", "records_cut")
    return {name: round(count) // per_rank for name, count in zip(names, counts, strict=True) if count}


def changed_settings(settings: TrainSettings) -> str:
    """Return which settings differ from those of the run in output, as "name: old -> new, …".

    Raises:
        UserError: vocab_size does; the weights were made for another.
    """
    path = settings.output / "recipe.toml"
    if not path.exists():
        return ""
    recipes = read_toml(path), tomllib.loads(to_toml(settings))
    before, now = ({**recipe, **recipe.pop("model", {}), "output": None, "resume": None} for recipe in recipes)
    names = [name for name in {**before, **now} if name != "model" and before.get(name) != now.get(name)]
    if "vocab_size" in names:
        was = before.get("vocab_size", 0)
        raise UserError(
            f"vocab_size: {settings.vocab_size} cannot be used; accepted: {was}, as in the run that is resumed"
        )
    return ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in names)


def _or_stop(policy: str, what: str, step: int, log: RunLog) -> None:
    """Go on and leave a line in the log where the policy is "skip"; else stop."""
    if policy == "stop":
        raise UserError(what)
    log.write({"step": step, "event": what})


def save(run: RunState, checkpoints: Checkpoints, settings: TrainSettings, log: RunLog) -> None:
    """Save where the settings say so, and see to the end of what is being written.

    Raises:
        UserError: a checkpoint could not be written, and bad_saves says stop.
    """
    step = run.progress.step
    is_last = step == settings.steps
    try:
        checkpoints.poll()
    except SaveError as error:
        _or_stop(settings.bad_saves, str(error), step, log)
    try:
        if step % settings.save_every == 0 or is_last:
            checkpoints.save(step, run.state())
        if is_last:
            checkpoints.wait()
    except SaveError as error:
        _or_stop(settings.bad_saves, str(error), step, log)


# -- speed ------------------------------------------------------------------------------------------------------------


class Meter:
    """What happened since the last line of metrics: time, tokens, expert load, and the share of the peak reached."""

    def __init__(self, model: MiniMaxM1ForCausalLM, world: World, dtype: str) -> None:
        self.model, self.world = model, world
        self.peak_flops = peak_flops(world.device, dtype)
        self.reset()

    def reset(self) -> None:
        self.started, self.tokens, self.flops = time.perf_counter(), 0.0, 0
        self.filled: list[int] = []
        self.expert_counts: Any = 0
        self.result: dict[str, Any] = {}

    def add(self, result: dict[str, Any], batches: list[PackedBatch]) -> None:
        """Count one step, of which `batches` are this rank's."""
        self.result, self.tokens = result, self.tokens + result["step_tokens"]
        self.expert_counts = self.expert_counts + result["expert_counts"]
        self.filled += [len(batch.input_ids) for batch in batches]
        self.flops += sum(training_flops(self.model.config, batch.layout.seqlens) for batch in batches)

    def line(self, progress: Progress, settings: TrainSettings) -> dict[str, Any]:
        """Return a line of metrics of the last step, with speed and load since the line before."""
        seconds = time.perf_counter() - self.started
        hidden = ("expert_counts", "step_tokens")
        load = self.expert_counts / self.expert_counts.sum(1, keepdim=True)
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            **{name: value for name, value in self.result.items() if name not in hidden},
            "expert_load": [[round(share, 4) for share in layer] for layer in load.tolist()],
            "window": settings.window[progress.stage],
            "packing": sum(self.filled) / (len(self.filled) * settings.tokens_per_batch),
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
        }
        if self.peak_flops:
            line["mfu"] = self.flops / self.world.num_context_ranks / seconds / self.peak_flops
        self.reset()
        return line


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the peak FLOP/s of this rank's device: of a CPU measured on a float32 product, None if unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "")
        gpu = next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in name), None)
        return None if gpu is None else gpu.flops if dtype == "bfloat16" else gpu.float32_flops
    a = torch.randn(1024, 1024)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


# -- the model ------------------------------------------------------------------------------------------------------


def build_model(settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer, world: World) -> MiniMaxM1ForCausalLM:
    """Return the model to train, in float32, divided over the ranks: init's, or a random one of the settings' config.

    Where weights are divided, no rank ever has all of them, unless init's vocabulary grows or LoRA is added.
    """
    if settings.init is None:
        config = settings.model_config(
            len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    else:
        config = MiniMaxM1Config.from_pretrained(settings.init)
    grows = settings.init is not None and settings.vocab_size > 0
    if world.mesh is None or grows or settings.lora_rank:
        model = _whole_model(config, settings, tokenizer).to(world.device)
        parallelize(model, world, settings)
        return model
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(config)
    parallelize(model, world, settings)
    materialize(model, world.device)
    if settings.init is None:
        model.init_weights(settings.seed)
    else:
        load_weights(model, settings.init)
    return model


def _whole_model(
    config: MiniMaxM1Config, settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer
) -> MiniMaxM1ForCausalLM:
    if settings.init is None:
        model = MiniMaxM1ForCausalLM(config)
        model.init_weights(settings.seed)
        return model
    model = MiniMaxM1ForCausalLM.from_pretrained(settings.init, dtype=torch.float32)
    model = extend_embeddings(model, MiniMaxM1Tokenizer.from_pretrained(settings.init), tokenizer)
    if settings.lora_rank:
        from minimax_m1.training.lora import add_lora

        add_lora(model, settings)
    return model
