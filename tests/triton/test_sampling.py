"""Tokens chosen by the Triton kernels, against the numpy path; their kernels fill every output (NaN-poisoned)."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from minimax_m1.continuation import Continuation, choose_tokens
from minimax_m1.kernels import sampling_triton
from minimax_m1.kernels.sampling_triton import ASKED, BLOCK, choose_rows
from minimax_m1.sampling import SamplingParams, prompt_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_logits(num_rows, vocab_size, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(num_rows, vocab_size, generator=generator)).to(DEVICE)


def row_of(params, seed, vocab_size, prompt=(1, 2), output=(), eos_ids=(3,)):
    row = Continuation(params, seed, prompt, eos_ids, None, vocab_size)
    for token in output:
        row.append(token, -1.0)
    return row


def check_equal(logits, rows, forbidden=None):
    """Compare tokens, log-probabilities, ranks and lists of the numpy path and the kernels."""
    found = choose_tokens(logits, rows, forbidden, "triton")
    expected = choose_tokens(logits, rows, forbidden, "torch")
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.token == other.token, (i, rows[i].params)
        assert type(one.token) is int
        assert (one.logprob is None) == (other.logprob is None) and (one.details is None) == (other.details is None)
        if other.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=2e-6)
        if other.details is not None:
            assert one.details.rank == other.details.rank
            assert [i for i, _ in one.details.top] == [i for i, _ in other.details.top]
            assert [v for _, v in one.details.top] == pytest.approx([v for _, v in other.details.top], abs=2e-6)
    return found


CUTS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1e-40},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.95},
    {"top_p": 0.3, "temperature": 2.0},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.3, "temperature": 0.8},
    {"top_p": 0.8, "min_p": 1e-3},
]


@pytest.mark.parametrize(
    ("vocab_size", "spread", "cuts"),
    [(5, 3.0, CUTS[::2]), (BLOCK, 20.0, CUTS[3::6]), (BLOCK + 77, 3.0, CUTS[1::2]), (BLOCK + 77, 0.02, CUTS[7:14:6])],
)
def test_draws_are_those_of_numpy(vocab_size, spread, cuts):
    """From a certain token to hardly any difference, where whole blocks are left."""
    params = [SamplingParams(**cut, logprobs=None if i % 2 else i % 5, max_new_tokens=9) for i, cut in enumerate(cuts)]
    rows = [row_of(p, 1000 * vocab_size + seed, vocab_size) for seed, p in enumerate(params)]
    check_equal(random_logits(len(rows), vocab_size, spread, seed=vocab_size), rows, np.array([0, vocab_size - 1]))


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.9}, {"temperature": 0.0}])
def test_ties_stay_together(cut):
    """Many equal logits: greedy takes the first id, and a cut leaves all that are as probable as its last."""
    logits = torch.randint(-2, 2, (3, 300), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    logits[:, ::7] = -torch.inf
    rows = [row_of(SamplingParams(**cut, logprobs=20), seed, 300) for seed in range(3)]
    assert len({choice.token for choice in check_equal(logits, rows)}) > 1


def test_quantiles_at_the_ends_and_certain_tokens():
    logits = torch.full((6, 100), -torch.inf, device=DEVICE)
    logits[:, 40:43] = torch.tensor([0.0, -200.0, 0.0], device=DEVICE)  # the middle one's weight is 0
    asked = np.zeros(6, dtype=ASKED)
    asked["temperature"], asked["top_p"], asked["forced"], asked["adjusted"], asked["num_best"] = 1, 1, -1, -1, -1
    asked["quantile"] = [0, 0.5, 1 - 2**-53] * 2
    asked["top_k"][3:] = 50
    found = choose_rows(logits, None, asked, None).cpu()
    assert found[:, 0].tolist() == [40, 42, 42] * 2
    assert found[:, 3].tolist() == [2] * 6 and bool(found[:, :5].isfinite().all())


class Masked(Continuation):
    """A continuation with a grammar that is a list of ids."""

    mask: np.ndarray

    def allowed_ids(self):
        return self.mask


ADJUSTMENTS = [
    {"logit_bias": {7: 9.0, 11: -100.0}},
    {"repetition_penalty": 1.3, "temperature": 0.7},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 0.1, "frequency_penalty": -2.0, "logit_bias": {5: 3.0}, "top_p": 0.9},
    {"min_tokens": 9, "stop_token_ids": (4,)},
    {"min_tokens": 9, "temperature": 0.0, "presence_penalty": 2.0},
    {},
]


def test_adjusted_rows():
    """Bias, penalties, bans and forced tokens, beside rows that have none of them."""
    vocab_size, output = 300, (5, 5, 6)
    base = {"logprobs": 2, "max_new_tokens": 4000}
    rows = [row_of(SamplingParams(**p, **base), seed, vocab_size, output=output) for seed, p in enumerate(ADJUSTMENTS)]
    rows[6]._forced = [9]
    logits = random_logits(len(rows), vocab_size)
    logits[:, 3:7] += 12
    found = check_equal(logits, rows, np.array([6, 20]))
    assert found[6].token == 9 and all(choice.token != 6 for choice in found)
    assert found[4].token not in (3, 4) and found[5].token != 3


def test_masked_rows():
    """A mask keeps to its ids; where all of them are forbidden, these are chosen all the same."""
    logits, rows = random_logits(6, 200), []
    for i, ids in enumerate([[4, 5, 6], [8], [8, 9], [8, 3], [1], [2, 8]]):
        params = SamplingParams(temperature=i % 2, logprobs=3, min_tokens=i % 3)
        row = Masked(params, i, (), (3,), None, 200)
        row.mask = np.isin(np.arange(200), ids)
        rows.append(row)
    plain = [row_of(SamplingParams(logprobs=1), 3, 200)]
    logits = torch.cat((logits, random_logits(1, 200, seed=1)))
    found = check_equal(logits, plain + rows, np.array([8, 9]))
    assert found[2].token == 8 and found[3].token in (8, 9) and found[6].token == 2


def test_a_row_chooses_the_same_in_any_company():
    logits = random_logits(2, 700)
    params = [SamplingParams(**cut, logprobs=3) for cut in CUTS[2:14:11]]
    rows = [row_of(p, seed, 700) for seed, p in enumerate(params)]
    together = choose_tokens(logits, rows, None, "triton")
    assert [choose_tokens(logits[i : i + 1], rows[i : i + 1], None, "triton")[0] for i in range(2)] == together
    strided = torch.cat((logits, logits), dim=1)[:, :700]
    assert choose_tokens(strided, rows, None, "triton") == together


def test_draws_follow_the_distribution():
    """Evenly spaced quantiles: each id comes as often as its probability says, to less than one draw at either end."""
    vocab_size, n = 10, 20
    row = random_logits(1, vocab_size, 1.0)
    asked = np.zeros(n, dtype=ASKED)
    asked["temperature"], asked["top_p"], asked["forced"], asked["adjusted"], asked["num_best"] = 1, 1, -1, -1, -1
    asked["quantile"] = (np.arange(n) + 0.5) / n
    found = np.bincount(choose_rows(row.expand(n, -1), None, asked, None)[:, 0].long().cpu(), minlength=vocab_size)
    assert np.abs(found - n * row[0].softmax(0).cpu().numpy()).max() < 1.01


def test_logprobs_of_prompts():
    logits, ids = random_logits(7, BLOCK + 50), [1, 2, 3, BLOCK + 49, 5, 6, 7]
    for top in (0, 4):
        found = prompt_logprobs(logits, ids, top, np.array([2, 9]), "triton")
        for one, other in zip(found, prompt_logprobs(logits, ids, top, np.array([2, 9]), "torch"), strict=True):
            assert (one.token, one.rank) == (other.token, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=2e-6)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]


def test_one_wait_for_the_gpu(monkeypatch):
    """The answer is copied once, whatever rows ask for."""
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or cpu(tensor))
    rows = [row_of(SamplingParams(top_k=3, logprobs=2, presence_penalty=1.0), seed, 50, output=(4,)) for seed in (1, 2)]
    choose_tokens(random_logits(2, 50), rows, np.array([7]), "triton")
    assert copies == [(2, 5 + 2 * 2)]
    assert sampling_triton.forbidden_mask.cache_info().currsize <= 4
