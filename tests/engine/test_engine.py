"""The engine's public face: results, errors, aborts, pauses, samples. (Its tokens: tests/parity.)"""

import asyncio

import pytest
import torch

from minimax_m1.engine import AsyncEngine, Engine
from minimax_m1.errors import UserError
from minimax_m1.generation import generate_batch
from minimax_m1.sampling import SamplingParams
from minimax_m1.settings import EngineSettings

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, max_batch_size=4, cache_bytes=8 << 20)


@pytest.fixture
def engine(loaded):
    """An engine that has nothing to do and remembers nothing."""
    yield loaded
    for name in list(loaded._requests):
        loaded.abort(name)
    loaded.step()
    loaded.forget_prefixes()
    assert loaded.cache.pool.num_free == loaded.cache.pool.num_pages


def drain(engine):
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    return deltas


def test_results_come_in_the_order_of_the_prompts(engine):
    prompts = ["pear apple", "plum", "how many letters", "sort the words think think"]
    each = [SamplingParams(max_new_tokens=n, temperature=0.0) for n in (9, 3, 5, 1)]
    results = engine.generate(prompts, each)
    for prompt, params, result in zip(prompts, each, results, strict=True):
        ids = engine.tokenizer.encode(prompt)
        assert result.prompt_ids == ids
        assert result.token_ids == generate_batch(engine.model, [ids], params, tokenizer=engine.tokenizer)[0]
        assert result.finish_reason == "length" and result.stop_reason is None
        assert result.usage.completion_tokens == params.max_new_tokens
        assert result.usage.total_tokens == len(ids) + params.max_new_tokens
        assert result.text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_deltas_join_to_the_result(engine):
    name = engine.add("pear apple", SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, logprobs=2))
    deltas = drain(engine)
    result = deltas[-1].result
    assert all(delta.result is None for delta in deltas[:-1]) and {delta.request_id for delta in deltas} == {name}
    assert [token for delta in deltas for token in delta.token_ids] == result.token_ids
    assert "".join(delta.text for delta in deltas) == result.text
    assert [entry for delta in deltas for entry in delta.logprobs] == result.logprobs
    assert len(result.logprobs) == 10


def test_n_samples_share_one_prefill_and_differ_by_seed(engine):
    prompt = engine.tokenizer.encode("pear apple plum quince. " * 30)
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=11, n=6)  # more than max_batch_size
    results = engine.generate([prompt], params)
    assert [result.index for result in results] == list(range(6))
    for i, result in enumerate(results):
        alone = SamplingParams(max_new_tokens=8, temperature=1.0, seed=11 + i)
        assert result.token_ids == generate_batch(engine.model, [prompt], alone, tokenizer=engine.tokenizer)[0]


def test_n_samples_run_the_prompt_once(engine):
    ran = []
    original = engine.model.forward_packed
    engine.model.forward_packed = lambda ids, *rest: ran.append(len(ids)) or original(ids, *rest)
    try:
        engine.generate([[5] * 100], SamplingParams(max_new_tokens=1, n=4))
    finally:
        del engine.model.forward_packed
    assert sum(ran) == 100


def test_an_aborted_request_keeps_what_it_has_and_frees_its_room(engine):
    kept, gone = engine.add("plum", GREEDY), engine.add("pear apple", SamplingParams(max_new_tokens=1000))
    deltas = engine.step() + engine.step()
    engine.abort(gone)
    deltas += drain(engine)
    results = {delta.request_id: delta.result for delta in deltas if delta.result is not None}
    assert results[gone].finish_reason == "abort" and len(results[gone].token_ids) == 2
    assert results[kept].finish_reason == "length"
    with pytest.raises(UserError, match="request_id"):
        engine.abort(gone)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_paused_request_costs_nothing_and_goes_on_to_the_bit(engine, on_disk, steps, tmp_path):
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=5, logprobs=0)
    expected = engine.generate(["pear apple plum"], params)[0]
    name = engine.add("pear apple plum", params)
    deltas = [delta for _ in range(steps) for delta in engine.step()]
    engine.pause(name, tmp_path if on_disk else None)
    assert not engine.has_work()
    engine.forget_prefixes()
    assert engine.cache.pool.num_free == engine.cache.pool.num_pages
    assert len(list(tmp_path.iterdir())) == (on_disk and steps > 0)
    engine.generate(["something else in the meantime"] * 4, GREEDY)
    engine.resume(name)
    result = (deltas + drain(engine))[-1].result
    assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)
    assert not list(tmp_path.iterdir())


def test_prefix_hit_gives_the_bits_of_a_miss(loaded, engine):
    system = engine.tokenizer.encode("the pear and the plum. " * 60)
    question = engine.tokenizer.encode("how many letters in quince")
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=1, logprobs=5)
    fresh = Engine(engine.model, engine.tokenizer, EngineSettings(cache_bytes=8 << 20, prefix_cache=False))
    miss = fresh.generate([system + question], params)[0]
    first = engine.generate([system + question], params)[0]
    hit = engine.generate([system + question], params)[0]
    assert miss.usage.cached_tokens == first.usage.cached_tokens == 0
    assert hit.usage.cached_tokens == (len(system + question) - 1) // 64 * 64
    assert hit.token_ids == first.token_ids == miss.token_ids
    assert hit.logprobs == first.logprobs == miss.logprobs  # floats, compared exactly
    other = engine.generate([system + [9] * 50], params)[0]  # shares the beginning only
    assert other.logprobs == fresh.generate([system + [9] * 50], params)[0].logprobs


def test_prompt_logprobs_are_those_of_the_whole_prompt_at_once(engine):
    ids = engine.tokenizer.encode("pear apple plum quince. " * 20)
    params = SamplingParams(max_new_tokens=2, temperature=0.0, prompt_logprobs=2, n=2)
    engine.generate([ids], GREEDY)  # a cached prefix must not leave a gap
    for result in engine.generate([ids], params):
        assert result.usage.cached_tokens == 0 and result.prompt_logprobs[0] is None
        logits = engine.model(torch.tensor([ids])).logits[0]
        expected = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        found = torch.tensor([entry.logprob for entry in result.prompt_logprobs[1:]])
        assert [entry.token for entry in result.prompt_logprobs[1:]] == ids[1:]
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_preempted_prompt_keeps_its_logprobs(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, max_batch_size=2, cache_bytes=1 << 20)
    ids = [5] * 700
    params = SamplingParams(max_new_tokens=2, temperature=0.0, prompt_logprobs=0)
    expected = engine.generate([ids], params)[0].prompt_logprobs
    engine.scheduler.max_num_tokens = 320
    engine.add(ids, params)
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.scheduler.max_num_tokens = 500  # chunks end elsewhere now
    assert drain(engine)[-1].result.prompt_logprobs == expected


def test_a_preempted_sequence_is_counted_once(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, max_batch_size=2, cache_bytes=1 << 20, routing_log=True)
    name = engine.add([5] * 300, GREEDY)
    for _ in range(4):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    result = drain(engine)[-1].result
    assert result.request_id == name and len(result.token_ids) == 12
    assert result.routing.num_tokens == engine.routing.num_tokens == 300 + 12 - 1  # the last token has not run
    assert engine.prefix_cache.stats.queries == 1


def test_a_short_prompt_does_not_wait_for_a_long_one(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, max_batch_size=4, cache_bytes=8 << 20, max_num_tokens=256)
    long, short = engine.add([5] * 3000, GREEDY), engine.add([6] * 20, GREEDY)
    order = [delta.request_id for delta in drain(engine) if delta.result is not None]
    assert order == [short, long]
    engine.add([5] * 3000, GREEDY)  # and a long one goes on beside many short ones
    for i in range(40):
        engine.add([7] * (100 + i), SamplingParams(max_new_tokens=1))
    lengths = [len(delta.result.prompt_ids) for delta in drain(engine) if delta.result is not None]
    assert lengths.index(3000) < 40


def test_expert_threshold_of_one_request_leaves_the_others_alone(engine):
    plain = SamplingParams(max_new_tokens=8, temperature=0.0, logprobs=1)
    frugal = SamplingParams(max_new_tokens=8, temperature=0.0, logprobs=1, expert_threshold=0.3)
    alone = [engine.generate(["pear apple plum"], params, routing_log=True)[0] for params in (plain, frugal)]
    engine.forget_prefixes()
    together = engine.generate(["pear apple plum"] * 2, [plain, frugal], routing_log=True)
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs == other.logprobs and one.routing.to_dict() == other.routing.to_dict()
    assert alone[0].logprobs != alone[1].logprobs


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ("", None, "prompt: is empty"),
        ([1, 2, 100_000], None, "prompt: id 100000 is out of range; accepted: 0 to 319"),
        ([-1], None, "prompt: id -1"),
        ([5] * 10_000_000, None, "prompt: 10000000 tokens are too many; accepted: up to"),
        ("pear", {"max_thinking_tokens": -1}, "max_thinking_tokens: -1"),
        ("pear", {"temprature": 1}, "temperature"),
        ("pear", {"structured": {"json_schema": {"type": "nonsense"}}}, "json_schema"),
        ("pear", {"structured": {"regex": "("}}, "regex"),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(engine, prompt, params, match):
    name = engine.add("pear apple", GREEDY)
    deltas = engine.step()
    with pytest.raises(UserError, match=match):
        engine.add(prompt, params)
    result = (deltas + drain(engine))[-1].result
    assert result.request_id == name and len(result.token_ids) == 12
    with pytest.raises(UserError, match=match):
        engine.generate(["plum", prompt], [GREEDY, params or GREEDY])
    assert not engine.has_work() or drain(engine) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_batch_sise": 3}, "max_batch_size"),
        ({"max_batch_size": 0}, "max_batch_size: 0"),
        ({"max_num_tokens": 10}, "max_num_tokens: 10"),
        ({"cache_bytes": 1000}, "cache_bytes: 1,000"),
    ],
)
def test_bad_settings_are_refused(tiny_checkpoint, settings, match):
    with pytest.raises(UserError, match=match):
        Engine.from_pretrained(tiny_checkpoint, **settings)


def test_a_closed_stream_is_gone_before_the_next_step(loaded):
    def held():
        return len(loaded.scheduler.running), len(loaded.scheduler._free_slots), loaded._requests

    async def main():
        async with AsyncEngine(loaded) as engine:
            free = (await engine.call(held))[1]
            stream = await engine.add(["pear", "plum"], SamplingParams(max_new_tokens=2000, temperature=0.0, n=2))
            await stream.take()
            assert (await engine.call(held))[:2] == (4, free - 4)
            await stream.aclose()
            assert await engine.call(held) == (0, free, {})  # calls come in order, and before another step

    asyncio.run(main())


def test_async_requests_run_together_and_leave_when_nobody_listens(loaded):
    async def answer(engine, prompt, params):
        return [delta async for delta in engine.generate(prompt, params)]

    async def leave(engine):
        deltas = engine.generate("pear", SamplingParams(max_new_tokens=2000, temperature=0.0))
        async for _ in deltas:
            break
        await deltas.aclose()

    async def main():
        async with AsyncEngine(loaded) as engine:
            prompts = ["pear", "apple plum", "how many"] * 4
            answers = await asyncio.gather(*(answer(engine, prompt, GREEDY) for prompt in prompts), leave(engine))
            with pytest.raises(UserError, match="prompt: is empty"):
                await answer(engine, "", GREEDY)
            while await engine.call(loaded.has_work):  # the request that was left has still to be swept up
                await asyncio.sleep(0.01)
            assert await engine.call(lambda: loaded._requests) == {}
            return prompts, answers[:-1]

    prompts, answers = asyncio.run(main())
    for prompt, deltas in zip(prompts, answers, strict=True):
        expected = loaded.generate([prompt], GREEDY)[0]
        assert deltas[-1].result.token_ids == expected.token_ids
        assert "".join(delta.text for delta in deltas) == expected.text
    assert torch.is_inference_mode_enabled() is False
