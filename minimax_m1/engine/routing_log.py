"""RoutingLog: which experts each layer used, how often and with what weight, for one request or for the whole engine.

Shapes: L layers, E experts of each, K experts a token, T rows of one step. NumPy, whose calls on a few hundred numbers
take half as long as torch's: a step of 16 requests makes some 40 of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import Routing


@dataclass(eq=False)
class RoutingLog:
    """Sums over the tokens that have run; the memory does not grow with them unless their ids are asked for."""

    counts: NDArray[np.int64]  # [L, E]: tokens that used the expert
    weight_sums: NDArray[np.float64]  # [L, E]: of the weights that they gave it
    num_tokens: int = 0
    step_ids: list[NDArray[np.int16]] | None = None  # [tokens, L, K] of each step; None: not kept

    @classmethod
    def of(cls, config: MiniMaxM1Config, *, keep_token_ids: bool = False) -> RoutingLog:
        """Return an empty log for a network; `keep_token_ids` keeps 2 L K bytes for every token."""
        shape = config.num_hidden_layers, config.num_local_experts
        return cls(np.zeros(shape, np.int64), np.zeros(shape), step_ids=[] if keep_token_ids else None)

    def add(self, counts: NDArray[np.int64], weight_sums: NDArray[np.float64], num_tokens: int) -> None:
        """Add the sums of more tokens, or of another log."""
        self.counts += counts
        self.weight_sums += weight_sums
        self.num_tokens += num_tokens

    @property
    def mean_weights(self) -> NDArray[np.float64]:
        """[L, E]: the weight of an expert in the tokens that used it; 0 where none did."""
        return self.weight_sums / np.maximum(self.counts, 1)

    @property
    def load_balance_entropy(self) -> NDArray[np.float64]:
        """[L]: -sum over experts of p log p / log E, where p is the expert's share of all uses in its layer.

        1: all experts are used alike; 0: a single one is, or nothing has run.
        """
        shares = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        logs = np.log(np.where(shares > 0, shares, 1))
        return np.abs((shares * logs).sum(1)) / math.log(max(2, self.counts.shape[1]))

    @property
    def token_expert_ids(self) -> NDArray[np.int16] | None:
        """[tokens, L, K]: each token's experts, the most probable first, -1 for unused; None: not kept."""
        if self.step_ids is None:
            return None
        return np.concatenate(self.step_ids) if self.step_ids else np.empty((0, len(self.counts), 0), np.int16)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: each layer's used experts in lists side by side, the most used first."""
        entropy, mean_weights, layers = self.load_balance_entropy, self.mean_weights, []
        for i, counts in enumerate(self.counts):
            order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
            layers.append(
                {
                    "layer": i,
                    "experts": order.tolist(),
                    "counts": counts[order].tolist(),
                    "mean_weights": mean_weights[i, order].round(6).tolist(),
                    "load_balance_entropy": round(float(entropy[i]), 6),
                }
            )
        result: dict[str, Any] = {"num_tokens": self.num_tokens, "num_experts": self.counts.shape[1], "layers": layers}
        token_expert_ids = self.token_expert_ids
        if token_expert_ids is not None:
            result["token_expert_ids"] = token_expert_ids.tolist()
        return result


def record_routing(
    routings: list[Routing], rows: Sequence[tuple[RoutingLog | None, int, int]], totals: RoutingLog | None = None
) -> None:
    """Add one step to the logs of its requests.

    Args:
        routings: of every layer, T rows each, of which those at the end may be padding.
        rows: (log, first row, last row + 1) of each request, ascending, without overlap; rows in none of them, such as
            rejected drafts, are not counted. A log of None counts in `totals` only.
        totals: gets what all of these rows used.
    """
    rows = [(log, start, stop) for log, start, stop in rows if stop > start and (log is not None or totals is not None)]
    if not rows:
        return
    all_ids, all_weights = (torch.stack(tensors) for tensors in list(zip(*routings, strict=True))[1:])  # [L, T, K]
    on_host = [x.to("cpu", non_blocking=True) for x in (all_ids, all_weights)]
    if all_ids.is_cuda:
        torch.cuda.current_stream(all_ids.device).synchronize()  # one wait for both
    ids, weights = (x.numpy() for x in on_host)
    (num_layers, num_rows, _), num_experts = ids.shape, routings[0].probs.shape[-1]
    owners = np.full(num_rows, len(rows))  # of each row, its place in `rows`; the last place is for nobody's
    end = 0
    for i, (_, start, stop) in enumerate(rows):
        assert end <= start and stop <= num_rows, f"rows {start}:{stop} behind {end}, of {num_rows}"
        owners[start:stop], end = i, stop
    cells = (owners * num_layers + np.arange(num_layers)[:, None])[:, :, None] * num_experts + ids  # [L, T, K]
    shape = (len(rows) + 1, num_layers, num_experts)
    used = weights != 0  # the model gives a weight of exactly 0 to an expert that it did not run
    counts = np.bincount(cells[used], minlength=math.prod(shape)).reshape(shape)
    weight_sums = np.bincount(cells.ravel(), weights.ravel(), minlength=math.prod(shape)).reshape(shape)
    for i, (log, start, stop) in enumerate(rows):
        if log is not None:
            log.add(counts[i], weight_sums[i], stop - start)
            if log.step_ids is not None:
                kept = np.where(used[:, start:stop], ids[:, start:stop], -1)
                log.step_ids.append(kept.swapaxes(0, 1).astype(np.int16))
    if totals is not None:
        num_tokens = sum(stop - start for _, start, stop in rows)
        totals.add(counts[:-1].sum(0), weight_sums[:-1].sum(0), num_tokens)
