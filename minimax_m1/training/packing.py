"""Which samples share a micro-batch: in order as long as they fit, then best fit into the room that is left.

Shapes: `lengths` are the tokens of samples that wait, in the order in which they were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

LOOKAHEAD = 64  # samples behind the first that does not fit, among which best fit chooses


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


def needed(lengths: Sequence[int], budget: int) -> int:
    """Return how many samples `next_batch` has to look at, as far as these tell: if all of them fit, then more."""
    return in_order(lengths, budget) + 1 + LOOKAHEAD


def next_batch(lengths: Sequence[int], budget: int) -> list[int]:
    """Return the indices, ascending, of the next batch.

    It takes samples in order until the next one does not fit; that one begins the batch after it, so none waits for
    ever. The room left goes to those that fit best among the LOOKAHEAD behind it.
    """
    first = in_order(lengths, budget)
    window = lengths[first : first + 1 + LOOKAHEAD]
    return [*range(first), *(first + i for i in best_fit(window, budget - sum(lengths[:first])))]


def best_fit_efficiency(lengths: Sequence[int], budget: int) -> float:
    """Return the share of the budget that is filled as long as there is enough to choose from."""
    waiting, filled = list(lengths), list[int]()
    while len(waiting) >= needed(waiting, budget) or (waiting and not filled):
        taken = set(next_batch(waiting, budget))
        filled.append(sum(waiting[i] for i in taken))
        waiting = [length for i, length in enumerate(waiting) if i not in taken]
    return sum(filled) / (budget * len(filled)) if filled else 0.0


def in_order_efficiency(lengths: Sequence[int], budget: int) -> float:
    """Return the share of the budget that is filled if batches take samples strictly in order (next fit).

    The last batch, which the samples may not fill, does not count.
    """
    filled = [0]
    for length in lengths:
        if filled[-1] + length > budget:
            filled.append(0)
        filled[-1] += length
    full = filled[:-1] or filled
    return sum(full) / (budget * len(full))


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
