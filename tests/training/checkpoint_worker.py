"""Ranks that write and read checkpoints, for test_checkpoint.py; run as a script, because ranks are processes.

`python checkpoint_worker.py FOLDER`: each phase forks its ranks, so that torch is imported once. A rank that fails says
why and makes the script fail. `python checkpoint_worker.py OUTPUT INIT` leaves what a run of four ranks would.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # here, or torch loads it in every rank when it first divides a tensor
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.settings import to_toml
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.checkpoint import Checkpoints, SaveError
from minimax_m1.training.export import export
from minimax_m1.training.parallel import World, init_world, parallelize
from minimax_m1.training.settings import TrainSettings

NUM_SLOTS = 4


def fork_ranks(size: int, phase: Callable[..., None], *args: Any, **axes: int) -> list[int]:
    """Start `size` ranks that run phase(world, *args), and return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if size > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                phase(init_world(TrainSettings(batches_per_step=NUM_SLOTS, **axes)), *args)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        pids.append(pid)
    return pids


def run_ranks(size: int, phase: Callable[..., None], *args: Any, **axes: int) -> None:
    """Run phase(world, *args) on `size` ranks to its end."""
    statuses = [os.waitpid(pid, 0)[1] for pid in fork_ranks(size, phase, *args, **axes)]
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
    """Take a step, so that no tensor is what it was."""
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all tensors, whole."""
    with torch.no_grad():
        return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def write(world: World, folder: Path) -> None:
    """Train and save; what was saved also lies in expected.pt, gathered."""
    model, optimizer = build(world)
    checkpoints = Checkpoints(folder, 2, world)
    for step in (1, 2):
        train_once(model, optimizer)
        slots = {str(slot): {"position": 100 * step + slot} for slot in range(world.rank, NUM_SLOTS, world.size)}
        state = state_of(model, optimizer, slots)
        state["progress"] |= {"tokens": step}
        expected = gather(state["model"]), gather(state["optimizer"])
        checkpoints.save(step, state)
        train_once(model, optimizer)  # the state changes while it is written
        checkpoints.poll()
    checkpoints.wait()
    assert checkpoints.newest() == 2
    if world.is_main:
        torch.save(expected, folder / "expected.pt")


def read(world: World, folder: Path) -> None:
    """Load what another number of ranks saved, and compare to the bit."""
    model, optimizer = build(world)
    train_once(model, optimizer)
    slots: dict[str, Any] = {str(slot): {} for slot in range(world.rank, NUM_SLOTS, world.size)}
    state = state_of(model, optimizer, slots)
    checkpoints = Checkpoints(folder, 2, world)
    newest = checkpoints.newest()
    assert newest == 2
    checkpoints.load(newest, state)
    for section, expected in zip(("model", "optimizer"), torch.load(folder / "expected.pt"), strict=True):
        found = gather(state[section])
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
    assert state["progress"] == {"tokens": 2}
    assert state["slots"] == {name: {"position": 200 + int(name)} for name in slots}


def network(world: World, folder: Path, seed: int, writing: bool) -> None:
    """The network itself, divided by experts and by rows: written, or read and held against its seed's weights."""
    config = MiniMaxM1Config(
        vocab_size=33,
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        attn_type_list=(0, 1),
    )
    expected = MiniMaxM1ForCausalLM(config)
    expected.init_weights(seed)
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed if writing else seed + 1)
    parallelize(model, world, TrainSettings(expert_parallel=world.mesh["expert_parallel"].size() if world.mesh else 1))
    state = {"model": dict(model.named_parameters())}
    checkpoints = Checkpoints(folder, 2, world)
    if writing:
        checkpoints.save(7, state)
        checkpoints.wait()
    else:
        checkpoints.load(7, state)
        found = gather(state["model"])
        for name, tensor in expected.named_parameters():
            assert torch.equal(found[name], tensor), name


def run_folder(world: World, output: Path, init: Path) -> None:
    """Leave what a run does: checkpoint, tokenizer, recipe and exported model; the weights are those of seed 0."""
    settings = TrainSettings(output=output, init=init, expert_parallel=2)
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(init)
    model = MiniMaxM1ForCausalLM(MiniMaxM1Config.from_pretrained(init))
    model.init_weights(0)
    parallelize(model, world, settings)
    checkpoints = Checkpoints(output / "checkpoints", 2, world)
    checkpoints.save(1, {"model": dict(model.named_parameters()), "progress": {"config": model.config.to_dict()}})
    export(model, tokenizer, settings, output / "model", world)
    checkpoints.wait()
    if world.is_main:
        tokenizer.save_pretrained(output / "tokenizer")
        (output / "recipe.toml").write_text(to_toml(settings), encoding="utf-8")


def fail_on_one(world: World, folder: Path) -> None:
    """One rank cannot write: all ranks hear of it at the same poll, and the next save works."""
    tensor = distribute_tensor(torch.arange(40_000.0), init_device_mesh("cpu", (world.size,)), (Shard(0),))
    checkpoints = Checkpoints(folder, 2, world)
    checkpoints.save(1, {"model": {"x": tensor}})
    checkpoints.wait()
    if world.rank == 1:
        limit_files(20_000)
    checkpoints.save(2, {"model": {"x": tensor}})
    failed_at, message, turn = None, "", 0
    while checkpoints.saving is not None:
        turn += 1
        try:
            checkpoints.poll()
        except SaveError as error:
            failed_at, message = turn, str(error)
    assert "step-000002: File too large" in message, message
    turns: list[Any] = [None] * world.size
    dist.all_gather_object(turns, failed_at)
    assert set(turns) == {failed_at}, turns
    assert checkpoints.newest() == 1
    if world.rank == 1:
        limit_files(-1)
    checkpoints.save(3, {"model": {"x": tensor}})
    checkpoints.wait()
    assert checkpoints.newest() == 3
    dist.barrier()
    assert not list(folder.glob("*.part"))


def misfit_on_one(world: World, folder: Path) -> None:
    """One rank asks for what is not there: all ranks refuse."""
    checkpoints = Checkpoints(folder, 2, world)
    tensor = distribute_tensor(torch.zeros(40_000), init_device_mesh("cpu", (world.size,)), (Shard(0),))
    with pytest.raises(UserError, match="slot 0"):
        checkpoints.load(3, {"model": {"x": tensor}, "slots": {"0": {}} if world.rank else {}})


def limit_files(size: int) -> None:
    """Let this process write no file above so many bytes, as if the disk were full; -1: any."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def main(folder: Path) -> None:
    """Run every phase of test_checkpoint.py."""
    for writers in (1, 2):
        run_ranks(writers, write, folder / f"by-{writers}")
        for readers in (1, 2, 4):
            if readers != writers:
                run_ranks(readers, read, folder / f"by-{writers}")
    run_ranks(4, network, folder / "network", 0, True, expert_parallel=2)
    run_ranks(1, network, folder / "network", 0, False)
    run_ranks(2, network, folder / "network", 0, False, expert_parallel=2)
    run_ranks(4, network, folder / "network", 0, False, expert_parallel=4)
    run_ranks(2, network, folder / "network", 0, False, dp_replicate=2)
    run_ranks(2, fail_on_one, folder / "failing")
    run_ranks(2, misfit_on_one, folder / "failing")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        run_ranks(4, run_folder, *map(Path, sys.argv[1:]), expert_parallel=2)
