"""Where a training run fits and what it takes: memory of a rank, layouts of the ranks, time of a step.

A layout is dp_replicate x dp_shard x expert_parallel x context_parallel, the axes of `minimax-m1 train`, from the
outermost to the innermost: ranks of one context group are neighbours in a node. Every rank holds its share of
parameters, gradients and moments in float32; at each micro-batch layers are gathered one by one in the dtype of the
computation, and their gradients reduced. A micro-batch has tokens_per_batch tokens, divided over the context ranks;
every other rank has its own.

Letters: b bytes of a number in the computation's dtype, h hidden_size, W heads x head_dim, K experts of a token.
It is a stated model, not a simulation: docs/plan.md says what it leaves out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from minimax_m1.accounting import flops_by_part, parameter_counts, parameters, training_flops
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError

GPUS_PER_NODE = 8
LIGHTNING_BLOCK = 64  # tokens of a block of the lightning kernel, which keeps a state for each
LOSS_CHUNK_BYTES, MIN_LOSS_CHUNK = 32 << 20, 128  # of the cross-entropy: logits held at a time, tokens at least
COMPUTE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; bandwidths in bytes per second, of links one way."""

    flops: float  # dense bfloat16, per second
    float32_flops: float  # without TensorFloat-32, which PyTorch does not use for products unless told
    memory_bytes: float  # what CUDA reports as total, a little below the name's
    memory_bandwidth: float
    node_bandwidth: float  # to the others of its node: NVLink, or PCIe where there is none
    network_bandwidth: float  # to other nodes, per GPU


GPUS = {
    # NVIDIA A100 datasheet (312 TFLOP/s; NVLink 600 GB/s both ways); DGX A100: 200 Gb/s for each GPU
    "a100-40gb": Gpu(312e12, 19.5e12, 39.4 * 2**30, 1.555e12, 300e9, 25e9),
    "a100-80gb": Gpu(312e12, 19.5e12, 79.1 * 2**30, 2.039e12, 300e9, 25e9),
    # NVIDIA H100 datasheet (SXM5: 989.4 TFLOP/s; NVLink 900 GB/s both ways); DGX H100: 400 Gb/s for each GPU
    "h100": Gpu(989.4e12, 66.9e12, 79.1 * 2**30, 3.35e12, 450e9, 50e9),
    # the same chip with NVLink cut to 400 GB/s; eight 400 Gb/s adapters a node (DeepSeek-V3 report, arXiv 2412.19437)
    "h800": Gpu(989.4e12, 66.9e12, 79.1 * 2**30, 3.35e12, 200e9, 50e9),
    # NVIDIA H200 datasheet (SXM)
    "h200": Gpu(989.4e12, 66.9e12, 139.7 * 2**30, 4.8e12, 450e9, 50e9),
    # NVIDIA DGX B200 datasheet (2.25 PFLOP/s, NVLink 1.8 TB/s both ways); memory bandwidth as pytorch/ao PR 4002 found
    "b200": Gpu(2250e12, 75e12, 178.3 * 2**30, 7.67e12, 900e9, 50e9),
    # NVIDIA L40S datasheet (362 TFLOP/s dense; PCIe 4.0 x16, no NVLink); network assumed 100 Gb/s for each GPU
    "l40s": Gpu(362e12, 91.6e12, 44.4 * 2**30, 0.864e12, 32e9, 12.5e9),
    # NVIDIA Ada architecture whitepaper (165.2 TFLOP/s with float32 sums; PCIe 4.0 x16); network assumed as above
    "rtx4090": Gpu(165.2e12, 82.6e12, 23.6 * 2**30, 1.008e12, 32e9, 12.5e9),
}


@dataclass(frozen=True)
class Workload:
    """What is to be trained, on what.

    Raises:
        UserError: a value that cannot be used.
    """

    config: MiniMaxM1Config
    gpu: Gpu
    num_gpus: int
    sequence_length: int
    batch_tokens: int  # of an optimizer step, at most
    dtype: str = "bfloat16"  # of the computation: one of COMPUTE_BYTES
    efficiency: float = 0.4  # share of the GPU's peak that all that is computed, recomputation included, reaches
    margin: float = 0.1  # share of its memory that is left alone: CUDA, NCCL, fragments, uneven experts

    def __post_init__(self) -> None:
        for name in ("num_gpus", "sequence_length", "batch_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        _require(0 < self.efficiency <= 1, "efficiency", self.efficiency, "a share above 0, up to 1")
        _require(0 <= self.margin < 1, "margin", self.margin, "a share from 0, below 1")
        longest = self.config.max_position_embeddings
        _require(self.sequence_length <= longest, "sequence_length", self.sequence_length, f"1 to {longest:,}")
        _require(
            self.batch_tokens >= self.sequence_length,
            "batch_tokens",
            self.batch_tokens,
            f"at least one sequence ({self.sequence_length:,})",
        )
        if self.num_gpus > 1 or self.dtype != "float32":  # as `minimax-m1 train` has it
            for name in ("tie_word_embeddings", "dynamic_gate"):
                _require(not getattr(self.config, name), name, True, "false, on several GPUs or in bfloat16")

    @property
    def memory_limit(self) -> float:
        """Bytes that a rank may use."""
        return self.gpu.memory_bytes * (1 - self.margin)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the computation's dtype."""
        return COMPUTE_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has; the product is the number of GPUs."""

    dp_replicate: int = 1  # copies of everything
    dp_shard: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that work on different micro-batches."""
        return self.dp_replicate * self.dp_shard * self.expert_parallel

    @property
    def state_ranks(self) -> int:
        """Ranks that parameters, gradients and moments are divided over."""
        return self.dp_shard * self.expert_parallel * self.context_parallel


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what it always holds, and what comes on top within a layer's backward pass or at the loss."""

    parameters: float  # float32, its share
    moments: float  # AdamW's two, float32, its share
    gradients: float  # float32, its share
    activations: float  # what forward keeps for backward
    layer_weights: float  # whole layers in the dtype of the computation: the one in hand and the next
    layer_gradients: float  # of the whole layer, as computed and in float32 on their way to their ranks
    layer_workspace: float  # its activations if they are recomputed, and what its backward makes
    layer_exchange: float  # tokens on their way to experts; keys, values and states of all context ranks
    loss: float  # instead of the layer's: a chunk of logits; the head, its gradient and a copy in float32

    @property
    def total(self) -> float:
        """The sum at the fuller of the two moments."""
        layer = self.layer_weights + self.layer_gradients + self.layer_workspace + self.layer_exchange
        return self.parameters + self.moments + self.gradients + self.activations + max(layer, self.loss)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what a rank waits for; gathering of layers hides behind the computation."""

    compute: float
    gathering: float  # of parameters and gradients: what the computation does not hide
    experts: float  # tokens to their experts and back, never hidden
    context: float  # keys, values and lightning states between context ranks, never hidden
    optimizer: float  # reading and writing its state

    @property
    def total(self) -> float:
        """The sum."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """One way to run a workload."""

    layout: Layout
    tokens_per_batch: int  # of a micro-batch, over all its context ranks
    batches_per_step: int  # micro-batches of all ranks together
    activation_checkpointing: bool
    memory: Memory
    time: StepTime

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.tokens_per_batch * self.batches_per_step

    @property
    def tokens_per_second(self) -> float:
        """Speed of all ranks together."""
        return self.step_tokens / self.time.total


@dataclass(frozen=True)
class Totals:
    """A whole training run."""

    steps: int
    flops: float  # forward and backward of every token once: recomputation is not counted
    seconds: float
    gpu_hours: float
    mfu: float  # share of the GPUs' peak that these FLOPs are
    cost: float | None  # None: no price


def totals(workload: Workload, plan: Plan, tokens: float, price: float | None = None) -> Totals:
    """Return what training on so many tokens takes, at a price of a GPU-hour."""
    steps = math.ceil(tokens / plan.step_tokens)
    length = workload.sequence_length
    flops = training_flops(workload.config, [length]) / length * plan.step_tokens * steps
    seconds = steps * plan.time.total
    gpu_hours = workload.num_gpus * seconds / 3600
    peak = workload.gpu.flops if workload.dtype == "bfloat16" else workload.gpu.float32_flops
    mfu = flops / (seconds * workload.num_gpus * peak)
    return Totals(steps, flops, seconds, gpu_hours, mfu, None if price is None else price * gpu_hours)


# -- search -------------------------------------------------------------------------------------------------------


def search(workload: Workload) -> tuple[list[Plan], list[Plan], dict[str, int]]:
    """Try every layout with micro-batches of 1, 2, 4, … sequences, with and without activation checkpointing.

    Returns:
        the plans that fit, one a layout, the fastest first; for each layout that does not fit, the plan of least
        memory, the nearest first; and how many layouts are ruled out by each other reason.
    """
    fitting, too_large = [], []
    ruled_out: dict[str, int] = {}
    for layout in layouts(workload.num_gpus):
        reason = _obstacle(workload, layout)
        if reason:
            ruled_out[reason] = ruled_out.get(reason, 0) + 1
            continue
        tried = list(_plans(workload, layout))
        fits = [plan for plan in tried if plan.memory.total <= workload.memory_limit]
        if fits:
            fitting.append(max(fits, key=lambda plan: (plan.tokens_per_second, -plan.memory.total)))
        else:
            too_large.append(min(tried, key=lambda plan: plan.memory.total))
    fitting.sort(key=lambda plan: (-plan.tokens_per_second, plan.memory.total))
    return fitting, sorted(too_large, key=lambda plan: plan.memory.total), ruled_out


def layouts(num_gpus: int) -> Iterator[Layout]:
    """Yield every layout of so many ranks."""
    divisors = [n for n in range(1, num_gpus + 1) if num_gpus % n == 0]
    for replicate, shard, expert in itertools.product(divisors, repeat=3):
        if num_gpus % (replicate * shard * expert) == 0:
            yield Layout(replicate, shard, expert, num_gpus // (replicate * shard * expert))


def _obstacle(workload: Workload, layout: Layout) -> str | None:
    """Return why a layout makes no sense for the workload, whatever the memory."""
    config, length = workload.config, workload.sequence_length
    if config.num_local_experts % layout.expert_parallel:
        return f"expert_parallel does not divide the network's {config.num_local_experts}"
    num_parts = layout.dp_shard * layout.context_parallel
    if layout.expert_parallel > 1 and (config.hidden_size % num_parts or 2 * config.intermediate_size % num_parts):
        return "dp_shard x context_parallel does not divide the rows of the experts' matrices"
    if layout.data_ranks * length > workload.batch_tokens:
        return f"a step of {workload.batch_tokens:,} tokens has too few sequences for its data ranks"
    return None


def _plans(workload: Workload, layout: Layout) -> Iterator[Plan]:
    tokens, fits = workload.sequence_length, True
    while fits and tokens * layout.data_ranks <= workload.batch_tokens:
        per_rank = workload.batch_tokens // (tokens * layout.data_ranks)
        for checkpointing in (False, True):
            memory = rank_memory(workload, layout, tokens, checkpointing)
            time = step_time(workload, layout, tokens, per_rank, checkpointing)
            yield Plan(layout, tokens, per_rank * layout.data_ranks, checkpointing, memory, time)
            fits = memory.total <= workload.memory_limit  # if not even with checkpointing, nor with more tokens
        tokens *= 2


# -- memory -------------------------------------------------------------------------------------------------------


def rank_memory(workload: Workload, layout: Layout, tokens_per_batch: int, checkpointing: bool) -> Memory:
    """Return the memory of one rank, experts taken to be evenly used."""
    config, b = workload.config, workload.compute_bytes
    experts = parameter_counts(config)["experts"]
    share = (parameters(config) - experts) / layout.state_ranks + experts * _expert_share(config, layout)
    layer = max(_layer_parameters(config, layout))
    head = 4 * config.vocab_size * config.hidden_size
    is_whole = workload.num_gpus == 1 and workload.dtype == "float32"  # then weights are used where they lie
    tokens = -(-tokens_per_batch // layout.context_parallel)  # of this rank
    kept = [
        tokens * layer_activation_bytes(config, is_softmax, b, layout) + (0 if is_softmax else _states(config, layout))
        for is_softmax in (False, True)
        for _ in (config.softmax_layers if is_softmax else config.lightning_layers)
    ]
    # embedded tokens; of the final norm its input in float32 and what comes out twice; its gradient, made in forward
    outside = tokens * (4 + 4 * b) * config.hidden_size
    return Memory(
        parameters=4 * share,
        moments=8 * share,
        gradients=4 * share,
        activations=(tokens * b * config.hidden_size * len(kept) if checkpointing else sum(kept)) + outside,
        layer_weights=0 if is_whole else 2 * b * layer,
        layer_gradients=(b if is_whole else b + 4) * layer,
        layer_workspace=(max(kept) if checkpointing else 0) + tokens * _backward_bytes(config, b),
        layer_exchange=_exchange_bytes(workload, layout, tokens_per_batch),
        loss=max(LOSS_CHUNK_BYTES, 4 * MIN_LOSS_CHUNK * config.vocab_size) + (2 if is_whole else 3) * head,
    )


def _expert_share(config: MiniMaxM1Config, layout: Layout) -> float:
    """Return what part of all experts' parameters a rank holds.

    An even one, by whole experts or by rows of their matrices; only where neither their number nor the rows are a
    multiple of the ranks, as many whole experts as the rank that has most of them.
    """
    ranks, num_experts = layout.state_ranks, config.num_local_experts
    if layout.expert_parallel > 1 or num_experts % ranks == 0:
        return 1 / ranks
    whole = math.ceil(num_experts / ranks) / num_experts
    w13, w2 = (whole if rows % ranks else 1 / ranks for rows in (2 * config.intermediate_size, config.hidden_size))
    return (2 * w13 + w2) / 3


def layer_activation_bytes(config: MiniMaxM1Config, is_softmax: bool, b: int, layout: Layout) -> float:
    """Return the bytes that one layer keeps for each token until its backward pass.

    Exactly what autograd saves with the torch kernels (tests/test_planning.py), less what it saves once and not for
    every token; to which the axes add the rows that went to experts and came back, and all ranks' keys and values.
    """
    assert config.head_dim is not None and config.rotary_dim is not None
    h, W, K, widen = config.hidden_size, _heads_width(config), config.num_experts_per_tok, 4 if b < 4 else 0
    norms = 2 * ((4 + 2 * b) * h + 4)  # float32 input, normed, weighted; the root
    if is_softmax:
        kv = 2 * config.num_key_value_heads * config.head_dim
        attention: float = (
            b * (3 * W + layout.context_parallel * kv) + 4 * config.num_attention_heads + 2 * b * config.rotary_dim
        )
    else:  # q, k, v before and after SiLU; the states; the gated norm, from float32; q for the state from other ranks
        attention = 6 * b * W + 4 * W * config.head_dim / LIGHTNING_BLOCK + 4 * W + 4 * b * W + 4
        attention += 4 * W if layout.context_parallel > 1 else 0
    router = widen * h + 4 * config.num_local_experts + 24 * K + 4
    moe = 2 * K * b * config.intermediate_size + (2 * K * b * h if layout.expert_parallel > 1 else 0)
    shared = 4 * b * config.shared_intermediate_size + (2 * b + widen) * h if config.shared_intermediate_size else 0
    return norms + attention + router + moe + shared


def _backward_bytes(config: MiniMaxM1Config, b: int) -> float:
    """Bytes for each token that the backward of one operation makes, the larger of lightning's and the experts'."""
    assert config.head_dim is not None
    W, h = _heads_width(config), config.hidden_size
    # float32: q, k, v and the gradient in blocks; the states' gradients; scores; three gradients and one term
    blocks = 4 * (8 * W + W * config.head_dim / LIGHTNING_BLOCK + LIGHTNING_BLOCK * config.num_attention_heads)
    rows = (2 * config.num_experts_per_tok + 1) * b * h
    return max(blocks if config.lightning_layers else 4 * b * W, rows)


def _exchange_bytes(workload: Workload, layout: Layout, tokens_per_batch: int) -> float:
    config, b = workload.config, workload.compute_bytes
    assert config.head_dim is not None
    total = 0.0
    if layout.expert_parallel > 1:  # one buffer to send, one to receive
        total += 2 * b * config.num_experts_per_tok * config.hidden_size * tokens_per_batch / layout.context_parallel
    if (
        layout.context_parallel > 1
    ):  # keys and values of all ranks as they come and end to end; as many gradients; or states
        kv = 2 * b * tokens_per_batch * 2 * config.num_key_value_heads * config.head_dim
        total += max(kv if config.softmax_layers else 0, 2 * _states(config, layout))
    return total


def _states(config: MiniMaxM1Config, layout: Layout) -> float:
    """Bytes of all context ranks' states of one lightning layer, float32; 0 if there is one rank."""
    assert config.head_dim is not None
    return layout.context_parallel * 4 * _heads_width(config) * config.head_dim if layout.context_parallel > 1 else 0


def _layer_parameters(config: MiniMaxM1Config, layout: Layout) -> list[float]:
    """Return the parameters of a gathered layer of each kind that there is, with the rank's share of the experts."""
    counts, layers = parameter_counts(config), config.num_hidden_layers
    common = (counts["router"] + counts["shared_expert"] + counts["experts"] / layout.expert_parallel) / layers
    attention = (("lightning_attention", config.lightning_layers), ("softmax_attention", config.softmax_layers))
    return [common + counts[name] / len(of_kind) for name, of_kind in attention if of_kind]


# -- time ---------------------------------------------------------------------------------------------------------


def step_time(
    workload: Workload, layout: Layout, tokens_per_batch: int, batches_per_rank: int, checkpointing: bool
) -> StepTime:
    """Return the seconds of one optimizer step, in which each rank has so many micro-batches."""
    config, gpu = workload.config, workload.gpu
    speed = workload.efficiency * (gpu.flops if workload.dtype == "bfloat16" else gpu.float32_flops)
    compute = rank_flops(workload, layout, tokens_per_batch, checkpointing) / speed
    gathering = _gathering_seconds(workload, layout)
    passes = 3 if checkpointing else 2  # forward, backward, and forward again
    # float32 parameter, gradient and moments are read, parameter and moments written
    optimizer = 28 * parameters(config) / layout.state_ranks / gpu.memory_bandwidth
    return StepTime(
        compute=batches_per_rank * compute,
        gathering=batches_per_rank * max(0.0, gathering - compute),
        experts=batches_per_rank * passes * _dispatch_seconds(workload, layout, tokens_per_batch),
        context=batches_per_rank * _context_seconds(workload, layout, tokens_per_batch, passes),
        optimizer=optimizer,
    )


def rank_flops(workload: Workload, layout: Layout, tokens_per_batch: int, checkpointing: bool) -> float:
    """Return the FLOPs of the busiest rank for one micro-batch.

    Context ranks have equal pieces of every sequence, but the tokens of the last piece see most: (2 c - 1) / c of the
    mean, in softmax layers, where a sequence is cut into c pieces.
    """
    length, context = workload.sequence_length, layout.context_parallel
    num_sequences = tokens_per_batch // length
    whole = num_sequences * training_flops(workload.config, [length], recompute=checkpointing)
    scores = flops_by_part(workload.config, length)["softmax_scores"] * num_sequences * (4 if checkpointing else 3)
    pieces = max(1.0, context / num_sequences)
    return (whole + scores * (1 - 1 / pieces)) / context


def _gathering_seconds(workload: Workload, layout: Layout) -> float:
    """Seconds of a micro-batch's gathers of all layers, forward and backward, and of its gradients' reduction."""
    config, gpu = workload.config, workload.gpu
    others = parameters(config) - parameter_counts(config)["experts"]
    bytes_each = 2 * workload.compute_bytes + 4  # gathered twice, reduced once in float32
    held = _expert_share(config, layout) * parameter_counts(config)["experts"]
    experts = held * layout.dp_shard * layout.context_parallel  # of a group, with padding where they are uneven
    share = others / layout.state_ranks + held
    return (
        _gather_seconds(gpu, layout, ("dp_shard", "expert_parallel", "context_parallel"), bytes_each * others)
        + _gather_seconds(gpu, layout, ("dp_shard", "context_parallel"), bytes_each * experts)
        # replicas add up their shares of the gradients: reduced and gathered, in float32
        + _gather_seconds(gpu, layout, ("dp_replicate",), 8 * share)
    )


def _dispatch_seconds(workload: Workload, layout: Layout, tokens_per_batch: int) -> float:
    """Seconds of sending a micro-batch's tokens to their experts and back, over all layers, once."""
    config, n = workload.config, layout.expert_parallel
    rows = config.num_experts_per_tok * tokens_per_batch / layout.context_parallel
    size = 2 * config.num_hidden_layers * rows * config.hidden_size * workload.compute_bytes
    neighbours = _neighbours(layout, ("expert_parallel",))
    near, far = size * (neighbours - 1) / n, size * (n - neighbours) / n
    return max(near / workload.gpu.node_bandwidth, far / workload.gpu.network_bandwidth)


def _context_seconds(workload: Workload, layout: Layout, tokens_per_batch: int, passes: int) -> float:
    """Seconds of gathering keys, values and lightning states, and of their gradients' way back, over all layers."""
    config = workload.config
    assert config.head_dim is not None
    kv = 2 * config.num_key_value_heads * config.head_dim * tokens_per_batch * workload.compute_bytes
    size = kv * len(config.softmax_layers) + _states(config, layout) * len(config.lightning_layers)
    return _gather_seconds(workload.gpu, layout, ("context_parallel",), passes * size)


def _gather_seconds(gpu: Gpu, layout: Layout, axes: tuple[str, ...], size: float) -> float:
    """Return the seconds of an all-gather to, or a reduce-scatter of, `size` bytes over the ranks of some axes.

    Every rank receives all but its own share over the node's links; what comes from other nodes enters each node once,
    over the adapters of all its members of the group.
    """
    num_ranks = math.prod(getattr(layout, axis) for axis in axes)
    neighbours = _neighbours(layout, axes)
    near = size * (num_ranks - 1) / num_ranks / gpu.node_bandwidth if neighbours > 1 else 0.0
    far = size * (num_ranks - neighbours) / num_ranks / (neighbours * gpu.network_bandwidth)
    return max(near, far)


def _neighbours(layout: Layout, axes: tuple[str, ...]) -> int:
    """Return how many ranks of a group along `axes` share a node, axes filling it from the innermost."""
    room, count = GPUS_PER_NODE, 1
    for axis in ("context_parallel", "expert_parallel", "dp_shard", "dp_replicate"):
        size = getattr(layout, axis)
        if axis in axes:
            count *= min(size, room)
        room = max(1, room // size)
    return count


def _heads_width(config: MiniMaxM1Config) -> int:
    assert config.head_dim is not None
    return config.num_attention_heads * config.head_dim


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise UserError(f"{name}: {value!r} cannot be used; accepted: {accepted}")
