"""The head's losses with Triton's softmax, and products of 16 bits summed in float32, against float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from minimax_m1.kernels.cross_entropy import linear_cross_entropy, linear_logprobs
from minimax_m1.kernels.linear import float32_linear, parts_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, V = 32, 5000  # two blocks, the second not full
Z_LOSS = 0.01
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]


def inputs(hidden_dtype, weight_dtype, tokens=7, vocabulary=V, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(tokens, D, generator=generator)
    weight = torch.randn(vocabulary, D, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    hidden, weight = hidden.to(DEVICE, hidden_dtype), weight.to(DEVICE, weight_dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(DEVICE)


def widened(hidden, weight):
    return [x.detach().double().requires_grad_() for x in (hidden, weight)]


def assert_near(actual, expected, tolerance=1e-5):
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach())
    assert difference <= tolerance * torch.linalg.vector_norm(expected.detach())


def assert_gradients_near(tensors, wide):
    for tensor, expected in zip(tensors, wide, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert_near(tensor.grad, expected.grad, 1e-5 if tensors[0].dtype == tensor.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("dtypes", "chunk"), list(zip(DTYPES, (3, 3, None, None), strict=True)))
def test_cross_entropy(dtypes, chunk):
    hidden, weight, targets = inputs(*dtypes)
    results = linear_cross_entropy(hidden, weight, targets, Z_LOSS, chunk, backend="triton")
    (-0.3 * results[0]).backward()
    wide = widened(hidden, weight)
    logits = wide[0] @ wide[1].T
    cross_entropy, squares = F.cross_entropy(logits, targets, reduction="sum"), logits.logsumexp(1).square().sum()
    (-0.3 * (cross_entropy + Z_LOSS * squares)).backward()
    hits = (logits.argmax(1) == targets).sum().double()
    for result, expected in zip(results, (cross_entropy + Z_LOSS * squares, cross_entropy, squares, hits), strict=True):
        assert result.dtype == torch.float32
        assert_near(result, expected)
    assert_gradients_near((hidden, weight), wide)


@pytest.mark.parametrize(("dtypes", "chunk"), list(zip(DTYPES, (None, None, 3, 3), strict=True)))
def test_logprobs(dtypes, chunk):
    hidden, weight, targets = inputs(*dtypes, scale=0.3)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, chunk, backend="triton")
    coming = torch.linspace(-1, 2, 7, device=DEVICE)
    logprobs.backward(coming)
    wide = widened(hidden, weight)
    expected = torch.log_softmax(wide[0] @ wide[1].T, 1)
    picked = expected.gather(1, targets[:, None])[:, 0]
    picked.backward(coming.double())
    assert_near(logprobs, picked)
    assert_near(entropy, -(expected.exp() * expected).sum(1))
    assert not entropy.requires_grad
    assert_gradients_near((hidden, weight), wide)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_one_of_the_two_is_learned(frozen):
    tensors = inputs(torch.bfloat16, torch.bfloat16, tokens=2, vocabulary=64)
    tensors[frozen].requires_grad_(False)
    wide = widened(*tensors[:2])
    linear_logprobs(*tensors, backend="triton")[0].sum().backward()
    F.cross_entropy(wide[0] @ wide[1].T, tensors[2], reduction="sum").backward()
    assert tensors[frozen].grad is None
    assert_near(tensors[1 - frozen].grad, -wide[1 - frozen].grad, 1e-2)


def test_no_tokens_are_no_loss_but_still_part_of_the_graph():
    hidden, weight, targets = inputs(torch.bfloat16, torch.float32, tokens=0, vocabulary=64)
    results = linear_cross_entropy(hidden, weight, targets, Z_LOSS, backend="triton")
    results[0].backward()
    assert [result.item() for result in results] == [0, 0, 0, 0]
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_extreme_logits_stay_finite():
    hidden, weight = torch.zeros(2, D, device=DEVICE), torch.zeros(70, D, device=DEVICE)
    hidden[:, 0] = torch.tensor([1e4, -1e4])
    weight[::2, 0], weight[1::2, 0] = 1.0, -1.0  # each token finds half of its logits at 10^4, the others at -10^4
    targets = torch.tensor([0, 0], device=DEVICE)  # the most and the least probable
    logprobs, entropy = linear_logprobs(hidden, weight, targets, backend="triton")
    expected = torch.log_softmax((hidden @ weight.T).double(), 1)
    assert_near(logprobs, expected.gather(1, targets[:, None])[:, 0], 1e-6)
    assert_near(entropy, torch.full((2,), 35.0, dtype=torch.float64, device=DEVICE).log())
    *_, hits = linear_cross_entropy(hidden, weight, targets, backend="triton")
    assert hits == 1


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_router_has_float32_logits_of_bfloat16_rows(weight_dtype):
    hidden, weight, _ = inputs(torch.bfloat16, weight_dtype, vocabulary=32)
    logits = float32_linear(hidden, weight, "triton")
    wide = widened(hidden, weight)
    expected = wide[0] @ wide[1].T
    assert logits.dtype == torch.float32
    assert_near(logits, expected)
    coming = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits.backward(coming)
    expected.backward(coming.double())
    assert_gradients_near((hidden, weight), wide)


def test_two_parts_are_nearly_a_float32():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first, second = parts_of(weight, torch.bfloat16)
    assert first.dtype == second.dtype == torch.bfloat16
    assert ((first.double() + second.double() - weight).abs() <= weight.abs() * 2**-17).all()
    assert len(parts_of(weight, torch.float32)) == len(parts_of(first, torch.bfloat16)) == 1
