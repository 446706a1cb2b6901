"""Whatever else runs beside it, a request gets from the engine what `generate_batch` gives it alone."""

import dataclasses
import json
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimax_m1 import shipped
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.engine.engine import Engine
from minimax_m1.generation import generate_batch
from minimax_m1.kernels import choose
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams
from minimax_m1.settings import EngineSettings
from minimax_m1.tokenizer import MiniMaxM1Tokenizer, parse_answer

VOCAB = 211
SLOT_BYTES, PAGE_BYTES = 3 * 4 * 8 * 8 * 4, 2 * 2 * 8 * 64 * 4  # of the model below


@pytest.fixture(scope="module")
def model() -> MiniMaxM1ForCausalLM:
    config = MiniMaxM1Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_type_list=(0, 1, 0, 0),
        num_local_experts=4,
        initializer_range=0.2,
        max_position_embeddings=8192,
        eos_token_id=7,
    )
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    return model.eval()


def make_engine(model, **options) -> Engine:
    return Engine(model, None, EngineSettings(**{"cache_bytes": 40 << 20, "max_batch_size": 8, **options}))


def assert_nothing_leaks(engine: Engine) -> None:
    assert not engine.has_work() and not engine.scheduler.running
    engine.forget_prefixes()
    assert engine.cache.pool.num_free == engine.cache.pool.num_pages
    assert sorted(engine.scheduler._free_slots) == list(range(engine.cache.max_seqs))


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=rng.choice([1, 2, 8, 24, 60]),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 5, 40]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        presence_penalty=rng.choice([0.0, 0.5]),
        min_tokens=rng.choice([0, 1]),
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 3]))),
        ignore_eos=rng.random() < 0.3,
        logit_bias={rng.randrange(VOCAB): rng.choice([-100, 5])} if rng.random() < 0.2 else {},
        seed=rng.randrange(1 << 40),
    )


def random_requests(rng: random.Random, count: int, longest: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to `longest` tokens, some of which begin alike."""
    shared = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(3)]
    requests = []
    for _ in range(count):
        length = min(longest, int(longest ** rng.random()) + rng.randrange(3))
        own = [rng.randrange(VOCAB) for _ in range(max(1, length))]
        if rng.random() < 0.4:
            prefix = rng.choice(shared)
            own = (prefix[: rng.randint(1, len(prefix))] + own)[:longest]
        requests.append((own, random_params(rng)))
    return requests


def run_schedule(engine: Engine, requests, rng: random.Random, abort_share: float) -> dict[int, object]:
    """Add the requests at random steps, abort some at random steps; return index -> result."""
    waiting, names, results = list(range(len(requests))), {}, {}
    for _ in range(100_000):
        while waiting and rng.random() < 0.5:
            i = waiting.pop(0)
            names[engine.add(*requests[i])] = i
        running = [name for name, i in names.items() if i not in results]
        if running and rng.random() < abort_share:
            engine.abort(rng.choice(running))
        for delta in engine.step():
            if delta.result is not None:
                results[names[delta.request_id]] = delta.result
        if not waiting and not engine.has_work():
            return results
    raise AssertionError("some request does not end")


def assert_as_alone(model, requests, results) -> None:
    assert results.keys() == set(range(len(requests)))
    for i, (prompt, params) in enumerate(requests):
        alone = generate_batch(model, [prompt], params)[0]
        got = results[i].token_ids
        if results[i].finish_reason == "abort":
            assert got == alone[: len(got)]
        else:
            assert got == alone, f"request {i}: {params}"


@pytest.mark.parametrize("seed", [0, 1])
def test_64_random_requests_get_what_they_get_alone(model, seed):
    rng = random.Random(seed)
    requests = random_requests(rng, 64, 3000)
    engine = make_engine(model, max_num_tokens=512, speculative_tokens=rng.choice([0, 4]))
    results = run_schedule(engine, requests, rng, abort_share=0.02)
    assert_as_alone(model, requests, results)
    assert engine.prefix_cache.stats.hits > 0
    assert_nothing_leaks(engine)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 1 << 30),
    st.integers(1, 5),
    st.integers(12, 40),
    st.booleans(),
    st.sampled_from([0, 3]),
    st.sampled_from([None, 64]),
)
def test_every_schedule_ends_and_leaks_nothing(model, seed, batch_size, num_pages, prefix_cache, drafts, every):
    """Few pages: sequences are preempted, cached prefixes evicted; everyone still gets its own."""
    rng = random.Random(seed)
    requests = random_requests(rng, 12, 300)
    checkpoint_bytes = rng.choice([0, 30_000, 1 << 20])
    engine = make_engine(
        model,
        max_batch_size=batch_size,
        max_num_tokens=batch_size + rng.choice([64, 200]),
        max_model_len=400,
        cache_bytes=batch_size * SLOT_BYTES + num_pages * PAGE_BYTES + checkpoint_bytes,
        checkpoint_bytes=checkpoint_bytes,
        prefix_cache=prefix_cache,
        speculative_tokens=drafts,
        checkpoint_every=every,
    )
    results = run_schedule(engine, requests, rng, abort_share=0.05)
    assert_as_alone(model, requests, results)
    assert_nothing_leaks(engine)


def test_preempted_sequences_get_what_they_get_alone(model):
    """Eight sequences that grow to 5 pages each, in 20 pages."""
    rng = random.Random(3)
    requests = [([rng.randrange(VOCAB) for _ in range(100)], random_params(rng)) for _ in range(8)]
    requests = [
        (prompt, dataclasses.replace(params, max_new_tokens=200, ignore_eos=True, stop_token_ids=()))
        for prompt, params in requests
    ]
    engine = make_engine(
        model,
        max_model_len=320,
        cache_bytes=8 * SLOT_BYTES + 20 * PAGE_BYTES,
        checkpoint_bytes=0,
    )
    results = run_schedule(engine, requests, rng, abort_share=0)
    assert engine.scheduler.num_preemptions > 0
    assert_as_alone(model, requests, results)
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_speculation_gives_the_bits_of_decoding_one_by_one(model, temperature):
    """Prompts that repeat, so that drafts are right and wrong; log-probabilities are compared exactly."""
    rng = random.Random(5)
    prompts = []
    for _ in range(5):
        phrase = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 9))]
        prompts.append(phrase * rng.randint(3, 20))
    params = SamplingParams(max_new_tokens=80, temperature=temperature, ignore_eos=True, seed=2, logprobs=3)
    results, steps = [], []
    for drafts in (0, 5):
        engine = make_engine(model, speculative_tokens=drafts)
        names = [engine.add(prompt, params) for prompt in prompts]
        found = {}
        count = 0
        while engine.has_work():
            found |= {delta.request_id: delta.result for delta in engine.step() if delta.result is not None}
            count += 1
        results.append([(found[name].token_ids, found[name].logprobs) for name in names])
        steps.append(count)
        assert_nothing_leaks(engine)
    assert results[0] == results[1]
    assert steps[1] < steps[0]  # some drafts were right


def rows_depend_on_company() -> str | None:
    """Say why bits cannot be promised here: decode rows need our kernels, prefill rows PyTorch's steady product."""
    if choose(None, torch.empty(0)) != "compiled":
        return "the compiled kernels were not built here"
    x, weight = torch.randn(512, 64), torch.randn(96, 64)
    whole = torch.nn.functional.linear(x, weight)
    steady = all(torch.equal(torch.nn.functional.linear(x[:n], weight), whole[:n]) for n in (16, 17, 40, 64, 150, 333))
    return None if steady else "on this machine a row of PyTorch's matrix product depends on how many there are"


@pytest.mark.skipif(rows_depend_on_company() is not None, reason=str(rows_depend_on_company()))
@pytest.mark.parametrize("drafts", [0, 4])
def test_company_chunks_and_cached_prefixes_change_no_bit(model, drafts):
    """Log-probabilities compared exactly: alone with the whole budget, and crowded in small chunks with cache hits."""
    rng = random.Random(7)
    requests = [(prompt, dataclasses.replace(params, logprobs=2)) for prompt, params in random_requests(rng, 24, 1000)]
    crowd = make_engine(model, max_num_tokens=150, max_batch_size=20, speculative_tokens=drafts, checkpoint_every=128)
    results = run_schedule(crowd, requests, rng, abort_share=0)
    assert crowd.prefix_cache.stats.hits > 0
    alone = make_engine(model, prefix_cache=False)
    for i, (prompt, params) in enumerate(requests):
        expected = alone.generate([prompt], params)[0]
        assert (results[i].token_ids, results[i].logprobs) == (expected.token_ids, expected.logprobs), i


def test_budgets_grammars_stops_and_tools_in_one_batch():
    """The shipped model with everything that decides a token: each request as alone through `generate_batch`."""
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(shipped.path())
    model = MiniMaxM1ForCausalLM.from_pretrained(shipped.path(), dtype="float32")
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    number = {"type": "integer", "minimum": 0, "maximum": 999}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    forms = [
        {},
        {"max_thinking_tokens": 0},
        {"max_thinking_tokens": 7},
        {"max_thinking_tokens": 7, "structured": {"json_schema": schema}},
        {"structured": {"regex": "[0-9]{3}"}},
        {"structured": {"choice": ["yes", "no"]}, "max_thinking_tokens": 3},
        {"tools": [tool], "tool_choice": "required", "max_thinking_tokens": 5},
        {"stop": ["1", " is"], "min_tokens": 4},
        {"repetition_stop_tokens": 3, "repetition_stop_probability": 0.9},
        {"temperature": 1.3, "seed": 3, "frequency_penalty": 1.0, "max_thinking_tokens": 9},
    ]
    questions = ["What is 38 + 72?", "Sort 31, 4, 15.", "Reverse the word plum."]
    requests = []
    for i, form in enumerate(forms * 2):
        messages = [{"role": "user", "content": questions[i % 3]}]
        values = {"temperature": 0.0, "max_new_tokens": 90} | form
        requests.append((tokenizer.apply_chat_template(messages), SamplingParams.parse(values)))
    engine = Engine(model, tokenizer, EngineSettings(max_batch_size=8, cache_bytes=64 << 20, speculative_tokens=3))
    results = engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    for (prompt, params), result in zip(requests, results, strict=True):
        assert result.token_ids == generate_batch(model, [prompt], params, tokenizer=tokenizer)[0], params
        budget = params.max_thinking_tokens
        assert budget is None or result.usage.reasoning_tokens <= budget
    assert [r.usage.reasoning_tokens for r in results[1:3]] == [0, 7]
    answers = [parse_answer(result.text) for result in results[:10]]
    assert json.loads(answers[3].content)["n"] is not None and results[3].usage.reasoning_tokens == 7
    assert re.fullmatch("[0-9]{3}", answers[4].content) and answers[5].content in ("yes", "no")
    assert [call.name for call in answers[6].tool_calls][:1] == ["add"]
    assert results[7].stop_reason in ("1", " is") and results[8].finish_reason == "repetition"
    assert_nothing_leaks(engine)
