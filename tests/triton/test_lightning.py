"""Lightning attention in Triton against the recurrence in float64: interpreted here, on the GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from minimax_m1.errors import UserError
from minimax_m1.kernels import lightning_triton
from minimax_m1.kernels.lightning import (
    lightning_attention,
    lightning_attention_reference,
    lightning_decode,
    lightning_prefill,
    lightning_slopes,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERROR = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}  # of outputs and gradients
STATE_ERROR = 1e-5  # of states, whatever the dtype of what they were made from


def draw(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def bounds_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def qkv_views(tokens, heads, head_dim, dtype=torch.bfloat16):
    """q, k and v as the model passes them: views of one tensor."""
    return draw(tokens, heads, 3 * head_dim, dtype=dtype).chunk(3, dim=-1)


def error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def outputs_and_gradients(inputs, slope, lengths, **options):
    """o, the final states, and the gradients of both with respect to q, k, v and the initial states."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    options["cu_seqlens"] = bounds_of(lengths)
    o, final = lightning_attention(*inputs[:3], slope, initial_state=inputs[3], **options)
    weights = draw(*o.shape, seed=1).to(o.dtype), draw(*final.shape, dtype=torch.float32, seed=2).to(final.dtype)
    gradients = torch.autograd.grad((o, final), inputs, weights)
    return {"o": o, "final": final, **dict(zip(("dq", "dk", "dv", "dinitial"), gradients, strict=True))}


def check(lengths, head_dim, dtype, heads=2, slope=None):
    inputs = [*qkv_views(sum(lengths), heads, head_dim, dtype)]
    inputs.append(draw(len(lengths), heads, head_dim, head_dim, dtype=torch.float32))
    slope = (lightning_slopes(heads, 1, 5) if slope is None else torch.full((heads,), slope)).to(DEVICE)
    actual = outputs_and_gradients(inputs, slope, lengths, backend="triton")
    expected = outputs_and_gradients([x.double() for x in inputs], slope, lengths, backend="reference")
    for name, value in actual.items():
        limit = STATE_ERROR if name in ("final", "dinitial") else ERROR[dtype]
        assert error(value, expected[name]) < limit, name


@pytest.mark.parametrize("lengths", [[1], [2], [63], [64], [257], [65, 1, 2], [3, 0, 5]], ids=str)
def test_lengths(lengths):
    check(lengths, 32, torch.bfloat16)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((head_dim, torch.bfloat16) for head_dim in (8, 96, 128, 256)),
        (40, torch.float32),
        (64, torch.float16),
    ],
    ids=str,
)
def test_head_sizes_and_dtypes(head_dim, dtype):
    check([66] if dtype == torch.bfloat16 else [18, 3], head_dim, dtype, heads=1)


@pytest.mark.parametrize("slope", [0.0, 1.5, 1e4])
def test_extreme_decay_neither_overflows_nor_loses_gradients(slope):
    check([71, 5], 32, torch.bfloat16, slope=slope)


def test_without_states_and_with_a_gradient_of_the_final_states_alone():
    lengths, slope = [65, 3], lightning_slopes(2, 1, 5).to(DEVICE)
    results = []
    for wide, backend in ((False, "triton"), (True, "reference")):
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in qkv_views(sum(lengths), 2, 32)]
        o, final = lightning_attention(*inputs, slope, cu_seqlens=bounds_of(lengths), backend=backend)
        of_o = torch.autograd.grad(o.sum(), inputs, retain_graph=True)
        of_final = torch.autograd.grad(final.sum(), inputs[1:])
        results.append([o, final, *of_o, *of_final])
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) < 1e-2
    assert error(results[0][1], results[1][1]) < STATE_ERROR


def test_few_heads_are_scanned_in_segments(monkeypatch):
    lengths = [260, 0, 131]
    monkeypatch.setattr(lightning_triton, "SEGMENT_CHUNKS", 1)
    monkeypatch.setattr(lightning_triton, "num_multiprocessors", lambda device: 9)
    assert lightning_triton._segment_length(draw(sum(lengths), 1, 32), len(lengths)) == 64
    check(lengths, 32, torch.bfloat16, heads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prefill_gives_the_same_bits_however_prompts_are_cut_and_batched(dtype):
    q, k, v = qkv_views(150, 2, 32, dtype)
    slope, before = lightning_slopes(2, 1, 5).to(DEVICE), draw(4, 2, 32, 32, dtype=torch.float32)

    def prefill(pool, slots, lengths, rows):
        inputs = (x[rows] for x in (q, k, v))
        slots = torch.tensor(slots, device=DEVICE)
        return lightning_prefill(*inputs, slope, pool, slots, bounds_of(lengths), backend="triton")

    pool = before.clone()
    whole = prefill(pool, [2, 0], [140, 10], slice(None))
    expected, final = lightning_attention_reference(
        *(x.double() for x in (q, k, v)), slope, cu_seqlens=bounds_of([140, 10]), initial_state=before[[2, 0]].double()
    )
    assert error(whole, expected) < ERROR[dtype]
    assert error(pool[[2, 0]], final) < STATE_ERROR
    assert torch.equal(pool[[1, 3]], before[[1, 3]])
    cut = before.clone()
    rows = [slice(64), slice(64, 128), slice(128, 140)]
    parts = [prefill(cut, [2], [part.stop - (part.start or 0)], part) for part in rows]
    parts.append(prefill(cut, [0, 3], [10, 0], slice(140, 150)))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(cut, pool)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(32, torch.bfloat16), (96, torch.float16), (256, torch.float32)], ids=str
)
def test_decode_advances_states_in_their_slots(head_dim, dtype):
    q, k, v = qkv_views(3, 2, head_dim, dtype)
    slope, before = lightning_slopes(2, 1, 5).to(DEVICE), draw(5, 2, head_dim, head_dim, dtype=torch.float32)
    pool, slots = before.clone(), torch.tensor([4, 0, 2], device=DEVICE)
    o = lightning_decode(q, k, v, slope, pool, slots, backend="triton")
    inputs = (x.double() for x in (q, k, v))
    expected, final = lightning_attention_reference(
        *inputs, slope, cu_seqlens=bounds_of([1, 1, 1]), initial_state=before[slots].double()
    )
    assert error(o, expected) < ERROR[dtype]
    assert error(pool[slots], final) < 1e-6
    assert torch.equal(pool[[1, 3]], before[[1, 3]])


def test_decode_of_drafts_gives_the_bits_of_single_calls():
    lengths, head_dim = [3, 1, 0, 2], 64
    q, k, v = qkv_views(sum(lengths), 2, head_dim)
    slope, before = lightning_slopes(2, 1, 5).to(DEVICE), draw(5, 2, head_dim, head_dim, dtype=torch.float32)
    together, single, slots = before.clone(), before.clone(), torch.tensor([4, 0, 3, 2], device=DEVICE)
    o = lightning_decode(q, k, v, slope, together, slots, bounds_of(lengths), backend="triton")
    owners = torch.repeat_interleave(slots, torch.tensor(lengths, device=DEVICE))
    for row in range(sum(lengths)):
        inputs = (x[row : row + 1] for x in (q, k, v))
        alone = lightning_decode(*inputs, slope, single, owners[row : row + 1], backend="triton")
        assert torch.equal(alone[0], o[row])
    assert torch.equal(together, single)


def test_rows_of_padding_may_share_a_slot():
    q, k, v = qkv_views(4, 2, 32)
    slope, pool = lightning_slopes(2, 1, 5).to(DEVICE), draw(3, 2, 32, 32, dtype=torch.float32)
    alone = pool.clone()
    o = lightning_decode(q, k, v, slope, pool, torch.tensor([1, 2, 2, 2], device=DEVICE), backend="triton")
    first = lightning_decode(q[:1], k[:1], v[:1], slope, alone, torch.tensor([1], device=DEVICE), backend="triton")
    assert torch.equal(o[0], first[0])
    assert torch.equal(pool[:2], alone[:2])


@pytest.mark.parametrize(
    ("head_dim", "dtype", "named"), [(512, torch.bfloat16, "512"), (32, torch.float32, "bfloat16.*float32")]
)
def test_what_the_kernels_do_not_take_is_refused(head_dim, dtype, named):
    q, k, v = qkv_views(3, 1, head_dim)
    slope, pool = torch.ones(1, device=DEVICE), draw(1, 1, head_dim, head_dim, dtype=torch.float32)
    with pytest.raises(UserError, match=named):
        lightning_attention(q, k, v.to(dtype), slope, cu_seqlens=bounds_of([3]), backend="triton")
    arguments = (q, k, v.to(dtype), slope, pool, torch.zeros(1, dtype=torch.int64, device=DEVICE), bounds_of([3]))
    for run in (lightning_prefill, lightning_decode):
        with pytest.raises(UserError, match=named):
            run(*arguments, backend="triton")
