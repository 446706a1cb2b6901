"""Ray actors do what one process does, to the last token; and what they do when some of them are killed.

One local Ray for all tests. The model is the shipped one, which solves some of the task's problems.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minimax_m1 import shipped
from minimax_m1.errors import UserError
from minimax_m1.rl import cluster
from minimax_m1.rl.cluster import RayWorkers
from minimax_m1.rl.settings import RLSettings
from minimax_m1.rl.trainer import train_rl
from minimax_m1.settings import to_toml

LOSS = 1e-5  # absolute: two ranks add up the same float32 numbers, of size 1, in another order
NORM = 1e-4  # relative: AdamW's first steps have the size of lr also where a gradient is all rounding
SETTINGS = RLSettings(
    tasks={"vowels of a long word": 1.0},
    isolation="none",  # scorers are not what is tested here
    score_seconds=60,
    steps=3,
    prompts_per_step=8,
    group_size=4,
    max_refills=1,
    updates_per_step=2,
    window=(60,),
    max_prompt_tokens=128,
    tokens_per_batch=4096,
    cache_bytes=200_000_000,
    threads=1,
    lr=1e-4,
    eval_every=3,
    eval_problems=4,
    log_samples=8,
    export_dtype="float32",
)
PATIENCE = 300  # seconds until a test gives up waiting for something that takes one on an idle machine

# What tests/rl/test_learner.py shows without Ray, or takes long for what it adds: MINIMAX_M1_RAY=all runs it.
rarely = pytest.mark.skipif(os.environ.get("MINIMAX_M1_RAY") != "all", reason="MINIMAX_M1_RAY is not 'all'")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run with changed settings; return the lines of metrics.jsonl that belong to steps."""
    train_rl(replace(SETTINGS, output=folder, **changes))
    return step_lines(folder)


def step_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "event" not in line]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Return the numbers of a line by where they stand, without those that tell of time and of the cluster."""
    if isinstance(value, dict):
        parts = [numbers(v, f"{path}.{k}") for k, v in value.items()]
    elif isinstance(value, list):
        parts = [numbers(v, f"{path}.{i}") for i, v in enumerate(value)]
    else:
        of_time = any(word in path for word in ("second", "restarts", "staleness", "lines"))
        return {} if of_time or isinstance(value, str) or value is None else {path: float(value)}
    return {k: v for part in parts for k, v in part.items()}


# -- processes ----------------------------------------------------------------------------------------------------


def descendants(root: int) -> dict[int, str]:
    """Return pid -> command line of all living processes below one."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if after_name[0] != "Z":
            parents[int(folder.name)], commands[int(folder.name)] = int(after_name[1]), command
    found: set[int] = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: commands[pid] for pid in found - {root}}


def actors(kind: str) -> list[int]:
    return sorted(pid for pid, command in descendants(os.getpid()).items() if command.startswith(f"ray::{kind}"))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@contextmanager
def killing(kind: str, folder: Path, moments: list[tuple[int, float]]) -> Iterator[list[int]]:
    """Kill one of the actors (-9) at each moment: when so many lines of metrics are there, and some seconds later."""
    killed: list[int] = []
    over = threading.Event()
    rng = random.Random(len(moments))

    def kill() -> None:
        for count, delay in moments:
            while len(step_lines(folder)) < count and not over.wait(0.05):
                pass
            over.wait(delay)
            pids = [] if over.is_set() else actors(kind)
            if pids:
                killed.append(rng.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


# -- one local Ray, and the runs that others are compared with ------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    cluster._start(ray, 4)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def ahead(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rollouts are begun a step before."""
    folder = tmp_path_factory.mktemp("ahead")
    run(folder, rollout_workers=2, max_staleness=1)
    return folder


# -- the same as one process ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_and_a_trainer_do_what_one_process_does(local_ray: Any, alone: Path, tmp_path: Path) -> None:
    """To the bit: an answer's seed is its own and its batch does not change it; weights travel as they are."""
    lines = run(tmp_path, rollout_workers=2)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and len(lines[1]["updates"]) == 2
    assert [numbers(line) for line in lines] == [numbers(line) for line in step_lines(alone)]
    assert samples(tmp_path) == samples(alone)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, alone))
    start = load_file(shipped.path() / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], start[name].float()) for name in ours)  # it has learned
    assert all(line["staleness_max"] == line["staleness_mean"] == line["restarts"] == 0 for line in lines[1:])


@rarely
@pytest.mark.slow
def test_two_trainers_learn_what_one_learns(local_ray: Any, alone: Path, tmp_path: Path) -> None:
    lines = run(tmp_path, rollout_workers=1, trainer_ranks=2)
    for ours, theirs in zip(lines[1:], step_lines(alone)[1:], strict=True):
        for update, expected in zip(ours["updates"], theirs["updates"], strict=True):
            for name in ("loss", "entropy", "ratio_mean"):
                assert update[name] == pytest.approx(expected[name], abs=LOSS), name
            assert update["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM)
            assert update["tokens"] == expected["tokens"]
    assert [s["rollouts"][0]["text"] for s in samples(tmp_path)] == [s["rollouts"][0]["text"] for s in samples(alone)]


@pytest.mark.slow
def test_rollouts_are_no_older_than_the_settings_allow(ahead: Path) -> None:
    lines = step_lines(ahead)[1:]
    assert [line["version"] for line in lines] == [1, 2, 3]
    assert [line["staleness_max"] for line in lines] == [0, 1, 1]  # the first step had nobody to begin before it
    assert all(line["staleness_mean"] <= line["staleness_max"] for line in lines)


# -- deaths ---------------------------------------------------------------------------------------------------------


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("MINIMAX_M1_KILLS", 2)) // 2))
def test_a_killed_worker_costs_no_sample(seed: int, ahead: Path, tmp_path: Path, capfd: Any) -> None:
    """The new actor gets the prompts, the seeds and the version of the weights that the dead one had."""
    rng = random.Random(seed)
    usual = step_lines(ahead)[-1]["seconds"]
    moments = [(step, rng.uniform(0, usual)) for step in (1, 2)]
    with killing("RolloutActor", tmp_path, moments) as killed:
        lines = run(tmp_path, rollout_workers=2, max_staleness=1)
    assert killed and 1 <= lines[-1]["restarts"] <= len(killed)
    assert capfd.readouterr().err.count("died and is replaced") == lines[-1]["restarts"]
    assert [numbers(line) for line in lines] == [numbers(line) for line in step_lines(ahead)]
    assert samples(tmp_path) == samples(ahead)


@rarely  # as tests/rl/test_kill.py, with the trainer in an actor
@needs_proc
@pytest.mark.slow
def test_a_killed_trainer_costs_no_finished_step(local_ray: Any, alone: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollout_workers": 1, "trainer_ranks": 2}
    delay = random.Random(0).uniform(0, step_lines(alone)[-1]["seconds"])
    said = pytest.raises(UserError, match=r"^trainer_ranks: a trainer died; the same command continues")
    with killing("TrainerActor", tmp_path, [(2, delay)]) as killed, said:
        run(tmp_path, **settings)
    assert len(killed) == 1
    finished = step_lines(tmp_path)
    assert [line["step"] for line in finished] in ([0, 1], [0, 1, 2])
    wait_until(lambda: not actors("TrainerActor") and not actors("RolloutActor"))  # also not the rank that waits
    lines = run(tmp_path, **settings)
    assert lines[: len(finished)] == finished
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for ours, theirs in zip(lines[1:], step_lines(alone)[1:], strict=True):
        assert ours["updates"][-1]["loss"] == pytest.approx(theirs["updates"][-1]["loss"], abs=LOSS)


@needs_proc
@rarely
@pytest.mark.slow
def test_a_worker_that_dies_while_it_loads_is_replaced(local_ray: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, output=tmp_path, rollout_workers=1)
    over = threading.Event()

    def kill_the_first() -> None:
        while not (pids := actors("RolloutActor")) and not over.wait(0.02):
            pass
        if pids:
            os.kill(pids[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_first)
    thread.start()
    workers = RayWorkers(settings, shipped.path())
    over.set()
    thread.join()
    assert workers.restarts == 1 and workers.newest() is None
    workers.close()


@needs_proc
@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches every process of the command; the actors are trained while it comes."""
    pytest.importorskip("ray")
    recipe = tmp_path / "recipe.toml"
    output = tmp_path / "run"
    recipe.write_text(to_toml(replace(SETTINGS, output=output, steps=1000, eval_every=0, rollout_workers=1)))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "minimax_m1", "rl", "--config", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        wait_until(lambda: len(step_lines(output)) >= 1 or process.poll() is not None)
        below = descendants(process.pid)
        assert any("TrainerActor" in command for command in below.values())
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert "the same command continues after step" in told.decode() and "Traceback" not in told.decode()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    finally:
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


# -- what a user can do wrong ---------------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"rollout_workers: .*minimax-m1\[ray\]"):
        RayWorkers(replace(SETTINGS, rollout_workers=1), shipped.path())


@pytest.mark.slow
def test_more_actors_than_processors_are_refused(local_ray: Any) -> None:
    with pytest.raises(UserError, match=r"^rollout_workers, trainer_ranks: 99 and 1 need 100 CPUs; accepted: up to"):
        RayWorkers(replace(SETTINGS, rollout_workers=99), shipped.path())


@needs_proc
@pytest.mark.slow
def test_what_an_actor_cannot_do_is_said_in_one_line(local_ray: Any, tmp_path: Path) -> None:
    """A user's mistake stays one, and the actors do not stay; what is no user's mistake names the actor."""
    folder = tmp_path / "model"
    shutil.copytree(shipped.path(), folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    settings = replace(SETTINGS, output=tmp_path, rollout_workers=1)
    with pytest.raises(UserError) as caught:
        RayWorkers(settings, folder)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    wait_until(lambda: not actors("TrainerActor") and not actors("RolloutActor"))
    workers = RayWorkers(settings, shipped.path())
    with pytest.raises(RuntimeError, match=r"^trainer: AttributeError: .*no_such_order"):
        workers._call("no_such_order")
    assert workers.newest() is None  # it is as it was
    workers.close()
