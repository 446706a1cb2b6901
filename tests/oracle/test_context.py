"""Attention on rows that are divided over ranks against the plain formula on all of them, forward and backward."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.kernels.context import ContextPart, _attend_lower_right, _AttendBehindPast
from tests.ranks import launch
from tests.tolerances import KERNEL, relative_error


@pytest.mark.slow
def test_both_kinds_on_three_ranks_are_the_reference(tmp_path):
    launch("tests.oracle.divided_worker", 3, "context", str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert all(len(errors) == 56 for errors in found)
    for rank, errors in enumerate(found):
        wrong = {
            name: e for name, e in errors.items() if not e < KERNEL[torch.float64 if "64" in name else torch.float32]
        }
        assert not wrong, f"rank {rank}"


@given(st.lists(st.integers(0, 40), min_size=1), st.integers(1, 5))
def test_every_row_is_in_one_part_behind_its_own_past(lengths, num_ranks):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    starts = [bounds[-1] * rank // num_ranks for rank in range(num_ranks + 1)]
    positions = []
    for rank in range(num_ranks):
        part = ContextPart(None, rank, starts, bounds)
        assert sum(part.seqlens) == part.end - part.start
        assert not any(part.past_lens[1:])
        positions += [past + i for n, past in zip(part.seqlens, part.past_lens, strict=True) for i in range(n)]
        past = part.past_lens[0] if part.past_lens else 0
        ends = [end for end in part.earlier_ends() if end is not None]
        assert ends == sorted(ends) and bool(ends) == bool(past)
        assert not ends or (part.start - past < ends[0] and ends[-1] == part.start)
    assert positions == [i for n in lengths for i in range(n)]


@pytest.mark.parametrize(("chunk", "past"), [(2, 1), (2, 300), (65, 64), (300, 1), (130, 257)])
def test_queries_behind_a_past_give_exact_gradients(chunk, past):
    generator = torch.Generator().manual_seed(chunk)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v, noise = draw(chunk, 4, 16), draw(2, past + chunk, 16), draw(2, past + chunk, 16), draw(chunk, 4, 16)
    wide = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("nhd,hld->hnl", wide[0], wide[1].repeat_interleave(2, 0)) / 4
    visible = torch.arange(past + chunk) <= past + torch.arange(chunk)[:, None]
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    expected = torch.einsum("hnl,hld->nhd", probs, wide[2].repeat_interleave(2, 0))
    expected_grads = torch.autograd.grad((expected * noise).sum(), wide)
    for attend in (_AttendBehindPast.apply, _attend_lower_right):
        narrow = [x.float().requires_grad_() for x in (q, k, v)]
        actual = attend(*narrow)
        assert relative_error(actual, expected) < KERNEL[torch.float32]
        grads = torch.autograd.grad((actual * noise.float()).sum(), narrow)
        for a, e in zip(grads, expected_grads, strict=True):
            assert relative_error(a, e) < KERNEL[torch.float32]
