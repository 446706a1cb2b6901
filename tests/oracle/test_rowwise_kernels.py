"""The compiled kernels of single rows against the formulas in float64."""

import pytest
import torch

from minimax_m1.kernels import compiled
from minimax_m1.kernels.rotary import rotate
from tests.tolerances import KERNEL, relative_error

pytestmark = pytest.mark.skipif(not compiled.library, reason="the compiled kernels were not built here")

TOLERANCE = KERNEL[torch.float32]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [5, 64, 1000])
def test_rms_norm(dtype, gated, size):
    x, weight, gate = 3 * draw(7, size, seed=1), draw(size, seed=2).to(dtype), 50 * draw(7, size, seed=3)
    actual = compiled.rms_norm(x, weight, 1e-5, gate if gated else None)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert relative_error(actual, expected * torch.sigmoid(gate.double()) if gated else expected) < TOLERANCE
    one = compiled.rms_norm(x[3:4], weight, 1e-5, gate[3:4] if gated else None)
    assert torch.equal(one[0], actual[3])


@pytest.mark.parametrize(("heads", "groups", "head_dim", "half"), [(4, 2, 32, 8), (6, 2, 20, 10), (3, 1, 7, 2)])
def test_rotate_append(heads, groups, head_dim, half):
    q, k, v = draw(5, heads, head_dim, seed=1), draw(5, groups, head_dim, seed=2), draw(5, groups, head_dim, seed=3)
    angles = draw(5, 1, half, seed=4)
    keys, values = (torch.full((groups, 3, 64, head_dim), float("nan")) for _ in range(2))
    token_rows = torch.tensor([130, 0, 63, 191, 64])
    rotary = angles.cos(), angles.sin()
    wide = tuple(x.double() for x in rotary)
    q_expected, k_expected = rotate(q.double(), *wide), rotate(k.double(), *wide)
    compiled.rotate_append(q, k, v, *rotary, token_rows, keys, values)
    assert relative_error(q, q_expected) < TOLERANCE
    assert relative_error(keys.flatten(1, 2)[:, token_rows], k_expected.transpose(0, 1)) < TOLERANCE
    assert torch.equal(values.flatten(1, 2)[:, token_rows], v.transpose(0, 1))
    for pool in (keys, values):
        pool.flatten(1, 2)[:, token_rows] = float("nan")
        assert pool.isnan().all()


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (32, 2), (5, 5), (1, 1)])
def test_route(experts, top_k):
    logits = 5 * draw(9, experts, seed=1)
    logits[0] = 1.0  # all equal: the lowest ids
    probs, ids, weights = compiled.route(logits, top_k)
    expected = torch.softmax(logits.double(), -1)
    kept, expected_ids = torch.topk(expected, top_k)
    assert relative_error(probs, expected) < TOLERANCE
    assert torch.equal(ids[1:], expected_ids[1:])
    assert ids[0].tolist() == list(range(top_k))
    assert relative_error(weights, kept / kept.sum(-1, keepdim=True)) < TOLERANCE
