"""What the processes of test_exchange and test_context do: one rank's share of an operation, held against the whole.

Run by `tests.ranks.launch` with the operation and the name of a folder; each rank writes its largest errors there, by
case. Every rank draws the same numbers and computes the whole in float64 with the plain formula.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_m1.kernels.attention import softmax_attention
from minimax_m1.kernels.context import ContextPart, lightning_attention_divided, softmax_attention_divided
from minimax_m1.kernels.exchange import expert_mlp_exchanged
from minimax_m1.kernels.experts import expert_mlp_reference
from minimax_m1.kernels.lightning import lightning_attention_reference, lightning_slopes
from tests.tolerances import relative_error

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
LENGTHS = {
    "one": [200],
    "ends at the cuts": [40, 40, 40],
    "many": [1, 30, 2, 50, 1, 1, 35, 9],
    "long and short": [3, 170, 4],
    "one row over": [41, 40, 40],
    "fewer rows than ranks": [2],
    "none at the end of a rank": [39, 0, 1, 80],
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(run: Callable[..., Tensor], noise: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradients of (result · noise).sum()."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = run(*inputs)
    return [result.detach(), *torch.autograd.grad((result.double() * noise).sum(), inputs)]


def context_errors() -> dict[str, float]:
    """Both kinds of attention, on every layout of sequences."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    errors = {}
    for name, lengths in LENGTHS.items():
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        num_tokens, slope = bounds[-1], lightning_slopes(HEADS, 1, 5)
        starts = [num_tokens * r // num_ranks for r in range(num_ranks + 1)]
        context = ContextPart(dist.group.WORLD, rank, starts, bounds)
        own = slice(context.start, context.end)
        whole_bounds = torch.tensor(bounds, dtype=torch.int32)
        part_bounds = torch.tensor([0, *torch.tensor(context.seqlens).cumsum(0)], dtype=torch.int32)
        q, k, v, noise = (draw(seed, num_tokens, HEADS, HEAD_DIM) for seed in range(4))

        def lightning_whole(q, k, v, bounds=whole_bounds, slope=slope):
            return lightning_attention_reference(q, k, v, slope, cu_seqlens=bounds)[0]

        cases: dict[str, tuple] = {"lightning": (lightning_whole, [q, k, v])}
        options = dict(slope=slope, cu_seqlens=part_bounds, context=context)
        divided: dict[str, Callable[..., Tensor]] = {"lightning": partial(lightning_attention_divided, **options)}
        for window in (None, 7, 90):
            whole = partial(softmax_attention, cu_seqlens=whole_bounds, window=window, backend="reference")
            cases[f"softmax {window}"] = whole, [q, k[:, :GROUPS], v[:, :GROUPS]]
            divided[f"softmax {window}"] = partial(softmax_attention_divided, context=context, window=window)
        for case, (whole, inputs) in cases.items():
            expected = gradients(whole, noise, inputs)
            for dtype in (torch.float32, torch.float64):
                parts = [x[own].to(dtype) for x in inputs]
                backend = "reference" if dtype == torch.float64 and num_tokens < 150 else None
                actual = gradients(partial(divided[case], backend=backend), noise[own], parts)
                # a rank's rows may all have small gradients: what counts is the whole tensor's scale
                scale = [max(float(x.abs().max()), 1e-3) for x in expected]
                found = [
                    float((a.double() - e[own]).abs().max()) / s if a.numel() else 0.0
                    for a, e, s in zip(actual, expected, scale, strict=True)
                ]
                errors[f"{case}, {name}, {dtype}"] = max(found)
    return errors


def exchange_errors() -> dict[str, float]:
    """The experts of all ranks, with tokens spread over them in different ways."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts, top_k, hidden, width = 2 * num_ranks, 2, 8, 12
    w13, w2 = draw(1, num_experts, 2 * width, hidden), draw(2, num_experts, hidden, width)
    share = slice(2 * rank, 2 * rank + 2)
    everywhere = list(range(num_experts))
    spreads = {
        "all to all": ([6, 9, 4], [everywhere] * 3),
        "a rank without tokens": ([5, 0, 7], [everywhere] * 3),
        "nobody has tokens for a rank": ([5, 3, 7], [[0, 1, 4, 5]] * 3),
        "each to the next": ([5, 3, 1], [[2, 3], [4, 5], [0, 1]]),
        "only one rank has any, for one other": ([0, 30, 0], [[0, 1]] * 3),
    }
    errors = {}
    for name, (sizes, allowed) in spreads.items():
        x, noise = draw(3, sum(sizes), hidden), draw(4, sum(sizes), hidden)
        weights = draw(5, sum(sizes), top_k).softmax(-1)
        choices = [
            torch.tensor(experts)[draw(6 + r, size, len(experts)).argsort(-1)[:, :top_k]]
            for r, (size, experts) in enumerate(zip(sizes, allowed, strict=True))
        ]
        ids = torch.cat(choices)
        expected = gradients(
            lambda x, w13, w2, weights, ids=ids: expert_mlp_reference(x, w13, w2, ids, weights),
            noise,
            [x, w13, w2, weights],
        )
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for dtype in (torch.float32, torch.float64):
            actual = gradients(
                lambda x, w13, w2, weights, ids=ids[own]: expert_mlp_exchanged(
                    x, w13, w2, ids, weights, dist.group.WORLD
                ),
                noise[own],
                [t.to(dtype) for t in (x[own], w13[share], w2[share], weights[own])],
            )
            parts = [expected[0][own], expected[1][own], expected[2][share], expected[3][share], expected[4][own]]
            found = [relative_error(a, e) for a, e in zip(actual, parts, strict=True) if a.numel()]
            errors[f"{name}, {dtype}"] = max(found)
    return errors


def main(operation: str, folder: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    errors = {"context": context_errors, "exchange": exchange_errors}[operation]()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(errors), encoding="utf-8")
    dist.destroy_process_group()
