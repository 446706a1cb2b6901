"""Feed: the micro-batches of this rank, step by step, drawn ahead of a GPU that is still busy with the step before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from minimax_m1.training.data import PackedBatch
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import SampleStream


class Feed:
    """What the streams of this rank's slots give, and where they stand, which is a checkpoint's business.

    Ahead of a GPU, the samples of the next step are drawn in a thread while the step runs; state and notes are those of
    what has been given out all the same, so that the batches do not depend on it, and neither does a run that resumes.
    """

    def __init__(self, streams: Mapping[int, SampleStream], settings: TrainSettings, is_ahead: bool) -> None:
        self.streams, self.settings = streams, settings
        self._thread = ThreadPoolExecutor(1, "samples") if is_ahead else None
        self._drawn: Future[list[PackedBatch]] | None = None  # of the next step, on the host
        self._states = self._read_states()

    def next_batches(self, step: int, device: torch.device) -> list[PackedBatch]:
        """Return the micro-batches of step 0, 1, …, which must be the one after the last, on the device.

        Raises:
            UserError: as `SampleStream.next_batch`.
        """
        batches = self._draw(step) if self._drawn is None else self._drawn.result()
        self._states, self._drawn = self._read_states(), None
        if self._thread is not None and step + 1 < self.settings.steps:
            self._drawn = self._thread.submit(self._draw, step + 1)
        return [batch.to(device) for batch in batches]

    def state(self) -> dict[str, Any]:
        """Return where each slot stands, for `load`."""
        return self._states

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` stood."""
        assert self._drawn is None
        for slot, stream in self.streams.items():
            stream.load_state_dict(state[str(slot)])
        self._states = self._read_states()

    def notes(self) -> list[tuple[str, int, str | None]]:
        """Return what was left out so far: its kind, how often, and the place of the first, if it has one."""
        times: Counter[str] = Counter()
        places: dict[str, str] = {}
        for state in self._states.values():
            times.update(state["notes"])
            places = {**state["examples"], **places}
        return [(note, count, places.get(note)) for note, count in times.items()]

    def close(self) -> None:
        """Wait for the thread, and draw no more."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _draw(self, step: int) -> list[PackedBatch]:
        for stream in self.streams.values():
            stream.window = self.settings.window[self.settings.stage(step)]
        return [stream.next_batch(backend=self.settings.backend) for stream in self.streams.values()]

    def _read_states(self) -> dict[str, Any]:
        return {str(slot): stream.state_dict() for slot, stream in self.streams.items()}
