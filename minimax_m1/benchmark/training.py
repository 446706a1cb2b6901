"""Training beside Transformers' own Trainer: same weights, same samples, same optimizer, steps in turn.

A step has four samples of 512 tokens, or SAMPLES of mixed lengths; ours are laid end to end, the Trainer's padded.
"""

from __future__ import annotations

import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.autograd.profiler import profile

from minimax_m1.accounting import training_flops
from minimax_m1.benchmark.measure import Figure, Machine, peak_memory
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.data import PackedBatch, Sample, pack
from minimax_m1.training.loss import packed_losses
from minimax_m1.training.optimizer import build_optimizers
from minimax_m1.training.parallel import init_world, parallelize
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.trainer import train_step

CASES = ("train", "train-mix", "memory-train-32k")
TOKENS = 2048
PRODUCT = re.compile(r"^aten::(mm|bmm|addmm_?|_scaled_dot_product.*)$")  # the profiler's names
SAMPLES, LENGTHS_SEED = 8, 0  # of a step of mixed lengths


def run(
    size: str, model: MiniMaxM1ForCausalLM, twin: Any, machine: Machine, cases: Collection[str], *, quick: bool
) -> Iterator[Figure]:
    """Yield the figures of one preset; `twin` None: without a peer."""
    rounds = 2 if quick else 5
    if "train" in cases:
        samples = random_samples(model.config.vocab_size, [512] * 4)
        flops = training_flops(model.config, [512] * 4)
        ours, theirs = _seconds(model, twin, [samples], rounds)
        name, ceiling = f"{size} train 4x512", TOKENS * machine.gemm_flops / flops
        yield Figure(name, "tok/s", TOKENS / ours, twin and TOKENS / theirs, ceiling)
        # without the optimizer, whose time does not grow with the batch; and of that the products alone
        seconds, products = _forward_backward_seconds(model, pack(samples), rounds)
        yield Figure(f"{name}, no optimizer", "tok/s", TOKENS / seconds, None, ceiling)
        yield Figure(f"{name}, its products", "GFLOP/s", flops / products / 1e9, None, machine.gemm_flops / 1e9)
    if "train-mix" in cases:
        steps = [random_samples(model.config.vocab_size, lengths) for lengths in length_mix(rounds)]
        num_tokens = statistics.mean(sum(len(sample.ids) for sample in step) for step in steps)
        ours, theirs = _seconds(model, twin, steps, rounds)
        yield Figure(f"{size} train, lengths mixed", "tok/s", num_tokens / ours, twin and num_tokens / theirs)
        padded = [[_padded(sample, step) for sample in step] for step in steps]
        alone, _ = _seconds(model, None, padded, rounds)
        yield Figure(f"{size} packed / padded, both ours", "tok/s", num_tokens / ours, num_tokens / alone)
    if "memory-train-32k" in cases and size == "small":
        length = 2048 if quick else 32_768
        code = f"from minimax_m1.benchmark.training import train_alone; train_alone({size!r}, {length})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        short, peak = map(int, done.stdout.split())
        yield Figure(f"{size} train, peak memory, one sequence of {length // 1024}k", "GB", peak / 1e9)
        yield Figure(f"{size} train, peak memory, one of 64 tokens", "GB", short / 1e9)


def length_mix(count: int) -> list[list[int]]:
    """Return the lengths of the samples of so many steps: log-normal, as conversations are; median 180, up to 1,024."""
    rng = random.Random(LENGTHS_SEED)
    return [[min(1024, max(16, round(rng.lognormvariate(5.2, 0.9)))) for _ in range(SAMPLES)] for _ in range(count)]


def random_samples(vocab_size: int, lengths: list[int]) -> list[Sample]:
    """Return samples of random ids, all of them learned."""
    return [Sample(torch.randint(0, vocab_size, (n,)).tolist(), [True] * n) for n in lengths]


def _padded(sample: Sample, step: list[Sample]) -> Sample:
    """Return the sample filled up to the longest of its step, as padding would have it; what fills is not learned."""
    missing = max(len(other.ids) for other in step) - len(sample.ids)
    return Sample(sample.ids + [0] * missing, sample.learned + [False] * missing)


def _seconds(model: MiniMaxM1ForCausalLM, twin: Any, steps: list[list[Sample]], rounds: int) -> tuple[float, float]:
    """Return the median seconds of our step and of the Trainer's, taken in turn on the same samples."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings.from_dict({"output": folder, "lr": 1e-6, "warmup_steps": 0, "steps": 10_000})
        world = init_world(settings)
        optimizers = build_optimizers(model, settings)

        def ours(i: int) -> float:
            start = time.perf_counter()
            train_step(model, optimizers, [pack(steps[i % len(steps)])], world, settings, 0)
            return time.perf_counter() - start

        ours(0)  # warm-up: the optimizer makes its moments
        pairs = _in_turn(twin, steps, rounds, ours, folder) if twin else [(ours(i), 0.0) for i in range(rounds)]
    model.eval().zero_grad(set_to_none=True)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def _in_turn(
    twin: Any, steps: list[list[Sample]], rounds: int, ours: Callable[[int], float], folder: str
) -> list[tuple[float, float]]:
    """Run Transformers' Trainer; behind each of its steps, one of ours on the same samples. Return seconds of both."""
    import transformers

    in_order = [steps[0], *(steps[i % len(steps)] for i in range(rounds))]  # the first is their warm-up
    rows = [{"input_ids": sample.ids, "labels": sample.ids} for step in in_order for sample in step]
    pairs: list[tuple[float, float]] = []

    class InTurn(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            theirs = time.perf_counter() - self.started
            if state.global_step > 1:
                pairs.append((ours(state.global_step - 2), theirs))
            self.started = time.perf_counter()

    twin.config.output_router_logits = True
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=len(steps[0]),
        max_steps=rounds + 1,
        learning_rate=1e-6,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model=twin, args=arguments, train_dataset=rows, data_collator=_collate, callbacks=[InTurn()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    twin.config.output_router_logits = False
    twin.eval().zero_grad(set_to_none=True)
    return pairs


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad a batch to its longest row, on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def _forward_backward_seconds(model: MiniMaxM1ForCausalLM, batch: PackedBatch, rounds: int) -> tuple[float, float]:
    """Return the median seconds of a forward and backward pass alone, and those of its matrix products.

    Gradients keep their memory. Attention counts as products: its fused kernels are not taken apart.
    """
    seconds, products = [], []
    model.train()
    for _ in range(rounds + 1):
        with profile(use_kineto=False) as profiled:
            start = time.perf_counter()
            packed_losses(model, batch).loss.backward()
            seconds.append(time.perf_counter() - start)
        events = profiled.key_averages()
        products.append(sum(event.self_cpu_time_total for event in events if PRODUCT.search(event.key)) / 1e6)
    model.eval().zero_grad(set_to_none=True)
    return statistics.median(seconds[1:]), statistics.median(products[1:])


def train_alone(size: str, length: int) -> None:
    """Take a step on one random sequence of 64 tokens and one on `length`, layers recomputed; print this process's peak
    memory in bytes after each."""
    settings = TrainSettings(tokens_per_batch=length, window=(length,), activation_checkpointing=True)
    world = init_world(settings)
    model = MiniMaxM1ForCausalLM(MiniMaxM1Config.preset(size))
    model.init_weights(0)
    parallelize(model, world, settings)
    optimizers = build_optimizers(model, settings)
    for step, tokens in enumerate((64, length)):
        samples = random_samples(model.config.vocab_size, [tokens])
        train_step(model, optimizers, [pack(samples)], world, settings, step)
        print(peak_memory())
