"""The report of a run, or of several side by side: curves by matplotlib in one HTML file that needs nothing else.

A figure is a function `(axes, run)` or `(axes, runs)` that draws and returns its text for who cannot see it, "" where
the run has no such numbers. Each is drawn once, in the colours of a light page: a PNG beside the report keeps them, in
the page they become the reader's. Arrays: S logged steps, L layers, E experts; what was not finite is NaN.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from minimax_m1 import accounting
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.settings import read_toml
from minimax_m1.training.metrics import imbalance, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
Figures = dict[str, tuple[str, Callable[..., str]]]

MAX_POINTS = 1000  # of one curve; a longer one is thinned
MAX_COLUMNS = 400  # of one heat map
MAX_ANSWERS = 30  # of one prompt

# name in the page's style -> on a light page, on a dark one. Lines differ by dashes as well.
COLORS = {
    "text": ("#1f2328", "#e6e9ec"),
    "muted": ("#59636e", "#9da7b1"),
    "line": ("#d5dbe1", "#3a424b"),
    "blue": ("#0067a5", "#6cb6ff"),
    "orange": ("#c84b00", "#ff9e64"),
    "green": ("#00795a", "#4fd1a5"),
    "purple": ("#8a3ea1", "#d8a6f0"),
    "ochre": ("#8f6b00", "#e3c14e"),
}
LOSS = "loss (nats per learned token)"
LIGHT = {name: light for name, (light, _) in COLORS.items()}
LINES: list[dict[str, Any]] = [
    dict(color=LIGHT["blue"], linestyle="-"),
    dict(color=LIGHT["orange"], linestyle="--"),
    dict(color=LIGHT["green"], linestyle="-."),
    dict(color=LIGHT["purple"], linestyle=":"),
    dict(color=LIGHT["ochre"], linestyle=(0, (6, 1))),
]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: the lines of metrics.jsonl by kind, and the recipe flattened ("model.head_dim")."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: MiniMaxM1Config | None


def write_report(output: Path) -> Path:
    """Write the report of the run in `output` to output/report.html, its figures to output/report, too.

    Returns:
        The HTML file.

    Raises:
        UserError: there is no run in `output`, it cannot be written, or matplotlib is not installed.
    """
    return compare_runs([output], output / "report.html")


def compare_runs(folders: Sequence[Path], path: Path) -> Path:
    """Write the report of one run, or of several with their curves over each other, to an HTML file.

    Args:
        folders: outputs of `minimax-m1 train`.
        path: the file to write; PNGs go into the folder beside it that has its name without the ending.

    Raises:
        UserError: as `write_report`.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    runs = [dataclasses.replace(r, name=str(r.folder)) if names.count(r.name) > 1 else r for r in runs]
    drawn: Run | list[Run]
    page: dict[str, Any] = {"title": " · ".join(run.name for run in runs), "colors": COLORS}
    if len(runs) == 1:
        (run,) = runs
        page |= {"facts": facts(run), "final": final_shares(run), "events": run.events[-100:]}
        page |= {"answers": answers(run), "recipe": {key: [value] for key, value in run.recipe.items()}, "names": []}
        figures, drawn = FIGURES, run
    else:
        page |= {"rows": comparison(runs), "recipe": differences(runs), "names": [run.name for run in runs]}
        figures, drawn = COMPARISONS, runs
    part = path.with_name(f"{path.name}.part")  # an earlier report stays whole until this one is
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page["figures"] = draw_figures(figures, drawn, path.with_suffix(""))
        part.write_text(render(page), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise UserError(f"output: cannot write {path}: {error.strerror}; a folder with room is needed") from None
    return path


# -- reading --------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Return what is in a run's folder; only metrics.jsonl must be there.

    Raises:
        UserError: it is not, or has no line.
    """
    try:
        lines = [line for line in read_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    except OSError:
        lines = []
    if not lines:
        raise UserError(f"run: {folder} cannot be used; accepted: an output folder of train, with a metrics.jsonl")
    samples = folder / "samples.jsonl"
    recipe = _read_recipe(folder / "recipe.toml")
    return Run(
        folder=folder,
        name=folder.resolve().name,
        recipe=_flat(recipe),
        metrics=[line for line in lines if not line.keys() & {"solved", "eval_loss", "event"} or "loss" in line],
        evaluations=[line for line in lines if line.keys() & {"solved", "eval_loss"}],
        events=[line for line in lines if "event" in line],
        samples=list(read_lines(samples)) if samples.is_file() else [],
        config=_read_config(folder, recipe),
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except UserError:  # the curves are worth a report without it
        return {}


def _read_config(folder: Path, recipe: dict[str, Any]) -> MiniMaxM1Config | None:
    """Return the network's config: of the newest checkpoint, of the exported model, or of the recipe."""
    checkpoints = sorted(folder.glob("checkpoints/step-*/progress.json"), reverse=True)
    for path in [*checkpoints, folder / "model" / "config.json"]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return MiniMaxM1Config.from_dict(values["progress"]["config"] if path in checkpoints else values)
        except (OSError, ValueError, KeyError, TypeError):  # not there, or not what it should be
            continue
    if not (recipe.get("model") and recipe.get("vocab_size")):
        return None
    try:
        return MiniMaxM1Config.from_dict({**recipe["model"], "vocab_size": recipe["vocab_size"]})
    except (UserError, TypeError):
        return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def series(lines: list[dict[str, Any]], key: str, part: str | None = None) -> tuple[Array, Array]:
    """Return the steps [S] at which `key` (or its `part`) was logged and its values [S] there."""
    pairs = []
    for line in lines:
        values = line if part is None else line.get(key)
        name = key if part is None else part
        if isinstance(values, dict) and name in values:
            value = values[name]
            pairs.append((line["step"], value if _is_number(value) else math.nan))
    both = np.array(pairs, dtype=float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parts(lines: list[dict[str, Any]], key: str) -> list[str]:
    """Return the names below `key` in any line, such as all families below "solved", in their order."""
    return list(dict.fromkeys(name for line in lines if isinstance(line.get(key), dict) for name in line[key]))


def thin(number: int, most: int) -> Array:
    """Return at most `most` of the indices 0 .. number - 1, evenly, with the first and the last."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int))


def smooth(values: Array) -> Array:
    """Return the moving average of [S] values over the last 2% or so of them, exponentially weighted."""
    weight = 1 / max(1.0, len(values) / 50)
    total, seen, out = 0.0, 0.0, np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, seen = (1 - weight) * total + weight * value, (1 - weight) * seen + weight
        out[i] = total / seen if seen else np.nan
    return out


# -- figures --------------------------------------------------------------------------------------------------------


def plot(ax: Axes, steps: Array, values: Array, **style: Any) -> None:
    """Draw a curve of at most MAX_POINTS points, the last one among them."""
    keep = thin(len(steps), MAX_POINTS)
    marker = dict(marker="o", markersize=3) if len(keep) <= 12 else {}
    ax.plot(steps[keep], values[keep], **{"linewidth": 1.6, **marker, **style})


def plot_smoothed(ax: Axes, steps: Array, values: Array, label: str | None = None) -> None:
    """Draw a curve as it is, pale, and its moving average over it."""
    plot(ax, steps, values, color=LIGHT["blue"], alpha=0.3, linewidth=0.8)
    plot(ax, steps, smooth(values), color=LIGHT["blue"], label=label)


def finish(ax: Axes, label: str, *, log: bool = False, percent: bool = False) -> None:
    """Name the axis of values, with its unit, and choose its scale."""
    from matplotlib.ticker import PercentFormatter

    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines if line.get_transform() == ax.transData]
    values = np.concatenate([ys[np.isfinite(ys)] for ys in drawn] or [np.zeros(0)])
    positive = values[values > 0]
    if log and len(positive) and positive.max() > 3 * positive.min():
        ax.set_yscale("log", nonpositive="mask")
        scale_numbers(ax)
    elif percent and len(values):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel(label)
    ax.grid(axis="y", color=LIGHT["line"], linewidth=0.7)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=8, labelcolor=LIGHT["text"])


def scale_numbers(ax: Axes) -> None:
    """Write 1, 2, 5, 10, … on a logarithmic axis of values."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def mark_stages(ax: Axes, run: Run) -> None:
    """Draw a line where a new window begins."""
    steps, windows = series(run.metrics, "window")
    for before, after, step in zip(windows, windows[1:], steps, strict=False):
        if after != before:
            ax.axvline(step, color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(
                f"window {after:,.0f} ",
                (step, 1),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right",
                va="top",
                fontsize=7,
                color=LIGHT["muted"],
            )


def heat_map(ax: Axes, rows: list[str], columns: Array, values: Array, label: str, **scale: Any) -> None:
    """Draw values [rows, columns], the first row on top; `columns` says where each column begins."""
    keep = thin(len(columns), MAX_COLUMNS)
    columns, values = columns[keep], values[:, keep]
    width = np.diff(columns)
    right = columns[-1] + (width[-1] if len(width) else 1)
    mesh = ax.pcolormesh(
        np.append(columns, right),
        np.arange(len(rows) + 1),
        np.ma.masked_invalid(values),
        cmap="viridis",
        rasterized=True,
        **scale,
    )
    figure: Any = ax.figure
    figure.set_figheight(min(6.0, max(2.9, 0.16 * len(rows) + 0.6)))  # room for 30 names, then every other, …
    every = math.ceil(len(rows) / 34)
    ax.set_yticks(np.arange(len(rows))[::every] + 0.5, rows[::every])
    ax.invert_yaxis()
    ax.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=ax, label=label, pad=0.02)
    if "norm" in scale:
        scale_numbers(bar.ax)
    bar.outline.set_visible(False)


def draw_loss(ax: Axes, run: Run) -> str:
    steps, values = series(run.metrics, "loss")
    if not len(steps):
        return ""
    plot_smoothed(ax, steps, values, "training, smoothed")
    last = []
    for i, name in enumerate(parts(run.evaluations, "eval_loss")):
        at, losses = series(run.evaluations, "eval_loss", name)
        plot(ax, at, losses, **LINES[1 + i % 4], label=Path(name).name, marker="o", markersize=3)
        last.append(f"{Path(name).name} {_last(losses)}")
    mark_stages(ax, run)
    finish(ax, LOSS, log=True)
    return f"Training loss, last {_last(smooth(values))} smoothed. " + "; ".join(last)


def draw_accuracy(ax: Axes, run: Run) -> str:
    steps, values = series(run.metrics, "token_accuracy")
    if not len(steps):
        return ""
    plot_smoothed(ax, steps, values, "learned tokens, smoothed")
    at, solved = mean_of(run, "solved")
    if len(at):
        plot(ax, at, solved, **LINES[1], label="unseen problems solved, mean of families", marker="o", markersize=3)
    finish(ax, "accuracy", percent=True)
    return f"Token accuracy, last {_last(smooth(values), '.1%')}; mean of families {_last(solved, '.1%')}"


def draw_families(ax: Axes, run: Run) -> str:
    names = parts(run.evaluations, "solved")
    lines = [line for line in run.evaluations if isinstance(line.get("solved"), dict)]
    if not names:
        return ""
    values = np.array([[_float(line["solved"].get(name)) for line in lines] for name in names])
    heat_map(ax, names, np.array([line["step"] for line in lines], float), values, "share solved", vmin=0, vmax=1)
    return "Share of unseen problems solved, by family and step; the table below has the last ones"


def draw_lr(ax: Axes, run: Run) -> str:
    steps, values = series(run.metrics, "lr")
    if not np.isfinite(values).any():
        return ""
    plot(ax, steps, values, **LINES[0])
    finish(ax, "learning rate")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:g}")
    return f"Learning rate, last {_last(values, '.3g')}, highest {_highest(values)}"


def draw_grad_norm(ax: Axes, run: Run) -> str:
    steps, values = series(run.metrics, "grad_norm")
    if not len(steps):
        return ""
    plot_smoothed(ax, steps, values)
    limit = run.recipe.get("max_grad_norm")
    if _is_number(limit) and np.any(values > limit):
        ax.axhline(limit, color=LIGHT["muted"], linewidth=0.8, linestyle="--", label="clipped to")
    if run.events:
        at = [event["step"] for event in run.events]
        ax.plot(
            at,
            [0.03] * len(at),
            transform=ax.get_xaxis_transform(),
            color=LIGHT["orange"],
            marker="^",
            linestyle="",
            markersize=5,
            label="event",
        )
    mark_stages(ax, run)
    finish(ax, "gradient norm, before clipping", log=True)
    return f"Gradient norm before clipping, last {_last(values, '.3g')}, highest {_highest(values)}"


def draw_grad_norm_by_layer(ax: Axes, run: Run) -> str:
    from matplotlib.colors import LogNorm

    lines = [line for line in run.metrics if isinstance(line.get("grad_norm_by_layer"), dict)]
    names = parts(lines, "grad_norm_by_layer")
    values = np.array([[_float(line["grad_norm_by_layer"].get(name)) for line in lines] for name in names])
    positive = values[np.isfinite(values) & (values > 0)] if names else np.zeros(0)
    if not len(positive):
        return ""
    # The hundredth part of the smallest and largest values is left to the ends of the scale.
    low, high = np.quantile(positive, [0.01, 0.99])
    values = np.where(values > 0, values, np.nan)
    heat_map(
        ax,
        names,
        np.array([line["step"] for line in lines], float),
        values,
        "gradient norm",
        norm=LogNorm(low, max(high, low * 1.01)),
    )
    return f"Gradient norm by layer and step, from {low:.2g} to {high:.2g}"


def draw_expert_load(ax: Axes, run: Run) -> str:
    loads = [line["expert_load"] for line in run.metrics if isinstance(line.get("expert_load"), list)]
    layers = [layer for layer in loads[-1] if isinstance(layer, list)] if loads else []
    most = max(map(len, layers), default=0)
    if most == 0:
        return ""
    values = np.array(
        [[_float(share) * len(layer) for share in layer] + [math.nan] * (most - len(layer)) for layer in layers]
    )
    heat_map(
        ax,
        [f"layer {i}" for i in range(len(layers))],
        np.arange(most) - 0.5,
        values,
        "load (1: an even share)",
        vmin=0,
        vmax=max(2.0, np.nanmax(values, initial=2.0)),
    )
    ax.set_xlabel("expert")
    return f"Load of every expert at the last step, 1 is an even share; the highest is {_highest(values.ravel())}"


def draw_imbalance(ax: Axes, run: Run) -> str:
    lines = [line for line in run.metrics if isinstance(line.get("expert_load"), list)]
    worst = [[_float(value) for value in imbalance(line["expert_load"])] for line in lines]
    kept = [(line["step"], layers) for line, layers in zip(lines, worst, strict=True) if np.isfinite(layers).any()]
    if not kept:
        return ""
    steps = np.array([step for step, _ in kept], float)
    most, mean = (np.array([float(f(layers)) for _, layers in kept]) for f in (np.nanmax, np.nanmean))
    plot(ax, steps, most, **LINES[1], label="worst layer")
    plot(ax, steps, mean, **LINES[0], label="mean of layers")
    finish(ax, "highest load of an expert (1: even)")
    return (
        f"Highest load of an expert: last {_last(mean, '.2f')} in the mean of layers, {_last(most, '.2f')} in the worst"
    )


def draw_speed(ax: Axes, run: Run) -> str:
    text = draw_one(ax, run, "tokens_per_second", "tokens per second", bottom=0)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    return text


def draw_mfu(ax: Axes, run: Run) -> str:
    return draw_one(ax, run, "mfu", "share of the peak FLOP/s", bottom=0, percent=True)


def draw_packing(ax: Axes, run: Run) -> str:
    return draw_one(ax, run, "packing", "share of the token budget filled", percent=True)


def draw_one(ax: Axes, run: Run, key: str, label: str, *, bottom: float | None = None, percent: bool = False) -> str:
    """Draw one number of the metrics over the steps."""
    steps, values = series(run.metrics, key)
    if not np.isfinite(values).any():
        return ""
    plot_smoothed(ax, steps, values)
    finish(ax, label, percent=percent)
    ax.set_ylim(bottom=bottom)
    return f"{label.capitalize()}, last {_last(values, '.4g')}"


def compare(
    ax: Axes, runs: list[Run], curve: Callable[[Run], tuple[Array, Array]], *, label: str, **scale: bool
) -> str:
    """Draw the same curve of every run that has it."""
    texts = []
    for i, run in enumerate(runs):
        steps, values = curve(run)
        if np.isfinite(values).any():
            plot(ax, steps, values, **LINES[i % len(LINES)], label=run.name)
            texts.append(f"{run.name} {_last(values)}")
    if texts:
        finish(ax, label, **scale)
    return f"{label.capitalize()} of each run, last: {'; '.join(texts)}" if texts else ""


def compare_over_tokens(ax: Axes, runs: list[Run]) -> str:
    from matplotlib.ticker import EngFormatter

    def curve(run: Run) -> tuple[Array, Array]:
        lines = [line for line in run.metrics if _is_number(line.get("tokens")) and "loss" in line]
        return np.array([line["tokens"] for line in lines], dtype=float), smooth(series(lines, "loss")[1])

    ax.set_xlabel("tokens seen")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return compare(ax, runs, curve, label=LOSS, log=True)


def compare_smoothed(ax: Axes, runs: list[Run], key: str, **axis: Any) -> str:
    def curve(run: Run) -> tuple[Array, Array]:
        steps, values = series(run.metrics, key)
        return steps, smooth(values)

    return compare(ax, runs, curve, **axis)


def compare_evaluations(ax: Axes, runs: list[Run], key: str, **axis: Any) -> str:
    return compare(ax, runs, lambda run: mean_of(run, key), **axis)


def mean_of(run: Run, key: str) -> tuple[Array, Array]:
    """Return the steps of evaluations and the mean of what stands below `key` there: families or files."""
    lines = [line for line in run.evaluations if isinstance(line.get(key), dict) and line[key]]
    means = [np.mean([_float(value) for value in line[key].values()]) for line in lines]
    return np.array([line["step"] for line in lines], dtype=float), np.array(means, dtype=float)


FIGURES: Figures = {
    "loss": ("Loss", draw_loss),
    "accuracy": ("Accuracy", draw_accuracy),
    "families": ("Unseen problems solved, by family", draw_families),
    "learning-rate": ("Learning rate", draw_lr),
    "gradient-norm": ("Gradient norm", draw_grad_norm),
    "gradient-norm-by-layer": ("Gradient norm by layer", draw_grad_norm_by_layer),
    "expert-load": ("Expert load at the end", draw_expert_load),
    "expert-imbalance": ("Expert imbalance", draw_imbalance),
    "speed": ("Speed", draw_speed),
    "mfu": ("Model FLOPs utilisation (MFU)", draw_mfu),
    "packing": ("Packing efficiency", draw_packing),
}
COMPARISONS: Figures = {
    "loss": ("Loss", partial(compare_smoothed, key="loss", label=LOSS, log=True)),
    "loss-over-tokens": ("Loss over tokens", compare_over_tokens),
    "eval-loss": (
        "Evaluation loss, mean of files",
        partial(compare_evaluations, key="eval_loss", label=LOSS, log=True),
    ),
    "accuracy": ("Accuracy", partial(compare_smoothed, key="token_accuracy", label="token accuracy", percent=True)),
    "solved": (
        "Unseen problems solved, mean of families",
        partial(compare_evaluations, key="solved", label="share solved", percent=True),
    ),
    "gradient-norm": ("Gradient norm", partial(compare_smoothed, key="grad_norm", label="gradient norm", log=True)),
    "speed": ("Speed", partial(compare_smoothed, key="tokens_per_second", label="tokens per second")),
}


def draw_figures(figures: Figures, drawn: Run | list[Run], folder: Path) -> list[dict[str, str]]:
    """Draw the figures that have numbers; write each to a PNG in `folder`.

    Returns:
        For each: title, alt (what it shows, in words) and svg, whose colours are the page's variables.

    Raises:
        UserError: matplotlib is not installed.
        OSError: `folder` cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('report: matplotlib is needed for it; pip install "minimax-m1[report]"') from None

    folder.mkdir(exist_ok=True)
    done = []
    for name, (title, draw) in figures.items():
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            figure = Figure(figsize=(5.2, 2.9), layout="constrained")
            ax = figure.subplots()
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
            ax.xaxis.set_major_formatter("{x:,.0f}")
            alt = draw(ax, drawn)
            if not alt:
                continue
            figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
            figure.set_layout_engine("none")  # everything has its place now
            svg = io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        done.append({"title": title, "alt": alt, "svg": _inline(svg.getvalue(), name)})
    return done


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may have dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": LIGHT["text"],
    "axes.labelcolor": LIGHT["text"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
}


def _inline(svg: str, name: str) -> str:
    """Return the <svg> element for a page: as wide as its place, names its own, colours as the page's variables."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1
    )
    for mark in ('id="', "url(#", 'href="#'):
        svg = svg.replace(mark, f"{mark}{name}-")
    for color, light in LIGHT.items():
        svg = svg.replace(light, f"var(--{color})")
    return svg


# -- tables ---------------------------------------------------------------------------------------------------------


def facts(run: Run) -> dict[str, str]:
    """Return the run in a few words: name of the fact -> how it reads."""
    last = run.metrics[-1] if run.metrics else {}
    seconds = float(np.nansum(series(run.metrics, "seconds")[1]))
    tokens = last.get("tokens")
    loss = smooth(series(run.metrics, "loss")[1])
    _, solved = mean_of(run, "solved")
    _, speeds = series(run.metrics, "tokens_per_second")
    _, mfu = series(run.metrics, "mfu")
    steps, of = max(line["step"] for line in run.metrics + run.evaluations + run.events), run.recipe.get("steps")
    found = {
        "Steps": f"{steps:,}" + (f" of {of:,}" if isinstance(of, int) else ""),
        "Tokens": _short(tokens) if _is_number(tokens) else "",
        "Time": _time(seconds) if seconds else "",
        "Loss": _last(loss) if len(loss) else "",
        "Problems solved": _last(solved, ".1%") if len(solved) else "",
        "Speed": f"{_middle(speeds):,.0f} tokens/s" if len(speeds) else "",
        "MFU": f"{_middle(mfu):.1%}" if np.isfinite(mfu).any() else "",
        "Parameters": _short(accounting.parameters(run.config)) if run.config else "",
        "Active for a token": _short(accounting.active_parameters(run.config)) if run.config else "",
        "Layers": f"{run.config.num_hidden_layers}" if run.config else "",
        "Experts": f"{run.config.num_experts_per_tok} of {run.config.num_local_experts}" if run.config else "",
        "Device": " ".join(str(run.recipe[key]) for key in ("device", "dtype") if key in run.recipe),
        "Started from": Path(str(run.recipe.get("init", ""))).name,
    }
    return {name: text for name, text in found.items() if text}


def final_shares(run: Run) -> list[tuple[str, str, str]]:
    """Return, by family and then by evaluation file, the last value and the best one."""
    rows = []
    for name in parts(run.evaluations, "solved"):
        _, values = series(run.evaluations, "solved", name)
        rows.append((name, _last(values, ".1%"), _highest(values, ".1%")))
    for name in parts(run.evaluations, "eval_loss"):
        _, values = series(run.evaluations, "eval_loss", name)
        rows.append((f"loss of {name}", _last(values), _last(np.fmin.accumulate(values))))
    return rows


def answers(run: Run) -> dict[str, list[tuple[int, str]]]:
    """Return prompt -> (step, answer), thinned to MAX_ANSWERS with the first and the last among them."""
    found: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        if isinstance(sample.get("step"), int):
            found.setdefault(str(sample.get("prompt", "")), []).append((sample["step"], str(sample.get("text", ""))))
    thinned = {}
    for prompt, all_of_it in found.items():
        thinned[prompt] = [all_of_it[i] for i in thin(len(all_of_it), MAX_ANSWERS)]
    return thinned


def comparison(runs: list[Run]) -> dict[str, list[str]]:
    """Return fact, family or evaluation file -> how it reads for each run, "" where a run has none."""
    columns = [{**facts(run), **{name: last for name, last, _ in final_shares(run)}} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "") for column in columns] for name in names}


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the keys of the recipes in which the runs differ -> each run's value, "" where it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    rows = {key: [run.recipe.get(key, "") for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if key != "output" and any(value != row[0] for value in row)}


def _float(value: object) -> float:
    return float(value) if _is_number(value) else math.nan


def _last(values: Array, form: str = ".4f") -> str:
    """Return the last finite value, as it reads."""
    finite = values[np.isfinite(values)]
    return format(float(finite[-1]), form) if len(finite) else "-"


def _highest(values: Array, form: str = ".3g") -> str:
    finite = values[np.isfinite(values)]
    return format(float(finite.max()), form) if len(finite) else "-"


def _middle(values: Array) -> float:
    """Return the median: evaluations and pauses do not count as training."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _short(number: float) -> str:
    """Return a number with three digits: 1.23 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.3g}"


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{seconds / 60:.1f} min"


# -- the page -------------------------------------------------------------------------------------------------------


def render(page: dict[str, Any]) -> str:
    """Return the HTML of a report; what comes from files is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(page)
