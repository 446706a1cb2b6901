"""The head and the cross-entropy in chunks against torch's own in float64, on logits that exist all at once."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minimax_m1.kernels.cross_entropy import CHUNK_BYTES, linear_cross_entropy
from tests.tolerances import KERNEL, relative_error

N, D, V = 37, 16, 50
Z_LOSS = 0.01


def inputs(hidden_dtype=torch.float32, weight_dtype=torch.float32, n=N, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(n, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (n,), generator=generator)
    return hidden.to(hidden_dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_(), targets


def expected(hidden, weight, targets, z_loss=Z_LOSS):
    """The four results and both gradients, in float64 of the same numbers."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight.T
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    squares = logits.logsumexp(1).square().sum()
    loss = cross_entropy + z_loss * squares
    loss.backward()
    hits = logits.gather(1, targets[:, None])[:, 0] == logits.amax(1)
    return (loss, cross_entropy, squares, hits.sum()), (hidden.grad, weight.grad)


def assert_is_expected(hidden, weight, targets, chunk=None, z_loss=Z_LOSS):
    results = linear_cross_entropy(hidden, weight, targets, z_loss, chunk)
    results[0].backward()
    values, grads = expected(hidden, weight, targets, z_loss)
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # of everything but the gradients that come back
    for found, wanted in zip(results, values, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, wanted) < KERNEL[dtype]
    for tensor, wanted in zip((hidden, weight), grads, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad, wanted) < KERNEL[tensor.dtype]


@pytest.mark.parametrize("chunk", [1, 10, 36, N, 100, None])
@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
def test_chunks_are_the_whole(chunk, z_loss):
    assert_is_expected(*inputs(torch.float64, torch.float64), chunk, z_loss)
    assert_is_expected(*inputs(), chunk, z_loss)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_whatever_goes_in(hidden_dtype, weight_dtype):
    assert_is_expected(*inputs(hidden_dtype, weight_dtype), chunk=10)


def test_the_gradient_that_comes_in_scales_those_that_go_out():
    hidden, weight, targets = inputs(torch.float64, torch.float64)
    (-0.3 * linear_cross_entropy(hidden, weight, targets, Z_LOSS, 10)[0]).backward()
    _, grads = expected(hidden, weight, targets)
    assert relative_error(hidden.grad, -0.3 * grads[0]) < KERNEL[torch.float64]
    assert relative_error(weight.grad, -0.3 * grads[1]) < KERNEL[torch.float64]


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_one_of_the_two_is_learned(frozen):
    tensors = list(inputs(torch.float64, torch.float64))
    _, grads = expected(*tensors)
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors, Z_LOSS, 10)[0].backward()
    assert tensors[frozen].grad is None
    assert relative_error(tensors[1 - frozen].grad, grads[1 - frozen]) < KERNEL[torch.float64]


def test_without_gradients_only_the_values_are_made():
    hidden, weight, targets = inputs(torch.float64, torch.float64)
    values, _ = expected(hidden, weight, targets)
    with torch.no_grad():
        results = linear_cross_entropy(hidden, weight, targets, Z_LOSS, 10)
    assert not results[0].requires_grad
    assert all(relative_error(a, b) < KERNEL[torch.float64] for a, b in zip(results, values, strict=True))


def test_no_tokens_are_no_loss_and_no_gradient_but_still_part_of_the_graph():
    hidden, weight, targets = inputs(n=0)
    results = linear_cross_entropy(hidden, weight, targets, Z_LOSS)
    assert [result.item() for result in results] == [0, 0, 0, 0]
    results[0].backward()  # under FSDP every rank has to run its backward pass
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D))


class Poison(TorchDispatchMode):
    """Memory that nothing was written to holds NaN."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        names = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
        return result.fill_(float("nan")) if function._schema.name in names and result.is_floating_point() else result


def test_fresh_memory_may_hold_anything():
    hidden, weight, targets = inputs()
    with Poison():
        assert torch.empty_like(hidden).isnan().all()
        loss = linear_cross_entropy(hidden, weight, targets, Z_LOSS, 10)[0]
    loss.backward()
    _, grads = expected(hidden, weight, targets)
    assert relative_error(hidden.grad, grads[0]) < KERNEL[torch.float32]
    assert relative_error(weight.grad, grads[1]) < KERNEL[torch.float32]


def test_extreme_logits_stay_finite():
    hidden, weight, targets = torch.zeros(4, D), torch.zeros(V, D), torch.tensor([0, 1, 2, 3])
    hidden[:, 0] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    weight[::2, 0], weight[1::2, 0] = 1.0, -1.0  # each token finds half of its logits at 10^4, the others at -10^4
    hidden.requires_grad_(), weight.requires_grad_()
    for wanted, num_hits in ((targets, 4), (targets.flip(0), 0)):  # the most and the least probable
        hidden.grad = weight.grad = None
        loss, cross_entropy, squares, hits = linear_cross_entropy(hidden, weight, wanted, Z_LOSS, chunk=3)
        loss.backward()
        values, grads = expected(hidden, weight, wanted)
        assert hits == num_hits
        assert abs(cross_entropy - values[1]) < 4 * 1e-3  # the spacing of float32 at 10^4, for each token
        assert relative_error(squares, values[2]) < KERNEL[torch.float32]
        assert relative_error(hidden.grad, grads[0]) < KERNEL[torch.float32]
        assert relative_error(weight.grad, grads[1]) < KERNEL[torch.float32]


def test_a_target_that_ties_for_the_first_place_counts_as_a_hit():
    hidden, weight = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [2.0]])
    *_, hits = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    assert hits == 2


MEASURED = """
import resource, torch
from minimax_m1.kernels.cross_entropy import linear_cross_entropy
def step(n):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(16384, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(n, dtype=torch.int64))[0].backward()
step(8)  # what a first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_is_that_of_one_chunk():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    logits = 4 * 4096 * 16_384
    assert int(done.stdout) < 2 * CHUNK_BYTES < logits / 4 + 1
