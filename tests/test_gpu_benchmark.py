"""What is measured on a GPU runs, on a CPU at a tiny size, and rivals compute the same."""

import pytest
import torch

from minimax_m1.benchmark import gpu, gpu_kernels, gpu_layers, gpu_training
from minimax_m1.benchmark.gpu_measure import Case, measure, measure_gpu
from minimax_m1.benchmark.measure import Machine
from minimax_m1.config import MiniMaxM1Config

CPU = torch.device("cpu")
MACHINE = Machine(gemm_flops=1e15, read_bytes=1e12)
SIZES = {  # of each case, instead of those of a GPU
    "lightning": (70,),
    "lightning-decode": (2,),
    "attention": (70,),
    "attention-decode": ((2, 70),),
    "experts": (3, 80),
    "experts-train": (40,),
    "products": (3, 80),
    "norms": (3,),
}


@pytest.fixture(scope="module")
def config() -> MiniMaxM1Config:
    return MiniMaxM1Config.preset("minimax-m1").replace(
        hidden_size=64,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
    )


@pytest.mark.parametrize("name", gpu_kernels.CASES)
def test_a_kernel_and_its_rival_compute_the_same(name, config):
    torch.manual_seed(0)
    for case in gpu_kernels.CASES[name](config, CPU, SIZES[name]):
        ours = case.ours()
        assert case.flops >= 0 and case.num_bytes > 0 and case.work > 0
        if case.rival is not None and "int" not in case.name:  # fewer bits are another function
            for mine, theirs in zip(_tensors(ours), _tensors(case.rival()), strict=True):
                error = (mine.float().flatten() - theirs.float().flatten()).norm() / theirs.float().norm()
                assert error < 2e-2, case.name


def _tensors(result):
    return result if isinstance(result, tuple) else (result,)


def test_a_figure_has_its_ceiling(config, monkeypatch):
    monkeypatch.setattr("minimax_m1.benchmark.gpu_measure.MEASURED_SECONDS", 0.01)
    case = next(gpu_kernels.CASES["norms"](config, CPU, (3,)))
    figure = measure(case, MACHINE, CPU)
    assert figure.ours > 0 and figure.peer > 0
    assert figure.ceiling == pytest.approx(1e12 / 1e9)  # bound by memory: what is copied at best
    machine = measure_gpu(CPU, size=64)
    assert machine.gemm_flops > 0 and machine.read_bytes > 0


def test_a_case_that_fails_leaves_the_others_their_figures(config, monkeypatch, capsys):
    def fails():
        raise RuntimeError("no memory\nand more")

    def cases(_, device):
        yield Case("without its rival", "GB/s", 1, 0, 1, lambda: None, fails)
        yield Case("nothing of it", "GB/s", 1, 0, 1, fails)
        yield Case("after it", "GB/s", 1, 0, 1, lambda: None)
        fails()

    monkeypatch.setattr("minimax_m1.benchmark.gpu_measure.MEASURED_SECONDS", 0.01)
    monkeypatch.setattr(gpu, "CASES", ("products", "norms"))
    monkeypatch.setattr(gpu_kernels, "CASES", {"products": cases, "norms": cases})
    found = [(figure.case, figure.peer) for figure in gpu.run(CPU, MACHINE, gpu.CASES, with_peer=False)]
    assert found == 2 * [("without its rival", None), ("after it", None)]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "without its rival, with its rival: RuntimeError: no memory"
    assert [line.split(":")[0] for line in told[1:4]] == ["nothing of it", "products", told[0].split(":")[0]]


def test_layers_are_measured(config, monkeypatch):
    monkeypatch.setattr("minimax_m1.benchmark.gpu_measure.MEASURED_SECONDS", 0.01)
    figures = list(gpu_layers.decoding(config, CPU, MACHINE, (1, 2), context=70))
    assert [figure.case for figure in figures] == [
        f"{kind} layer {weights} decode {count}"
        for kind in ("lightning", "softmax")
        for weights in ("bfloat16", "int8")
        for count in (1, 2)
    ]
    assert all(figure.ceiling > figure.ours > 0 for figure in figures)
    figures = list(gpu_layers.long_prefill(config, CPU, MACHINE, length=2048, chunk=128))
    assert [figure.case[-2:] for figure in figures] == ["0k", "0k", "1k", "2k"] and figures[0].peer == figures[0].ours


@pytest.mark.slow
def test_training_is_measured_beside_the_port(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed: it is the peer")
    monkeypatch.setattr("minimax_m1.benchmark.gpu_training.ROUNDS", 3)
    tiny = dict(hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    tiny |= dict(rotary_dim=16, vocab_size=128, num_hidden_layers=2, attn_type_list=(0, 1))
    figures = list(gpu_training.training(CPU, MACHINE, with_peer=True, samples=2, length=64, **tiny))
    assert [figure.unit for figure in figures] == ["tok/s", "% MFU"][: len(figures)]
    assert all(figure.ours > 0 and figure.peer > 0 for figure in figures)
