"""Every lightning backend against the plain recurrence in float64, forward and backward."""

import math

import pytest
import torch

from minimax_m1.kernels import compiled
from minimax_m1.kernels.lightning import lightning_attention, lightning_decode, lightning_slopes
from minimax_m1.kernels.lightning_torch import BLOCK
from tests.tolerances import KERNEL, relative_error

LENGTHS = [[1], [2], [63], [64], [65], [257], [65, 1, 130, 64, 2], [3, 0, 5], [1, 1, 1]]
BACKENDS = ["torch", pytest.param("compiled", marks=pytest.mark.skipif(not compiled.library, reason="not built here"))]


def make_inputs(lengths, dtype, initial, heads=3, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total = sum(lengths)
    q, k, v = (draw(total, heads, head_dim) for _ in range(3))
    state = draw(len(lengths), heads, head_dim, head_dim) if initial else None
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return q, k, v, state, cu_seqlens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_forward_and_backward(backend, dtype, initial, lengths):
    q, k, v, state, cu_seqlens = make_inputs(lengths, dtype, initial)
    slope = lightning_slopes(3, 1, 5)
    results = []
    for name, wide in (("reference", torch.float64), (backend, None)):
        inputs = [x.to(wide or x.dtype, copy=True).requires_grad_() for x in (q, k, v, state) if x is not None]
        kwargs = {"initial_state": inputs[3]} if initial else {}
        o, final = lightning_attention(*inputs[:3], slope, cu_seqlens=cu_seqlens, backend=name, **kwargs)
        weights = torch.Generator().manual_seed(1)
        loss = (o.double() * torch.randn(o.shape, generator=weights, dtype=torch.float64)).sum()
        loss = loss + (final.double() * torch.randn(final.shape, generator=weights, dtype=torch.float64)).sum()
        results.append([o, final, *torch.autograd.grad(loss, inputs)])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < KERNEL[dtype]


def test_packed_is_separate_and_the_initial_state_is_not_modified():
    lengths = [70, 3, 200]
    q, k, v, state, cu_seqlens = make_inputs(lengths, torch.float64, True)
    slope, before = lightning_slopes(3, 0, 4), state.clone()
    o, final = lightning_attention(q, k, v, slope, cu_seqlens=cu_seqlens, initial_state=state, backend="torch")
    assert torch.equal(state, before)
    for i, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        bounds = torch.tensor([0, b - a], dtype=torch.int32)
        alone, end = lightning_attention(
            q[a:b], k[a:b], v[a:b], slope, cu_seqlens=bounds, initial_state=state[i : i + 1], backend="torch"
        )
        assert relative_error(o[a:b], alone) < 1e-12
        assert relative_error(final[i], end[0]) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_any_split_of_4096_tokens_is_the_whole(seed):
    q, k, v, _, cu_seqlens = make_inputs([4096], torch.float64, False, heads=2, head_dim=8, seed=seed)
    slope = lightning_slopes(2, 0, 4)
    whole, final = lightning_attention(q, k, v, slope, cu_seqlens=cu_seqlens, backend="torch")
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, 4096, (12,), generator=generator).unique().tolist()
    state, parts = None, []
    for a, b in zip([0, *cuts], [*cuts, 4096], strict=True):
        bounds = torch.tensor([0, b - a], dtype=torch.int32)
        part, state = lightning_attention(
            q[a:b], k[a:b], v[a:b], slope, cu_seqlens=bounds, initial_state=state, backend="torch"
        )
        parts.append(part)
    assert relative_error(torch.cat(parts), whole) < KERNEL[torch.float64]
    assert relative_error(state, final) < KERNEL[torch.float64]


@pytest.mark.parametrize("slope", [0.0, 1.5, 40.0])
def test_extreme_decay_neither_overflows_nor_loses_gradients(slope):
    q, k, v, _, cu_seqlens = make_inputs([BLOCK + 7, 5], torch.float32, False)
    results = []
    for backend in ("reference", "torch"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        o, final = lightning_attention(*inputs, torch.full((3,), slope), cu_seqlens=cu_seqlens, backend=backend)
        results.append([o, final, *torch.autograd.grad(o.sum() + final.sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < KERNEL[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [[0], [2, 0, 3], [0, 1, 2, 3]], ids=str)
def test_decode_is_one_step_of_the_recurrence(backend, slots):
    q, k, v, states, _ = make_inputs([1] * 4, torch.float32, True)
    n, slope = len(slots), lightning_slopes(3, 0, 4)
    bounds = torch.arange(n + 1, dtype=torch.int32)
    expected, final = lightning_attention(
        q[:n], k[:n], v[:n], slope, cu_seqlens=bounds, initial_state=states[slots], backend="reference"
    )
    pool = states.clone()
    with torch.no_grad():
        actual = lightning_decode(q[:n], k[:n], v[:n], slope, pool, torch.tensor(slots), backend=backend)
    assert relative_error(actual, expected) < KERNEL[torch.float32]
    assert relative_error(pool[slots], final) < KERNEL[torch.float32]
    untouched = [i for i in range(4) if i not in slots]
    assert torch.equal(pool[untouched], states[untouched])


def test_slopes_follow_the_formula_and_the_alibi_rule():
    factor = 1 - 3 / 9 + 1e-5
    for h, slope in enumerate(lightning_slopes(8, 3, 10).tolist()):
        assert slope == pytest.approx(2 ** (-(h + 1)) * factor, rel=1e-6)
    # 6 heads: the 4 slopes of 4 heads, then every second one of 8
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert lightning_slopes(6, 0, 10).tolist() == pytest.approx([s * (1 + 1e-5) for s in expected], rel=1e-6)
    assert all(s > 0 and math.isfinite(s) for s in lightning_slopes(6, 9, 10).tolist())  # the last layer still decays
