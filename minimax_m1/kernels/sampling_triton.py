"""The choice of the next tokens on the GPU: `sampling.py` for all rows at once, and nothing sorted.

Shapes: N rows, V ids of the vocabulary, B blocks of BLOCK ids. A weight is exp((score - largest score) / temperature),
as in `sampling.exponentials`; what top_k, top_p and min_p leave are the weights from a threshold on, which is searched
for among the bits of float32, and so is exact. Sums are in float64. A row's choice depends on no other row.

Two launches: the first reads every logit once and leaves each block's maximum and sum. The second has a program a row,
which draws a block by the sums and an id inside of it; or, if ids are to be cut, lists the few that may be left.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from minimax_m1.kernels.gpu import to_device

# What is asked of a row: all float64, which is exact for ids, so that one copy brings it.
# The columns' order is that of the kernels' loads.
ASKED = np.dtype([(name, np.float64) for name in (
    "temperature", "top_k", "top_p", "min_p", "quantile", "forced", "adjusted", "num_best"
)])  # fmt: skip
NUM_ASKED = tl.constexpr(8)
NUM_ANSWERED = 5  # before the best

BLOCK = 4096  # ids that a program of the first launch reads: 16 KB, 16 ids a thread
TILE = 1024  # listed ids compared with all bounds at once: with 16 bounds 32 comparisons a thread
WAYS = tl.constexpr(16)  # bounds that a pass of the search tries: 8 passes instead of the 30 of a bisection
ABOVE_ONE = tl.constexpr(0x3F800001)  # the bits of the smallest float32 above 1, the largest weight
NOWHERE = tl.constexpr(0x7FFFFFFF)


def choose_rows(
    logits: Tensor, scores: Tensor | None, asked: NDArray[np.void], forbidden: NDArray[np.int64] | None
) -> Tensor:
    """Choose each row's token and describe it; the host does not wait.

    Args:
        logits: [N, V] float32, the model's own.
        scores: [M, V] float32: what rows that are adjusted are chosen by; forbidden ids are out already.
        asked: [N] of ASKED: `temperature` (0: greedy) and the cuts as in `SamplingParams`; `quantile` in
            [0, 1); `forced`, the token, or -1; `adjusted`, the row of `scores`, or -1 for the logits themselves;
            `num_best`: how many of the most probable ids to list, or -1 if the rank is not needed either.
        forbidden: ids that are never chosen, and do not count in ranks and lists.
    Returns:
        [N, 5 + 2 K] float64, K the largest `num_best`: the token, its logit, the row's largest logit, the sum of
        exp(logit - largest), the token's rank; then K ids and K logits of the best, the smaller id of equal ones first
        (of rows that ask for them).
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    num_best = min(vocab_size, max(0, int(asked["num_best"].max())))
    device, is_cut = logits.device, (asked["top_k"] > 0) | (asked["top_p"] < 1) | (asked["min_p"] > 0)
    hidden = forbidden_mask(b"" if forbidden is None else forbidden.tobytes(), vocab_size, device)
    numbers = to_device(asked.view(np.float64), device)
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    maxima = logits.new_empty(2, num_rows, num_blocks)  # of the logits, of the scores
    sums = logits.new_empty(2, num_rows, num_blocks, dtype=torch.float64)
    firsts = logits.new_empty(num_rows, num_blocks, dtype=torch.int32)
    listed = logits.new_empty(num_rows if is_cut.any() else 0, vocab_size, dtype=torch.int32)
    answer = logits.new_empty(num_rows, NUM_ANSWERED + 2 * num_best, dtype=torch.float64)
    scores = logits if scores is None else scores
    inputs = (logits, scores, hidden, numbers, logits.stride(0), scores.stride(0), vocab_size)
    _sum_blocks[(num_rows, num_blocks)](*inputs, maxima, sums, firsts, BLOCK=BLOCK, num_warps=8)
    padded = triton.next_power_of_2(num_blocks)
    _choose[(num_rows,)](
        *inputs, maxima, sums, firsts, listed, answer, answer.stride(0), BLOCK=BLOCK, BLOCKS=padded, TILE=TILE,
        num_warps=16,  # alone on its multiprocessor, and 8 spill registers
    )  # fmt: skip
    if num_best:
        asking = to_device(np.flatnonzero(asked["num_best"] > 0), device)
        tokens = answer[:, 0].index_select(0, asking).long()
        best = best_of(logits.index_select(0, asking), tokens, hidden, num_best)
        answer[:, NUM_ANSWERED:].index_copy_(0, asking, best)
    return answer


def best_of(logits: Tensor, tokens: Tensor, hidden: Tensor, num_best: int) -> Tensor:
    """Return ids and logits [M, 2 K] float64 of the K best of each row; hidden ids are out, but for the row's token."""
    own = logits.gather(1, tokens[:, None])
    shown = logits.masked_fill(hidden, -torch.inf).scatter_(1, tokens[:, None], own)
    bits = (shown + 0.0).view(torch.int32)  # -0 becomes 0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # integers in the order of the floats
    backwards = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    keys = (order + backwards).topk(num_best, dim=1).values
    ids = logits.shape[1] - 1 - (keys & 0xFFFFFFFF)
    return torch.cat((ids.double(), shown.gather(1, ids).double()), dim=1)


@lru_cache(maxsize=4)
def forbidden_mask(ids: bytes, vocab_size: int, device: torch.device) -> Tensor:
    """Return [V] bool, true at the ids (the bytes of int64): copied once, as they are the same in every step."""
    mask = np.zeros(vocab_size, dtype=np.bool_)
    mask[np.frombuffer(ids, dtype=np.int64)] = True
    return torch.from_numpy(mask).to(device)


@triton.jit
def _load_scores(scores, hidden, adjusted, ids, vocab_size):
    """Load scores of a row; hidden ids are -inf, if the row is none of those that are adjusted."""
    score = tl.load(scores + ids, mask=ids < vocab_size, other=-float("inf"))
    out = tl.load(hidden + ids, mask=ids < tl.where(adjusted < 0, vocab_size, 0), other=0)
    return tl.where(out != 0, -float("inf"), score)


@triton.jit
def _weigh(score, largest, temperature):
    """Return exp((score - largest) / temperature), rounded at each step as numpy does; 0 for -inf."""
    return tl.exp(tl.div_rn(score - largest, tl.zeros_like(score) + temperature))


@triton.jit
def _first_above(cumulated, is_in, places, target):
    """Return the first place inside whose cumulated weight exceeds the target; NOWHERE if there is none."""
    return tl.min(tl.where(is_in & (cumulated > target), places, NOWHERE), axis=0)


@triton.jit
def _sum_blocks(
    logits, scores, hidden, asked, logits_stride, scores_stride, vocab_size, maxima, sums, firsts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block of one row: maxima and sums of exponentials of logits and scores, and the first best id."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + block
    behind = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)  # the scores' part of maxima and sums
    ids = block * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.load(asked + row * NUM_ASKED).to(tl.float32)
    adjusted = tl.load(asked + row * NUM_ASKED + 6).to(tl.int64)
    temperature = tl.where(temperature == 0, 1.0, temperature)  # greedy rows draw nothing
    raw = logits + row * logits_stride
    own = raw
    if adjusted >= 0:
        own = scores + adjusted * scores_stride

    logit = tl.load(raw + ids, mask=ids < vocab_size, other=-float("inf"))
    largest = tl.max(logit, axis=0)
    tl.store(maxima + at, largest)
    largest = tl.where(largest == -float("inf"), 0.0, largest)  # -inf - -inf is not a number
    tl.store(sums + at, tl.sum(tl.exp(logit - largest).to(tl.float64), axis=0))

    score = _load_scores(own, hidden, adjusted, ids, vocab_size)
    largest = tl.max(score, axis=0)
    tl.store(maxima + behind + at, largest)
    tl.store(firsts + at, tl.min(tl.where(score == largest, ids, NOWHERE), axis=0))
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(sums + behind + at, tl.sum(_weigh(score, largest, temperature).to(tl.float64), axis=0))


@triton.jit
def _weigh_listed(listed, start, n, scores, largest, temperature, TILE: tl.constexpr):
    """Return weights of TILE listed ids; 0 behind the list's end."""
    places = start + tl.arange(0, TILE)
    ids = tl.load(listed + places, mask=places < n, other=0)
    score = tl.load(scores + ids, mask=places < n, other=-float("inf"))
    return _weigh(score, largest, temperature)


@triton.jit
def _search(listed, n, scores, largest, temperature, least, target, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Return the bits of the largest threshold from which on the weights sum (or count) to the target, or `least`."""
    beyond = tl.zeros_like(least) + ABOVE_ONE
    while beyond - least > 1:
        step = (beyond - least + WAYS) // (WAYS + 1)
        bounds = least + step * (1 + tl.arange(0, WAYS))
        mass = tl.zeros([WAYS], tl.float64)
        for start in range(0, n, TILE):
            weight = _weigh_listed(listed, start, n, scores, largest, temperature, TILE)
            bits = weight.to(tl.int32, bitcast=True)  # in the weights' order, as these are not negative
            own = tl.full([TILE], 1.0, tl.float64) if COUNT else weight.to(tl.float64)
            mass += tl.sum(tl.where(bits[:, None] >= bounds[None, :], own[:, None], 0.0), axis=0)
        reached = tl.sum(((mass >= target) & (bounds < beyond)).to(tl.int32), axis=0)
        beyond = tl.minimum(beyond, least + step * (reached + 1))
        least += step * reached
    return least


@triton.jit
def _choose(
    logits, scores, hidden, asked, logits_stride, scores_stride, vocab_size, maxima, sums, firsts,
    listed, answer, answer_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row, and describe it."""
    row = tl.program_id(0).to(tl.int64)
    asked += row * NUM_ASKED
    temperature, top_k = tl.load(asked).to(tl.float32), tl.load(asked + 1)
    top_p, min_p, quantile = tl.load(asked + 2), tl.load(asked + 3).to(tl.float32), tl.load(asked + 4)
    forced, adjusted = tl.load(asked + 5).to(tl.int32), tl.load(asked + 6).to(tl.int64)
    num_best = tl.load(asked + 7)
    raw = logits + row * logits_stride
    own = raw
    if adjusted >= 0:
        own = scores + adjusted * scores_stride

    # The whole row, from its blocks.
    num_blocks = tl.cdiv(vocab_size, BLOCK)
    blocks = tl.arange(0, BLOCKS)
    is_block = blocks < num_blocks
    at, behind = row * num_blocks, tl.num_programs(0).to(tl.int64) * num_blocks
    block_largest = tl.load(maxima + at + blocks, mask=is_block, other=-float("inf"))
    block_sums = tl.load(sums + at + blocks, mask=is_block, other=0.0)
    raw_largest = tl.max(block_largest, axis=0)
    raw_total = tl.sum(block_sums * tl.exp(block_largest - raw_largest).to(tl.float64), axis=0)
    block_largest = tl.load(maxima + behind + at + blocks, mask=is_block, other=-float("inf"))
    largest = tl.max(block_largest, axis=0)

    token = forced
    if forced < 0:
        if temperature == 0:
            first = tl.load(firsts + at + blocks, mask=is_block, other=NOWHERE)
            token = tl.min(tl.where(block_largest == largest, first, NOWHERE), axis=0)
        else:
            block_sums = tl.load(sums + behind + at + blocks, mask=is_block, other=0.0)
            block_sums *= _weigh(block_largest, largest, temperature).to(tl.float64)
            total = tl.sum(block_sums, axis=0)
            if (top_k > 0) | (top_p < 1) | (min_p > 0):
                list_row = listed + row * vocab_size
                # Few ids are enough to search in: those too unlikely to be left even together are not listed.
                tail = tl.where(top_k > 0, 0.0, 0.999 * (1 - top_p) * total / vocab_size).to(tl.float32)
                is_simple = (top_k == 0) & (top_p >= 1)
                level, n = tl.zeros_like(forced), tl.zeros_like(forced)
                while level < 3:
                    bound = tl.where(level == 0, 2e-3, tl.where(level == 1, 1e-4, 0.0))
                    level = tl.where(is_simple | (bound <= tail), 3, level + 1)
                    bound = tl.where(is_simple, min_p, tl.maximum(bound, tail))
                    n = tl.zeros_like(forced)
                    found = tl.zeros_like(total)
                    for block in range(num_blocks):
                        block_max = tl.load(maxima + behind + at + block)
                        if _weigh(block_max, largest, temperature) >= bound:
                            ids = block * BLOCK + tl.arange(0, BLOCK)
                            score = _load_scores(own, hidden, adjusted, ids, vocab_size)
                            weight = _weigh(score, largest, temperature)
                            likely = (weight >= bound) & (weight > 0)
                            places = n + tl.cumsum(likely.to(tl.int32), axis=0) - 1
                            tl.store(list_row + places, ids, mask=likely)
                            n += tl.sum(likely.to(tl.int32), axis=0)
                            found += tl.sum(tl.where(likely, weight, 0.0).to(tl.float64), axis=0)
                    is_enough = tl.where(top_k > 0, n >= top_k, found > top_p * total)
                    level = tl.where(is_enough, 3, level)
                tl.debug_barrier()  # the list is read by other threads than wrote it

                threshold = tl.zeros_like(forced) + 1
                if top_k > 0:
                    threshold = _search(list_row, n, own, largest, temperature, threshold, top_k, True, TILE)
                    total = tl.zeros_like(total)
                    for start in range(0, n, TILE):
                        weight = _weigh_listed(list_row, start, n, own, largest, temperature, TILE)
                        is_in = weight.to(tl.int32, bitcast=True) >= threshold
                        total += tl.sum(tl.where(is_in, weight, 0.0).to(tl.float64), axis=0)
                if top_p < 1:
                    threshold = _search(list_row, n, own, largest, temperature, threshold, top_p * total, False, TILE)
                threshold = tl.maximum(threshold, min_p.to(tl.int32, bitcast=True))

                left = tl.zeros_like(total)
                for start in range(0, n, TILE):
                    weight = _weigh_listed(list_row, start, n, own, largest, temperature, TILE)
                    is_in = weight.to(tl.int32, bitcast=True) >= threshold
                    left += tl.sum(tl.where(is_in, weight, 0.0).to(tl.float64), axis=0)
                before = tl.zeros_like(total)
                place = tl.zeros_like(forced) + NOWHERE
                last = tl.zeros_like(forced)
                for start in range(0, n, TILE):
                    weight = _weigh_listed(list_row, start, n, own, largest, temperature, TILE)
                    is_in = weight.to(tl.int32, bitcast=True) >= threshold
                    weight = tl.where(is_in, weight, 0.0).to(tl.float64)
                    places = start + tl.arange(0, TILE)
                    cumulated = before + tl.cumsum(weight, axis=0)
                    place = tl.minimum(place, _first_above(cumulated, is_in, places, quantile * left))
                    last = tl.maximum(last, tl.max(tl.where(is_in, places, 0), axis=0))
                    before += tl.sum(weight, axis=0)
                token = tl.load(list_row + tl.minimum(place, last))
            else:
                target = quantile * total
                last = tl.max(tl.where(block_sums > 0, blocks, 0), axis=0)
                block = _first_above(tl.cumsum(block_sums, axis=0), block_sums > 0, blocks, target)
                block = tl.minimum(block, last)
                target -= tl.sum(tl.where(blocks < block, block_sums, 0.0), axis=0)
                ids = block * BLOCK + tl.arange(0, BLOCK)
                score = _load_scores(own, hidden, adjusted, ids, vocab_size)
                weight = _weigh(score, largest, temperature).to(tl.float64)
                last = tl.max(tl.where(weight > 0, ids, 0), axis=0)
                token = tl.minimum(_first_above(tl.cumsum(weight, axis=0), weight > 0, ids, target), last)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)  # where no score is a number

    logit = tl.load(raw + token)
    rank = tl.zeros_like(forced) + 1
    if num_best >= 0:
        for block in range(num_blocks):
            if tl.load(maxima + at + block) > logit:
                ids = block * BLOCK + tl.arange(0, BLOCK)
                other = _load_scores(raw, hidden, -1, ids, vocab_size)
                rank += tl.sum((other > logit).to(tl.int32), axis=0)
    answer += row * answer_stride
    tl.store(answer, token.to(tl.float64))
    tl.store(answer + 1, logit.to(tl.float64))
    tl.store(answer + 2, raw_largest.to(tl.float64))
    tl.store(answer + 3, raw_total)
    tl.store(answer + 4, rank.to(tl.float64))
