"""The compiled kernels of the cache against the formulas in float64, and what must not change a bit of the result."""

import math

import pytest
import torch

from minimax_m1.kernels import compiled
from minimax_m1.kernels.attention import attend_reference
from minimax_m1.kernels.lightning import lightning_attention_reference, lightning_slopes
from tests.tolerances import KERNEL, relative_error

pytestmark = pytest.mark.skipif(not compiled.library, reason="the compiled kernels were not built here")

LENGTHS = (1, 2, 63, 64, 65, 130, 257, 600)
TOLERANCE = KERNEL[torch.float32]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Cache:
    """Sequences of `lens` tokens in pages taken in random order; NaN wherever there is no token."""

    def __init__(self, lens, groups, head_dim, seed=0):
        most = max(-(-n // 64) for n in lens)
        count = sum(-(-n // 64) for n in lens) + 3
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self.lens = list(lens)
        self.slots = torch.arange(len(lens)).flip(0)
        self.block_tables = torch.full((len(lens), most), count - 1, dtype=torch.int32)
        self.k = [draw(n, groups, head_dim, seed=seed + 100 + i) for i, n in enumerate(lens)]
        self.v = [draw(n, groups, head_dim, seed=seed + 200 + i) for i, n in enumerate(lens)]
        self.keys, self.values = (torch.full((groups, count, 64, head_dim), math.nan) for _ in range(2))
        for i, n in enumerate(lens):
            for j in range(-(-n // 64)):
                page = order.pop()
                self.block_tables[self.slots[i], j] = page
                rows = slice(64 * j, min(n, 64 * j + 64))
                for pool, new in ((self.keys, self.k[i]), (self.values, self.v[i])):
                    pool[:, page, : rows.stop - rows.start] = new[rows].transpose(0, 1)

    def run(self, function, q, which, window, upto=None):
        """Attend from the last rows of sequences `which`, q[i] those of each, after `upto` tokens (None: all)."""
        lens = [self.lens[i] for i in which] if upto is None else upto
        bounds = torch.tensor([0, *torch.tensor([len(x) for x in q]).cumsum(0)], dtype=torch.int32)
        pools = self.keys, self.values, self.slots[which], self.block_tables
        return function(torch.cat(q), *pools, bounds, torch.tensor(lens), window).split([len(x) for x in q])

    def expected(self, q, i, window):
        k, v = (x[i].double().transpose(0, 1) for x in (self.k, self.v))
        return attend_reference(q.double(), k, v, window)


SHAPES = [(2, 2, 16), (4, 2, 32), (8, 2, 64), (10, 1, 128), (6, 2, 24), (3, 1, 7)]


@pytest.mark.parametrize("window", [None, 1, 100, 500])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHAPES)
def test_prefill_is_the_formula(heads, groups, head_dim, window):
    """Whole prompts and chunks behind a past, packed; the same bits alone."""
    cache = Cache(LENGTHS, groups, head_dim)
    new = [n if i % 2 else max(1, n // 3) for i, n in enumerate(LENGTHS)]
    q = [3 * draw(n, heads, head_dim, seed=i) for i, n in enumerate(new)]
    actual = cache.run(compiled.attention_prefill, q, range(len(LENGTHS)), window)
    for i in range(len(LENGTHS)):
        assert relative_error(actual[i], cache.expected(q[i], i, window)) < TOLERANCE
        alone = cache.run(compiled.attention_prefill, [q[i]], [i], window)[0]
        assert torch.equal(alone, actual[i])


@pytest.mark.parametrize("window", [None, 1, 100, 513])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHAPES)
def test_decode_is_the_formula(heads, groups, head_dim, window):
    """One row and several rows a sequence; each row has the bits that it has alone."""
    lens = (*LENGTHS, 511, 512, 513, 1500)
    cache = Cache(lens, groups, head_dim)
    new = [min(n, 1 + 3 * (i % 3)) for i, n in enumerate(lens)]
    q = [3 * draw(n, heads, head_dim, seed=i) for i, n in enumerate(new)]
    actual = cache.run(compiled.attention_decode, q, range(len(lens)), window)
    for i, n in enumerate(lens):
        assert relative_error(actual[i], cache.expected(q[i], i, window)) < TOLERANCE
        for r in range(new[i]):
            upto = [n - new[i] + r + 1]
            alone = cache.run(compiled.attention_decode, [q[i][r : r + 1]], [i], window, upto)[0]
            assert torch.equal(alone[0], actual[i][r])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHAPES)
def test_prefill_in_chunks_and_with_other_threads_has_the_same_bits(heads, groups, head_dim, window):
    cache = Cache([600], groups, head_dim)
    q = draw(600, heads, head_dim, seed=1)
    whole = cache.run(compiled.attention_prefill, [q], [0], window)[0]
    for size in (64, 192, 256):
        parts = [
            cache.run(compiled.attention_prefill, [x], [0], window, [min(600, start + size)])[0]
            for start, x in zip(range(0, 600, size), q.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    threads = torch.get_num_threads()
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(cache.run(compiled.attention_prefill, [q], [0], window)[0], whole)
            one = cache.run(compiled.attention_decode, [q[-3:]], [0], window)[0]
            assert relative_error(one, whole[-3:]) < TOLERANCE
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("function", [compiled.attention_decode, compiled.attention_prefill])
def test_attention_of_scores_far_apart(function):
    """Weights from 1 to e^-1000 and a maximum that rises from page to page."""
    cache = Cache([600], 1, 32)
    cache.keys *= torch.linspace(1, 40, cache.keys.shape[1])[:, None, None]
    q = 4 * draw(3, 2, 32, seed=1)
    pages = cache.block_tables[0]
    k, v = (x[:, pages].flatten(1, 2)[:, :600].double() for x in (cache.keys, cache.values))
    actual = cache.run(function, [q], [0], None)[0]
    assert relative_error(actual, attend_reference(q.double(), k, v, None)) < 1e-4  # scores reach 1000: 6e-8 of them
    q[1] = math.nan
    spoilt = cache.run(function, [q], [0], None)[0]
    assert spoilt[1].isnan().all() and torch.equal(spoilt[::2], actual[::2])


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 16), (4, 32), (2, 64), (1, 128), (3, 24), (2, 7)])
def test_lightning_prefill_is_the_recurrence(heads, head_dim):
    """Packed prompts, states in shuffled slots; cut at multiples of 64 and alone: the same bits."""
    lengths = (*LENGTHS, 0)
    slots = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    qkv = draw(sum(lengths), heads, 3 * head_dim, seed=1)
    q, k, v = qkv.chunk(3, -1)
    states = draw(len(lengths) + 2, heads, head_dim, head_dim, seed=2)
    slope = lightning_slopes(heads, 1, 5)
    expected, final = lightning_attention_reference(
        *(x.double() for x in (q, k, v)), slope, cu_seqlens=bounds, initial_state=states[slots].double()
    )
    pool = states.clone()
    actual = compiled.lightning_prefill(q, k, v, slope, pool, slots, bounds)
    assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(pool[slots], final) < TOLERANCE
    assert torch.equal(pool[len(lengths) :], states[len(lengths) :])
    for i, n in enumerate(lengths):
        again, start = states.clone(), int(bounds[i])
        for at in range(start, start + n, 64):
            part = slice(at, min(at + 64, start + n))
            cut = torch.tensor([at, part.stop], dtype=torch.int32)  # as a slice of a batch's bounds
            o = compiled.lightning_prefill(q[part], k[part], v[part], slope, again, slots[i : i + 1], cut)
            assert torch.equal(o, actual[part])
        assert torch.equal(again[slots[i]], pool[slots[i]])


@pytest.mark.parametrize("slope", [0.0, 1.5, 40.0])
def test_lightning_prefill_of_extreme_decay(slope):
    q, k, v = (draw(130, 1, 16, seed=i) for i in range(3))
    bounds, slopes, pool = torch.tensor([0, 130], dtype=torch.int32), torch.tensor([slope]), torch.zeros(1, 1, 16, 16)
    wide = (x.double() for x in (q, k, v))
    expected, final = lightning_attention_reference(*wide, slopes, cu_seqlens=bounds)
    actual = compiled.lightning_prefill(q, k, v, slopes, pool, torch.tensor([0]), bounds)
    assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(pool, final) < TOLERANCE


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 16), (4, 32), (2, 64), (1, 128), (3, 24), (2, 7)])
def test_lightning_decode_of_several_rows_is_as_many_steps(heads, head_dim):
    lengths, slots = (1, 5, 16, 2), torch.tensor([3, 0, 4, 1])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q, k, v = draw(sum(lengths), heads, 3 * head_dim, seed=1).chunk(3, -1)
    states, slope = draw(5, heads, head_dim, head_dim, seed=2), lightning_slopes(heads, 1, 5)
    pool = states.clone()
    actual = compiled.lightning_decode(q, k, v, slope, pool, slots, bounds)
    expected, final = lightning_attention_reference(
        *(x.double() for x in (q, k, v)), slope, cu_seqlens=bounds, initial_state=states[slots].double()
    )
    assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(pool[slots], final) < TOLERANCE
    assert torch.equal(pool[2], states[2])
    for i, n in enumerate(lengths):
        for row in range(int(bounds[i]), int(bounds[i]) + n):
            one = (x[row : row + 1] for x in (q, k, v))
            assert torch.equal(compiled.lightning_decode(*one, slope, states, slots[i : i + 1])[0], actual[row])
    assert torch.equal(pool, states)
