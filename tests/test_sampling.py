"""Sampling: validation, Transformers' processors as oracle, the draw, and independence of rows."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_m1.continuation import Choice, Continuation, choose_tokens
from minimax_m1.errors import UserError
from minimax_m1.sampling import (
    MOST_LOGPROBS,
    SamplingParams,
    StructuredOutput,
    TokenCounts,
    cumulated_blocks,
    draw_token,
    exponentials,
    forbidden_ids,
    index_at,
    keep_ids,
    prompt_logprobs,
    uniform,
)

V = 37
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def random_logits(rows: int, seed: int = 0, vocab_size: int = V) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def continuation(
    params: SamplingParams,
    seed: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    eos_ids: tuple[int, ...] = (),
    vocab_size: int = V,
) -> Continuation:
    row = Continuation(params, seed, prompt, eos_ids, None, vocab_size)
    for token in output:
        row.append(token, -1.0)
    return row


def choose(logits: torch.Tensor, rows: list[Continuation], forbidden: Any = None) -> list[int]:
    return [choice.token for choice in choose_tokens(logits, rows, forbidden)]


def kept(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """Return the logits as a Transformers processor would: -inf for what is not kept."""
    result = torch.full_like(logits, -torch.inf)
    for row, new in zip(logits.numpy(), result, strict=True):
        weights = np.empty_like(row)
        blocks = exponentials(row, params.get("temperature", 1.0), weights)
        new[torch.from_numpy(keep_ids(weights, float(blocks[-1]), SamplingParams(**params)))] = 0
    return torch.where(result == 0, logits, result)


# -- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("min_tokens", -1),
        ("min_tokens", 300),
        ("stop", ("",)),
        ("stop", 7),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 7),
        ("ignore_eos", "no"),
        ("seed", -1),
        ("logit_bias", {3: 1000.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", [3]),
        ("n", 0),
        ("logprobs", -1),
        ("logprobs", MOST_LOGPROBS + 1),
        ("logprobs", True),
        ("prompt_logprobs", 1.5),
        ("max_thinking_tokens", -1),
        ("max_thinking_tokens", "40K"),
        ("repetition_stop_tokens", -1),
        ("repetition_stop_probability", 1.5),
        ("structured", {"regex": "a"}),
        ("tool_choice", "perhaps"),
        ("tool_choice", "required"),
        ("tool_choice", {"name": "unknown"}),
        ("tool_choice", 7),
        ("tools", [{"description": "no name"}]),
        ("tools", 7),
        ("parallel_tool_calls", None),
        ("expert_threshold", 0.0),
        ("expert_threshold", 1.01),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_field(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{field}\b.*accepted") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "structured: .*exactly one of json_schema, "),
        ({"regex": "a", "choice": ["b"]}, "structured: .*exactly one"),
        ({"regex": 7}, "structured.regex: 7 "),
        ({"choice": "yes"}, "structured.choice: "),
        ({"choice": ["yes", ""]}, "structured.choice: "),
        ({"choice": 7}, "structured.choice: "),
        ({"json_schema": "{"}, "structured.json_schema: is not JSON"),
        ({"json_schema": "[]"}, "structured.json_schema: "),
        ({"json_schema": {"a": {1}}}, "structured.json_schema: cannot be written as JSON"),
        ({"json_object": 1}, "structured.json_object: 1 "),
        ({"regexp": "a"}, "structured field 'regexp' is not known; did you mean regex?"),
    ],
)
def test_a_bad_form_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams.parse({"structured": values})


def test_parsing_a_json_object() -> None:
    written = json.dumps(
        {
            "temperature": 0,
            "stop": ["a", "b"],
            "stop_token_ids": [3],
            "logit_bias": {"7": 1.5},
            "structured": {"choice": ["yes", "no"]},
        }
    )
    parsed = SamplingParams.parse(json.loads(written))
    assert parsed == SamplingParams(
        temperature=0,
        stop=("a", "b"),
        stop_token_ids=(3,),
        logit_bias={7: 1.5},
        structured=StructuredOutput(choice=("yes", "no")),
    )
    assert SamplingParams.parse({"stop": "</think>"}).stop == ("</think>",)
    with pytest.raises(UserError, match=r"^sampling field 'temprature' is not known; did you mean temperature\?$"):
        SamplingParams.parse({"temprature": 1})
    with pytest.raises(UserError, match="sampling field 'xyz' is not known; accepted: max_new_tokens, "):
        SamplingParams.parse({"xyz": 1})


def test_a_single_stop_string_is_not_taken_apart() -> None:
    assert SamplingParams(stop="</think>").stop == ("</think>",)  # type: ignore[arg-type]


def test_which_tools_are_forced() -> None:
    other = {"name": "later"}
    assert SamplingParams(tools=(TOOL, other)).forced_tools == ()
    assert SamplingParams(tools=(TOOL, other), tool_choice="required").forced_tools == (TOOL, other)
    named = SamplingParams(tools=(TOOL, other), tool_choice={"type": "function", "function": {"name": "later"}})
    assert named.forced_tools == (other,)
    with pytest.raises(UserError, match="structured: cannot be used with a forced tool call"):
        SamplingParams(tools=(TOOL,), tool_choice="required", structured=StructuredOutput(json_object=True))


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="logit_bias: id 99 "):
        continuation(SamplingParams(logit_bias={99: 1.0}))


# -- Transformers as oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.01, 0.3, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("vocab_size", [V, 5000])
def test_top_p_and_min_p_equal_transformers(value: float, vocab_size: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(8, vocab_size=vocab_size)
    differ = kept(logits, top_p=value) != transformers.TopPLogitsWarper(value)(None, logits)
    # Of thousands of ids, the set may end one sooner or later, where the sum rounds to either side of the threshold.
    assert int(differ.sum(1).max()) <= (0 if vocab_size == V else 1)
    assert torch.equal(kept(logits, min_p=value), transformers.MinPLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("k", [1, 2, 36, 37, 100])
def test_top_k_equals_transformers(k: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(8).round()  # with ties
    assert torch.equal(kept(logits, top_k=k), transformers.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(2)
    ids = torch.tensor([[1, 2, 2, 30], [5, 5, 6, 7]])
    ours = logits.clone()
    for row, scores in zip(ids.tolist(), ours.numpy(), strict=True):
        counts = TokenCounts(row[:2])
        for token in row[2:]:
            counts.add(token)
        counts.penalise(scores, SamplingParams(repetition_penalty=penalty))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [V, 4000])
def test_the_whole_chain_equals_transformers(vocab_size: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(64, vocab_size=vocab_size)
    chain = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(9),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.05),
        ]
    )
    ours = kept(logits, temperature=0.7, top_k=9, top_p=0.8, min_p=0.05)
    assert torch.equal(ours > -torch.inf, chain(None, logits) > -torch.inf)


# -- definitions -------------------------------------------------------------------------------------------------------


def test_frequency_and_presence_count_the_output_only() -> None:
    counts = TokenCounts([3, 3])
    for token in (4, 4, 5):
        counts.add(token)
    row = np.zeros(V, dtype=np.float32)
    counts.penalise(row, SamplingParams(frequency_penalty=0.5, presence_penalty=0.25))
    assert row[3] == 0 and row[4] == -1.25 and row[5] == -0.75


@given(st.lists(st.integers(0, V - 1), max_size=60), st.lists(st.integers(0, V - 1), max_size=9))
def test_counts_kept_along_equal_counts_made_at_once(output: list[int], prompt: list[int]) -> None:
    params = SamplingParams(repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=-0.6)
    counts = TokenCounts(prompt)
    for token in output[: len(output) // 2]:
        counts.add(token)
    early, twin = counts, counts.copy()
    for token in output[len(output) // 2 :]:
        twin.add(token)
    early.add(0)  # what the one gets, the other does not see
    row = random_logits(1)[0].numpy().copy()
    expected = row.copy()
    twin.penalise(row, params)
    for token in range(V):
        if token in prompt or token in output:
            expected[token] *= 1 / 1.7 if expected[token] > 0 else 1.7
        expected[token] -= 0.3 * output.count(token) + (-0.6 if token in output else 0)
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 100, 255, 256, 257, 5000])
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), data=st.data())
def test_a_quantile_is_found_as_by_adding_one_by_one(vocab_size: int, share: float, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31))
    weights = np.random.default_rng(seed).random(vocab_size, dtype=np.float32)
    weights[weights < 0.5] = 0
    weights[data.draw(st.integers(0, vocab_size - 1))] = 1
    exact = np.add.accumulate(weights.astype(np.float64))
    target = share * exact[-1]
    found = index_at(weights, cumulated_blocks(weights), target, side="right")
    before = exact[found - 1] if found else 0.0
    slack = 1e-6 * exact[-1]  # blocks are added in float32
    assert weights[found] > 0 and before - slack <= target <= exact[found] + slack


def test_top_p_of_a_flat_distribution_over_many_ids() -> None:
    logits = torch.linspace(0, 1e-3, 5000)[None]
    assert (kept(logits, top_p=0.1) > -torch.inf).sum() == pytest.approx(500, abs=2)
    assert (kept(logits, top_p=0.9) > -torch.inf).sum() == pytest.approx(4500, abs=3)


def test_temperature_may_be_tiny() -> None:
    logits = random_logits(4)
    for temperature in (1e-30, 1e-300):
        rows = [continuation(SamplingParams(temperature=temperature), seed) for seed in range(4)]
        assert choose(logits, rows) == logits.argmax(-1).tolist()


def test_forbidden_ids_are_zero_rows_and_those_past_the_tokenizer() -> None:
    embedding = torch.randn(10, 4)
    embedding[3] = 0
    embedding[5, 0] = 0
    assert forbidden_ids(embedding, 8).tolist() == [3, 8, 9]
    assert forbidden_ids(embedding.bfloat16()).tolist() == [3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_and_too_early_ids_are_never_chosen(temperature: float) -> None:
    logits = torch.zeros(200, V)
    logits[:, 1:4] = 50
    forbidden = np.array([1])
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(10**6,))
    early = [continuation(params, seed, output=(7,), eos_ids=(2,)) for seed in range(200)]
    assert set(choose(logits, early, forbidden)) == {3}
    late = [continuation(params, seed, output=(7, 7), eos_ids=(2,)) for seed in range(200)]
    assert set(choose(logits, late, forbidden)) == ({2} if temperature == 0 else {2, 3})
    assert float(logits[0, 1]) == 50, "the argument is not changed"


def test_logit_bias() -> None:
    rows = [continuation(SamplingParams(temperature=0, logit_bias={11: 100.0}))]
    assert choose(random_logits(1), rows) == [11]


# -- the draw ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=1 - 1e-9)], ids=["all", "kept"])
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Pearson's statistic over 40,000 draws; 373 is the 99.9th percentile at 299 degrees of freedom."""
    n, vocab = 40_000, 300  # more than a block
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).numpy()
    weights = np.empty_like(row)
    blocks = exponentials(row, 1.0, weights)
    tokens = [draw_token(weights, blocks, params, uniform(5, step)) for step in range(n)]
    observed = np.bincount(tokens, minlength=vocab)
    expected = n * weights / weights.sum()
    assert float(((observed - expected) ** 2 / expected).sum()) < 385


def test_uniform_numbers_of_neighbouring_seeds_are_independent() -> None:
    grid = torch.tensor([[uniform(seed, step) for step in range(300)] for seed in range(300)], dtype=torch.float64)
    assert float(grid.min()) >= 0 and float(grid.max()) < 1 and len(grid.flatten().unique()) == grid.numel()
    assert abs(float(grid.mean()) - 0.5) < 0.004 and abs(float(grid.var()) - 1 / 12) < 0.002
    for matrix in (grid, grid.T):
        correlation = torch.corrcoef(matrix) - torch.eye(300)
        assert float(correlation.abs().max()) < 0.3


def test_ids_of_probability_zero_are_never_drawn() -> None:
    weights = np.array([0.0, 0.5, 0.0, 0.5, 0.0], dtype=np.float32)
    blocks = cumulated_blocks(weights)
    for quantile, expected in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert draw_token(weights, blocks, SamplingParams(), quantile) == expected


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    top_k=st.sampled_from([0, 3, 50]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logprobs=st.sampled_from([None, 0, 4]),
    logit_bias=st.sampled_from([{}, {3: 5.0}]),
    max_new_tokens=st.sampled_from([256, 5000]),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    mine=SETTINGS,
    others=st.lists(SETTINGS, max_size=4),
    vocab_size=st.sampled_from([V, 1000]),
    forbidden=st.sampled_from([None, [5, 6]]),
)
def test_a_row_chooses_the_same_in_any_company(
    seed: int, mine: SamplingParams, others: list[SamplingParams], vocab_size: int, forbidden: list[int] | None
) -> None:
    """Token, log-probability and the list of the best are equal to the bit."""
    logits = random_logits(1 + len(others), seed % 1000, vocab_size)
    ids = None if forbidden is None else np.array(forbidden)

    def row() -> Continuation:
        return continuation(mine, seed, (1, 2), (3,), vocab_size=vocab_size)

    company = [continuation(params, 9, (1, 2), (3,), vocab_size=vocab_size) for params in others]
    (alone,) = choose_tokens(logits[:1], [row()], ids)
    *_, together = choose_tokens(logits.flip(0), [*company[::-1], row()], ids)
    assert together == alone


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab_size", [V, 3000])
def test_logprobs_are_those_of_the_model_itself(temperature: float, vocab_size: int) -> None:
    """Whatever temperature, penalties and bias do to the choice."""
    logits = random_logits(6, vocab_size=vocab_size)
    params = SamplingParams(
        temperature=temperature, logprobs=5, repetition_penalty=1.5, logit_bias={4: 9.0}, frequency_penalty=1.0
    )
    plain = SamplingParams(temperature=temperature, logprobs=5)
    expected = logits.double().log_softmax(-1)
    for chosen in (params, plain):
        rows = [continuation(chosen, seed, (1,), (2, 2), vocab_size=vocab_size) for seed in range(6)]
        for choice, row in zip(choose_tokens(logits, rows), expected, strict=True):
            assert isinstance(choice, Choice) and choice.details is not None
            assert choice.logprob == choice.details.logprob == pytest.approx(float(row[choice.token]), abs=1e-5)
            assert choice.details.rank == 1 + int((row > row[choice.token]).sum())
            values, ids = row.topk(5)
            assert [token for token, _ in choice.details.top] == ids.tolist()
            assert [value for _, value in choice.details.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_leave_out_what_is_never_sampled() -> None:
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 4] = 9, 5
    rows = [continuation(SamplingParams(temperature=0, logprobs=2))]
    (choice,) = choose_tokens(logits, rows, np.array([3]))
    assert choice.token == 4 and choice.details is not None
    assert choice.details.rank == 1 and [token for token, _ in choice.details.top] == [4, 0]
    assert choice.logprob == pytest.approx(float(logits[0].log_softmax(0)[4]), abs=1e-6), "of all ids"


def test_prompt_logprobs() -> None:
    logits = random_logits(5)
    found = prompt_logprobs(logits, [1, 2, 3, 4, 5], 2)
    for row, token, entry in zip(logits.log_softmax(-1), [1, 2, 3, 4, 5], found, strict=True):
        assert entry.token == token and entry.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert [i for i, _ in entry.top] == row.topk(2).indices.tolist()
    (alone,) = prompt_logprobs(logits[3:4], [4], 2)
    assert alone == found[3], "however the prompt is cut"
    assert math.isclose(sum(math.exp(v) for _, v in prompt_logprobs(logits[:1, :5], [0], 20)[0].top), 1, rel_tol=1e-5)
