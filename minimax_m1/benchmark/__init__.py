"""Benchmarks: this package beside others on the same weights, in the same run.

Only ratios of a run are worth quoting: machines differ, and drift while they measure. The machine's own ceilings
(float32 matrix product, reading memory) are measured in the same run, and our share of them is printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from minimax_m1.benchmark import engine, llama_cpp, network, rollout, server, training
from minimax_m1.benchmark.measure import Figure, Machine, as_line, measure_machine, processor
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.kernels import choose
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.settings import BenchSettings

CASES = (*network.CASES, *training.CASES, *engine.CASES, rollout.CASE, server.CASE, llama_cpp.CASE)


def main(settings: BenchSettings) -> None:
    """Run the cases and print them as they finish; write them to `settings.json` if that is set.

    Raises:
        UserError: an unknown case, or llama.cpp is asked for and not there.
    """
    unknown = sorted(set(settings.only) - set(CASES))
    if unknown:
        raise UserError(f"only: {unknown[0]!r} is not a case; choose from {', '.join(CASES)}")
    rival = llama_cpp.find(is_asked_for=llama_cpp.CASE in settings.only)
    peer = _peer_version()
    machine = measure_machine()
    about = {
        "torch": torch.__version__,
        "transformers": peer,
        "llama.cpp": None if rival is None else rival.version,
        "threads": torch.get_num_threads(),
        "backend": choose(None, torch.empty(0)),
        "processor": processor(),
        "gemm_gflops": round(machine.gemm_flops / 1e9, 1),
        "read_gbytes": round(machine.read_bytes / 1e9, 1),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'case':38}{'unit':>10}{'ours':>10}{'peer':>10}{'ratio':>8}{'of ceiling':>12}")
    figures = []
    if rollout.CASE in (settings.only or CASES):  # of the shipped model, whatever the sizes
        for figure in rollout.run(with_peer=peer is not None, quick=settings.quick):
            figures.append(figure)
            print(as_line(figure), flush=True)
    for size in settings.sizes:
        for figure in _run_size(size, machine, settings, rival, with_peer=peer is not None):
            figures.append(figure)
            print(as_line(figure), flush=True)
    if settings.json is not None:
        rows = [figure._asdict() for figure in figures]
        settings.json.write_text(json.dumps({"machine": about, "figures": rows}, indent=2) + "\n")


def _run_size(
    size: str, machine: Machine, settings: BenchSettings, rival: llama_cpp.LlamaCpp | None, *, with_peer: bool
) -> Iterator[Figure]:
    """Yield the figures of one preset."""
    cases = settings.only or CASES
    # The port rotates whole heads whatever rotary_dim says; the same here, so that both compute the same function.
    config = MiniMaxM1Config.preset(size)
    model = _random_model(config.replace(rotary_dim=config.head_dim))
    twin = None
    if with_peer and set(cases) & {*network.CASES, *training.CASES, *engine.CASES}:
        twin = network.transformers_twin(model)
        network.check_same(model, twin)
    yield from engine.run(size, model, twin, machine, cases, quick=settings.quick)
    yield from network.run(size, model, twin, machine, cases, quick=settings.quick)
    yield from training.run(size, model, twin, machine, cases, quick=settings.quick)
    if server.CASE in cases:
        yield from server.run(size, model, quick=settings.quick)
    del model, twin
    if rival is not None and llama_cpp.CASE in cases:
        yield from llama_cpp.run(size, _random_model(config), rival, machine, quick=settings.quick)


def _random_model(config: MiniMaxM1Config) -> MiniMaxM1ForCausalLM:
    torch.manual_seed(0)
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    return model.eval()


def _peer_version() -> str | None:
    try:
        import transformers
    except ImportError:
        print('transformers is not installed (pip install "minimax-m1[test]"): no peer, no ratios', file=sys.stderr)
        return None
    transformers.logging.set_verbosity_error()
    return transformers.__version__
