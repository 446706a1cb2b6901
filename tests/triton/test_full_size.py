"""The kernels at the full-size model's shapes against float64 on the same GPU; interpreted they would take hours."""

import pytest
import torch

from minimax_m1.kernels.attention import softmax_attention
from minimax_m1.kernels.experts import expert_mlp, route
from minimax_m1.kernels.lightning import lightning_attention, lightning_decode, lightning_prefill, lightning_slopes
from minimax_m1.kernels.linear import rms_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HEADS, GROUPS, HEAD_DIM, HIDDEN = 64, 8, 128, 6144
LENGTHS = [5000, 1, 3000, 191]  # together the tokens of a chunk of a prompt


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def bounds():
    return torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()


def results(function, inputs, weights, dtype=None):
    """What the function returns for these inputs, widened or not, and the gradients of its first result."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs[0], inputs, weights.to(outputs[0].dtype))
    return [x.detach() for x in (*outputs, *gradients)]


def compare(function, inputs, names, limits=None):
    """Errors of triton's results, against those of PyTorch's operations in float64."""
    weights = torch.randn_like(inputs[0])  # each of these functions returns first what looks like its first input
    ours = results(lambda *x: function(*x, backend="triton"), inputs, weights)
    exact = results(lambda *x: function(*x, backend="torch"), inputs, weights, torch.float64)
    for name, x, y in zip(names, ours, exact, strict=True):
        assert x.isfinite().all(), name
        error = float((x.double() - y).norm() / y.norm())
        assert error < (limits or {}).get(name, 1e-2), (name, error)


def test_lightning_attention():
    slope = lightning_slopes(HEADS, 40, 80).cuda()

    def run(q, k, v, state, backend):
        return lightning_attention(q, k, v, slope, cu_seqlens=bounds(), initial_state=state, backend=backend)

    q, k, v = randn(sum(LENGTHS), HEADS, 3 * HEAD_DIM).chunk(3, -1)
    state = randn(len(LENGTHS), HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float32)
    compare(run, (q, k, v, state), ("o", "final", "dq", "dk", "dv", "dstate"), {"final": 1e-5, "dstate": 1e-5})


def test_lightning_states_of_a_long_prompt():
    """Chunk by chunk in the pool, then token by token: the states are those of float64, the outputs as well."""
    slope = lightning_slopes(HEADS, 40, 80).cuda()
    q, k, v = randn(sum(LENGTHS), HEADS, 3 * HEAD_DIM).chunk(3, -1)
    states, slots = torch.full((3, HEADS, HEAD_DIM, HEAD_DIM), torch.nan, device="cuda"), torch.tensor([1]).cuda()
    states[1] = 0
    outputs, end = [], sum(LENGTHS) - 8
    for start in range(0, end, 2048):
        chunk = [x[start : min(start + 2048, end)] for x in (q, k, v)]
        lengths = torch.tensor([0, len(chunk[0])], device="cuda").int()
        outputs.append(lightning_prefill(*chunk, slope, states, slots, lengths, backend="triton"))
    for row in range(end, sum(LENGTHS)):
        token = [x[row : row + 1] for x in (q, k, v)]
        outputs.append(lightning_decode(*token, slope, states, slots, backend="triton"))
    whole = torch.tensor([0, sum(LENGTHS)], device="cuda").int()
    o, final = lightning_attention(q.double(), k.double(), v.double(), slope, cu_seqlens=whole, backend="torch")
    assert float((states[1].double() - final[0]).norm() / final.norm()) < 1e-5
    assert float((torch.cat(outputs).double() - o).norm() / o.norm()) < 1e-2
    assert states[[0, 2]].isnan().all()


def test_softmax_attention():
    def run(q, k, v, backend):
        return softmax_attention(q, k, v, cu_seqlens=bounds(), max_seqlen=max(LENGTHS), backend=backend)

    tokens = sum(LENGTHS)
    inputs = (randn(tokens, HEADS, HEAD_DIM), randn(tokens, GROUPS, HEAD_DIM), randn(tokens, GROUPS, HEAD_DIM))
    compare(run, inputs, ("o", "dq", "dk", "dv"))


@pytest.mark.parametrize("tokens", [1, 8, 64, 4096])
def test_experts(tokens):
    """Four experts of the full width, of the 32 that would take all of the memory in float64."""
    num_experts, width = 4, 9216
    _, ids, shares = route(randn(tokens, num_experts, dtype=torch.float32), 2, "triton")

    def run(x, w13, w2, shares, backend):
        return expert_mlp(x, w13, w2, ids, shares, backend=backend)

    w13, w2 = randn(num_experts, 2 * width, HIDDEN) * HIDDEN**-0.5, randn(num_experts, HIDDEN, width) * width**-0.5
    inputs = (randn(tokens, HIDDEN), w13, w2, shares)
    compare(run, inputs, ("y", "dx", "dw13", "dw2", "dshares"), {"dshares": 2e-2})  # two numbers, of one token
    with torch.no_grad():  # in inference few tokens take another way
        y, exact = run(*inputs, "triton"), run(*(x.double() for x in inputs), "torch")
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-2


def test_norm_and_gate():
    def run(x, weight, gate, backend):
        return rms_norm(x, weight, 1e-6, backend, gate)

    inputs = (randn(4096, HEADS * HEAD_DIM), 1 + 0.1 * randn(HEADS * HEAD_DIM), randn(4096, HEADS * HEAD_DIM))
    compare(run, inputs, ("y", "dx", "dweight", "dgate"))
