"""The same steps on one, two and four ranks, in every layout: same losses, gradients and weights."""

import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.testing._internal.distributed.fake_pg import FakeStore

from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.loss import packed_losses
from minimax_m1.training.optimizer import build_optimizers
from minimax_m1.training.parallel import AXES, close_world, context_part, init_world, load_weights, parallelize
from minimax_m1.training.trainer import train_step
from tests.ranks import launch
from tests.training.parallel_worker import CONFIG, LAYOUTS, STORED, make_batch, make_model, make_settings, probe, run

# Wanted of training in float32. In bfloat16 another order of the same sums can round a weight's gradient elsewhere.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def num_ranks(layout):
    return math.prod(layout.get(axis, 1) for axis in AXES)


def one_process(**layout):
    settings = make_settings(**layout)
    world = init_world(settings)
    try:
        model = make_model(**layout)
        parallelize(model, world, settings)
        return {**run(model, world), "sums": probe(model)}
    finally:
        close_world(world)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # no_dist says so too
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_is_one_process(tmp_path, ranks):
    make_model().save_pretrained(tmp_path / "whole")
    names = [name for name, layout in LAYOUTS.items() if num_ranks(layout) == ranks]
    launch("tests.training.parallel_worker", ranks, str(tmp_path), *names)

    expected: dict = {}
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["name"] for result in results] == names
    for result in results:
        alone = {name: value for name, value in LAYOUTS[result["name"]].items() if name in ("dtype", "experts")}
        dtype = alone.get("dtype", "float32")
        if str(alone) not in expected:
            expected[str(alone)] = one_process(**alone)
        one = expected[str(alone)]
        for step, (actual, wanted) in enumerate(zip(result["steps"], one["steps"], strict=True)):
            assert actual == pytest.approx(wanted, rel=TOLERANCE[dtype]), f"{result['name']}, step {step}"
        assert result["sums"] == pytest.approx(one["sums"], rel=1e-3, abs=1e-3), result["name"]
        if result["name"] not in STORED:
            continue
        assert result["same"] == {"init": True, "load": True, "gather": True, "matrices": True}, result["name"]
        # what these ranks have written, one process reads
        copy = MiniMaxM1ForCausalLM(CONFIG)
        state = {"model": {name: p.detach() for name, p in copy.named_parameters()}}
        dcp.load(state, checkpoint_id=tmp_path / result["name"], no_dist=True)
        assert probe(copy) == pytest.approx(result["sums"], rel=1e-4, abs=1e-4), result["name"]


def test_load_weights_into_a_whole_network(tmp_path):
    model, copy = make_model(), MiniMaxM1ForCausalLM(CONFIG)
    model.save_pretrained(tmp_path)
    load_weights(copy, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), copy.parameters(), strict=True))
    larger = MiniMaxM1ForCausalLM(CONFIG.replace(num_local_experts=5))
    with pytest.raises(UserError, match=r"experts.4.w1.weight; accepted: \[24, 32\]|gate"):
        load_weights(larger, tmp_path)


def test_one_rank_in_bfloat16_shows_its_own_weights_after_a_step_and_after_an_evaluation():
    settings = make_settings(dtype="bfloat16", batches_per_step=1)
    world = init_world(settings)
    try:
        model = make_model()
        parallelize(model, world, settings)
        batch, optimizers = make_batch(0, 0), build_optimizers(model, settings)
        for _ in range(2):
            train_step(model, optimizers, [batch], world, settings, 0)
            assert all(weight.dtype == torch.float32 for weight in model.parameters())
            with torch.no_grad():
                packed_losses(model, batch)
            assert all(weight.dtype == torch.float32 for weight in model.parameters())
    finally:
        close_world(world)


def test_one_process_in_float32_needs_nobody_else():
    world = init_world(make_settings())
    assert world.mesh is None and world.is_main and (world.num_data_ranks, world.num_context_ranks) == (1, 1)
    assert not dist.is_initialized()
    batch = make_batch(0, 0)
    assert context_part(batch, world) is batch


@pytest.fixture
def four_ranks(monkeypatch):
    """The first of four ranks, of which the others answer nothing."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        ({"dp_shard": 3}, r"= 3 cannot be used; accepted: 4, the number of processes"),
        ({"dp_shard": 0, "context_parallel": 3}, r"1 x 1 x 1 x 3 = 3 cannot be used"),
        ({"dp_replicate": 2, "dp_shard": 2, "expert_parallel": 2}, r"2 x 2 x 2 x 1 = 8 cannot be used"),
        ({"dp_shard": 4, "batches_per_step": 6}, r"batches_per_step: 6 cannot be used; accepted: a multiple of 4"),
    ],
)
def test_axes_that_do_not_fit_are_refused_before_anything_is_started(monkeypatch, layout, field):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=field):
        init_world(make_settings(**layout))
    assert not dist.is_initialized()


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(device):
    with pytest.raises(UserError, match=f"^device: '{device}' cannot be used: "):
        init_world(make_settings(device=device))


@pytest.mark.parametrize(
    ("fields", "layout", "message"),
    [
        (
            {"num_local_experts": 6},
            {"expert_parallel": 4},
            "expert_parallel: 4 cannot be used; accepted: a divisor of 6",
        ),
        (
            {"hidden_size": 33, "rotary_dim": 4},
            {"expert_parallel": 2, "dp_shard": 2},
            "expert_parallel: 2 cannot be used with .* = 2; accepted: a hidden_size",
        ),
        ({"tie_word_embeddings": True}, {"dp_shard": 4}, "tie_word_embeddings: True cannot be used"),
        ({"dynamic_gate": True}, {"dp_shard": 4}, "dynamic_gate: True cannot be used"),
    ],
)
def test_networks_that_cannot_be_divided_are_refused(four_ranks, fields, layout, message):
    settings = make_settings(**layout)
    world = init_world(settings)
    model = MiniMaxM1ForCausalLM(CONFIG.replace(**fields))
    with pytest.raises(UserError, match=message):
        parallelize(model, world, settings)


def test_ranks_share_the_slots_and_the_tokens(four_ranks):
    world = init_world(make_settings(dp_shard=0, context_parallel=2))
    assert (world.data_rank, world.num_data_ranks, world.context_rank, world.num_context_ranks) == (0, 2, 0, 2)
    batch = make_batch(0, 2)
    part = context_part(batch, world)
    rows = part.input_ids.shape[0]
    assert rows == batch.input_ids.shape[0] // 2
    assert torch.equal(part.targets, batch.targets[:rows])
    assert torch.equal(part.layout.positions, batch.layout.positions[:rows])
    short = make_batch(0, 0)
    single = type(short)(short.input_ids[:1], short.targets[:1], type(short.layout).packed([1]))
    with pytest.raises(UserError, match="context_parallel: 2 cannot be used for a micro-batch of 1 tokens"):
        context_part(single, world)
