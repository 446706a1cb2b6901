"""`plan` answers three questions from figures alone, and says in one line what it cannot answer."""

import json
from pathlib import Path

import pytest

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.settings import tomllib

M1 = ["plan", "--preset", "minimax-m1", "--gpu", "h800", "--num-gpus", 512, "--sequence-length", 32_768]


def test_a_plan_of_minimax_m1(run, tmp_path: Path) -> None:
    status, out, err = run(*M1, "--tokens", "1e12", "--price", 2, "--json", tmp_path / "plan.json")
    assert (status, err) == (0, "")
    answer = json.loads((tmp_path / "plan.json").read_text())
    assert "456.1B parameters, 45.9B active" in out and "layouts fit 71.2 GiB a rank (90% of 79.1 GiB)" in out
    best = answer["plans"][0]
    assert best["memory_total"] <= answer["memory_limit"] < answer["too_large"][0]["memory_total"]
    assert answer["totals"]["cost"] == pytest.approx(2 * answer["totals"]["gpu_hours"])
    assert f"{answer['totals']['cost']:,.0f} at 2 each" in out
    assert answer["ruled_out"] == {"expert_parallel does not divide the network's 32": 20}
    recipe = tomllib.loads(out.split("Recipe\n")[1])
    assert recipe == answer["recipe"]
    assert {name: recipe[name] for name in best["layout"]} == best["layout"]
    assert recipe["tokens_per_batch"] * recipe["batches_per_step"] == 512 * 32_768

    (tmp_path / "recipe.toml").write_text(out.split("Recipe\n")[1])
    resolved = run("train", "--config", tmp_path / "recipe.toml", "--dry-run")
    assert (resolved.status, resolved.err) == (0, "") and recipe.items() <= tomllib.loads(resolved.out).items()


def test_a_folder_with_nothing_but_a_config(run, tmp_path: Path) -> None:
    MiniMaxM1Config.preset("small").save_pretrained(tmp_path)
    status, out, _ = run("plan", "--model", tmp_path, "--num-gpus", 1, "--batch-tokens", 65_536)
    assert status == 0 and "354.6M parameters, 57.6M active" in out and "cost" not in out
    assert "dp_replicate = 1\n" in out and "steps of up to 65,536" in out


def test_attention_grows_with_the_context(run) -> None:
    lines = [line for line in run(*M1).out.splitlines() if " softmax " in line and "FLOP" in line]
    shares = [float(line.split("softmax")[1].split("%")[0]) for line in lines]
    assert shares == sorted(shares) and shares[0] < 1 and shares[-1] > 60  # 4K and 1M tokens


def test_the_comparison_with_deepseek_r1(run, tmp_path: Path) -> None:
    status, out, _ = run("plan", "--compare", "--json", tmp_path / "r1.json")
    assert status == 0 and "minimax-m1 over those of DeepSeek-R1" in out and "~25%" in out
    answer = json.loads((tmp_path / "r1.json").read_text())
    at = answer["generated_tokens"].index(100_000)
    shares = {(row["tokens"], row["attention"]): row["shares"][at] for row in answer["shares"]}
    assert shares["last", "plain"] == pytest.approx(0.269, abs=5e-4)  # the nearest to the published 25%
    assert min(shares, key=lambda key: abs(shares[key] - 0.25)) == ("last", "plain")


@pytest.fixture
def runs_csv(tmp_path: Path) -> Path:
    """Runs that follow a law exactly: loss = 1.7 + 400 / N^0.34 + 410 / D^0.28."""
    rows = [(N, N * r, 1.7 + 400 / N**0.34 + 410 / (N * r) ** 0.28) for N in (1e7, 1e8, 1e9) for r in (5, 20, 80)]
    path = tmp_path / "runs.csv"
    path.write_text("parameters,tokens,loss\n" + "".join(f"{N},{D},{loss}\n" for N, D, loss in rows))
    return path


def test_a_scaling_law(run, runs_csv: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, answer = tmp_path / "law.png", tmp_path / "law.json"
    status, out, err = run("plan", "--fit", runs_csv, "--budget", "1e21", "--plot", plot, "--json", answer)
    assert (status, err) == (0, "")
    law = json.loads(answer.read_text())
    assert law["law"]["alpha"]["value"] == pytest.approx(0.34, rel=1e-2)
    assert "fitted to 9 runs" in out and "1e+21 FLOP" in out and "times the largest run" in out
    (optimum,) = law["optima"]
    assert 6 * optimum["parameters"] * optimum["tokens"] == pytest.approx(1e21)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_several_files_after_one_flag(run, runs_csv: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"parameters": 1e9, "tokens": 2e11, "loss": 2.3}\n')
    assert "fitted to 10 runs" in run("plan", "--fit", runs_csv, more).out
    assert "fitted to 10 runs" in run("plan", "--fit", runs_csv, "--fit", more).out


def test_runs_that_have_no_optimum(run, tmp_path: Path) -> None:
    """Loss that rises with the data: a law all the same, and no best size; nothing in the JSON that is not JSON."""
    rows = [(N, D, 2 + 40 / N**0.3 + 1e-13 * D) for N in (1e6, 1e7, 1e8) for D in (1e10, 1e12, 3e12)]
    (tmp_path / "runs.csv").write_text("parameters,tokens,loss\n" + "".join(f"{N},{D},{loss}\n" for N, D, loss in rows))
    status, out, err = run("plan", "--fit", tmp_path / "runs.csv", "--json", tmp_path / "law.json")
    assert (status, err) == (0, "") and "there is none" in out
    answer = json.loads((tmp_path / "law.json").read_text(), parse_constant=pytest.fail)
    assert answer["optima"] == [] and len(answer["runs"]) == 9


MISTAKES = {
    "model: 'no-such'": ["--model", "no-such"],
    "num_gpus: 0": ["--num-gpus", 0],
    "price: -1": ["--price", -1],
    "cannot hold this run in any layout; the nearest, 1 x 1 x 1 x 1, needs 6": [
        *["--preset", "minimax-m1", "--num-gpus", 1]
    ],
    "sequence_length: 99999": ["--preset", "m1-nano", "--sequence-length", 99_999],
    "plot: x.png cannot be used": ["--plot", "x.png"],
    "fit: with compare": ["--fit", "x.csv", "--compare"],
    "cannot read": ["--fit", "missing.csv"],
    "json: cannot write": ["--json", "/no/such/folder/x.json"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(run, message: str) -> None:
    status, _, err = run("plan", *MISTAKES[message])
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
