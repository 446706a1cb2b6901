"""A run that is killed at random moments, again and again, and its scorer's process as well; for test_kill.py.

`python -m tests.rl.kill_worker FOLDER KILLS SEED` prints a line of JSON with what was found, or fails. FOLDER has a
model and a reward.py. A run is a fork of this process, which has imported everything: so it is soon where it was.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401 here, or torch loads it in every fork when it first takes a step

from minimax_m1.rl.settings import RLSettings
from minimax_m1.rl.trainer import train_rl
from minimax_m1.training.checkpoint import list_steps

STEP_SECONDS = 400  # much more than a start and a step need, on the busiest machine


def make_settings(folder: Path) -> RLSettings:
    return RLSettings(
        output=folder / "run",
        model=folder / "model",
        tasks={"vowels of a long word": 1.0},
        reward=f"{folder / 'reward.py'}:reward",
        isolation="none",
        steps=1_000_000,
        prompts_per_step=2,
        group_size=4,
        updates_per_step=2,
        window=(8,),
        max_prompt_tokens=400,
        tokens_per_batch=4096,
        cache_bytes=40 << 20,
        eval_every=0,
        log_samples=1,
        threads=1,
    )


def whole_lines(path: Path) -> list[bytes]:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def start(settings: RLSettings) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            train_rl(settings)
        finally:
            os._exit(1)  # it was to run until it is killed
    return pid


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_lines(path: Path, count: int, pid: int) -> None:
    deadline = time.monotonic() + STEP_SECONDS
    while len(whole_lines(path)) < count:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended by itself"
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("the run hangs")
        time.sleep(0.005)


def main(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    settings = make_settings(folder)
    metrics, samples = settings.output / "metrics.jsonl", settings.output / "samples.jsonl"
    seen: list[bytes] = []
    scorers = late = 0
    for _ in range(kills):
        pid = start(settings)
        wait_for_lines(metrics, len(seen) + rng.choice((0, 1, 2)), pid)
        step_seconds = json.loads(seen[-1])["seconds"] if seen else 1.0
        time.sleep(rng.random() * 1.5 * step_seconds)
        if rng.random() < 0.5:
            for child in children(pid):  # the scorer's; the run starts another
                os.kill(child, signal.SIGKILL)
                scorers += 1
            wait_for_lines(metrics, len(whole_lines(metrics)) + 2, pid)
            time.sleep(rng.random() * step_seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = whole_lines(metrics)
        assert found[: len(seen)] == seen, "a finished step was lost, or done again"
        steps = [json.loads(line)["step"] for line in found if b'"version"' in line]
        assert steps == list(range(1, len(steps) + 1)), f"steps {steps[-5:]}"
        saved = max(list_steps(settings.output / "checkpoints"), default=0)
        assert saved - len(steps) in (0, 1), f"{saved} steps saved, {len(steps)} logged"
        late += saved > len(steps)
        sampled = [json.loads(line)["step"] for line in whole_lines(samples)]
        assert sampled[: len(steps)] == steps, f"samples of steps {sampled[-5:]}"
        seen = found
        print(f"killed in step {len(steps) + 1}", file=sys.stderr)
    print(json.dumps({"kills": kills, "scorers": scorers, "between save and log": late, "steps": len(seen)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
