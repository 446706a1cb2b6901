"""The experts in Triton against the formula in float64: routing, sorting, products with float and quantized weights."""

import pytest
import torch

pytest.importorskip("triton")

from minimax_m1.errors import UserError
from minimax_m1.kernels import experts_triton
from minimax_m1.kernels.experts import expert_mlp, route
from minimax_m1.kernels.quantized import QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERROR = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def draw_quantized(*shape, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    most = 127 if group_size is None else 7
    values = torch.randint(-most - 1, most + 1, shape, generator=generator).to(torch.int8)
    groups = 1 if group_size is None else -(-shape[-1] // group_size)
    scales = (torch.rand(*shape[:-1], groups, generator=generator) + 0.5) * (0.3 / most)
    return QuantizedWeight.pack(values.to(DEVICE), scales.to(DEVICE), group_size)


def draw_choice(tokens, top_k, num_experts, seed=1):
    """Ids and weights [T, K], some weights 0."""
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    weights, ids = scores.topk(top_k)
    weights[1::3, 0] = 0
    return ids.to(DEVICE), weights.to(DEVICE)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tokens", [1, 3, 257])
@pytest.mark.parametrize(("num_experts", "top_k"), [(32, 2), (5, 3), (1, 1)])
def test_route(tokens, num_experts, top_k):
    logits = draw(tokens, num_experts)
    probs, ids, weights = route(logits, top_k, "triton")
    expected_probs, expected_ids, expected_weights = route(logits.double(), top_k, "reference")
    assert torch.equal(ids, expected_ids)
    assert error(probs, expected_probs) < 1e-6
    assert error(weights, expected_weights) < 1e-6


def test_route_of_numbers_that_do_not_exist_chooses_experts_that_do():
    _, ids, _ = route(torch.full((3, 5), torch.nan, device=DEVICE), 2, "triton")
    assert ((ids >= 0) & (ids < 5)).all()


@pytest.mark.parametrize("pairs", [(1, 2), (65, 3), (600, 2)])
@pytest.mark.parametrize("weighted", [True, False])
def test_sort_rows(pairs, weighted):
    num_experts = 7
    ids, weights = draw_choice(*pairs, num_experts)
    order, offsets = experts_triton.sort_rows(ids, weights if weighted else None, num_experts)
    keys = ids.flatten().masked_fill(weights.flatten() == 0, num_experts) if weighted else ids.flatten()
    assert torch.equal(order.long(), torch.argsort(keys, stable=True))
    assert offsets.tolist() == [int((keys < e).sum()) for e in range(num_experts + 1)]


@pytest.mark.parametrize(
    ("tokens", "group_size", "dtype"),
    [
        *((1, "float", dtype) for dtype in ERROR),
        *((9, "float", dtype) for dtype in ERROR),
        (1, None, torch.bfloat16),
        (2, 32, torch.bfloat16),
        (2, None, torch.float32),
        (2, 64, torch.float16),
        pytest.param(2, 32, torch.float32, marks=pytest.mark.slow),
        pytest.param(65, None, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(257, "float", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_experts(tokens, group_size, dtype):
    """Sizes that divide nothing; few pairs are gathered, more are sorted."""
    num_experts, hidden, width = 8 if tokens == 1 else 3, 70, 37
    x = draw(tokens, 2 * hidden, dtype=dtype)[:, :hidden]  # rows of a wider tensor
    ids, weights = draw_choice(tokens, 2, num_experts)
    if group_size == "float":
        w13 = draw(num_experts, 2 * width, hidden, dtype=dtype, scale=0.2)
        w2 = draw(num_experts, hidden, width, dtype=dtype, scale=0.2, seed=1)
        wide = w13.double(), w2.double()
    else:
        w13 = draw_quantized(num_experts, 2, width, hidden, group_size=group_size)
        w2 = draw_quantized(num_experts, hidden, width, group_size=group_size, seed=1)
        wide = (w.dequantize(torch.float64).view(num_experts, -1, w.size_in) for w in (w13, w2))
    y = expert_mlp(x, w13, w2, ids, weights, backend="triton")
    assert y.dtype == dtype
    assert error(y, expert_mlp(x.double(), *wide, ids, weights.double(), backend="reference")) < ERROR[dtype]


@pytest.mark.parametrize("group_size", ["float", None, 128])
def test_sizes_that_are_whole_tiles(group_size):
    num_experts, hidden, width = 4, 256, 128
    x, (ids, weights) = draw(2, hidden, dtype=torch.bfloat16), draw_choice(2, 2, num_experts)
    if group_size == "float":  # weights in another dtype than x
        w13 = draw(num_experts, 2 * width, hidden, scale=0.1)
        w2 = draw(num_experts, hidden, width, scale=0.1)
        wide = w13.bfloat16().double(), w2.bfloat16().double()
    else:
        w13 = draw_quantized(num_experts, 2, width, hidden, group_size=group_size)
        w2 = draw_quantized(num_experts, hidden, width, group_size=group_size)
        wide = (w.dequantize(torch.float64).view(num_experts, -1, w.size_in) for w in (w13, w2))
    y = expert_mlp(x, w13, w2, ids, weights, backend="triton")
    assert error(y, expert_mlp(x.double(), *wide, ids, weights.double(), backend="reference")) < 1e-2


def test_many_rows_of_one_expert():
    """All tokens through two experts of many: more tiles of an expert than it has on average, and none of others."""
    x = draw(33, 64, dtype=torch.bfloat16)
    w13, w2 = draw(16, 96, 64, dtype=torch.bfloat16, scale=0.2), draw(16, 64, 48, dtype=torch.bfloat16, scale=0.2)
    ids = torch.tensor([3, 15], device=DEVICE).expand(33, 2)
    weights = draw(33, 2)
    y = expert_mlp(x, w13, w2, ids, weights, backend="triton")
    expected = expert_mlp(*(t.double() for t in (x, w13, w2)), ids, weights.double(), backend="reference")
    assert error(y, expected) < 1e-2


def test_kept_products():
    """What the backward pass needs: the gates and ups of sorted rows, in the dtype of x."""
    x, w13 = draw(33, 36, dtype=torch.bfloat16), draw(5, 44, 36, dtype=torch.bfloat16, scale=0.2)
    ids, _ = draw_choice(33, 2, 5)
    order, offsets = experts_triton.sort_rows(ids, None, 5)
    a, h = experts_triton.up_product(x, w13, order, offsets, 2, keep=True)
    rows, experts = x.double()[order.long() // 2], ids.flatten()[order.long()]
    expected = torch.einsum("rd,rnd->rn", rows, w13.double()[experts])
    gate, up = expected.chunk(2, -1)
    assert error(h, expected) < 1e-2
    assert error(a, torch.nn.functional.silu(gate) * up) < 1e-2


def test_no_rows_and_no_gradient_through_quantized_weights():
    w13, w2 = draw_quantized(4, 2, 8, 16, group_size=None), draw_quantized(4, 16, 8, group_size=None)
    ids, weights = draw_choice(0, 2, 4)
    assert expert_mlp(draw(0, 16), w13, w2, ids, weights, backend="triton").shape == (0, 16)
    ids, weights = draw_choice(2, 2, 4)
    with pytest.raises(UserError, match="cannot be trained"):
        expert_mlp(draw(2, 16).requires_grad_(), w13, w2, ids, weights, backend="triton")
