"""Checkpoints are whole or not there, the same for any number of ranks, and say what is wrong with them."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from minimax_m1.errors import UserError
from minimax_m1.training.checkpoint import Checkpoints, SaveError, _Unpickler, list_steps, path_of
from minimax_m1.training.parallel import World

# Said at every save and load in one process; pytest undoes our filter.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ONE_PROCESS = World(0, 1, torch.device("cpu"), None, 0, 1, 0, 1, None)


def make_state(step: int) -> dict[str, Any]:
    """A state that a glance can tell from that of another step."""
    return {
        "model": {"w": torch.full((3, 5), float(step)), "temperature": torch.tensor(step + 0.5)},
        "optimizer": {"w.exp_avg": torch.arange(15.0).reshape(3, 5) * step},
        "progress": {"tokens": 10 * step, "config": {"rope_theta": 1e7}},
        "slots": {"0": {"position": step}, "1": {"position": -step}},
    }


def empty_state() -> dict[str, Any]:
    state = make_state(0)
    for tensor in (*state["model"].values(), *state["optimizer"].values()):
        tensor.fill_(-1)
    return {**state, "progress": {}, "slots": {"0": {}, "1": {}}}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for section in ("model", "optimizer"):
        assert a[section].keys() == b[section].keys()
        assert all(torch.equal(a[section][name], b[section][name]) for name in a[section])
    assert (a["progress"], a["slots"]) == (b["progress"], b["slots"])


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.wait()


def test_what_was_saved_is_loaded_though_the_state_changed_meanwhile(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    state = make_state(3)
    checkpoints.save(3, state)
    for tensor in state["model"].values():
        tensor.zero_()
    state["progress"].clear()
    state["slots"]["0"]["position"] = 99
    checkpoints.wait()
    loaded = empty_state()
    w = loaded["model"]["w"]
    Checkpoints(tmp_path, 2, ONE_PROCESS).load(3, loaded)
    assert_same(loaded, make_state(3))
    assert loaded["model"]["w"] is w  # in place


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, ONE_PROCESS)
    assert checkpoints.newest() is None
    save(checkpoints, 1, 5, 20, 1_000_000)
    assert checkpoints.newest() == 1_000_000
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000020", "step-1000000"]


def test_a_step_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    save(checkpoints, 4)
    checkpoints.save(4, {**make_state(4), "progress": {"again": True}})
    checkpoints.wait()
    progress: dict[str, Any] = {}
    checkpoints.load(4, {"progress": progress})
    assert progress == {"again": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_unfinished_ones_are_not_seen_and_go_when_the_next_run_begins(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, 2, ONE_PROCESS), 1, 2)
    os.rename(tmp_path / "step-000002", tmp_path / "step-000002.old.part")
    (tmp_path / "step-000003.part").mkdir()
    (tmp_path / "step-000004").mkdir()  # without progress.json: no checkpoint of ours
    assert list_steps(tmp_path) == [1]
    assert Checkpoints(tmp_path, 2, ONE_PROCESS).newest() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000004"]


def test_poll_finishes_without_waiting(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    checkpoints.poll()
    checkpoints.save(1, make_state(1))
    while checkpoints.saving is not None:
        checkpoints.poll()
    assert checkpoints.newest() == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "slots.json", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "zeroed", "missing"])
def test_damage_is_one_clear_line(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    save(checkpoints, 1, 2)
    path = path_of(tmp_path, 2) / name
    if damage == "missing":
        path.unlink()
        if name == "progress.json":  # then it is none
            assert checkpoints.newest() == 1
    elif damage == "zeroed":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(UserError, match=r"step-000002.*remove it to resume from an older one") as caught:
        checkpoints.load(2, empty_state())
    assert "\n" not in str(caught.value)
    loaded = empty_state()
    checkpoints.load(1, loaded)
    assert_same(loaded, make_state(1))


class _Asked:
    """Pickled as what asks for an attribute of something, as Python 3.11.2 writes a member of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_members_of_enums_are_read_however_python_has_written_them() -> None:
    file = io.BytesIO(pickle.dumps(_Asked(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")))
    assert _Unpickler(file).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


@pytest.mark.parametrize(
    "contents",
    [
        bytes(20),
        pickle.dumps(os.system),
        pickle.dumps(torch.load),
        pickle.dumps(_Asked(_MEM_FORMAT_ENCODING, "__class__")),
        pickle.dumps(_Asked(torch.Size, "__init__")),
        b"garbage",
    ],
)
def test_metadata_with_other_contents_is_damage_and_runs_nothing(tmp_path: Path, contents: bytes) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    save(checkpoints, 1)
    folder = path_of(tmp_path, 1)
    (folder / ".metadata").write_bytes(contents)
    about = json.loads((folder / "progress.json").read_text())
    about["files"][".metadata"] = len(contents)
    (folder / "progress.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="remove it to resume"):
        checkpoints.load(1, empty_state())


def test_no_path_of_the_machine_is_written(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, 2, ONE_PROCESS), 1)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in path_of(tmp_path, 1).iterdir())


def test_leaving_waits_and_keeps_the_error_that_there_is(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, 2, ONE_PROCESS) as checkpoints:
        checkpoints.save(1, make_state(1))
    assert list_steps(tmp_path) == [1]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError), Checkpoints(tmp_path / "file", 2, ONE_PROCESS) as checkpoints:
        checkpoints.save(1, make_state(1))
    checkpoints = Checkpoints(tmp_path / "file", 2, ONE_PROCESS)
    checkpoints.save(1, make_state(1))
    with pytest.raises(KeyError, match="its own"), checkpoints:
        raise KeyError("its own")
    assert checkpoints.saving is None


def test_another_network_or_more_slots_do_not_fit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    save(checkpoints, 1)
    shape, name, fewer, slots = (empty_state() for _ in range(4))
    shape["model"]["w"] = torch.zeros(3, 6)
    with pytest.raises(UserError, match=r"other settings: 1 tensors.*model\.w: \[3, 5\] there, \[3, 6\] here"):
        checkpoints.load(1, shape)
    name["optimizer"]["w.momentum"] = name["optimizer"].pop("w.exp_avg")
    with pytest.raises(UserError, match=r"2 tensors differ.*optimizer\.w\.exp_avg: \[3, 5\] there, absent here"):
        checkpoints.load(1, name)
    del fewer["model"]["temperature"]
    with pytest.raises(UserError, match=r"model\.temperature: \[\] there, absent here"):
        checkpoints.load(1, fewer)
    slots["slots"]["2"] = {}
    with pytest.raises(UserError, match=r"batches_per_step: .* slot 2; accepted: 2"):
        checkpoints.load(1, slots)


def test_sections_may_be_left_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ONE_PROCESS)
    save(checkpoints, 1)
    state = {"model": empty_state()["model"], "slots": {"1": {}}}
    checkpoints.load(1, state)
    assert torch.equal(state["model"]["w"], make_state(1)["model"]["w"])
    assert state["slots"] == {"1": {"position": -1}}


@pytest.mark.slow  # processes that import torch
def test_a_save_that_fails_leaves_the_earlier_ones_and_the_next_works(tmp_path: Path) -> None:
    """Files that may not grow stand for a full disk; in a process of its own, as the limit holds for all it writes."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import pytest, torch
from checkpoint_worker import limit_files
from minimax_m1.training.checkpoint import Checkpoints, SaveError
from minimax_m1.training.parallel import World
folder = Path({str(tmp_path)!r})
checkpoints = Checkpoints(folder, 2, World(0, 1, torch.device("cpu"), None, 0, 1, 0, 1, None))
state = {{"model": {{"x": torch.arange(40_000.0)}}}}
checkpoints.save(1, state)
checkpoints.wait()
limit_files(20_000)
for ask in (checkpoints.wait, lambda: checkpoints.save(9, state), checkpoints.newest):
    checkpoints.save(2, state)
    with pytest.raises(SaveError, match="^output: cannot write .*step-000002: File too large; earlier.*kept$"):
        ask()
assert [path.name for path in folder.iterdir()] == ["step-000001"]
limit_files(-1)
checkpoints.load(1, state)
checkpoints.save(3, state)
checkpoints.wait()
assert checkpoints.newest() == 3
"""
    run(["-c", code])


def test_a_folder_that_cannot_be_made_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", 2, ONE_PROCESS)
    checkpoints.save(1, make_state(1))
    with pytest.raises(SaveError, match="Not a directory"):
        checkpoints.wait()


def test_a_folder_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, ONE_PROCESS)
    save(checkpoints, 1)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    save(checkpoints, 2)
    assert list_steps(tmp_path / "checkpoints") == [2]


@pytest.mark.slow  # 24 processes
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path) -> None:
    """1 and 2 write, 1, 2 and 4 read, FSDP2 and stacked experts; and what fails on one rank fails on all."""
    run([str(Path(__file__).with_name("checkpoint_worker.py")), str(tmp_path)])


def run(arguments: list[str]) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
