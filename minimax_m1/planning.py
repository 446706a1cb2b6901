"""Where a training run fits and what it takes: memory of a rank, layouts of the ranks, time of a step.

A layout is replicas x shards x experts x context, the axes of `minimax-m1 train`, from the outermost to the innermost:
ranks of one context group are neighbours in a node. Every rank holds its share of parameters, gradients and moments in
float32; layers are gathered one by one in the dtype of the computation. A micro-batch has tokens_per_batch tokens,
divided over the context ranks; replicas x shards x experts groups work on different ones.

Letters: b bytes of a number in the computation's dtype, h hidden_size, W heads x head_dim, K experts of a token, I an
expert's width, V vocabulary.
The model is a stated one, not a simulation: docs/plan.md says what it leaves out.
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

    replicas: int = 1
    shards: int = 1
    experts: int = 1
    context: int = 1

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that work on different micro-batches."""
        return self.replicas * self.shards * self.experts

    @property
    def state_ranks(self) -> int:
        """Ranks that parameters, gradients and moments are divided over."""
        return self.shards * self.experts * self.context


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment, within the backward pass of a layer."""

    parameters: float  # float32, its share
    moments: float  # AdamW's two, float32, its share
    gradients: float  # float32, its share
    gathered: float  # whole layers in the dtype of the computation: this one and the next; embedding and head
    reducing: float  # gradients of one whole layer, as computed and in float32 on their way to their ranks
    activations: float  # what forward keeps for backward
    workspace: float  # the layer in hand: its activations if they are recomputed, and what its backward makes
    logits: float  # of a chunk; the head and its gradient in float32
    exchange: float  # tokens on their way to experts, keys and values and lightning states of other context ranks

    @property
    def total(self) -> float:
        """The sum."""
        return sum(dataclasses.astuple(self))


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
    for replicas, shards, experts in itertools.product(divisors, repeat=3):
        if num_gpus % (replicas * shards * experts) == 0:
            yield Layout(replicas, shards, experts, num_gpus // (replicas * shards * experts))


def _obstacle(workload: Workload, layout: Layout) -> str | None:
    """Return why a layout makes no sense for the workload, whatever the memory."""
    num_experts, length = workload.config.num_local_experts, workload.sequence_length
    if num_experts % layout.experts:
        return f"experts does not divide the network's {num_experts}"
    if length % layout.context:
        return f"context does not divide a sequence of {length:,}"
    if layout.data_ranks * length > workload.batch_tokens:
        return f"a step of {workload.batch_tokens:,} tokens has too few sequences for replicas x shards x experts"
    return None


def _plans(workload: Workload, layout: Layout) -> Iterator[Plan]:
    tokens = workload.sequence_length
    while tokens * layout.data_ranks <= workload.batch_tokens:
        per_rank = workload.batch_tokens // (tokens * layout.data_ranks)
        for checkpointing in (False, True):
            memory = rank_memory(workload, layout, tokens, checkpointing)
            time = step_time(workload, layout, tokens, per_rank, checkpointing)
            yield Plan(layout, tokens, per_rank * layout.data_ranks, checkpointing, memory, time)
        tokens *= 2


# -- memory -------------------------------------------------------------------------------------------------------


def rank_memory(workload: Workload, layout: Layout, tokens_per_batch: int, checkpointing: bool) -> Memory:
    """Return the memory of one rank, experts taken to be evenly used and parameters to divide evenly."""
    config, b = workload.config, workload.compute_bytes
    share = parameters(config) / layout.state_ranks
    layer = max(_layer_parameters(config, layout))
    ends = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    tokens = -(-tokens_per_batch // layout.context)  # of this rank
    kept = [
        tokens * layer_activation_bytes(config, is_softmax, b, layout)
        for is_softmax in (False, True)
        for _ in (config.softmax_layers if is_softmax else config.lightning_layers)
    ]
    # embedded tokens; of the final norm its input in float32 and what comes out twice; its gradient, made in forward
    outside = tokens * (4 + 4 * b) * config.hidden_size
    head = 4 * config.vocab_size * config.hidden_size
    exchange = _exchange_bytes(workload, layout, tokens_per_batch)
    return Memory(
        parameters=4 * share,
        moments=8 * share,
        gradients=4 * share,
        gathered=b * (2 * layer + ends),
        reducing=(b + 4) * layer,
        activations=(tokens * b * config.hidden_size * len(kept) if checkpointing else sum(kept)) + outside,
        workspace=(max(kept) if checkpointing else 0) + tokens * _backward_bytes(config, b),
        logits=max(LOSS_CHUNK_BYTES, 4 * MIN_LOSS_CHUNK * config.vocab_size) + 2 * head,
        exchange=exchange,
    )


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
            b * (3 * W + layout.context * kv) + 4 * config.num_attention_heads + 2 * b * config.rotary_dim
        )
    else:  # q, k, v before and after SiLU; the states; the gated norm, from float32
        attention = 6 * b * W + 4 * W * config.head_dim / LIGHTNING_BLOCK + 4 * W + 4 * b * W + 4
    router = widen * h + 4 * config.num_local_experts + 24 * K + 4
    moe = 2 * K * b * config.intermediate_size + (2 * K * b * h if layout.experts > 1 else 0)
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
    if layout.experts > 1:  # one buffer to send, one to receive
        total += 2 * b * config.num_experts_per_tok * config.hidden_size * tokens_per_batch / layout.context
    if layout.context > 1:  # keys and values of all ranks, their gradients in float32; every rank's state
        total += (b + 4) * tokens_per_batch * 2 * config.num_key_value_heads * config.head_dim
        total += layout.context * 4 * _heads_width(config) * config.head_dim
    return total


def _layer_parameters(config: MiniMaxM1Config, layout: Layout) -> list[float]:
    """Return the parameters of a rank's gathered layer, for each kind of layer there is: 1 / experts of the experts."""
    counts, layers = parameter_counts(config), config.num_hidden_layers
    common = (counts["router"] + counts["shared_expert"] + counts["experts"] / layout.experts) / layers
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
    length, context = workload.sequence_length, layout.context
    num_sequences = tokens_per_batch // length
    whole = num_sequences * training_flops(workload.config, [length], recompute=checkpointing)
    scores = flops_by_part(workload.config, length)["softmax_scores"] * num_sequences * (4 if checkpointing else 3)
    pieces = max(1.0, context / num_sequences)
    return (whole + scores * (1 - 1 / pieces)) / context


def _gathering_seconds(workload: Workload, layout: Layout) -> float:
    """Seconds of a micro-batch's gathers of all layers, forward and backward, and of its gradients' reduction."""
    config, gpu = workload.config, workload.gpu
    experts = parameter_counts(config)["experts"] / layout.experts
    others = parameters(config) - parameter_counts(config)["experts"]
    bytes_each = 2 * workload.compute_bytes + 4  # gathered twice, reduced once in float32
    share = parameters(config) / layout.state_ranks
    return (
        _gather_seconds(gpu, layout, ("shards", "experts", "context"), bytes_each * others)
        + _gather_seconds(gpu, layout, ("shards", "context"), bytes_each * experts)
        # replicas add up their shares of the gradients: reduced and gathered, in float32
        + _gather_seconds(gpu, layout, ("replicas",), 8 * share)
    )


def _dispatch_seconds(workload: Workload, layout: Layout, tokens_per_batch: int) -> float:
    """Seconds of sending a micro-batch's tokens to their experts and back, over all layers, once."""
    config, n = workload.config, layout.experts
    rows = config.num_experts_per_tok * tokens_per_batch / layout.context
    size = 2 * config.num_hidden_layers * rows * config.hidden_size * workload.compute_bytes
    neighbours = _neighbours(layout, ("experts",))
    near, far = size * (neighbours - 1) / n, size * (n - neighbours) / n
    return max(near / workload.gpu.node_bandwidth, far / workload.gpu.network_bandwidth)


def _context_seconds(workload: Workload, layout: Layout, tokens_per_batch: int, passes: int) -> float:
    """Seconds of gathering keys and values (gradients in float32 back) and lightning states, over all layers."""
    config, b = workload.config, workload.compute_bytes
    assert config.head_dim is not None
    kv = 2 * config.num_key_value_heads * config.head_dim * tokens_per_batch * len(config.softmax_layers)
    states = layout.context * 4 * _heads_width(config) * config.head_dim * len(config.lightning_layers)
    size = kv * (b * (passes - 1) + 4) + states * passes
    return _gather_seconds(workload.gpu, layout, ("context",), size)


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
    for axis in ("context", "experts", "shards", "replicas"):
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
