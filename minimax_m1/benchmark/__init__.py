"""Benchmarks: this package beside others on the same weights, in the same run.

Only ratios of a run are worth quoting: machines differ, and drift while they measure. The machine's own ceilings
(on a CPU the float32 matrix product and reading memory, on a GPU the bfloat16 product and copying) are measured in the
same run, and our share of them is printed. Where there is a GPU, it is measured, and the CPU is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from minimax_m1.benchmark import engine, gpu, llama_cpp, network, rollout, server, training
from minimax_m1.benchmark.gpu_measure import measure_gpu
from minimax_m1.benchmark.measure import Figure, Machine, as_line, measure_machine, processor
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.kernels import choose
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.settings import BenchSettings

CPU_CASES = (*network.CASES, *training.CASES, *engine.CASES, rollout.CASE, server.CASE, llama_cpp.CASE)


def main(settings: BenchSettings) -> None:
    """Run the cases and print them as they finish; write them to `settings.json` if that is set.

    Raises:
        UserError: an unknown case, or one of another device, or llama.cpp is asked for and not there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accepted = CPU_CASES if device.type == "cpu" else gpu.CASES
    unknown = sorted(set(settings.only) - set(accepted))
    if unknown:
        raise UserError(f"only: {unknown[0]!r} is not a case on this machine; choose from {', '.join(accepted)}")
    rival = llama_cpp.find(is_asked_for=llama_cpp.CASE in settings.only) if device.type == "cpu" else None
    peer = _peer_version()
    machine = measure_machine(1 if settings.quick else 5) if device.type == "cpu" else measure_gpu(device)
    about = _about(device, machine, peer, rival)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'case':38}{'unit':>10}{'ours':>10}{'peer':>10}{'ratio':>8}{'of ceiling':>12}")
    if device.type == "cpu":
        found = _run_on_cpu(machine, settings, rival, with_peer=peer is not None)
    else:
        found = gpu.run(device, machine, settings.only or accepted, with_peer=peer is not None)
    rows = []
    for figure in found:
        rows.append(figure._asdict())
        print(as_line(figure), flush=True)
        if settings.json is not None:  # each time: a run that is stopped has what it measured
            settings.json.write_text(json.dumps({"machine": about, "figures": rows}, indent=2) + "\n")


def _about(
    device: torch.device, machine: Machine, peer: str | None, rival: llama_cpp.LlamaCpp | None
) -> dict[str, str | int | float | None]:
    """Return what the figures depend on: versions, and what the machine can do."""
    return {
        "torch": torch.__version__,
        "transformers": peer,
        "llama.cpp": None if rival is None else rival.version,
        "threads": torch.get_num_threads(),
        "backend": choose(None, torch.empty(0, device=device)),
        "processor": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "gemm_gflops": round(machine.gemm_flops / 1e9, 1),
        "read_gbytes": round(machine.read_bytes / 1e9, 1),
    }


def _run_on_cpu(
    machine: Machine, settings: BenchSettings, rival: llama_cpp.LlamaCpp | None, *, with_peer: bool
) -> Iterator[Figure]:
    if rollout.CASE in (settings.only or CPU_CASES):  # of the shipped model, whatever the sizes
        yield from rollout.run(with_peer=with_peer, quick=settings.quick)
    for size in settings.sizes:
        yield from _run_size(size, machine, settings, rival, with_peer=with_peer)


def _run_size(
    size: str, machine: Machine, settings: BenchSettings, rival: llama_cpp.LlamaCpp | None, *, with_peer: bool
) -> Iterator[Figure]:
    """Yield the figures of one preset."""
    cases = settings.only or CPU_CASES
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
