"""Softmax attention and the rotary embedding in Triton against the formulas in float64."""

import pytest
import torch

pytest.importorskip("triton")

from minimax_m1.kernels import attention_triton
from minimax_m1.kernels.attention import attend_reference, softmax_attention, softmax_attention_cached
from minimax_m1.kernels.rotary import rotate, rotate_append
from tests.tolerances import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = [63, 0, 2, 65, 1, 64, 0]  # packed together, some of them empty


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def bounds_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim", "window", "dtype"),
    [
        (LENGTHS, 2, 1, 16, None, torch.bfloat16),
        (LENGTHS, 2, 2, 24, 7, torch.float32),
        ([130], 1, 1, 40, None, torch.float32),
        pytest.param([257], 3, 1, 16, None, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param([257], 2, 1, 16, 100, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packed_forward_and_backward(lengths, heads, groups, head_dim, window, dtype):
    """Our own kernels, on parts of a wider matrix, as a model's projections are."""
    rows, bounds = sum(lengths), bounds_of(lengths)
    wide = draw(rows, heads + 2 * groups, head_dim, dtype=dtype, seed=1)
    weight = draw(rows, heads, head_dim, dtype=dtype, seed=2)
    results = []
    for own in (True, False):
        inputs = (wide if own else wide.double()).clone().requires_grad_()
        q, k, v = inputs.split([heads, groups, groups], 1)
        if own:
            o = attention_triton.attend_own(q, k, v, bounds, window)
        else:
            o = softmax_attention(q, k, v, cu_seqlens=bounds, window=window, backend="reference")
        grads = torch.autograd.grad(o, inputs, weight.to(o.dtype))[0].split([heads, groups, groups], 1)
        results.append([o, *grads])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="the libraries' kernels run on a GPU only")
@pytest.mark.parametrize("window", [None, 100])
def test_packed_through_the_library(window):
    lengths, heads, groups = [257, 0, 1, 1000], 8, 2
    bounds, weight = bounds_of(lengths), draw(sum(lengths), heads, 128, dtype=torch.bfloat16, seed=2)
    wide = draw(sum(lengths), heads + 2 * groups, 128, dtype=torch.bfloat16, seed=1)
    if attention_triton.library(wide) is None:
        pytest.skip("no library's kernel here")
    results = []
    for backend in ("triton", "reference"):
        inputs = (wide if backend == "triton" else wide.double()).clone().requires_grad_()
        q, k, v = inputs.split([heads, groups, groups], 1)
        o = softmax_attention(q, k, v, cu_seqlens=bounds, max_seqlen=1000, window=window, backend=backend)
        results.append([o, *torch.autograd.grad(o, inputs, weight.to(o.dtype))])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-2


class Pages:
    """A cache of sequences of `lens` tokens in shuffled slots and pages; what is not theirs is NaN."""

    def __init__(self, lens, groups, head_dim, dtype):
        count = sum(-(-n // 64) for n in lens)
        self.keys, self.values = (
            torch.full((groups, count + 2, 64, head_dim), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)
        )
        free = torch.randperm(count + 2, generator=torch.Generator().manual_seed(0)).tolist()
        slots = torch.randperm(len(lens), generator=torch.Generator().manual_seed(1)).tolist()
        self.block_tables = torch.full((len(lens), 40), count + 1, dtype=torch.int32)
        self.own = []
        for i, (n, slot) in enumerate(zip(lens, slots, strict=True)):
            k, v = (draw(groups, n, head_dim, dtype=dtype, seed=2 * i + s) for s in (0, 1))
            self.own.append((k, v))
            for j, start in enumerate(range(0, n, 64)):
                page = self.block_tables[slot, j] = free.pop()
                for pool, rows in ((self.keys, k), (self.values, v)):
                    pool[:, page, : min(64, n - start)] = rows[:, start : start + 64]
        self.block_tables = self.block_tables.to(DEVICE)
        self.slots = torch.tensor(slots, device=DEVICE)
        self.kv_lens = torch.tensor(lens, device=DEVICE)


@pytest.mark.parametrize(
    ("lens", "new", "num_decodes", "heads", "groups", "head_dim", "window", "dtype"),
    [
        ([1, 64, 65, 257], [1, 1, 1, 1], 4, 8, 1, 16, None, torch.bfloat16),
        ([257, 3, 64], [3, 1, 4], 3, 6, 2, 24, None, torch.bfloat16),  # drafts
        ([300, 130], [2, 2], 2, 3, 1, 16, 70, torch.float32),
        ([90, 65, 33, 257], [1, 2, 33, 65], 2, 6, 2, 16, None, torch.bfloat16),  # mixed
        ([1, 2, 63, 65, 100], [1, 2, 63, 65, 1], 0, 2, 1, 16, None, torch.float32),
        pytest.param([300, 65], [130, 64], 0, 6, 2, 16, 90, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_over_pages(lens, new, num_decodes, heads, groups, head_dim, window, dtype, monkeypatch):
    monkeypatch.setattr(attention_triton, "FULL", 12)  # a few parts, where a GPU would have many
    pages = Pages(lens, groups, head_dim, dtype)
    q = draw(sum(new), heads, 2 * head_dim, dtype=dtype, seed=99)[..., head_dim:]
    actual = softmax_attention_cached(
        q,
        pages.keys,
        pages.values,
        cu_seqlens=bounds_of(new),
        kv_lens=pages.kv_lens,
        slots=pages.slots,
        block_tables=pages.block_tables,
        num_decodes=num_decodes,
        num_decode_rows=sum(new[:num_decodes]),
        window=window,
        backend="triton",
    )
    wide = [[x.double() for x in (rows, *kv)] for rows, kv in zip(q.split(new), pages.own, strict=True)]
    for rows, inputs in zip(actual.split(new), wide, strict=True):
        assert relative_error(rows, attend_reference(*inputs, window)) < TOLERANCE[dtype]


def test_parts_fill_the_gpu():
    """At M1's 8 groups and tables for 1M tokens, also where one sequence alone is long."""
    for num_seqs in (1, 2, 8, 33, 64):
        splits, _ = attention_triton._splits(8 * num_seqs, 8, 16384)
        assert splits * 8 * num_seqs >= attention_triton.FULL
        assert splits * 8 >= attention_triton.FULL / 2
    assert attention_triton._splits(8, 8, 3) == (1, 4)  # a table of three pages is one part


@pytest.mark.parametrize(
    ("head_dim", "half", "dtype"), [(16, 4, torch.bfloat16), (24, 5, torch.float32), (16, 8, torch.bfloat16)]
)
def test_rotary(head_dim, half, dtype):
    """Alone with its gradient, and with the writing of pages: strided inputs, every other row of the pools stays."""
    tokens, heads, groups = 7, 10, 3
    angles = 10 * draw(tokens, 1, half, seed=5)
    wide = draw(tokens, heads + 2 * groups, head_dim, dtype=dtype)
    weight, results = draw(tokens, heads, head_dim, dtype=dtype, seed=6), []
    for backend, x in (("triton", wide), ("reference", wide.double())):
        q = x[:, :heads].detach().requires_grad_()
        turned = rotate(q, angles.cos(), angles.sin(), backend)
        results.append((turned, *torch.autograd.grad(turned, q, weight.to(x.dtype))))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < TOLERANCE[dtype]

    written = []
    rows = torch.tensor([130, 5, 64, 63, 0, 191, 77], device=DEVICE)
    for backend, x in (("triton", wide), ("reference", wide.double())):
        q, k, v = x.clone().split([heads, groups, groups], 1)
        pools = [torch.full((groups, 3, 64, head_dim), 7.0, dtype=x.dtype, device=DEVICE) for _ in range(2)]
        q = rotate_append(q, k, v, angles.cos(), angles.sin(), *pools, rows, backend)
        written.append((q, *pools))
    for actual, expected in zip(*written, strict=True):
        assert relative_error(actual, expected) < TOLERANCE[dtype]
        assert torch.equal(actual == 7, expected == 7)
