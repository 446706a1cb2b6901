"""The kernels at the shapes of the full-size model, each beside its rival; `gpu_measure` has clock and ceilings.

Shapes: T tokens, N sequences, H heads, G key/value heads, D head_dim; M1's are H = 64, G = 8, D = 128, hidden 6144, 32
experts of 9216. Rivals: flash-linear-attention where it is installed, and PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_m1.benchmark.gpu_layers import one_layer
from minimax_m1.benchmark.gpu_measure import Case
from minimax_m1.cache import PAGE_SIZE
from minimax_m1.config import LIGHTNING, MiniMaxM1Config
from minimax_m1.kernels.attention import softmax_attention, softmax_attention_cached
from minimax_m1.kernels.experts import expert_mlp, route
from minimax_m1.kernels.lightning import lightning_attention, lightning_decode, lightning_slopes
from minimax_m1.kernels.linear import linear, rms_norm

DTYPE = torch.bfloat16
LENGTHS = (1024, 8192, 32_768, 131_072)
BATCH_SIZES = (1, 8, 64, 256)
FEW = 64  # tokens up to which a case is that of decoding: bound by memory, and replayed as a graph


def lightning(config: MiniMaxM1Config, device: torch.device, lengths: Sequence[int] = LENGTHS) -> Iterator[Case]:
    """Lightning attention of one sequence, forward and with its backward; the rival is `chunk_simple_gla`."""
    heads, head_dim = _heads(config)
    slope = lightning_slopes(heads, 0, config.num_hidden_layers).to(device)
    rival = _linear_attention_rival("chunk_simple_gla", slope)
    for length in lengths:
        qkv = torch.randn(length, heads, 3 * head_dim, device=device, dtype=DTYPE)
        inputs = [x.requires_grad_() for x in qkv.chunk(3, -1)]
        apart = [x.detach().contiguous()[None].requires_grad_() for x in inputs]
        bounds, grad = torch.tensor([0, length], dtype=torch.int32, device=device), torch.randn_like(apart[0][0])
        q, k, v = inputs
        ours = partial(lightning_attention, q, k, v, slope, cu_seqlens=bounds)
        theirs = None if rival is None else partial(rival, *apart)
        row, flops = grad.nbytes, 4 * length * heads * head_dim**2
        name = f"lightning {length // 1024}k"
        both = _without_grad(ours), theirs and _without_grad(theirs)
        yield Case(f"{name} forward", "tok/s", length, flops, 4 * row, *both)
        both = _with_backward(ours, inputs, grad), theirs and _with_backward(theirs, apart, grad)
        yield Case(f"{name} forward+backward", "tok/s", length, 3 * flops, 11 * row, *both)


def lightning_decoding(
    config: MiniMaxM1Config, device: torch.device, batch_sizes: Sequence[int] = BATCH_SIZES
) -> Iterator[Case]:
    """One token of N sequences, states in place; the rival, which writes them anew, `fused_recurrent_simple_gla`."""
    heads, head_dim = _heads(config)
    slope = lightning_slopes(heads, 0, config.num_hidden_layers).to(device)
    rival = _linear_attention_rival("fused_recurrent_simple_gla", slope)
    for count in batch_sizes:
        states = torch.randn(count, heads, head_dim, head_dim, device=device)
        q, k, v = torch.randn(count, heads, 3 * head_dim, device=device, dtype=DTYPE).chunk(3, -1)
        apart = [x.contiguous()[:, None] for x in (q, k, v)]
        ours = partial(lightning_decode, q, k, v, slope, states, torch.arange(count, device=device))
        theirs = None if rival is None else partial(rival, *apart, initial_state=states, output_final_state=True)
        moved, flops = 2 * states.nbytes + 4 * q.numel() * DTYPE.itemsize, 4 * states.numel()
        yield Case(f"lightning decode {count}", "GB/s", moved / 1e9, flops, moved, ours, theirs, as_graph=True)


def attention(config: MiniMaxM1Config, device: torch.device, lengths: Sequence[int] = LENGTHS[:3]) -> Iterator[Case]:
    """Softmax attention of one sequence, forward and with its backward; the rival is PyTorch's fused attention."""
    heads, head_dim = _heads(config)
    groups = config.num_key_value_heads
    for length in lengths:
        shapes = (length, heads, head_dim), (length, groups, head_dim), (length, groups, head_dim)
        inputs = [torch.randn(shape, device=device, dtype=DTYPE, requires_grad=True) for shape in shapes]
        bounds, grad = torch.tensor([0, length], dtype=torch.int32, device=device), torch.randn_like(inputs[0])
        ours, theirs = partial(softmax_attention, *inputs, cu_seqlens=bounds), partial(_fused_attention, *inputs)
        flops = 2 * length * length * heads * head_dim  # half of the square, two products
        moved = 2 * (inputs[0].nbytes + inputs[1].nbytes)
        name = f"attention {length // 1024}k"
        yield Case(f"{name} forward", "tok/s", length, flops, moved, _without_grad(ours), _without_grad(theirs))
        both = _with_backward(ours, inputs, grad), _with_backward(theirs, inputs, grad)
        yield Case(f"{name} forward+backward", "tok/s", length, 3.5 * flops, 3 * moved, *both)


def attention_decoding(
    config: MiniMaxM1Config,
    device: torch.device,
    batches: Sequence[tuple[int, int]] = ((1, 8192), (1, 1 << 20), (8, 32_768), (64, 8192)),
) -> Iterator[Case]:
    """One token of N sequences of L tokens each, over scattered pages; the rival has the same keys laid end to end."""
    heads, head_dim = _heads(config)
    groups = config.num_key_value_heads
    for count, length in batches:
        pages = -(-length // PAGE_SIZE)
        shape = (groups, count * pages, PAGE_SIZE, head_dim)
        keys, values = (torch.randn(shape, device=device, dtype=DTYPE) for _ in range(2))
        tables = torch.randperm(count * pages, device=device).view(count, pages)
        q = torch.randn(count, heads, head_dim, device=device, dtype=DTYPE)
        ours = partial(
            softmax_attention_cached,
            q,
            keys,
            values,
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device),
            kv_lens=torch.full((count,), length, device=device),
            slots=torch.arange(count, device=device),
            block_tables=tables.int(),
            num_decodes=count,
        )
        k, v = (x[:, tables].flatten(2, 3)[:, :, :length].transpose(0, 1).contiguous() for x in (keys, values))
        theirs = partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True)
        moved, flops = 2 * count * groups * length * head_dim * DTYPE.itemsize, 4 * q.numel() * length
        name = f"attention decode {count} x {length // 1024}k"
        yield Case(name, "GB/s", moved / 1e9, flops, moved, _without_grad(ours), _without_grad(theirs), as_graph=True)


def experts(
    config: MiniMaxM1Config, device: torch.device, counts: Sequence[int] = (1, 8, 64, 512, 8192)
) -> Iterator[Case]:
    """The experts of T tokens, in bfloat16, int8 and int4; the rival is PyTorch's grouped product in bfloat16."""
    plain = one_layer(config, LIGHTNING, device).model.layers[0].block_sparse_moe.experts
    for kind in (None, "int8", "int4"):
        own = (
            plain
            if kind is None
            else one_layer(config, LIGHTNING, device, kind).model.layers[0].block_sparse_moe.experts
        )
        bits = _bits(own.w13, own.w2)
        for count in counts:
            x = torch.randn(count, config.hidden_size, device=device, dtype=DTYPE)
            logits = torch.randn(count, config.num_local_experts, device=device)
            _, ids, shares = route(logits, config.num_experts_per_tok)
            weights_each = 3 * config.intermediate_size * config.hidden_size  # of an expert
            flops, moved = 2 * ids.numel() * weights_each, int(ids.unique().numel()) * weights_each * bits / 8
            ours = partial(expert_mlp, x, own.w13, own.w2, ids, shares)
            theirs = partial(grouped_experts, x, plain.w13, plain.w2, ids, shares)
            both = _without_grad(ours), _without_grad(theirs)
            yield _product(f"experts {kind or 'bfloat16'} {count}", count, flops, moved, *both)


def experts_training(
    config: MiniMaxM1Config, device: torch.device, counts: Sequence[int] = (8192, 32_768)
) -> Iterator[Case]:
    """Forward and backward of a layer's experts; the rival is PyTorch's grouped product."""
    matrices = one_layer(config, LIGHTNING, device).model.layers[0].block_sparse_moe.experts
    w13, w2 = matrices.w13, matrices.w2
    for count in counts:
        x = torch.randn(count, config.hidden_size, device=device, dtype=DTYPE, requires_grad=True)
        logits, grad = torch.randn(count, config.num_local_experts, device=device), torch.randn_like(x)
        _, ids, shares = route(logits, config.num_experts_per_tok)
        flops = 18 * ids.numel() * config.intermediate_size * config.hidden_size
        moved = 3 * (w13.nbytes + w2.nbytes)
        runs = (partial(function, x, w13, w2, ids, shares) for function in (expert_mlp, grouped_experts))
        both = [_with_backward(run, (x, w13, w2), grad) for run in runs]
        yield Case(f"experts forward+backward {count}", "TFLOP/s", flops / 1e12, flops, moved, both[0], both[1])


def products(config: MiniMaxM1Config, device: torch.device, counts: Sequence[int] = (1, 8, 64, 4096)) -> Iterator[Case]:
    """The products of quantized weights; the rival is the product in bfloat16."""
    config = config.replace(num_local_experts=config.num_experts_per_tok)  # to round the others would take long
    plain = one_layer(config, LIGHTNING, device).model.layers[0].self_attn
    for kind in ("int8", "int4"):
        own = one_layer(config, LIGHTNING, device, kind).model.layers[0].self_attn
        for name in ("qkv_proj", "out_proj"):
            weight, wide = getattr(own, name).weight, getattr(plain, name).weight
            for count in counts:
                x = torch.randn(count, wide.shape[1], device=device, dtype=DTYPE)
                flops, moved = 2 * count * wide.numel(), weight.tiles.nbytes + weight.scales.nbytes
                both = [_without_grad(partial(linear, x, w)) for w in (weight, wide)]
                yield _product(f"{name} {kind} {count}", count, flops, moved, both[0], both[1])


def norms(config: MiniMaxM1Config, device: torch.device, counts: Sequence[int] = (64, 32_768)) -> Iterator[Case]:
    """The norm of the lightning output with its gate; the rival is PyTorch's operations one by one."""
    heads, head_dim = _heads(config)
    weight = torch.ones(heads * head_dim, device=device, dtype=DTYPE)
    for count in counts:
        x, gate = (torch.randn(count, heads * head_dim, device=device, dtype=DTYPE) for _ in range(2))
        both = [_without_grad(partial(rms_norm, x, weight, 1e-6, backend, gate)) for backend in (None, "torch")]
        moved, is_graph = 3 * x.nbytes, count <= FEW
        yield Case(f"norm and gate {count}", "GB/s", moved / 1e9, 0, moved, both[0], both[1], as_graph=is_graph)


CASES: dict[str, Callable[[MiniMaxM1Config, torch.device], Iterator[Case]]] = {
    "lightning": lightning,
    "lightning-decode": lightning_decoding,
    "attention": attention,
    "attention-decode": attention_decoding,
    "experts": experts,
    "experts-train": experts_training,
    "products": products,
    "norms": norms,
}


# -- rivals -----------------------------------------------------------------------------------------------------------


def _linear_attention_rival(name: str, slope: Tensor) -> Callable[..., Any] | None:
    """Return flash-linear-attention's kernel of the same operation, if it is installed."""
    try:
        from fla.ops import simple_gla
    except ImportError:
        return None
    return partial(getattr(simple_gla, name), g_gamma=-slope, scale=1.0)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def grouped_experts(x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Return what `experts.expert_mlp` does, by PyTorch's grouped product of sorted rows; differentiable."""
    top_k = expert_ids.shape[1]
    order = torch.argsort(expert_ids.flatten(), stable=True)
    chosen = expert_ids.flatten()[:, None] == torch.arange(w13.shape[0], device=x.device)
    ends = chosen.sum(0).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    y = torch.empty_like(y).index_copy(0, order, y).view(-1, top_k, x.shape[1])
    return (y * expert_weights.to(x.dtype)[..., None]).sum(1)


# -- help -------------------------------------------------------------------------------------------------------------


def _heads(config: MiniMaxM1Config) -> tuple[int, int]:
    assert config.head_dim is not None
    return config.num_attention_heads, config.head_dim


def _bits(*weights: Any) -> float:
    """Return the bits of a weight, its share of the scales included."""
    stored = sum(w.nbytes if isinstance(w, Tensor) else w.tiles.nbytes + w.scales.nbytes for w in weights)
    return 8 * stored / sum(torch.Size(w.shape).numel() for w in weights)


def _product(
    name: str, count: int, flops: float, moved: float, ours: Callable[[], Any], rival: Callable[[], Any]
) -> Case:
    """A product of `count` rows: of few, the weights' bytes are what counts, of many the arithmetic."""
    if count <= FEW:
        return Case(name, "GB/s", moved / 1e9, flops, moved, ours, rival, as_graph=True)
    return Case(name, "TFLOP/s", flops / 1e12, flops, moved, ours, rival)


def _without_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(function)


def _with_backward(function: Callable[[], Any], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        o = function()
        o = o[0] if isinstance(o, tuple) else o
        return torch.autograd.grad(o.view_as(grad), inputs, grad)

    return run
