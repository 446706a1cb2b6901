"""A run that saves at every step is killed at random moments, again and again; for test_kill.py.

`python kill_worker.py FOLDER KILLS RANKS SEED` prints a line of JSON with what was found, or fails. A killed run may
have been anywhere: copying, writing, renaming, deleting. Each next one must find a whole newest checkpoint, consistent
to the bit, and no older than the last that a run before it saw complete.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_worker import fork_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from minimax_m1.training.checkpoint import Checkpoints
from minimax_m1.training.parallel import World

SHAPES = {"a": (3, 50), "b": (7,), "c": (40, 500), "d": (4, 6, 5)}
SAVE_SECONDS = 0.1  # more than one save takes, or restarts would be all that is tested


def make_state(world: World, step: int) -> dict[str, Any]:
    """The state after `step` steps: every element and slot says which step it is of."""
    tensors: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        value = torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 1000 * step + i
        if world.size > 1:
            mesh = init_device_mesh("cpu", (world.size,))
            tensors[name] = distribute_tensor(value, mesh, (Shard(0),), src_data_rank=None)
        else:
            tensors[name] = value
    moments = {f"{name}.exp_avg": -tensor for name, tensor in tensors.items()}
    slots = {str(slot): {"position": [step] * 100} for slot in range(world.rank, 4, world.size)}
    return {"model": tensors, "optimizer": moments, "progress": {"step": step}, "slots": slots}


def train(world: World, folder: Path, report: int) -> None:
    """Resume, check what was found, and save at every step for ever, telling the parent how far it is."""

    def tell(kind: str, step: int) -> None:
        if world.is_main:
            os.write(report, f"{kind} {step}\n".encode())

    checkpoints = Checkpoints(folder, 2, world)
    step = checkpoints.newest() or 0
    state = make_state(world, 0)
    if step:
        checkpoints.load(step, state)
    expected = make_state(world, step)
    for section in ("model", "optimizer"):
        for name, tensor in expected[section].items():
            found = state[section][name]
            if world.size > 1:
                found, tensor = found.to_local(), tensor.to_local()
            assert torch.equal(found, tensor), f"{name} of step {step} is not what was saved"
    assert (state["progress"], state["slots"]) == (expected["progress"], expected["slots"])
    if world.size > 1:
        dist.barrier()  # both have loaded
    tell("loaded", step)
    while True:
        step += 1
        checkpoints.save(step, make_state(world, step))
        while checkpoints.saving is not None:
            checkpoints.poll()
            time.sleep(0.001)
        tell("complete", step)


def main(folder: Path, kills: int, ranks: int, seed: int) -> None:
    """Kill so many runs, and let one more look at what is left."""
    rng = random.Random(seed)
    complete = 0
    left, newer = Counter[str](), 0
    began = time.perf_counter()
    for kill in range(kills + 1):
        reading, writing = os.pipe()
        pids = fork_ranks(ranks, train, folder, writing)
        os.close(writing)
        # Some saves, and a part of one; some runs are killed while they start.
        lines = [] if 0 < kill < kills and rng.random() < 0.1 else read_lines(reading, 1 + rng.randrange(4))
        time.sleep(rng.random() * SAVE_SECONDS)
        for pid in rng.sample(pids, rng.randint(1, len(pids))):  # one or all
            os.kill(pid, signal.SIGKILL)
        leave(pids)
        lines += read_lines(reading, None)
        os.close(reading)
        for kind, step in map(str.split, lines):
            if kind == "loaded":
                found = int(step)
                assert complete <= found <= complete + 1, f"loaded step {found}, but step {complete} was complete"
                newer += found - complete
            complete = int(step)
        if folder.is_dir():
            left[" ".join(sorted(path.name.partition(".")[2] for path in folder.glob("step-*.*"))) or "nothing"] += 1
    seconds = time.perf_counter() - began
    print(
        json.dumps({"kills": kills, "last": complete, "unfinished": left, "newer": newer, "seconds": round(seconds, 1)})
    )


def read_lines(reading: int, until: int | None) -> list[str]:
    """Read what a run tells, until so many lines have come or (None) all that is there."""
    text = b""
    deadline = time.monotonic() + 120
    while until is None or text.count(b"\n") < until:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(reading, 1 << 16) if ready else b""
        if not chunk:
            assert until is None, "a run ended, or said nothing for two minutes, before it was killed"
            break
        text += chunk
    return text.decode().splitlines()


def leave(pids: list[int]) -> None:
    """See every rank end; one whose peer is gone has seconds to find out by itself."""
    deadline = time.monotonic() + 5
    for pid in pids:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
