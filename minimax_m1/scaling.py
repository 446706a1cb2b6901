"""The scaling law of a set of runs: loss = E + A / N^alpha + B / D^beta, fitted as Chinchilla's third approach.

N parameters, D training tokens. For a mixture of experts N are the parameters that a token uses
(`accounting.active_parameters`: without embedding and head).
Shapes: n runs, S fits that descend at once, P = 5 unknowns (log A, log B, log E, alpha, beta) in this order.
Sources: Chinchilla (arXiv 2203.15556, approach 3 and appendix D.3); its replication (arXiv 2404.10102), which found
that the losses must be summed rather than averaged lest the search stop early, and intervals by bootstrap.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimax_m1.accounting import active_parameters
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

HUBER_DELTA = 1e-3  # residuals of log loss beyond it count linearly, so that an outlier does not bend the law
COLUMNS = ("parameters", "tokens", "loss")
MIN_RUNS = 6  # one more than there are unknowns
MIN_VALUES = 3  # of N and of D: through two points goes any power
NUM_DESCENTS = 100  # the best points of the grid, from which the search goes down
MAX_ITERATIONS, LEAST_GAIN = 500, 1e-12  # of a descent; share of the value
LAST_SHARE = 0.05  # of a run's tokens: its loss is the mean over the lines of so many last tokens


@dataclass(frozen=True)
class Run:
    """One trained model: what went in, what came out."""

    parameters: float
    tokens: float
    loss: float
    name: str


@dataclass(frozen=True)
class ScalingLaw:
    """loss = E + A / N^alpha + B / D^beta."""

    E: float  # the loss of endless text's own uncertainty
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def exponent(self) -> float:
        """The best number of parameters grows with the budget to this power."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss that the law expects."""
        by_size, by_data = -self.alpha * math.log(parameters), -self.beta * math.log(tokens)
        return self.E + self.A * _exp(by_size) + self.B * _exp(by_data)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens of least loss for a training budget of 6 N D = `flops`.

        Both are NaN where there is none: a loss that does not fall with both, as runs too few or too alike may give.
        Source: arXiv 2203.15556 eq. 4.
        """
        if not all(0 < value < math.inf for value in (self.A, self.B, self.alpha, self.beta)):
            return math.nan, math.nan
        log_G = (math.log(self.alpha * self.A) - math.log(self.beta * self.B)) / (self.alpha + self.beta)
        parameters = _exp(log_G + self.exponent * math.log(flops / 6))
        return parameters, flops / 6 / parameters


@dataclass(frozen=True)
class ScalingFit:
    """The law that fits the runs best, and the laws of resampled runs."""

    law: ScalingLaw
    runs: tuple[Run, ...]
    resampled: tuple[ScalingLaw, ...]  # each fitted to as many runs, drawn with replacement

    @property
    def residuals(self) -> list[float]:
        """log loss - log of what the law expects, a run each."""
        return [math.log(run.loss / self.law.loss(run.parameters, run.tokens)) for run in self.runs]

    def interval(self, value: Callable[[ScalingLaw], float], level: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap interval of a value of the law, such as `lambda law: law.alpha`: percentiles.

        NaN, NaN where fewer of the resampled laws than `level` have the value: it is not determined.
        """
        values = [v for v in (value(law) for law in self.resampled) if math.isfinite(v)]
        if len(values) < level * len(self.resampled):
            return math.nan, math.nan
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit(runs: list[Run], *, num_resamples: int = 500, seed: int = 0) -> ScalingFit:
    """Fit the law: Huber loss on log loss, by BFGS from the best points of Chinchilla's grid of starts.

    Args:
        num_resamples: laws for the intervals; each descends from the fitted one.
        seed: decides the resamples.

    Raises:
        UserError: too few runs, or too few sizes or lengths of them: the law is not determined.
    """
    for name in ("parameters", "tokens"):
        num_values = len({getattr(run, name) for run in runs})
        if len(runs) < MIN_RUNS or num_values < MIN_VALUES:
            accepted = f"at least {MIN_RUNS} runs with {MIN_VALUES} numbers of parameters and {MIN_VALUES} of tokens"
            raise UserError(
                f"fit: {len(runs)} runs with {num_values} numbers of {name} cannot be used; accepted: {accepted}"
            )
    log_N, log_D, log_L = (np.log([getattr(run, name) for run in runs]) for name in COLUMNS)
    # Measured from the middle, A and alpha (B and beta) hardly depend on one another, and the descent is short.
    centre = np.array([log_N.mean(), log_D.mean()])
    data = log_N - centre[0], log_D - centre[1], log_L

    starts = _grid()
    starts[:, :2] -= starts[:, 3:] * centre
    ones = np.ones((1, len(runs)))
    values, _ = objective(starts, *data, ones)
    best = starts[np.argsort(values, kind="stable")[:NUM_DESCENTS]]
    found, values = _minimise(lambda theta, _: objective(theta, *data, ones), best)
    theta = found[np.argmin(values)]

    draws = np.random.default_rng(seed).integers(len(runs), size=(num_resamples, len(runs)))
    counts = np.stack([np.bincount(draw, minlength=len(runs)) for draw in draws]).astype(float)
    start = np.tile(theta, (num_resamples, 1))
    resampled, _ = _minimise(lambda theta, rows: objective(theta, *data, counts[rows]), start)
    return ScalingFit(_law(theta, centre), tuple(runs), tuple(_law(row, centre) for row in resampled))


def objective(theta: Array, log_N: Array, log_D: Array, log_L: Array, counts: Array) -> tuple[Array, Array]:
    """Return the sum of Huber losses [S] at theta [S, P], and its gradient [S, P].

    log loss is the log-sum-exp of log A - alpha log N, log B - beta log D and log E. Divided by the Huber delta, which
    changes no minimum, so that an outlier's weight is 1.

    Args:
        log_N, log_D, log_L: [n].
        counts: [S or 1, n], how often each run counts.
    """
    a, b, e, alpha, beta = (column[:, None] for column in theta.T)
    terms = np.stack(np.broadcast_arrays(a - alpha * log_N, b - beta * log_D, e))  # [3, S, n]
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    shares /= total
    residual = top + np.log(total) - log_L
    size = np.abs(residual) / HUBER_DELTA
    losses = np.where(size <= 1, size**2 / 2, size - 0.5) * HUBER_DELTA
    slopes = counts * np.clip(residual / HUBER_DELTA, -1, 1)
    by_a, by_b, by_e = slopes * shares
    parts = (by_a, by_b, by_e, -by_a * log_N, -by_b * log_D)
    return (counts * losses).sum(-1), np.stack([part.sum(-1) for part in parts], -1)


def _grid() -> Array:
    """Chinchilla's 4,500 starts."""
    a = b = np.arange(0.0, 30.0, 5.0)
    alpha = beta = np.arange(0.0, 2.5, 0.5)
    e = np.arange(-1.0, 1.5, 0.5)
    return np.stack([x.ravel() for x in np.meshgrid(a, b, e, alpha, beta, indexing="ij")], -1)


def _minimise(function: Callable[[Array, Rows], tuple[Array, Array]], x: Array) -> tuple[Array, Array]:
    """Descend from every row of x [S, P] by BFGS with halved steps; return the lowest points and their values.

    A row rests once a step gains next to nothing, or no step goes down along the gradient itself.

    Args:
        function: (points [m, P], the rows [m] that they belong to) -> values [m] and gradients [m, P].
    """
    x, eye = x.copy(), np.eye(x.shape[1])
    rows = np.arange(len(x))  # those that still descend
    value, gradient = function(x, rows)
    inverse = np.tile(eye, (len(x), 1, 1))
    is_fresh = np.ones(len(x), bool)  # the inverse Hessian is the identity
    for _ in range(MAX_ITERATIONS):
        direction = -np.einsum("sij,sj->si", inverse[rows], gradient[rows])
        direction /= np.maximum(1, np.abs(direction).max(-1, keepdims=True))  # no unknown moves by more than 1
        new_x, new_value, new_gradient, is_lower = _line_search(
            function, x[rows], value[rows], gradient[rows], direction, rows
        )
        moved, turned = new_x - x[rows], new_gradient - gradient[rows]
        curvature = (moved * turned).sum(-1)
        bends = curvature > 1e-14
        rho = np.where(bends, 1 / np.where(bends, curvature, 1), 0)[:, None, None]
        left = eye - rho * moved[:, :, None] * turned[:, None, :]
        updated = left @ inverse[rows] @ left.transpose(0, 2, 1) + rho * moved[:, :, None] * moved[:, None, :]
        inverse[rows] = np.where(is_lower[:, None, None], updated, eye)
        gained = value[rows] - new_value
        rests = np.where(is_lower, gained <= LEAST_GAIN * value[rows] + 1e-15, is_fresh[rows])
        is_fresh[rows] = ~is_lower
        x[rows], value[rows], gradient[rows] = new_x, new_value, new_gradient
        rows = rows[~rests]
        if not len(rows):
            break
    return x, value


def _line_search(
    function: Callable[[Array, Rows], tuple[Array, Array]],
    x: Array,
    value: Array,
    gradient: Array,
    direction: Array,
    rows: Rows,
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Halve the step of each row until it goes down enough (Armijo); x, value and gradient are changed.

    Returns:
        x, value and gradient where each row ends, and which rows went down.
    """
    start, before, descent = x.copy(), value.copy(), (direction * gradient).sum(-1)
    waiting, step = np.arange(len(x)), 1.0
    for _ in range(40):
        trial = start[waiting] + step * direction[waiting]
        trial_value, trial_gradient = function(trial, rows[waiting])
        accepted = trial_value < before[waiting] + 1e-4 * step * descent[waiting]
        taken = waiting[accepted]
        x[taken], value[taken], gradient[taken] = trial[accepted], trial_value[accepted], trial_gradient[accepted]
        waiting, step = waiting[~accepted], step / 2
        if not len(waiting):
            break
    is_lower = np.ones(len(x), bool)
    is_lower[waiting] = False
    return x, value, gradient, is_lower


def _law(theta: Array, centre: Array) -> ScalingLaw:
    a, b, e, alpha, beta = map(float, theta)
    return ScalingLaw(_exp(e), _exp(a + alpha * float(centre[0])), _exp(b + beta * float(centre[1])), alpha, beta)


def _exp(x: float) -> float:
    """exp, kept within what a float holds."""
    return math.exp(min(x, 700.0))


# -- reading runs -------------------------------------------------------------------------------------------------


def read_runs(paths: list[Path]) -> list[Run]:
    """Read runs from CSV and JSONL files (columns parameters, tokens, loss) and from folders of `minimax-m1 train`.

    A folder is one run: the active parameters of its config.json (in the folder, or in its model/), the tokens of its
    metrics.jsonl, and the mean loss over the last of them.

    Raises:
        UserError: naming the file and the line that cannot be used.
    """
    runs: list[Run] = []
    for path in paths:
        if path.is_dir():
            runs.append(_read_folder(path))
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(_read(path).splitlines()))
            runs += [_run(row, f"{path}, line {i}") for i, row in enumerate(rows, 2)]
        elif path.suffix == ".jsonl":
            runs += [_run(row, where) for row, where in _json_lines(path)]
        else:
            raise UserError(f"fit: {path} cannot be used; accepted: .csv, .jsonl, or a folder of minimax-m1 train")
    return runs


def _read_folder(folder: Path) -> Run:
    homes = [home for home in (folder, folder / "model") if (home / "config.json").is_file()]
    if not homes:
        raise UserError(f"fit: {folder} has no config.json, nor has its model/; a folder of minimax-m1 train has one")
    config = MiniMaxM1Config.from_pretrained(homes[0])
    rows = _json_lines(folder / "metrics.jsonl")
    # null stands for a loss that was not finite: such a step changed nothing
    lines = [(row, where) for row, where in rows if row.get("loss") is not None and "tokens" in row]
    if not lines:
        raise UserError(f"fit: {folder / 'metrics.jsonl'} has no line with tokens and loss")
    points = [_run({**row, "parameters": active_parameters(config)}, where) for row, where in lines]
    last = points[-1]
    losses = [point.loss for point in points if point.tokens > (1 - LAST_SHARE) * last.tokens]
    return Run(last.parameters, last.tokens, sum(losses) / len(losses), str(folder))


def _json_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Return the objects of a JSONL file, each with the place that it stands at."""
    rows = []
    for i, line in enumerate(_read(path).splitlines(), 1):
        where = f"{path}, line {i}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"fit: {where} is not JSON: {error}") from None
        if row is not None:
            if not isinstance(row, dict):
                raise UserError(f"fit: {where} holds a {type(row).__name__}; a JSON object is needed")
            rows.append((row, where))
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"fit: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"fit: {path} is not text: {error}") from None


def _run(row: dict[str, Any], where: str) -> Run:
    values = []
    for name in COLUMNS:
        try:
            value = float(row[name])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not (0 < value < math.inf):
            accepted = f"a number above 0 in each of {', '.join(COLUMNS)}"
            raise UserError(f"fit: {where}: {name} {row.get(name)!r} cannot be used; accepted: {accepted}")
        values.append(value)
    return Run(values[0], values[1], values[2], str(row.get("name") or where))
