"""Training of the experts and the router in Triton: gradients against the formula's in float64."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")

from minimax_m1.kernels.exchange import expert_mlp_exchanged
from minimax_m1.kernels.experts import count_choices, expert_mlp_reference, route
from minimax_m1.kernels.experts_backward_triton import ExpertMLP, Route
from minimax_m1.model import Routing, load_balancing_loss
from minimax_m1.training.loss import expert_counts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
NAMES = ("x", "w13", "w2", "expert_weights")


def make_inputs(tokens, top_k, dtype, hidden=36, width=22, num_experts=3, choice=None, weight_dtype=None):
    """Return x, w13, w2, expert weights, ids; `choice` are the experts that tokens may go to."""
    generator = torch.Generator().manual_seed(tokens + top_k)
    x = torch.randn(tokens, hidden, generator=generator)
    w13 = torch.randn(num_experts, 2 * width, hidden, generator=generator) * 0.2
    w2 = torch.randn(num_experts, hidden, width, generator=generator) * 0.2
    scores = torch.rand(tokens, num_experts, generator=generator)
    if choice is not None:
        scores[:, [e for e in range(num_experts) if e not in choice]] = -1
    weights, ids = scores.topk(top_k)
    weight_dtype = weight_dtype or dtype
    tensors = x.to(dtype), w13.to(weight_dtype), w2.to(weight_dtype), weights
    return [t.to(DEVICE).requires_grad_() for t in tensors], ids.to(DEVICE)


def gradients(run, tensors, ids, grad_y):
    x, w13, w2, weights = tensors
    y = run(x, w13, w2, ids, weights)
    return y, torch.autograd.grad(y, [t for t in tensors if t.requires_grad], grad_y.to(y.dtype))


def compare(tensors, ids, dtype):
    """Compare outputs and gradients with those of the formula in float64, of the same inputs."""
    grad_y = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    y, grads = gradients(ExpertMLP.apply, tensors, ids, grad_y)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    expected_y, expected = gradients(expert_mlp_reference, wide, ids, grad_y)
    names = [name for name, t in zip(NAMES, tensors, strict=True) if t.requires_grad]
    for name, a, b in zip(("y", *names), (y, *grads), (expected_y, *expected), strict=True):
        assert error(a, b) < TOLERANCE[dtype], name
    for t, grad in zip([t for t in tensors if t.requires_grad], grads, strict=True):
        assert grad.dtype == t.dtype
    return grads


def error(actual, expected):
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    scale = float(expected.detach().norm())
    return float((actual.double() - expected).detach().norm()) / (scale or 1.0)


@pytest.mark.parametrize("tokens", [1, 64, 65, pytest.param(257, marks=pytest.mark.slow)])
def test_gradients_of_a_tile_of_rows_and_one_more(tokens):
    compare(*make_inputs(tokens, 1, torch.bfloat16, num_experts=2, choice=(1,)), torch.bfloat16)


@pytest.mark.parametrize(("dtype", "top_k"), [(torch.bfloat16, 3), (torch.float16, 2), (torch.float32, 2)])
def test_gradients_of_every_dtype(dtype, top_k):
    compare(*make_inputs(9, top_k, dtype), dtype)


@pytest.mark.parametrize(("hidden", "width"), [pytest.param(256, 256, marks=pytest.mark.slow), (80, 272)])
def test_gradients_in_large_tiles(hidden, width):
    inputs = make_inputs(5, 1, torch.bfloat16, hidden=hidden, width=width, num_experts=2)
    compare(*inputs, torch.bfloat16)


@pytest.mark.parametrize("choice", [(0,), (1, 3)])
def test_an_expert_without_rows_has_gradients_of_zero(choice):
    tensors, ids = make_inputs(5, 1, torch.bfloat16, num_experts=5, choice=choice)
    _, grad_w13, grad_w2, _ = compare(tensors, ids, torch.bfloat16)
    for e in {0, 1, 2, 3, 4} - set(choice):
        assert not grad_w13[e].any() and not grad_w2[e].any()


@pytest.mark.parametrize("trained", [("w13",), ("w2",), ("expert_weights",), ("x", "expert_weights")])
def test_what_is_frozen_is_spared(trained, monkeypatch):
    """Each gradient alone is what it is among the others, and no product is taken for what nobody asked for."""
    from minimax_m1.kernels import experts_backward_triton as module

    tensors, ids = make_inputs(2, 2, torch.bfloat16)
    for name, t in zip(NAMES, tensors, strict=True):
        t.requires_grad_(name in trained)
    calls = []

    def counted(run):
        def counting(*args, **options):
            calls.append(run)
            return run(*args, **options)

        return counting

    for name in ("weight_grads", "row_grads"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    compare(tensors, ids, torch.bfloat16)
    assert len(calls) == len({"x", "w13", "w2"} & set(trained))


def test_weights_of_another_dtype_get_gradients_of_their_own():
    compare(*make_inputs(2, 2, torch.bfloat16, weight_dtype=torch.float32), torch.bfloat16)


def test_inputs_of_any_strides():
    (x, w13, w2, weights), ids = make_inputs(3, 2, torch.bfloat16)
    wide = torch.randn(3, 72).to(DEVICE, torch.bfloat16)
    columns = [t.detach().mT.contiguous().mT.requires_grad_() for t in (w13, w2, weights)]
    ids = ids.T.contiguous().T
    compare([wide[:, ::2].requires_grad_(), *columns], ids, torch.bfloat16)
    y = ExpertMLP.apply(x, w13, w2, ids, weights)
    ones = torch.autograd.grad(y, x, torch.ones_like(y).contiguous(), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], ones)  # the sum's gradient has strides of 0


def test_the_same_inputs_give_the_same_bits():
    tensors, ids = make_inputs(9, 2, torch.bfloat16, num_experts=2)
    grad_y = torch.randn(9, 36).to(DEVICE)
    (y, first), (again, second) = (gradients(ExpertMLP.apply, tensors, ids, grad_y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((y, *first), (again, *second), strict=True))


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 1, 1), (1, 5, 2), (33, 32, 3), (9, 4, 4)])
def test_gradients_of_the_router(tokens, num_experts, top_k):
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, num_experts, generator=generator).to(DEVICE).requires_grad_()
    grad_weights = torch.randn(tokens, top_k, generator=generator).to(DEVICE)
    row = torch.randn(num_experts, generator=generator).to(DEVICE)  # the balance loss's, expanded: stride 0
    results = []
    for run, inputs in ((Route.apply, logits), (route, logits.detach().double().requires_grad_())):
        probs, expert_ids, weights = run(inputs, top_k)
        assert not expert_ids.requires_grad
        loss = (probs.mean(0) * row).sum() + (weights * grad_weights).sum()
        results.append((probs, expert_ids, weights, torch.autograd.grad(loss, inputs)[0]))
    (probs, expert_ids, weights, grad), (probs64, ids64, weights64, grad64) = results
    assert torch.equal(expert_ids, ids64)
    for a, b in ((probs, probs64), (weights, weights64), (grad, grad64)):
        assert error(a, b) < 1e-5 or float((a - b).abs().max()) < 1e-6  # K = E = 1 has gradients of zero


def test_the_router_trains_through_its_weights_alone():
    logits = torch.randn(20, 6).to(DEVICE).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    grad = torch.autograd.grad(Route.apply(logits, 2)[2][:, 0].sum(), logits)[0]
    assert error(grad, torch.autograd.grad(route(wide, 2)[2][:, 0].sum(), wide)[0]) < 1e-5


def test_choices_are_counted_without_asking_for_a_value():
    expert_ids = torch.randint(5, (40, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(count_choices(expert_ids, 7), torch.bincount(expert_ids.flatten(), minlength=7))
    meta = Routing(*(torch.empty(40, n, device="meta", dtype=d) for n, d in ((7, None), (2, torch.int64), (2, None))))
    assert load_balancing_loss([meta, meta]).shape == ()  # the meta device has no values: asking for one fails
    assert expert_counts([meta, meta]).shape == (2, 7)


def test_experts_on_ranks_run_with_these_kernels():
    """One rank here: every row goes to itself, with one choice, and the weights act behind the exchange."""
    tensors, ids = make_inputs(3, 2, torch.float32)
    grad_y = torch.randn(3, 36).to(DEVICE)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        y, grads = gradients(
            lambda x, w13, w2, ids, weights: expert_mlp_exchanged(x, w13, w2, ids, weights, dist.group.WORLD, "triton"),
            tensors,
            ids,
            grad_y,
        )
    finally:
        dist.destroy_process_group()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected_y, expected = gradients(expert_mlp_reference, wide, ids, grad_y)
    for a, b in zip((y, *grads), (expected_y, *expected), strict=True):
        assert error(a, b) < TOLERANCE[torch.float32]
