"""The memory of a rank against what autograd saves and against sums by hand; layouts, speeds and totals."""

import dataclasses
import math
import weakref

import pytest

from minimax_m1.accounting import parameters, training_flops
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.planning import (
    GPUS,
    Layout,
    Workload,
    _dispatch_seconds,
    _gather_seconds,
    _neighbours,
    layer_activation_bytes,
    layouts,
    rank_flops,
    rank_memory,
    search,
    step_time,
    totals,
)

M1 = MiniMaxM1Config.preset("minimax-m1")
H800 = GPUS["h800"]
ONCE = 0.02  # what a layer saves once and not for every token (the router in float32), or shares with others (angles)
BASE = MiniMaxM1Config(
    vocab_size=96,
    hidden_size=160,
    intermediate_size=224,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rotary_dim=32,
    attn_type_list=(0, 1),
    num_local_experts=4,
    postnorm=True,
)


def m1_run(**changes: object) -> Workload:
    values = dict(config=M1, gpu=H800, num_gpus=512, sequence_length=32_768, batch_tokens=2**24)
    return Workload(**{**values, **changes})


@pytest.mark.parametrize("shared", [0, 96])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_are_what_autograd_saves(dtype: str, shared: int) -> None:
    torch = pytest.importorskip("torch")
    from minimax_m1.batch import ForwardBatch
    from minimax_m1.model import MiniMaxM1ForCausalLM, rotary_angles

    config, T = BASE.replace(shared_intermediate_size=shared), 512
    model = MiniMaxM1ForCausalLM(config).to(getattr(torch, dtype))
    model.init_weights(seed=0)
    batch = ForwardBatch.packed([T], backend="torch")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for is_softmax, layer in enumerate(model.model.layers):
        saved = {}

        def keep(t, saved=saved):
            if t.untyped_storage().data_ptr() not in weights:
                saved[t.untyped_storage().data_ptr()] = t  # kept alive, so that no storage is used twice
            return t

        x = torch.randn(T, config.hidden_size, dtype=model.dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x, batch, rotary_angles(batch.positions, config), None)
        measured = sum(t.untyped_storage().nbytes() for t in saved.values()) / T
        planned = layer_activation_bytes(config, bool(is_softmax), 2 if dtype == "bfloat16" else 4, Layout())
        assert planned == pytest.approx(measured, rel=ONCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_step_on_one_process(checkpointing: bool) -> None:
    """The tensors that live at once in forward and backward, beside parameters and gradients, in float32."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from minimax_m1.batch import ForwardBatch
    from minimax_m1.model import MiniMaxM1ForCausalLM

    class Living(TorchDispatchMode):
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}

        def meet(self, values, counts: bool) -> None:
            for x in tree_leaves(values):
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.sizes:
                    storage = x.untyped_storage()
                    self.sizes[storage._cdata] = storage.nbytes() if counts else 0
                    self.now += self.sizes[storage._cdata]
                    weakref.finalize(storage, self.forget, storage._cdata)
            self.peak = max(self.peak, self.now)

        def forget(self, key: int) -> None:
            self.now -= self.sizes.pop(key)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.meet((args, kwargs), counts=False)  # what was there before
            result = function(*args, **(kwargs or {}))
            self.meet(result, counts=True)
            return result

    T = 1024
    sizes = dict(vocab_size=512, num_local_experts=4, num_hidden_layers=3, attn_type_list=(0, 1, 0))
    config = MiniMaxM1Config.preset("nano").replace(**sizes)
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    model.model.activation_checkpointing = checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(0, config.vocab_size, (T,))
    with Living() as living:
        hidden, _ = model.forward_packed(ids, ForwardBatch.packed([T], backend="torch"))
        model.lm_head.token_losses(hidden, ids)[0].backward()
    workload = Workload(config, H800, 1, T, T, dtype="float32")
    memory = rank_memory(workload, Layout(), T, checkpointing)
    planned = memory.total - memory.parameters - memory.moments - memory.gradients
    assert living.peak < planned < 1.2 * living.peak


def test_memory_of_minimax_m1_by_hand() -> None:
    """32 shards x 8 groups of experts x 2 context ranks; a micro-batch of 32,768 tokens, 16,384 a rank."""
    memory = rank_memory(m1_run(), Layout(1, 32, 8, 2), 32_768, checkpointing=True)
    assert memory.parameters + memory.moments + memory.gradients == 16 * 456_089_655_296 / 512
    # the larger kind of layer: lightning, its projections 5 x 6144 x 8192, the router, 4 of 32 experts
    layer = 5 * 6144 * 8192 + 6144 * 32 + 4 * 3 * 6144 * 9216
    assert memory.layer_weights == 2 * 2 * layer
    assert memory.layer_gradients == (2 + 4) * layer
    assert memory.loss == 4 * 128 * 200_064 + 3 * 4 * 200_064 * 6144
    # inputs of 80 layers; embedded tokens, the final norm, its gradient
    assert memory.activations == 16_384 * 6144 * (2 * 80 + 12)
    # rows to experts and back; keys and values of 32,768 tokens, twice
    assert memory.layer_exchange == 2 * 2 * 2 * 6144 * 16_384 + 2 * 2 * 32_768 * 2 * 1024
    always = memory.parameters + memory.moments + memory.gradients + memory.activations
    layer_moment = sum(v for name, v in dataclasses.asdict(memory).items() if name.startswith("layer_"))
    assert layer_moment > memory.loss and memory.total == pytest.approx(always + layer_moment)


def test_axes_divide_the_state_but_replicas_copy_it() -> None:
    def state(*axes: int) -> float:
        return rank_memory(m1_run(), Layout(*axes), 32_768, checkpointing=True).parameters

    assert state(1, 64, 2, 4) == state(1, 8, 16, 4) == state(1, 1, 32, 16) == 4 * parameters(M1) / 512
    assert state(8, 16, 2, 2) == 8 * state(1, 64, 2, 4)
    # without an axis of experts their matrices are divided by whole experts, of which there are 32, or by rows
    experts = 434_865_438_720
    others = parameters(M1) - experts
    assert state(1, 512, 1, 1) == state(1, 96, 1, 1) * 96 / 512 == 4 * parameters(M1) / 512
    # 5 divides neither 32 experts nor 18,432 and 6,144 rows: one rank has 7 experts; with 9, w13 alone goes by rows
    assert state(1, 5, 1, 1) == pytest.approx(4 * (others / 5 + experts * 7 / 32))
    assert state(1, 9, 1, 1) == pytest.approx(4 * (others / 9 + experts * (2 / 3 / 9 + 1 / 3 * 4 / 32)))
    assert state(32, 16, 1, 1) == 4 * parameters(M1) / 16


def test_without_checkpointing_every_layer_is_kept() -> None:
    layout, tokens = Layout(dp_shard=64, context_parallel=8), 32_768
    kept = rank_memory(m1_run(), layout, tokens, checkpointing=False)
    again = rank_memory(m1_run(), layout, tokens, checkpointing=True)
    lightning, softmax = (tokens // 8 * layer_activation_bytes(M1, kind, 2, layout) for kind in (False, True))
    lightning += 8 * 64 * 128**2 * 4  # the states of 8 ranks
    assert kept.activations - again.activations == 70 * lightning + 10 * softmax - 80 * tokens // 8 * 6144 * 2
    assert again.layer_workspace - kept.layer_workspace == max(lightning, softmax)


def test_layouts_are_all_and_each_once() -> None:
    found = list(layouts(512))
    assert len(found) == len(set(found)) == math.comb(9 + 3, 3)  # 2^9 into four factors
    assert all(math.prod(dataclasses.astuple(layout)) == 512 for layout in found)
    assert sorted(map(dataclasses.astuple, layouts(3))) == [(1, 1, 1, 3), (1, 1, 3, 1), (1, 3, 1, 1), (3, 1, 1, 1)]


def test_search_sorts_every_layout_into_one_of_three() -> None:
    workload = m1_run(batch_tokens=2**22, num_gpus=256)
    fitting, too_large, ruled_out = search(workload)
    assert len(fitting) + len(too_large) + sum(ruled_out.values()) == len(list(layouts(256)))
    assert fitting and too_large and len(ruled_out) == 2
    assert all(plan.memory.total <= workload.memory_limit for plan in fitting)
    assert all(plan.memory.total > workload.memory_limit for plan in too_large)
    speeds = [plan.tokens_per_second for plan in fitting]
    assert speeds == sorted(speeds, reverse=True)
    for plan in fitting + too_large:
        assert M1.num_local_experts % plan.layout.expert_parallel == 0
        assert plan.batches_per_step % plan.layout.data_ranks == 0 and plan.step_tokens <= 2**22


def test_a_small_model_needs_no_sharding() -> None:
    workload = Workload(MiniMaxM1Config.preset("small"), H800, 8, 4096, 2**20)
    fitting, too_large, _ = search(workload)
    assert not too_large and any(plan.layout == Layout(dp_replicate=8) for plan in fitting)


@pytest.mark.parametrize(("num_sequences", "context"), [(1, 1), (1, 4), (2, 4), (4, 2)])
def test_the_busiest_context_rank_by_brute_force(num_sequences: int, context: int) -> None:
    """Tokens of packed sequences are cut into as many pieces as there are ranks; the last piece sees most."""
    length = 64
    workload = Workload(BASE, H800, context, length, length * num_sequences)
    place = [i % length + 1 for i in range(length * num_sequences)]  # tokens seen
    piece = len(place) // context
    seen = max(sum(place[i : i + piece]) for i in range(0, len(place), piece))
    linear = num_sequences * training_flops(BASE, [length]) - 3 * 4 * 256 * sum(place)
    found = rank_flops(workload, Layout(context_parallel=context), len(place), checkpointing=False)
    assert found == pytest.approx(linear / context + 3 * 4 * 256 * seen, rel=1e-3)  # pieces begin at a whole token


def test_links_by_hand() -> None:
    gpu = GPUS["h100"]
    # 16 ranks over two nodes: 15/16 over NVLink; half of it comes over the 8 adapters of the node, which are slower
    assert _gather_seconds(gpu, Layout(dp_shard=16), ("dp_shard",), 1e9) == pytest.approx(
        max(15 / 16 / 450, 1 / 2 / (8 * 50)), rel=1e-12
    )
    assert _gather_seconds(gpu, Layout(dp_shard=8), ("dp_shard",), 1e9) == pytest.approx(7 / 8 / 450)
    # one rank a node: all but its own share comes over one adapter
    assert _gather_seconds(gpu, Layout(dp_replicate=4, dp_shard=8), ("dp_replicate",), 1e9) == pytest.approx(3 / 4 / 50)
    assert _gather_seconds(gpu, Layout(dp_shard=4), ("context_parallel",), 1e9) == 0
    layout = Layout(dp_replicate=2, dp_shard=4, expert_parallel=4, context_parallel=2)
    assert _neighbours(layout, ("context_parallel",)) == 2
    assert _neighbours(layout, ("expert_parallel",)) == 4
    assert _neighbours(layout, ("dp_shard", "context_parallel")) == 2  # shards are 8 ranks apart
    assert _neighbours(Layout(expert_parallel=2, dp_shard=8), ("dp_shard",)) == 4
    # dispatch: 80 layers x there and back x 2 experts x 6144 x 2 bytes, 7/8 of it to others
    workload = m1_run(gpu=gpu, num_gpus=8)
    expected = 80 * 2 * 2 * 32_768 * 6144 * 2 * 7 / 8 / 450e9
    assert _dispatch_seconds(workload, Layout(expert_parallel=8), 32_768) == pytest.approx(expected)


def test_time_of_a_step() -> None:
    workload = Workload(BASE, H800, 1, 1024, 4096)
    once = step_time(workload, Layout(), 1024, 1, checkpointing=False)
    assert once.compute == pytest.approx(training_flops(BASE, [1024]) / (0.4 * 989.4e12))
    assert (once.gathering, once.experts, once.context) == (0, 0, 0)
    assert step_time(workload, Layout(), 1024, 4, checkpointing=False).compute == pytest.approx(4 * once.compute)
    again = step_time(workload, Layout(), 1024, 1, checkpointing=True)
    assert again.compute == pytest.approx(4 / 3 * once.compute)
    slow = dataclasses.replace(workload, dtype="float32")
    assert step_time(slow, Layout(), 1024, 1, checkpointing=False).compute == pytest.approx(once.compute * 989.4 / 66.9)


def test_totals() -> None:
    workload = m1_run()
    plan = search(workload)[0][0]
    run = totals(workload, plan, 1e12, price=2.0)
    assert run.steps == math.ceil(1e12 / plan.step_tokens)
    assert run.flops == pytest.approx(1e12 / 32_768 * training_flops(M1, [32_768]), rel=1e-3)
    assert run.seconds == pytest.approx(run.steps * plan.time.total)
    assert run.gpu_hours == pytest.approx(512 * run.seconds / 3600) and run.cost == pytest.approx(2 * run.gpu_hours)
    assert run.mfu < 0.4  # recomputation and waiting come off the efficiency
    assert totals(workload, plan, 1e12).cost is None


BAD = {
    "num_gpus: 0": dict(num_gpus=0),
    r"sequence_length: 99000000 .* 10,240,000": dict(sequence_length=99_000_000),
    r"batch_tokens: 1000 .*\(32,768\)": dict(batch_tokens=1000),
    "efficiency: 1.5": dict(efficiency=1.5),
    "margin: 1": dict(margin=1),
}


@pytest.mark.parametrize("message", BAD)
def test_values_that_describe_no_run(message: str) -> None:
    with pytest.raises(UserError, match=message):
        m1_run(**BAD[message])


def test_flags_and_table_name_the_same_gpus() -> None:
    from typing import get_args

    from minimax_m1.settings import GpuName

    assert set(get_args(GpuName)) == set(GPUS)
