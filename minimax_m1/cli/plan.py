"""`minimax-m1 plan`: what a training run needs before it is started, from a config alone; nothing is measured.

Three questions: which layout of the GPUs fits and how long it takes (the default), which scaling law a set of runs
follows (`--fit`), and how the FLOPs compare with DeepSeek-R1's (`--compare`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimax_m1 import accounting, planning, scaling
from minimax_m1.cli.info import find_config
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.planning import Plan, Totals, Workload
from minimax_m1.settings import PlanSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_BATCH = 2**27  # tokens: what MiniMax-01's batch grew to (arXiv 2501.08313)
TOKENS_PER_PARAMETER = 20  # Chinchilla's rule (arXiv 2203.15556)
NUM_SHOWN = 8  # layouts
CONTEXTS = (4096, 32_768, 131_072, 524_288, 1_048_576)  # of the table of training FLOPs
COMPARED = (16_000, 32_000, 64_000, 80_000, 100_000, 128_000)  # generated tokens
LAW = ("E", "A", "B", "alpha", "beta", "exponent")
PUBLISHED = {64_000: "< 50%", 80_000: "~30%", 100_000: "~25%"}  # M1's report


def plan(settings: PlanSettings) -> None:
    """Answer the question that the settings ask, as text, and in numbers in `settings.json`.

    Raises:
        UserError: no such model, values or files that cannot be used, or a run that fits in no layout.
    """
    if settings.fit and settings.compare:
        raise UserError("fit: with compare; accepted: one of the two")
    if settings.plot is not None and not (settings.fit or settings.compare):
        raise UserError(f"plot: {settings.plot} cannot be used; accepted: with fit or compare, which have one")
    if settings.fit:
        answer = _fit(settings)
    elif settings.compare:
        answer = _compare(settings)
    else:
        answer = _plan(settings)
    if settings.json is not None:
        _write(settings.json, json.dumps(answer, indent=2) + "\n")


# -- layouts, time and cost ---------------------------------------------------------------------------------------


def _plan(settings: PlanSettings) -> dict[str, Any]:
    name, config = find_config(settings.model)
    length = settings.sequence_length
    workload = Workload(
        config=config,
        gpu=planning.GPUS[settings.gpu],
        num_gpus=settings.num_gpus,
        sequence_length=length,
        batch_tokens=settings.batch_tokens or max(length, min(settings.num_gpus * length, LARGEST_BATCH)),
        dtype=settings.dtype,
        efficiency=settings.efficiency,
        margin=settings.margin,
    )
    fitting, too_large, ruled_out = planning.search(workload)
    if not fitting:
        raise UserError(_nothing_fits(settings, workload, too_large[0]))
    best = fitting[0]
    tokens = settings.tokens or TOKENS_PER_PARAMETER * accounting.active_parameters(config)
    totals = planning.totals(workload, best, tokens, settings.price)
    recipe = _recipe(workload, best, totals.steps)
    about = f"{_count(accounting.parameters(config))} parameters, {_count(accounting.active_parameters(config))}"
    lines = [
        f"{name} ({about} active for a token) on {settings.num_gpus} {settings.gpu}, sequences of {length:,} tokens,",
        f"steps of up to {workload.batch_tokens:,}; products in {settings.dtype} at {settings.efficiency:.0%} of peak",
        "",
        *_layouts_as_text(workload, fitting, too_large, ruled_out),
        "",
        *_best_as_text(workload, best),
        "",
        f"Training on {tokens:,.4g} tokens",
        *_totals_as_text(totals, settings.price),
        "",
        *_contexts_as_text(config, length),
        "",
        "Recipe",
        *(f"  {key} = {value}" for key, value in recipe.items()),
    ]
    print("\n".join(lines))
    return {
        "model": name,
        "gpu": settings.gpu,
        "num_gpus": settings.num_gpus,
        "memory_limit": workload.memory_limit,
        "plans": [_plan_as_json(plan) for plan in fitting],
        "too_large": [_plan_as_json(plan) for plan in too_large],
        "ruled_out": ruled_out,
        "totals": {"tokens": tokens, **dataclasses.asdict(totals)},
        "recipe": {key: json.loads(value) for key, value in recipe.items()},  # such values are JSON too
    }


def _nothing_fits(settings: PlanSettings, workload: Workload, nearest: Plan) -> str:
    return (
        f"num_gpus: {settings.num_gpus} {settings.gpu} cannot hold this run in any layout; the nearest, "
        f"{_axes(nearest)}, needs {_bytes(nearest.memory.total)} of {_bytes(workload.memory_limit)} a rank, most for "
        f"{_largest(nearest)}; accepted: more or larger GPUs, or shorter sequences"
    )


def _layouts_as_text(
    workload: Workload, fitting: list[Plan], too_large: list[Plan], ruled_out: dict[str, int]
) -> list[str]:
    limit = f"{_bytes(workload.memory_limit)} a rank ({1 - workload.margin:.0%} of {_bytes(workload.gpu.memory_bytes)})"
    rows = [
        "  {:>10}{:>7}{:>8}{:>9}".format(*dataclasses.astuple(p.layout))
        + f"{p.tokens_per_batch:>18,}{p.batches_per_step:>10,}{'yes' if p.activation_checkpointing else 'no':>15}"
        + f"{_bytes(p.memory.total):>12}{p.time.total:>10.3g}{p.tokens_per_second:>12,.0f}"
        for p in fitting[:NUM_SHOWN]
    ]
    lines = [
        f"{len(fitting)} layouts fit {limit}; the fastest",
        f"  {'replicate':>10}{'shard':>7}{'expert':>8}{'context':>9}{'tokens_per_batch':>18}{'batches':>10}"
        f"{'checkpointing':>15}{'a rank':>12}{'step s':>10}{'tokens/s':>12}",
        *rows,
    ]
    if too_large:
        nearest = too_large[0]
        lines += [
            f"{len(too_large)} do not; the nearest, {_axes(nearest)}, needs {_bytes(nearest.memory.total)}, "
            f"most for {_largest(nearest)}"
        ]
    return lines + [f"{count} cannot be: {reason}" for reason, count in ruled_out.items()]


def _best_as_text(workload: Workload, best: Plan) -> list[str]:
    return [
        "Memory of a rank, fastest layout",
        *(f"  {name:<20} {_bytes(size)}" for name, size in dataclasses.asdict(best.memory).items()),
        f"  {'fullest moment':<20} {_bytes(best.memory.total)} of {_bytes(workload.gpu.memory_bytes)}",
        "",
        "Time of a step, fastest layout",
        *(f"  {name:<20} {seconds:9.3f} s" for name, seconds in dataclasses.asdict(best.time).items()),
        f"  {'total':<20} {best.time.total:9.3f} s for {best.step_tokens:,} tokens",
    ]


def _totals_as_text(totals: Totals, price: float | None) -> list[str]:
    lines = [
        f"  steps                {totals.steps:,}",
        f"  compute              {totals.flops:.3g} FLOP, {totals.mfu:.1%} of the peak (recomputation not counted)",
        f"  time                 {_time(totals.seconds)}, {totals.gpu_hours:,.0f} GPU-hours",
    ]
    return lines if totals.cost is None else [*lines, f"  cost                 {totals.cost:,.0f} at {price:g} each"]


def _contexts_as_text(config: MiniMaxM1Config, length: int) -> list[str]:
    lines = ["Training FLOPs of a token by sequence length, and what of them is attention to earlier tokens"]
    for n in sorted({*CONTEXTS, length}):
        if n > config.max_position_embeddings:
            continue
        parts = accounting.flops_by_part(config, n)
        total = sum(parts.values())
        lines.append(
            f"  {n:>9,} tokens     {3 * total / n:.3g} FLOP   softmax {parts['softmax_scores'] / total:6.2%}   "
            f"lightning {parts['lightning_state'] / total:6.2%}"
        )
    return lines


def _recipe(workload: Workload, plan: Plan, steps: int) -> dict[str, str]:
    """Return the keys of `minimax-m1 train` and their values in TOML."""
    return {
        **{axis: str(size) for axis, size in dataclasses.asdict(plan.layout).items()},
        "activation_checkpointing": str(plan.activation_checkpointing).lower(),
        "window": f"[{workload.sequence_length}]",
        "tokens_per_batch": str(plan.tokens_per_batch),
        "batches_per_step": str(plan.batches_per_step),
        "steps": str(steps),
        "device": '"cuda"',
        "dtype": f'"{workload.dtype}"',
    }


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(plan),
        "memory_total": plan.memory.total,
        "step_seconds": plan.time.total,
        "tokens_per_second": plan.tokens_per_second,
    }


# -- scaling law --------------------------------------------------------------------------------------------------


def _fit(settings: PlanSettings) -> dict[str, Any]:
    found = scaling.fit(scaling.read_runs(list(settings.fit)))
    law, residuals = found.law, found.residuals
    spent = max(6 * run.parameters * run.tokens for run in found.runs)
    budgets = [settings.budget] if settings.budget else [spent, 10 * spent, 100 * spent]
    values = {name: (getattr(law, name), *found.interval(attrgetter(name))) for name in LAW}
    root_mean_square = math.sqrt(sum(r * r for r in residuals) / len(residuals))
    lines = [
        f"loss = E + A / N^alpha + B / D^beta, fitted to {len(found.runs)} runs (95% intervals from "
        f"{len(found.resampled)} resamples)",
        *(f"  {name:<8} {value:12.5g}   {_range(low, high)}" for name, (value, low, high) in values.items()),
        "  N are the parameters that a token uses, D training tokens; the best N grows with FLOPs^exponent",
        "",
        f"Residuals of log loss: root mean square {root_mean_square:.2g}; the largest",
    ]
    by_size = sorted(zip(residuals, found.runs, strict=True), key=lambda pair: -abs(pair[0]))
    lines += [f"  {r:+.4f}   {run.name}: N {run.parameters:.3g}, D {run.tokens:.3g}" for r, run in by_size[:5]]
    lines += ["", "Least loss for a budget of 6 N D"]
    optima = []
    for budget in budgets:
        N, D = law.optimum(budget)
        low, high = _size_interval(found, budget)
        if math.isnan(N):
            lines.append(
                "  there is none: this law's loss does not fall with both; more runs, further apart, are needed"
            )
            break
        optima.append({"flops": budget, "parameters": N, "tokens": D, "low": _known(low), "high": _known(high)})
        lines.append(
            f"  {budget:.3g} FLOP    N {N:.3g} ({_range(low, high)}), D {D:.3g}, loss {law.loss(N, D):.4f}"
            + ("" if budget <= spent else f", {budget / spent:.3g} times the largest run")
        )
    print("\n".join(lines))
    if settings.plot is not None:
        _plot(settings.plot, lambda axes: _plot_fit(axes, found))
    runs = [{**dataclasses.asdict(run), "residual": r} for run, r in zip(found.runs, residuals, strict=True)]
    return {
        "law": {n: {"value": v, "low": _known(low), "high": _known(high)} for n, (v, low, high) in values.items()},
        "optima": optima,
        "runs": runs,
    }


def _range(low: float, high: float) -> str:
    return "not determined" if math.isnan(low) else f"{low:.4g} to {high:.4g}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _size_interval(found: scaling.ScalingFit, budget: float) -> tuple[float, float]:
    return found.interval(lambda law: law.optimum(budget)[0])


def _plot_fit(axes: Axes, found: scaling.ScalingFit) -> None:
    """Loss against FLOPs: the runs, the law at each of their sizes, and the best that any size reaches."""
    import numpy as np
    from matplotlib import colormaps

    sizes = sorted({run.parameters for run in found.runs})
    shown = sizes if len(sizes) <= 10 else [sizes[round(i * (len(sizes) - 1) / 9)] for i in range(10)]
    flops = [6 * run.parameters * run.tokens for run in found.runs]
    low, high = math.log(min(sizes)), math.log(max(sizes))

    def colour(size: float) -> tuple[float, float, float, float]:
        return colormaps["viridis"]((math.log(size) - low) / (high - low))

    for size in shown:
        tokens = [run.tokens for run in found.runs if run.parameters == size]
        D = np.geomspace(min(tokens) / 2, max(tokens) * 2, 50)
        axes.plot(6 * size * D, [found.law.loss(size, d) for d in D], color=colour(size), lw=1, label=f"N = {size:.2g}")
    axes.scatter(flops, [run.loss for run in found.runs], c=[colour(run.parameters) for run in found.runs], s=14)
    budgets = np.geomspace(min(flops) / 2, max(flops) * 10, 50)
    if not math.isnan(found.law.optimum(budgets[0])[0]):
        axes.plot(budgets, [found.law.loss(*found.law.optimum(c)) for c in budgets], "k--", lw=1, label="best N and D")
    axes.set(xscale="log", xlabel="training FLOPs (6 N D)", ylabel="loss", title="Runs and their scaling law")
    axes.legend(fontsize=7)


# -- DeepSeek-R1 --------------------------------------------------------------------------------------------------


def _compare(settings: PlanSettings) -> dict[str, Any]:
    name, config = find_config(settings.model or "minimax-m1")
    rows = []
    for cumulative in (False, True):
        for attention in accounting.DEEPSEEK_ATTENTION:
            shares = [
                accounting.share_of_deepseek_r1(config, n, attention=attention, cumulative=cumulative) for n in COMPARED
            ]
            rows.append({"tokens": "all" if cumulative else "last", "attention": attention, "shares": shares})
    print(f"FLOPs of {name} over those of DeepSeek-R1, at so many generated tokens")
    print(f"  {'tokens counted':<16}{'R1 attention':<14}" + "".join(f"{n // 1000:>8}K" for n in COMPARED))
    for row in rows:
        print(f"  {row['tokens']:<16}{row['attention']:<14}" + "".join(f"{share:>9.1%}" for share in row["shares"]))
    print(f"  {'published':<30}" + "".join(f"{PUBLISHED.get(n, ''):>9}" for n in COMPARED))
    if settings.plot is not None:
        _plot(settings.plot, lambda axes: _plot_comparison(axes, name, config))
    return {"model": name, "generated_tokens": list(COMPARED), "shares": rows}


def _plot_comparison(axes: Axes, name: str, config: MiniMaxM1Config) -> None:
    lengths = [1000 * k for k in range(1, 129)]
    for attention, colour in zip(accounting.DEEPSEEK_ATTENTION, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for cumulative, style in ((False, "-"), (True, "--")):
            shares = [
                100 * accounting.share_of_deepseek_r1(config, n, attention=attention, cumulative=cumulative)
                for n in lengths
            ]
            label = f"{attention}, {'all tokens' if cumulative else 'last token'}"
            axes.plot([n / 1000 for n in lengths], shares, style, color=colour, lw=1.2, label=label)
    axes.plot([80, 100], [30, 25], "k^", label="published: about 30% and 25%")
    axes.plot([64], [50], "kv", label="published: less than 50%")
    axes.set(xlabel="generated tokens (thousands)", ylabel="% of DeepSeek-R1's FLOPs", ylim=(0, 135), xlim=(0, 128))
    axes.set_title(f"{name} over DeepSeek-R1, by how R1's attention is counted")
    axes.legend(fontsize=8)


# -- parts --------------------------------------------------------------------------------------------------------


def _plot(path: Path, draw: Callable[[Axes], None]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('plot: matplotlib is not installed: pip install "minimax-m1[report]"') from None
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    draw(figure.add_subplot())
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that names no format
        raise UserError(f"plot: cannot write {path}: {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"json: cannot write {path}: {error.strerror}") from None


def _axes(plan: Plan) -> str:
    return " x ".join(map(str, dataclasses.astuple(plan.layout)))


def _largest(plan: Plan) -> str:
    parts = sorted(dataclasses.asdict(plan.memory).items(), key=lambda part: -part[1])
    return " and ".join(f"{name} ({_bytes(size)})" for name, size in parts[:2])


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    for unit, scale in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
