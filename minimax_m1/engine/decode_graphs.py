"""DecodeGraphs: steps in which every sequence decodes one token, padded to a few sizes, each recorded as a CUDA graph.

A decoding step is some thousand short kernels, which take the host longer to launch than a GPU to run; a graph is
launched as one. It repeats what was recorded, at the same addresses and sizes. So what differs between steps lies in
one small tensor, which is overwritten before, and a batch is padded to the next size that a graph may have: the
"multi-level padding" of MiniMax-01 (arXiv 2501.08313). Rows of padding run in the cache's spare slot and page.

Shapes: n sequences, a token each, padded to N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minimax_m1.cache import HybridCache
from minimax_m1.model import MiniMaxM1ForCausalLM, Routing

Outcome = tuple[Tensor, list[Routing]]  # hidden [N, hidden] and each layer's routing


class DecodeGraphs:
    """The graphs of one model and its cache, each recorded when its size first comes up.

    The weights are read where they were then: they may change in place, and may not be replaced by other tensors.
    On a CPU nothing is recorded and the network just runs, on the same padded rows; that is for tests.
    """

    def __init__(self, model: MiniMaxM1ForCausalLM, cache: HybridCache, backend: str | None) -> None:
        """Record nothing yet; with this `backend`, no operation of a decoding step may make the host wait."""
        self._model, self._cache, self._backend = model, cache, backend
        self._device = model.device
        if self._device.type == "cuda":  # one of each for all graphs: they never run at the same time
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        self._recorded: dict[int, tuple[Tensor, Callable[[], Outcome]]] = {}  # N -> its inputs, and what runs them

    @property
    def sizes(self) -> list[int]:
        """The sizes that have come up, ascending."""
        return sorted(self._recorded)

    def run(self, token_ids: list[int], slots: list[int]) -> Outcome:
        """Run a token of each of the sequences in n different slots behind what they have, and count it there.

        Returns:
            hidden [n, hidden] after the final norm, and each layer's routing, whose rows from n on are padding; valid
            until the next run.
        """
        cache = self._cache
        past_lens = [cache.lens[slot] for slot in slots]
        for slot, past in zip(slots, past_lens, strict=True):
            reserved = cache.reserve(slot, past + 1)
            assert reserved, f"slot {slot}: no page for {past} + 1 tokens"
        size = padded_size(len(slots), cache.max_seqs)
        if size not in self._recorded:
            inputs, forward = self._prepare(size)
            self._recorded[size] = inputs, self._record(forward) if self._device.type == "cuda" else forward
        inputs, launch = self._recorded[size]
        padding = [0] * (inputs.shape[1] - len(slots))
        rows = [token_ids + padding, past_lens + padding, slots + [cache.spare_slot] * len(padding)]
        is_cuda = self._device.type == "cuda"
        inputs.copy_(torch.tensor(rows, dtype=torch.int64, pin_memory=is_cuda), non_blocking=is_cuda)
        hidden, routings = launch()
        for slot in slots:
            cache.lens[slot] += 1
        return hidden[: len(slots)], routings

    def _prepare(self, size: int) -> tuple[Tensor, Callable[[], Outcome]]:
        """Return inputs [3, N or N + 1] int64 (token ids, positions, slots), all padding, and what runs them."""
        width = size + size % 2  # rows begin at 16 bytes: Triton compiles anew for other addresses
        inputs = torch.zeros(3, width, dtype=torch.int64, device=self._device)
        inputs[2] = self._cache.spare_slot
        cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        return inputs, partial(self._forward, inputs[:, :size], cu_seqlens)

    def _forward(self, inputs: Tensor, cu_seqlens: Tensor) -> Outcome:
        token_ids, positions, slot_ids = inputs
        batch = self._cache.decode_batch(slot_ids, positions, cu_seqlens, self._backend)
        return self._model.forward_packed(token_ids, batch, self._cache)

    def _record(self, forward: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """Run `forward` once, on padding, and record it; return what replays it."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            forward()  # compiles kernels, makes what is made at first use: nothing of this may be in a graph
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a learner's, may use the GPU in the meantime.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outcome = forward()

        def replay() -> Outcome:
            graph.replay()
            return outcome

        return replay


def padded_size(count: int, most: int) -> int:
    """Return the size that a batch of `count` <= `most` sequences is padded to.

    Up to 8 sequences every size is one, for a row of padding may wake experts that nobody else needs, and then the
    weights of experts are all that a step waits for. Beyond, there are four sizes to a doubling, 10, 12, 14, 16, 20,
    ...: padding is less than a quarter, and up to 256 sequences need 28 graphs.
    """
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return min(most, -(-count // step) * step)
