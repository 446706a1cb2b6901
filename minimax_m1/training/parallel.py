"""A network over many processes: who holds which part of it, and what they exchange; applied from outside.

World size = dp_replicate x dp_shard x expert_parallel x context_parallel; ranks are numbered in this order, the last
axis fastest. The ranks of a context_parallel group share a micro-batch, all others have their own. Gradients are summed
over ranks.

Shapes: T packed tokens of one micro-batch, E experts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from minimax_m1.batch import ForwardBatch
from minimax_m1.errors import UserError
from minimax_m1.kernels.context import ContextPart
from minimax_m1.kernels.experts import count_choices
from minimax_m1.model import DecoderLayer, MiniMaxM1ForCausalLM, Routing
from minimax_m1.training.data import PackedBatch
from minimax_m1.training.settings import TrainSettings
from minimax_m1.weights import find_pieces

AXES = ("dp_replicate", "dp_shard", "expert_parallel", "context_parallel")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # of AXES; None: one process, and nothing to shard
    data_rank: int  # which micro-batches are this rank's: every num_data_ranks-th, from this one
    num_data_ranks: int
    context_rank: int  # which part of them
    num_context_ranks: int
    context_group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0


def init_world(settings: TrainSettings) -> World:
    """Join the processes that torchrun has started, by the environment that it sets; without it, be the only one.

    Raises:
        UserError: the axes do not fit the number of processes, or the micro-batches of a step the ranks; or there is
            no such device.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sizes = _axis_sizes(settings, size)
    context_size = sizes[-1]
    num_data_ranks = size // context_size
    if settings.batches_per_step % num_data_ranks:
        raise UserError(
            f"batches_per_step: {settings.batches_per_step} cannot be used; accepted: a multiple of {num_data_ranks}, "
            "the ranks with micro-batches of their own"
        )
    try:
        device = torch.device(settings.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # a torch without CUDA lacks the function
        raise UserError(f"device: {settings.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    mesh = context_group = None
    if size > 1 or settings.dtype != "float32":  # mixed precision is a part of sharding, even on one process
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo too: checkpoints talk on the CPU
        if dist.is_initialized():  # by whoever calls this, or for an earlier run of this process
            pass
        elif "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        context_group = mesh["context_parallel"].get_group()
    return World(
        rank,
        size,
        device,
        mesh,
        data_rank=rank // context_size,
        num_data_ranks=num_data_ranks,
        context_rank=rank % context_size,
        num_context_ranks=context_size,
        context_group=context_group,
    )


def _axis_sizes(settings: TrainSettings, size: int) -> tuple[int, ...]:
    """Return the sizes of AXES for so many processes."""
    others = settings.dp_replicate * settings.expert_parallel * settings.context_parallel
    dp_shard = settings.dp_shard or max(1, size // others)
    sizes = (settings.dp_replicate, dp_shard, settings.expert_parallel, settings.context_parallel)
    if math.prod(sizes) != size:
        product = " x ".join(map(str, sizes))
        raise UserError(
            f"{' x '.join(AXES)}: {product} = {math.prod(sizes)} cannot be used; accepted: {size}, the number of "
            "processes (torchrun --nproc-per-node)"
        )
    return sizes


def close_world(world: World) -> None:
    """Leave the processes of `init_world`."""
    if world.mesh is not None:
        dist.destroy_process_group()


# -- the network, divided ---------------------------------------------------------------------------------------------


def parallelize(model: MiniMaxM1ForCausalLM, world: World, settings: TrainSettings) -> None:
    """Divide the weights of a network over the ranks, and let it exchange what its forward and backward need.

    All ranks hold the same weights before, on the device of `world`, or on the meta device (then `materialize`). With
    one process in float32 nothing is divided.

    Raises:
        UserError: a network that cannot be divided in this way.
    """
    if world.mesh is not None:
        _check(model, world.mesh)
        if world.mesh["expert_parallel"].size() > 1:
            _divide_experts(model, world.mesh)
    model.model.activation_checkpointing = settings.activation_checkpointing
    if world.mesh is not None:
        _shard_weights(model, world.mesh, settings.dtype)


def _check(model: MiniMaxM1ForCausalLM, mesh: DeviceMesh) -> None:
    """Raise UserError for a network that cannot be divided over these ranks."""
    config = model.config
    for name in ("tie_word_embeddings", "dynamic_gate"):  # a weight in two groups; a weight that is one number
        if getattr(config, name):
            raise UserError(f"{name}: True cannot be used on several ranks or in bfloat16; accepted: False")
    num_ranks = mesh["expert_parallel"].size()
    if num_ranks == 1:
        return
    if config.num_local_experts % num_ranks:
        raise UserError(
            f"expert_parallel: {num_ranks} cannot be used; accepted: a divisor of {config.num_local_experts}, the "
            "number of experts"
        )
    num_shards = mesh["dp_shard"].size() * mesh["context_parallel"].size()
    for name, rows in (("hidden_size", config.hidden_size), ("intermediate_size", 2 * config.intermediate_size)):
        if rows % num_shards:
            raise UserError(
                f"expert_parallel: {num_ranks} cannot be used with dp_shard x context_parallel = {num_shards}; "
                f"accepted: a {name} that is a multiple of it"
            )


def _divide_experts(model: MiniMaxM1ForCausalLM, mesh: DeviceMesh) -> None:
    """Leave each rank its share of the experts, whole ones, and let tokens travel to where theirs are."""
    experts_mesh = mesh["expert_parallel"]
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        experts = layer.block_sparse_moe.experts
        for name, weight in list(experts.named_parameters(recurse=False)):
            part = distribute_tensor(weight.data, experts_mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(part, requires_grad=weight.requires_grad))
        experts.group = experts_mesh.get_group()


def _shard_weights(model: MiniMaxM1ForCausalLM, mesh: DeviceMesh, dtype: str) -> None:
    """Divide every weight over the ranks that would hold the same (FSDP2); each group is gathered while it is used.

    In bfloat16 what is gathered has that type, but of router and head; weights and sums of gradients are float32.
    """
    float32 = MixedPrecisionPolicy(cast_forward_inputs=False)  # rotary angles are float32 in any model
    policy = float32
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    everyone = _data_mesh(mesh, ("dp_shard", "expert_parallel", "context_parallel"))
    axis = partial(_axis_to_divide, num_ranks=everyone.size(-1))
    # After every forward weights are given back, so that named_parameters() are always the parts.
    options: dict[str, Any] = dict(mesh=everyone, reshard_after_forward=True, shard_placement_fn=axis)

    fully_shard(model.model.embed_tokens, mp_policy=policy, **options)
    experts_mesh = _data_mesh(mesh, ("dp_shard", "context_parallel"))
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        moe = layer.block_sparse_moe
        if mesh["expert_parallel"].size() > 1:  # axis 0, the experts, is divided already
            by_row = {**options, "mesh": experts_mesh, "shard_placement_fn": lambda weight: Shard(1)}
            fully_shard(moe.experts, mp_policy=policy, **by_row)
        if policy is not float32:
            fully_shard(moe.gate, mp_policy=float32, **options)
        fully_shard(layer, mp_policy=policy, **options)
    fully_shard(model.lm_head, mp_policy=float32, **options)
    fully_shard(model, mp_policy=policy, **options)

    for module in model.modules():
        # Gradients are summed: each loss is divided by the tokens of all ranks. One rank would copy to divide by 1.
        if isinstance(module, FSDPModule) and mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "forward_packed")
    for name in ("token_losses", "token_logprobs", "logits"):
        register_fsdp_forward_method(model.lm_head, name)


def keep_weights(model: nn.Module, world: World, is_kept: bool) -> None:
    """Say whether what a forward gathers stays until its backward: on one rank, where it saves memory for nobody, but a
    copy of every weight."""
    if world.size == 1 and isinstance(model, FSDPModule):
        model.set_reshard_after_forward(not is_kept)


def _axis_to_divide(weight: Tensor, num_ranks: int) -> Shard:
    """The first; but the rows of a stack of experts that cannot be divided evenly: M1 has 32, on many more ranks."""
    is_uneven = weight.dim() == 3 and weight.shape[0] % num_ranks != 0
    return Shard(1 if is_uneven and weight.shape[1] % num_ranks == 0 else 0)


def _data_mesh(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    """Return the mesh that weights are divided over: `axes` as one, below copies for dp_replicate."""
    flat = mesh[axes]._flatten("_".join(axes))
    return flat if mesh["dp_replicate"].size() == 1 else DeviceMesh._concatenate([mesh["dp_replicate"], flat])


# -- the micro-batch, divided -----------------------------------------------------------------------------------------


def context_part(batch: PackedBatch, world: World) -> PackedBatch:
    """Return this rank's rows of a micro-batch: as many as any other's, or one more.

    Raises:
        UserError: fewer rows than ranks.
    """
    num_ranks = world.num_context_ranks
    if num_ranks == 1:
        return batch
    num_tokens = batch.input_ids.shape[0]
    if num_tokens < num_ranks:
        raise UserError(
            f"context_parallel: {num_ranks} cannot be used for a micro-batch of {num_tokens} tokens; accepted: at "
            "least one token a rank"
        )
    starts = [num_tokens * rank // num_ranks for rank in range(num_ranks + 1)]
    assert world.context_group is not None
    context = ContextPart(world.context_group, world.context_rank, starts, batch.layout.bounds)
    rows = slice(context.start, context.end)
    layout = ForwardBatch.packed(
        context.seqlens, past_lens=context.past_lens, device=batch.input_ids.device, backend=batch.layout.backend
    )
    layout = replace(layout, positions=batch.layout.positions[rows], context=context)
    return PackedBatch(batch.input_ids[rows], batch.targets[rows], layout)


def context_balance_loss(routings: list[Routing], group: dist.ProcessGroup | None) -> Tensor:
    """Return `model.load_balancing_loss` of a micro-batch whose tokens are divided over the ranks of `group`.

    The value is that of the whole micro-batch on every rank; its gradient is that of this rank's tokens, so that the
    gradients' sum over the group is the whole one.
    """
    assert group is not None
    probs = torch.cat([r.probs for r in routings])
    ids = torch.cat([r.expert_ids for r in routings])
    num_experts = probs.shape[-1]
    counts, own = count_choices(ids, num_experts).to(probs.dtype), probs.sum(0)
    totals = torch.stack((counts, own.detach()))
    dist.all_reduce(totals, group=group)
    num_tokens = totals[0].sum() / ids.shape[1]
    share = totals[1] + (own - own.detach())
    return num_experts * (totals[0] * share).sum() / num_tokens**2


# -- sums over ranks --------------------------------------------------------------------------------------------------


def sum_over_ranks(values: Any, world: World) -> Any:
    """Return the sums over all ranks of a list of numbers, or of a tensor, in kind; for a list no GPU is waited for."""
    if world.size == 1:
        return values
    is_list = isinstance(values, list)
    sums = torch.tensor(values, dtype=torch.float64) if is_list else values.clone()
    dist.all_reduce(sums)
    return sums.tolist() if is_list else sums


def gradient_norms(model: MiniMaxM1ForCausalLM, world: World) -> dict[str, float]:
    """Return the norm of the whole gradient, "all", and of its parts: "embedding", "layer 0", …, "head" (and norm)."""
    return norms_by_layer(model, sum_over_ranks(gradient_squares(model), world).tolist(), world)


@torch.no_grad()
def gradient_squares(model: MiniMaxM1ForCausalLM) -> Tensor:
    """Return [P] float64: the squared norm of this rank's part of each parameter's gradient; the host waits for none.

    All of them in a few launches: one by one, hundreds, a GPU would stand still behind the host.
    """
    parameters = list(model.parameters())
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    norms = iter(torch._foreach_norm(gradients, dtype=torch.promote_types(gradients[0].dtype, torch.float32)))
    zero = gradients[0].new_zeros(())
    return torch.stack([zero if p.grad is None else next(norms) for p in parameters]).double().square()


def norms_by_layer(model: MiniMaxM1ForCausalLM, squares: Sequence[float], world: World) -> dict[str, float]:
    """Return `gradient_norms` from `gradient_squares`, once these are summed over ranks."""
    num_layers = len(model.model.layers)
    sums = dict.fromkeys(["embedding", *(f"layer {i}" for i in range(num_layers)), "head"], 0.0)
    for (name, parameter), square in zip(model.named_parameters(), squares, strict=True):
        layer = re.search(r"layers\.(\d+)\.", name)
        part = f"layer {layer[1]}" if layer else "embedding" if "embed_tokens" in name else "head"
        sums[part] += square / (world.size // _num_parts(parameter))  # so many ranks hold the same part
    return {name: math.sqrt(x) for name, x in {**sums, "all": sum(sums.values())}.items()}


@torch.no_grad()
def clip_gradients(model: MiniMaxM1ForCausalLM, factor: float) -> None:
    """Multiply all gradients by `factor`."""
    if factor != 1.0:
        torch._foreach_mul_([_local(p.grad) for p in model.parameters() if p.grad is not None], factor)


def on_whole_matrices(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x) for a function of each matrix of x [..., m, n], which may be divided over ranks.

    A matrix that is divided is gathered, and every rank computes it; matrices of a divided stack stay where they are.
    """
    if not isinstance(x, DTensor):
        return function(x)
    whole = [Replicate() if isinstance(p, Shard) and p.dim >= x.dim() - 2 else p for p in x.placements]
    parts = function(x.redistribute(placements=whole).to_local())
    result = DTensor.from_local(parts, x.device_mesh, whole, run_check=False, shape=x.shape, stride=x.stride())
    return result.redistribute(placements=x.placements)


def _local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def _num_parts(x: Tensor) -> int:
    """How many parts a tensor is divided into."""
    if not isinstance(x, DTensor):
        return 1
    sizes = zip(x.placements, x.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_shard())


# -- weights of a divided network -------------------------------------------------------------------------------------


def materialize(model: MiniMaxM1ForCausalLM, device: torch.device) -> None:
    """Give a network that was divided on the meta device its memory, of its parts only; their values are undefined."""
    model.to_empty(device=device)


def full_weights(model: MiniMaxM1ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the whole of each parameter, one after another. Every rank must take all of them."""
    for name, parameter in model.named_parameters():
        whole = parameter.detach()
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole


@torch.no_grad()
def gather_weights(model: MiniMaxM1ForCausalLM, whole: MiniMaxM1ForCausalLM | None) -> None:
    """Copy the weights of a divided network into `whole`, whose parameters have the same names. Every rank must call
    this; with None it only gives its parts to others.

    Generation needs a whole network: it runs in inference mode, of which FSDP2 is not capable.
    """
    parameters = {} if whole is None else dict(whole.named_parameters())
    for name, weight in full_weights(model):
        if parameters:
            parameters[name].copy_(weight)


@torch.no_grad()
def load_weights(model: MiniMaxM1ForCausalLM, folder: Path) -> None:
    """Load a checkpoint folder into a network, divided or not: each rank its parts, tensor by tensor.

    Raises:
        UserError: the folder cannot be read, or lacks tensors of the network.
    """
    pieces = find_pieces(folder)
    for parameter_name, parameter in model.named_parameters():
        local, starts = _local(parameter.detach()), [0] * parameter.dim()
        if isinstance(parameter, DTensor):
            starts = list(
                compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)[1]
            )
        if local.numel() == 0:
            continue
        for name, shape, place, target in _official_parts(parameter_name, parameter.shape, local, starts):
            if name not in pieces or pieces[name].shape != shape:
                found = list(pieces[name].shape) if name in pieces else "nothing"
                raise UserError(f"weights: {folder} has {found} for {name}; accepted: {list(shape)}")
            piece = pieces[name]
            with safe_open(piece.file, framework="pt") as file:
                values = (
                    file.get_tensor(piece.source) if piece.part is None else file.get_slice(piece.source)[piece.part]
                )
            target.copy_(values[place])


def _official_parts(
    name: str, shape: torch.Size, local: Tensor, starts: list[int]
) -> Iterator[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]:
    """Yield what the part of a parameter that begins at `starts` is made of: an official tensor's name and shape, the
    place in it, and the part to fill."""
    stacked = re.fullmatch(r"(.*\.experts\.)(w13|w2)", name)
    if stacked is None:
        yield name, tuple(shape), tuple(slice(a, a + n) for a, n in zip(starts, local.shape, strict=True)), local
        return
    prefix, kind = stacked.groups()
    matrices = {"w2": 0} if kind == "w2" else {"w1": 0, "w3": shape[1] // 2}  # the first row of each
    rows = shape[1] // len(matrices)
    for i in range(local.shape[0]):
        for matrix, first in matrices.items():
            low, high = max(first, starts[1]), min(first + rows, starts[1] + local.shape[1])
            if low < high:
                place = (slice(low - first, high - first), slice(0, shape[2]))  # columns are never divided
                part = local[i, low - starts[1] : high - starts[1]]
                yield f"{prefix}{starts[0] + i}.{matrix}.weight", (rows, shape[2]), place, part
