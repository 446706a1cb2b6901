"""The scaling law is found again in made-up runs; gradients and optima against numbers that need no calculus."""

import json
import math
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest

from minimax_m1.accounting import active_parameters
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.scaling import Run, ScalingFit, ScalingLaw, fit, objective, read_runs

TRUTH = ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # arXiv 2404.10102


def made_up_runs(noise: float, outliers: int = 0, seed: int = 0) -> list[Run]:
    rng = np.random.default_rng(seed)
    runs = []
    for N in np.geomspace(5e7, 1.6e10, 9):
        for ratio in (1, 3, 10, 30, 100):
            loss = TRUTH.loss(N, ratio * N) * math.exp(noise * rng.standard_normal())
            runs.append(Run(N, ratio * N, loss, f"{N:.2g} x {ratio}"))
    for i in range(outliers):
        runs[7 * i] = Run(runs[7 * i].parameters, runs[7 * i].tokens, 1.3 * runs[7 * i].loss, "outlier")
    return runs


def test_gradients_are_right() -> None:
    """Central differences in float64; the Huber loss is smooth once, so that h^2 does not show."""
    rng = np.random.default_rng(1)
    runs = made_up_runs(0.01)
    data = [np.log([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss")]
    theta = np.array([[6.0, 7.5, 0.6, 0.35, 0.36], [5.0, 9.0, 0.2, 0.3, 0.45], [20.0, 3.0, -1.0, 1.5, 0.1]])
    counts = rng.integers(0, 3, (3, len(runs))).astype(float)
    _, gradient = objective(theta, *data, counts)
    for p in range(5):
        step = np.zeros(5)
        step[p] = 1e-6
        ahead, behind = objective(theta + step, *data, counts)[0], objective(theta - step, *data, counts)[0]
        np.testing.assert_allclose(gradient[:, p], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def test_the_objective_is_the_papers() -> None:
    """Huber loss, delta 1e-3, of log(A/N^a + B/D^b + E) - log L, here by its definition; divided by delta."""
    runs = made_up_runs(0.002)
    data = [np.log([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss")]
    theta = np.array([[math.log(TRUTH.A), math.log(TRUTH.B), math.log(TRUTH.E), TRUTH.alpha, TRUTH.beta]])
    expected = 0.0
    for run in runs:
        r = abs(math.log(TRUTH.loss(run.parameters, run.tokens)) - math.log(run.loss))
        expected += r * r / 2 if r <= 1e-3 else 1e-3 * (r - 5e-4)
    value, _ = objective(theta, *data, np.ones((1, len(runs))))
    assert value[0] * 1e-3 == pytest.approx(expected, rel=1e-9)


def test_exact_runs_give_the_law_back() -> None:
    law = fit(made_up_runs(0), num_resamples=2).law
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3)


def test_intervals_hold_the_truth() -> None:
    """Four draws of noise; of 24 draws, the 95% intervals held E, alpha and the exponent 24 times, beta 21 times."""
    for seed in range(4):
        found = fit(made_up_runs(0.003, seed=seed), num_resamples=100, seed=seed)
        for name in ("E", "alpha", "beta", "exponent"):
            low, high = found.interval(attrgetter(name), level=0.99)
            assert low < getattr(TRUTH, name) < high
            assert low < getattr(found.law, name) < high and high - low < 0.3 * getattr(TRUTH, name)
    assert fit(made_up_runs(0.003, seed=3), num_resamples=100, seed=3) == found  # resamples are drawn by seed


def test_outliers_do_not_bend_the_law() -> None:
    """Three of 45 losses 30% too high: with squares they would move the law by percents everywhere."""
    found = fit(made_up_runs(0.003, outliers=3), num_resamples=2)
    residuals = np.sort(np.abs(found.residuals))
    assert residuals[-3:].min() > 0.2 and np.median(residuals) < 0.005
    assert found.law.loss(1e9, 2e10) == pytest.approx(TRUTH.loss(1e9, 2e10), rel=0.005)


def test_the_optimum_by_brute_force() -> None:
    budget = 5.76e23
    N, D = TRUTH.optimum(budget)
    assert budget / N / D == pytest.approx(6)
    sizes = np.geomspace(N / 10, N * 10, 100_001)
    best = sizes[np.argmin([TRUTH.loss(n, budget / 6 / n) for n in sizes])]
    assert best == pytest.approx(N, rel=1e-3)
    assert TRUTH.exponent == pytest.approx(math.log(TRUTH.optimum(100 * budget)[0] / N) / math.log(100))


def test_a_law_without_an_optimum() -> None:
    """Runs whose loss rises with their data, and a term that has vanished."""
    runs = [Run(N, D, 2 + 40 / N**0.3 + 0.01 * math.log(D), "") for N in (1e6, 1e7, 1e8) for D in (1e8, 1e9, 1e10)]
    found = fit(runs, num_resamples=20)
    assert math.isfinite(found.law.loss(1e7, 1e9)) and len(found.residuals) == 9
    for law in (ScalingLaw(1.0, 2.0, 0.0, 0.3, -140.0), ScalingLaw(1.0, 2.0, 3.0, 0.3, -0.1)):
        assert all(math.isnan(x) for x in law.optimum(1e20)) and math.isfinite(law.loss(1e7, 1e9))
    half = ScalingFit(TRUTH, (), (TRUTH, ScalingLaw(1.0, 2.0, 3.0, 0.3, -0.1)))
    assert all(math.isnan(x) for x in half.interval(lambda law: law.optimum(1e20)[0]))


def test_runs_from_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("parameters,tokens,loss,colour\n1e6,2e7,4.5,red\n2e6,2e7,4.25,blue\n")
    (tmp_path / "runs.jsonl").write_text('{"parameters": 1e6, "tokens": 3, "loss": 4, "name": "x"}\n\n')
    folder = tmp_path / "run"
    config = MiniMaxM1Config.preset("nano")
    config.save_pretrained(folder / "model")
    lines = [{"step": i, "tokens": 100 * i, "loss": 5 - 0.01 * i} for i in range(1, 101)]
    lines += [{"step": 100, "event": "saved"}, {"step": 100, "tokens": 10_000, "loss": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third, trained = read_runs([tmp_path / "runs.csv", tmp_path / "runs.jsonl", folder])
    assert (first.parameters, first.tokens, first.loss) == (1e6, 2e7, 4.5)
    assert (second.loss, second.name) == (4.25, f"{tmp_path / 'runs.csv'}, line 3")
    assert third.name == "x"
    assert (trained.parameters, trained.tokens) == (active_parameters(config), 10_000)
    assert trained.loss == pytest.approx(5 - 0.01 * 98)  # the mean of steps 96 to 100


BAD_FILES = {
    r"runs.csv, line 3: loss 'nan'": ("runs.csv", "parameters,tokens,loss\n1,2,3\n1,2,nan\n"),
    r"runs.csv, line 2: tokens None": ("runs.csv", "parameters,loss\n1,3\n"),
    r"runs.csv, line 2: parameters '-1'": ("runs.csv", "parameters,tokens,loss\n-1,2,3\n"),
    r"runs.jsonl, line 2 is not JSON": ("runs.jsonl", '{"parameters": 1, "tokens": 2, "loss": 3}\n{"par'),
    r"runs.jsonl, line 1 holds a list": ("runs.jsonl", "[]\n"),
    r"runs.txt cannot be used; accepted: .csv": ("runs.txt", ""),
    r"0 runs with 0 numbers of parameters": ("runs.csv", ""),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(message: str, tmp_path: Path) -> None:
    name, text = BAD_FILES[message]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        fit(read_runs([tmp_path / name]))


def test_runs_that_determine_no_law(tmp_path: Path) -> None:
    same_size = [Run(1e6, 1e6 * i, 4 - i / 10, "") for i in range(1, 9)]
    with pytest.raises(
        UserError,
        match=r"8 runs with 1 numbers of parameters .* at least 6 runs with 3 numbers of parameters and 3 of tokens",
    ):
        fit(same_size)
    with pytest.raises(UserError, match=r"cannot read .*missing.csv"):
        read_runs([tmp_path / "missing.csv"])
    with pytest.raises(UserError, match=r"has no config.json"):
        read_runs([tmp_path])
