"""Decoding steps padded to a few sizes give what they give without padding; on a GPU, replayed as CUDA graphs."""

import copy

import pytest
import torch

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.engine import Engine
from minimax_m1.engine.decode_graphs import DecodeGraphs, padded_size
from minimax_m1.kernels import compiled
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams
from minimax_m1.settings import EngineSettings

VOCAB = 211

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_compiled = pytest.mark.skipif(not compiled.library, reason="not built here")


@pytest.fixture(scope="module")
def model() -> MiniMaxM1ForCausalLM:
    config = MiniMaxM1Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attn_type_list=(0, 1, 0),
        num_local_experts=4,
        initializer_range=0.2,
        eos_token_id=7,
    )
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    return model.eval()


def make_engine(model, backend=None, **settings) -> Engine:
    options = {"max_batch_size": 9, "max_num_tokens": 400, "cache_bytes": 32 << 20, "routing_log": True, **settings}
    return Engine(model, None, EngineSettings(**options), backend)


def add_requests(engine, count):
    """Requests that come together and end one after the other, so that every batch size comes up."""
    generator = torch.Generator().manual_seed(count)
    for i in range(count):
        ids = torch.randint(0, VOCAB, (1 + 37 * i,), generator=generator).tolist()
        params = SamplingParams(max_new_tokens=12 + 3 * i, temperature=1.0, seed=i, logprobs=0, ignore_eos=True)
        engine.add(ids, params, request_id=f"{count}-{i}")


def memory(engine):
    """Everything that sequences have in the pools, whoever it belongs to, but the spare slot's and page's."""
    cache = engine.cache
    return cache._states[:, :-1], cache._keys[:, :, :-1], cache._values[:, :, :-1], cache.block_tables[:-1]


def run_beside(padded, plain):
    """Run two engines step by step, with requests that come in the middle, and compare them after every step."""
    for engine in (padded, plain):
        for tensor in memory(engine)[1:3]:
            tensor.zero_()
    for round_ in range(3):
        for engine in (padded, plain):
            add_requests(engine, 9 - 2 * round_)
        while plain.has_work() and not (round_ < 2 and len(plain.scheduler.running) == 4 and not waits(plain)):
            gained = [[(d.request_id, d.token_ids, d.logprobs) for d in engine.step()] for engine in (padded, plain)]
            assert gained[0] == gained[1]
            assert padded.cache.lens[:-1] == plain.cache.lens[:-1] and padded.cache.pages == plain.cache.pages
            for ours, expected in zip(memory(padded), memory(plain), strict=True):
                assert torch.equal(ours, expected)
    assert not padded.has_work()


def waits(engine):
    return engine.scheduler.waiting or any(not s.decodes for s in engine.scheduler.running)


def test_sizes_are_few_and_padding_is_small():
    sizes = [padded_size(count, 300) for count in range(1, 301)]
    assert all(count <= size < 1.25 * count or size == count for count, size in enumerate(sizes, 1))
    expected = set(range(1, 9)).union(range(10, 17, 2), range(20, 33, 4), range(40, 65, 8), range(80, 129, 16))
    assert set(sizes) == expected.union(range(160, 257, 32), [300])
    assert padded_size(9, 9) == 9


@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_compiled), "torch"])
def test_padded_steps_give_what_plain_ones_give(model, backend, monkeypatch):
    counts = set()

    def to_four(count, most):
        counts.add(count)
        return min(most, -(-count // 4) * 4)

    monkeypatch.setattr("minimax_m1.engine.decode_graphs.padded_size", to_four)
    padded, plain = (make_engine(model, backend) for _ in range(2))
    padded.runner.graphs = DecodeGraphs(model, padded.cache, backend)
    assert plain.runner.graphs is None
    run_beside(padded, plain)
    assert counts == set(range(1, 10)) and padded.runner.graphs.sizes == [4, 8, 9]
    ours, expected = padded.routing, plain.routing
    assert (ours.counts == expected.counts).all() and (ours.weight_sums == expected.weight_sums).all()
    assert ours.num_tokens == expected.num_tokens


@needs_gpu
def test_a_replayed_graph_gives_what_its_kernels_give_one_by_one(model, monkeypatch):
    on_gpu = copy.deepcopy(model).to("cuda", torch.bfloat16)
    graphs, plain = (make_engine(on_gpu) for _ in range(2))
    monkeypatch.setattr(plain.runner.graphs, "_record", lambda forward: forward)  # the same padded rows
    run_beside(graphs, plain)
    assert graphs.runner.graphs.sizes == list(range(1, 10))
    on_gpu.model.layers[1].self_attn.o_proj.weight.data.mul_(2)  # a graph reads the weights as they are
    run_beside(graphs, plain)


@needs_gpu
def test_the_host_waits_for_nothing_while_a_step_runs(model):
    engine = make_engine(copy.deepcopy(model).to("cuda", torch.bfloat16))
    for mode in ("default", "error"):  # the first time, kernels are compiled and graphs recorded
        add_requests(engine, 5)
        with torch.inference_mode():
            while engine.has_work():
                step = engine.scheduler.schedule()
                torch.cuda.set_sync_debug_mode(mode)
                hidden, routings = engine.runner.run(step)
                torch.cuda.set_sync_debug_mode("default")
                engine.runner.commit(step, hidden, routings, engine.runner.sample(step, hidden))
                for sequence in list(engine.scheduler.running):
                    engine._report(sequence)
                engine._deltas.clear()
