"""Checkpoints of a training run: written while it goes on, whole or not there, and read by any number of ranks.

A checkpoint is a folder step-NNNNNN: torch.distributed.checkpoint's files with the tensors, by their whole shapes;
slots.json, where in the data every slot is; and progress.json, which is written last and lists what belongs to it.
step-NNNNNN.part is one that is being written or removed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from minimax_m1 import __version__
from minimax_m1.errors import UserError
from minimax_m1.training.parallel import World

PROGRESS_FILE, SLOTS_FILE = "progress.json", "slots.json"
TENSORS = ("model", "optimizer")  # the sections of a state that hold tensors

# Said at every save and load in one process, which is what we want there.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class SaveError(UserError):
    """A checkpoint could not be written; the earlier ones are as they were."""


class Checkpoints:
    """The newest `keep` checkpoints of a run; every rank has this object, sees the folder and makes the same calls.

    A state is {"model": {name: tensor}, "optimizer": {name: tensor}, "progress": {...}, "slots": {"0": {...}, ...}}:
    plain tensors or DTensors, in whatever division; values that JSON can hold; and this rank's slots.

    One save at a time is written by a thread, which talks with those of the other ranks through a process group of its
    own. All threads of a save end in the same way, because each of its parts ends with an exchange of errors. Leaving
    the `with` block waits for it, also when a run has failed: nothing else may destroy the process group meanwhile.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        several = world.size > 1
        self.saving_group = dist.new_group(backend="gloo") if several else None
        self.polling_group = dist.new_group(backend="gloo") if several else None
        cuda = world.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self.stager = DefaultStager(options)  # keeps its memory, one copy of the state, for the next save
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[None] | None = None
        if world.is_main:
            for unfinished in folder.glob("step-*.part"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state and begin to write it; an earlier save is waited for.

        Raises:
            SaveError: the earlier save failed; this one has not begun.
        """
        self.wait()
        staged = self.stager.stage(_flat_tensors(state))
        assert isinstance(staged, dict)  # and no future: it is copied now
        documents = json.dumps(state.get("progress", {})), json.dumps(state.get("slots", {}))
        self.saving = self.thread.submit(self._write, step, staged, *documents)

    def poll(self) -> None:
        """Look whether the save in flight, if there is one, has ended on all ranks.

        Raises:
            SaveError: it has failed.
        """
        if self.saving is None:
            return
        done = torch.tensor(int(self.saving.done()))
        if self.polling_group is not None:
            dist.all_reduce(done, dist.ReduceOp.MIN, group=self.polling_group)
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            SaveError: it has failed.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def newest(self) -> int | None:
        """Return the step of the newest whole checkpoint, as rank 0 sees it; None if there is none.

        Raises:
            SaveError: a save in flight has failed.
        """
        self.wait()
        newest = [max(list_steps(self.folder), default=None)]
        if self.saving_group is not None:
            dist.broadcast_object_list(newest, src=0, group=self.saving_group)
        return newest[0]

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fill a state in place: its tensors, its progress, and the slots that it names. A section may be missing.

        Raises:
            UserError: the checkpoint is damaged, or does not fit the state.
        """
        self.wait()
        folder = path_of(self.folder, step)
        _together(lambda: _load_documents(folder, state), self.saving_group)
        _load_tensors(folder, _flat_tensors(state), self.saving_group)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait for the save in flight; a run that ends by an error ends by that one."""
        try:
            self.wait()
        except SaveError:
            if kind is None:
                raise

    def _write(self, step: int, tensors: dict[str, Tensor], progress: str, slots: str) -> None:
        """Write one checkpoint and drop the oldest: what the thread does."""
        place = path_of(self.folder, step)
        part = place.with_name(f"{place.name}.part")
        is_main, group = self.world.is_main, self.saving_group

        def begin() -> str:
            if is_main:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            return slots

        def finish() -> None:
            if is_main:
                self._finish(part, step, progress, all_slots)

        try:
            all_slots = _together(begin, group)
            writer = _Writer(part, per_thread_copy_ahead=0)  # it syncs its files
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            _together(lambda: _raise(writer.failure), group)
            _together(finish, group)
        except (OSError, RuntimeError) as error:
            if is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise SaveError(f"output: cannot write {place}: {_reason(error)}; earlier checkpoints are kept") from None

    def _finish(self, part: Path, step: int, progress: str, slots: list[str]) -> None:
        """Make `part` durable, give it its name, and drop what is more than `keep`; rank 0."""
        merged = {name: value for text in slots for name, value in json.loads(text).items()}
        _write_synced(part / SLOTS_FILE, json.dumps(merged))
        about = {"step": step, "ranks": self.world.size, "version": __version__, "torch": torch.__version__}
        about |= {"files": {path.name: path.stat().st_size for path in sorted(part.iterdir())}}
        _write_synced(part / PROGRESS_FILE, json.dumps({**about, "progress": json.loads(progress)}, indent=1) + "\n")
        sync(part)
        place = path_of(self.folder, step)
        if place.exists():  # a run that began again came here before
            _remove(place)
        os.rename(part, place)
        sync(self.folder)
        for old in list_steps(self.folder)[: -self.keep]:
            _remove(path_of(self.folder, old))


# -- reading without a run ----------------------------------------------------------------------------------------


def list_steps(folder: Path) -> list[int]:
    """Return the steps of the whole checkpoints in `folder`, rising."""
    found = (re.fullmatch(r"step-(\d{6,})", path.parent.name) for path in folder.glob(f"step-*/{PROGRESS_FILE}"))
    return sorted(int(match[1]) for match in found if match)


def path_of(folder: Path, step: int) -> Path:
    """Return where in `folder` the checkpoint of a step lies."""
    return folder / f"step-{step:06d}"


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the progress that was saved, having looked whether all files are there in their length.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        about = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        wrong = [name for name, size in about["files"].items() if (checkpoint / name).stat().st_size != size]
        progress = about["progress"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(checkpoint, str(error)) from None
    if wrong:
        raise _damaged(checkpoint, f"{', '.join(wrong)} has not the length it was written with")
    return progress


def load_tensors(checkpoint: Path, section: str, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a section, "model" or "optimizer", of a checkpoint, in one process.

    Raises:
        UserError: the checkpoint is damaged, or has other tensors.
    """
    read_progress(checkpoint)
    _load_tensors(checkpoint, _flat_tensors({section: tensors}), None)


# -- parts --------------------------------------------------------------------------------------------------------


def _flat_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{section}.{name}": tensor for section in TENSORS for name, tensor in state.get(section, {}).items()}


def _load_documents(folder: Path, state: dict[str, Any]) -> None:
    """Fill the progress and the slots of a state, and hold its tensors against what the checkpoint has."""
    progress = read_progress(folder)
    try:
        slots = json.loads((folder / SLOTS_FILE).read_text(encoding="utf-8"))
        metadata = _Reader(folder).read_metadata()
    except (OSError, ValueError, pickle.UnpicklingError, EOFError, LookupError, AttributeError, ImportError) as error:
        raise _damaged(folder, _reason(error)) from None
    _check_tensors(folder, metadata, state)
    missing = sorted(state.get("slots", {}).keys() - slots.keys(), key=int)
    if missing:
        raise UserError(
            f"batches_per_step: {folder} knows where in the data {len(slots)} micro-batches of a step are, not those "
            f"of slot {', '.join(missing)}; accepted: {len(slots)}"
        )
    if "progress" in state:
        state["progress"].clear()
        state["progress"].update(progress)
    for name in state.get("slots", {}):
        state["slots"][name] = slots[name]


def _check_tensors(folder: Path, metadata: Metadata, state: dict[str, Any]) -> None:
    """Compare the names and shapes of the sections that a state has."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _flat_tensors(state).items()}
    sections = tuple(f"{section}." for section in TENSORS if section in state)
    found = {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and name.startswith(sections)
    }
    unlike = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if unlike:
        name = unlike[0]
        shapes = [str(list(where[name])) if name in where else "absent" for where in (found, wanted)]
        raise UserError(
            f"output: {folder} was written with other settings: {len(unlike)} tensors differ, the first is {name}: "
            f"{shapes[0]} there, {shapes[1]} here; give the settings it was written with, or another output"
        )


def _load_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    if not tensors:
        return
    reader = _Reader(folder)
    dcp.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    try:
        _together(lambda: _raise(reader.failure), group)
    except (OSError, RuntimeError) as error:
        raise _damaged(folder, _reason(error)) from None


class _Writer(dcp.FileSystemWriter):
    """DCP's writer; it keeps an error to itself until all ranks are through and can exchange theirs.

    DCP would send the error with its traceback, which some versions of Python and torch cannot, and then hang.
    """

    failure: Exception | None = None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # not where it was written: a path of Python 3.13 cannot be read by an older one

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's, when it could not write
            self.failure = error
            return _done([])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        try:
            super().finish(metadata, results)
        except OSError as error:
            self.failure = error


class _Reader(dcp.FileSystemReader):
    """DCP's reader; it keeps errors as the writer does, and a checkpoint can make it do nothing but read."""

    failure: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        try:
            return super().read_data(plan, planner)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            self.failure = error
            return _done(None)


def _done(result: Any) -> torch.futures.Future[Any]:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return future


class _Unpickler(pickle.Unpickler):
    """Makes only what DCP's metadata are made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        of_dcp = module == "torch.distributed.checkpoint.metadata" and not name.startswith("__")
        known = (("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"))
        if is_type or of_dcp or (module, name) in known:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # the early releases of Python 3.11 write an enum's members so
            return _enum_member
        raise pickle.UnpicklingError(f"its .metadata holds {module}.{name}, which no checkpoint does")


def _enum_member(owner: Any, name: str) -> Any:
    """Do what `getattr` would for a member of an enum, and refuse anything else."""
    if isinstance(owner, EnumMeta) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"its .metadata asks for {name} of {owner!r}, which no checkpoint does")


def _together(do: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Run `do` and return what it gave on every rank; if it failed on any, every rank raises the first failure."""
    result, error = None, None
    try:
        result = do()
    except (OSError, RuntimeError, UserError) as caught:
        error = caught
    if group is None:
        outcomes = [(result, error)]
    else:
        outcomes = [(None, None)] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, error), group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def _raise(failure: Exception | None) -> None:
    """Raise an error that has been kept, in a form that other ranks understand."""
    if failure is not None:
        raise OSError(_reason(failure))


def _reason(error: BaseException) -> str:
    """What went wrong, in some words: what the operating system said, if torch has only wrapped that."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _damaged(checkpoint: Path, reason: str) -> UserError:
    return UserError(f"output: cannot read {checkpoint}: {reason}; remove it to resume from an older one")


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that what is left of it is never taken for a whole one."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old.part")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
