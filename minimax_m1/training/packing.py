"""Which samples share a micro-batch: in order as long as they fit, then best fit into the room that is left.

Shapes: `lengths` are the tokens of samples that wait, in the order in which they were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence


def in_order(lengths: Sequence[int], room: int) -> int:
    """Return how many of the first samples fit into `room` tokens together."""
    for count, length in enumerate(lengths):
        if length > room:
            return count
        room -= length
    return len(lengths)


def best_fit(lengths: Sequence[int], room: int) -> list[int]:
    """Return the indices, ascending, of those that fill `room`: again and again the longest sample that still fits.

    One sweep from the longest to the shortest does that: room only shrinks, so what did not fit never will. Of samples
    of one length the earliest is taken.
    """
    taken = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] <= room:
            taken.append(index)
            room -= lengths[index]
    return sorted(taken)


def in_order_efficiency(lengths: Sequence[int], budget: int) -> float:
    """Return the share of the budget that is filled if batches take samples strictly in order (next fit).

    The last batch, which the samples may not fill, does not count.
    """
    filled, start = [], 0
    while start < len(lengths):
        count = max(1, in_order(lengths[start:], budget))
        filled.append(sum(lengths[start : start + count]))
        start += count
    full = filled[:-1] or filled
    return sum(full) / (budget * len(full)) if full else 0.0


def padded_efficiency(lengths: Sequence[int], budget: int) -> float:
    """Return the share of tokens among those computed if rows of a batch are padded to the longest of them.

    A batch takes samples in order as long as its number of rows times the longest of them is within the budget.
    """
    computed = rows = longest = 0
    for length in lengths:
        if rows and (rows + 1) * max(longest, length) > budget:
            computed += rows * longest
            rows = longest = 0
        rows, longest = rows + 1, max(longest, length)
    computed += rows * longest
    return sum(lengths) / computed if computed else 0.0
