"""Ranks that write and read checkpoints, for test_checkpoint.py; run as a script, because ranks are processes.

`python checkpoint_worker.py FOLDER`: each phase forks its ranks, so that torch is imported once. A rank that fails says
why and makes the script fail.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from minimax_m1.errors import UserError
from minimax_m1.training.checkpoint import Checkpoints, SaveError


@dataclass(frozen=True)
class World:
    """What Checkpoints needs to know of a training run's ranks."""

    rank: int
    size: int
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def run_ranks(size: int, phase: Any, *args: Any) -> None:
    """Fork `size` ranks that run phase(world, *args), and wait for them."""
    store = Path(f"/tmp/minimax-m1-{os.getpid()}-{phase.__name__}-{size}")
    store.unlink(missing_ok=True)
    ranks = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if size > 1:
                    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
                phase(World(rank, size), *args)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        ranks.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in ranks]
    store.unlink(missing_ok=True)
    if any(statuses):
        sys.exit(f"{phase.__name__} on {size} ranks failed: {statuses}")


def build(world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network with shapes that do not divide, sharded by FSDP2 if there are several ranks, and its optimizer."""
    torch.manual_seed(world.size)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    if world.size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, slots: dict[str, Any]) -> dict[str, Any]:
    """The state of a run, with an optimizer that has taken at least one step."""
    names = dict(model.named_parameters())
    moments = {f"{name}.{key}": value for name, p in names.items() for key, value in optimizer.state[p].items()}
    return {"model": names, "optimizer": moments, "progress": {}, "slots": slots}


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take a step, so that no tensor is where it was."""
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a state, gathered."""
    tensors = {
        f"{section}.{name}": tensor for section in ("model", "optimizer") for name, tensor in state[section].items()
    }
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def write(world: World, folder: Path) -> None:
    """Train and save; what was saved also lies in expected.pt, gathered."""
    model, optimizer = build(world)
    checkpoints = Checkpoints(folder, 2, world)
    for step in (1, 2):
        train_once(model, optimizer)
        slots = {str(slot): {"position": 100 * step + slot} for slot in range(world.rank, 4, world.size)}
        state = state_of(model, optimizer, slots)
        state["progress"] |= {"tokens": step}
        expected = whole(state)
        checkpoints.save(step, state)
        train_once(model, optimizer)  # the state changes while it is written
        checkpoints.poll()
    checkpoints.wait()
    assert checkpoints.newest() == 2
    if world.is_main:
        torch.save({name: tensor.detach() for name, tensor in expected.items()}, folder / "expected.pt")


def read(world: World, folder: Path) -> None:
    """Load what another number of ranks saved, and compare to the bit."""
    model, optimizer = build(world)
    train_once(model, optimizer)
    slots: dict[str, Any] = {str(slot): {} for slot in range(world.rank, 4, world.size)}
    state = state_of(model, optimizer, slots)
    checkpoints = Checkpoints(folder, 2, world)
    newest = checkpoints.newest()
    assert newest == 2
    checkpoints.load(newest, state)
    expected = torch.load(folder / "expected.pt")
    found = whole(state)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert state["progress"] == {"tokens": 2}
    assert state["slots"] == {name: {"position": 200 + int(name)} for name in slots}


def experts(world: World, folder: Path, shape: tuple[int, int], writing: bool) -> None:
    """Stacked experts over (what shards, experts): by experts first, then by experts or rows; others replicated too."""
    names = {"w13": (8, 6, 5), "w2": (8, 5, 3), "norm": (5,)}
    full = {name: torch.arange(float(torch.Size(size).numel())).reshape(size) for name, size in names.items()}
    places = {"w13": (Shard(1), Shard(0)), "w2": (Shard(0), Shard(0)), "norm": (Shard(0), Replicate())}
    mesh = init_device_mesh("cpu", shape) if world.size > 1 else None
    tensors = {}
    for name, value in full.items():
        value = value if writing else torch.zeros_like(value)
        tensors[name] = distribute_tensor(value, mesh, places[name]) if mesh is not None else value
    checkpoints = Checkpoints(folder, 2, world)
    if writing:
        checkpoints.save(7, {"model": tensors})
        checkpoints.wait()
    else:
        checkpoints.load(7, {"model": tensors})
        for name, value in tensors.items():
            gathered = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(gathered, full[name]), name


def fail_on_one(world: World, folder: Path) -> None:
    """One rank cannot write: all ranks hear of it at the same poll, and the next save works."""
    tensor = distribute_tensor(torch.arange(40_000.0), init_device_mesh("cpu", (world.size,)), (Shard(0),))
    checkpoints = Checkpoints(folder, 2, world)
    checkpoints.save(1, {"model": {"x": tensor}})
    checkpoints.wait()
    if world.rank == 1:
        limit_files(20_000)
    checkpoints.save(2, {"model": {"x": tensor}})
    failed_at, message = None, ""
    for turn in range(100_000):
        try:
            checkpoints.poll()
        except SaveError as error:
            failed_at, message = turn, str(error)
            break
        if checkpoints.saving is None:
            break
    assert "step-000002: File too large" in message, message
    turns: list[Any] = [None] * world.size
    dist.all_gather_object(turns, failed_at)
    assert failed_at is not None and set(turns) == {failed_at}, turns
    assert checkpoints.newest() == 1
    if world.rank == 1:
        limit_files(-1)
    checkpoints.save(3, {"model": {"x": tensor}})
    checkpoints.wait()
    assert checkpoints.newest() == 3
    dist.barrier()
    assert not list(folder.glob("*.part"))


def damaged(world: World, folder: Path) -> None:
    """All ranks refuse a checkpoint that only one of them finds damaged."""
    checkpoints = Checkpoints(folder, 2, world)
    tensor = distribute_tensor(torch.zeros(40_000), init_device_mesh("cpu", (world.size,)), (Shard(0),))
    with pytest.raises(UserError, match="slot 0"):
        checkpoints.load(3, {"model": {"x": tensor}, "slots": {"0": {}} if world.rank else {}})


def limit_files(size: int) -> None:
    """Let this process write no file above so many bytes, as if the disk were full; -1: any."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def main(folder: Path) -> None:
    """Run every phase."""
    for writers in (1, 2):
        run_ranks(writers, write, folder / f"by-{writers}")
        for readers in (1, 2, 4):
            run_ranks(readers, read, folder / f"by-{writers}")
    run_ranks(4, experts, folder / "experts", (2, 2), True)
    run_ranks(1, experts, folder / "experts", (1, 1), False)
    run_ranks(2, experts, folder / "experts", (1, 2), False)
    run_ranks(4, experts, folder / "experts", (2, 2), False)
    run_ranks(2, fail_on_one, folder / "failing")
    run_ranks(2, damaged, folder / "failing")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
