"""The Triton kernels of RMSNorm, forward and backward, against the formula in float64."""

import pytest
import torch

pytest.importorskip("triton")

from minimax_m1.kernels.linear import add_rms_norm, add_scaled, rms_norm, silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}


def draw(*shape, seed, dtype, scale=1.0):
    numbers = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype).requires_grad_()


def assert_near(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    difference = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    assert difference < TOLERANCE[dtype]


def formula(h, weight, gate):
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight
    return y if gate is None else y * torch.sigmoid(gate)


def assert_same_as_the_formula(function, expected_function, inputs):
    """Compare the result and the gradients of all inputs."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = function(*inputs), expected_function(*wide)
    dtype = inputs[0].dtype
    assert_near(y.detach(), expected.detach(), dtype)
    coming = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    y.backward(coming)
    expected.backward(coming.double())
    for x, x_expected in zip(inputs, wide, strict=True):
        assert_near(x.grad, x_expected.grad, x.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "size", "gated"), [(1, 64, True), (5, 1000, False), (3, 1000, True), (2, 6144, False), (9, 5, True)]
)
def test_norm(dtype, gated, rows, size):
    inputs = [draw(rows, size, seed=1, dtype=dtype, scale=3.0), draw(size, seed=2, dtype=dtype)]
    inputs += [draw(rows, size, seed=3, dtype=dtype, scale=4.0)] if gated else []
    assert_same_as_the_formula(
        lambda x, weight, gate=None: rms_norm(x, weight, EPS, "triton", gate),
        lambda x, weight, gate=None: formula(x, weight, gate),
        inputs,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size", "beta"), [(1, 64, 0.7), (4, 1000, 1.0)])
def test_norm_of_a_sum(dtype, beta, rows, size):
    inputs = [draw(rows, size, seed=seed, dtype=dtype) for seed in (1, 2)] + [draw(size, seed=3, dtype=dtype)]
    assert_same_as_the_formula(
        lambda residual, branch, weight: add_rms_norm(residual, 3.5, branch, beta, weight, EPS, "triton"),
        lambda residual, branch, weight: formula(3.5 * residual + beta * branch, weight, None),
        inputs,
    )


def test_more_rows_than_programs(monkeypatch):
    from minimax_m1.kernels import rowwise_triton

    monkeypatch.setattr(rowwise_triton, "PROGRAMS", 2)
    inputs = [draw(5, 8192, seed=1, dtype=torch.float32), draw(8192, seed=2, dtype=torch.float32)]
    assert_same_as_the_formula(
        lambda x, weight: rms_norm(x, weight, EPS, "triton"), lambda x, weight: formula(x, weight, None), inputs
    )


@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_rounding_is_that_of_the_plain_formula(beta):
    """To the last bit but where float32's own last bit decides."""
    x, branch = (draw(7, 512, seed=seed, dtype=torch.bfloat16).detach() for seed in (1, 2))
    weight = draw(512, seed=3, dtype=torch.float32).detach()  # used in the dtype of x
    y = add_rms_norm(x, 3.5, branch, beta, weight, EPS, "triton")
    expected = rms_norm(add_scaled(x, 3.5, branch, beta), weight, EPS, "torch")
    assert (y != expected).float().mean() < 2e-3


def test_rows_that_are_not_contiguous():
    whole = draw(6, 3 * 64, seed=1, dtype=torch.float32).detach()
    weight = draw(64, seed=2, dtype=torch.float32).detach()
    views = [part.requires_grad_() for part in whole.chunk(3, dim=1)]
    y = add_rms_norm(views[0], 2.0, views[1], 1.0, weight, EPS, "triton")
    assert_near(y.detach(), formula((2.0 * views[0] + views[1]).double(), weight.double(), None).detach(), y.dtype)
    gated = rms_norm(views[0], weight, EPS, "triton", views[2])
    gated.sum().backward()
    wide = [view.detach().double().requires_grad_() for view in views]
    expected = formula(wide[0], weight.double(), wide[2])
    expected.sum().backward()
    assert_near(gated.detach(), expected.detach(), gated.dtype)
    assert_near(views[0].grad, wide[0].grad, y.dtype)
    assert_near(views[2].grad, wide[2].grad, y.dtype)
    columns = whole.t().contiguous().t()  # a column is contiguous, a row is not
    assert_near(
        rms_norm(columns, torch.ones(192, device=DEVICE), EPS, "triton"), formula(whole.double(), 1.0, None), y.dtype
    )


def test_no_rows():
    x, weight = draw(0, 64, seed=1, dtype=torch.float32), draw(64, seed=2, dtype=torch.float32)
    y = rms_norm(x, weight, EPS, "triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_silu_is_in_place_only_in_inference():
    x = draw(3, 64, seed=1, dtype=torch.float32).detach()
    expected = torch.nn.functional.silu(x)
    kept = x.clone()
    assert torch.equal(silu(x, "triton"), expected) and torch.equal(x, kept)
    with torch.no_grad():
        assert silu(x, "triton").data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)
