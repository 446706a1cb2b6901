"""Softmax attention: the torch backend against the formula in float64, packed and over pages."""

import pytest
import torch

from minimax_m1.kernels.attention import softmax_attention, softmax_attention_cached
from tests.tolerances import KERNEL, relative_error

HEADS, GROUPS, HEAD_DIM = 6, 2, 16


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("lengths", [[1], [2], [63], [64], [65], [257], [600, 1, 30]], ids=str)
def test_packed_forward_and_backward(dtype, window, lengths):
    total = sum(lengths)
    q = draw(total, HEADS, HEAD_DIM, dtype=dtype, seed=1)
    k, v = (draw(total, GROUPS, HEAD_DIM, dtype=dtype, seed=s) for s in (2, 3))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    results = []
    for backend, wide in (("reference", torch.float64), ("torch", dtype)):
        inputs = [x.to(wide, copy=True).requires_grad_() for x in (q, k, v)]
        o = softmax_attention(*inputs, cu_seqlens=cu_seqlens, window=window, backend=backend)
        loss = (o.double() * draw(*o.shape, seed=4)).sum()
        results.append([o, *torch.autograd.grad(loss, inputs)])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < KERNEL[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 90])
def test_cached_rows_are_the_rows_of_the_whole(dtype, window):
    """Three sequences in one call: one decodes, one starts, one continues; the unused part of the cache is NaN."""
    totals, seqlens, slots, num_pages = [90, 33, 700], [1, 33, 600], [2, 0, 1], 20
    q_all = [draw(n, HEADS, HEAD_DIM, seed=10 + i).to(dtype) for i, n in enumerate(totals)]
    keys, values = (torch.full((GROUPS, num_pages, 64, HEAD_DIM), float("nan"), dtype=dtype) for _ in range(2))
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    block_tables = torch.zeros(3, 11, dtype=torch.int32)
    expected = []
    for i, (n, new, slot) in enumerate(zip(totals, seqlens, slots, strict=True)):
        k, v = (draw(n, GROUPS, HEAD_DIM, seed=s + i).to(dtype) for s in (20, 30))
        for j, start in enumerate(range(0, n, 64)):
            page = block_tables[slot, j] = free.pop()
            for pool, rows in ((keys, k), (values, v)):
                pool[:, page, : min(64, n - start)] = rows[start : start + 64].transpose(0, 1)
        bounds = torch.tensor([0, n], dtype=torch.int32)
        wide = (x.double() for x in (q_all[i], k, v))
        expected.append(softmax_attention(*wide, cu_seqlens=bounds, window=window, backend="reference")[-new:])
    actual = softmax_attention_cached(
        torch.cat([x[-new:] for x, new in zip(q_all, seqlens, strict=True)]),
        keys,
        values,
        cu_seqlens=torch.tensor([0, 1, 34, 634], dtype=torch.int32),
        kv_lens=torch.tensor(totals),
        slots=torch.tensor(slots),
        block_tables=block_tables,
        num_decodes=1,
        window=window,
        backend=None,
    )
    assert relative_error(actual, torch.cat(expected)) < KERNEL[dtype]
