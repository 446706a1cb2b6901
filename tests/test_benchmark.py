"""The benchmark runs, compares like with like, and refuses what it does not know."""

import json
import statistics
import subprocess
import sys

import pytest
import torch

from minimax_m1 import shipped
from minimax_m1.accounting import parameters
from minimax_m1.benchmark import llama_cpp, main, network, rollout, training
from minimax_m1.benchmark.measure import Machine
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.settings import BenchSettings
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

MACHINE = Machine(gemm_flops=1e15, read_bytes=1e12)  # faster than any of today


@pytest.mark.slow
def test_a_quick_run_writes_its_figures(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: it is the peer")
    settings = BenchSettings(sizes=("nano",), quick=True, only=("decode-1",), json=tmp_path / "figures.json")
    main(settings)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["case"] for row in written["figures"]] == ["nano decode-1"]
    assert all(row["ours"] > 0 and row["ceiling"] > 0 for row in written["figures"])
    assert all(row["peer"] > 0 for row in written["figures"])
    assert written["machine"]["gemm_gflops"] > 0
    assert "ratio" in capsys.readouterr().out


def test_an_unknown_case_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="only: 'speed' is not a case on this machine; choose from prefill-8k"):
        main(BenchSettings(only=("speed",)))


@pytest.mark.slow
def test_a_quick_run_of_the_engine(tmp_path):
    """Without Transformers' share: its peers are the engine itself."""
    cases = ("prefix", "routing-log", "speculation")
    main(BenchSettings(sizes=("nano",), quick=True, only=cases, json=tmp_path / "figures.json"))
    written = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert [row["case"] for row in written] == [
        "nano float32 first token, 512 cached",
        "nano int8 first token, 512 cached",
        "nano 16 requests, routing logs",
        "nano repeated text, 8 drafts",
    ]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in written)


@pytest.mark.slow
def test_rollouts_are_measured_beside_what_computes_the_same():
    """The twin answers prompts of several lengths, padded, as the model does; so both draw from the same."""
    pytest.importorskip("transformers", reason="transformers is not installed: it is the peer")
    folder = shipped.find(None)
    model = MiniMaxM1ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(folder)
    prompts = [prompt.ids for prompt in rollout.nano_prompts(tokenizer, 3, seed=0)]
    assert len({len(prompt) for prompt in prompts}) > 1
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    answers = rollout.peer_rollouts(rollout.twin_of(model), prompts, 2, 24, end, pad, seed=0)
    assert [len(tokens) for tokens, _ in answers] == [24] * 6  # none has ended
    for i, (tokens, logprobs) in enumerate(answers):
        ids = torch.tensor([prompts[i // 2] + tokens])
        expected = model(ids, logits_to_keep=25).logits[0, :-1].log_softmax(-1)[range(24), tokens]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=0)  # two float32 networks
    (figure,) = rollout.run(with_peer=True, quick=True)
    assert figure.case == "m1-nano rollouts 2x2" and figure.ours > 0 and figure.peer > 0


def test_llama_cpp_is_used_or_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_BIN", raising=False)
    monkeypatch.delenv("LLAMA_CPP_CONVERT", raising=False)
    assert llama_cpp.find(is_asked_for=False) is None
    with pytest.raises(UserError, match="LLAMA_CPP_BIN: is not set; accepted: a folder with llama-bench"):
        main(BenchSettings(only=("llama-cpp",)))
    monkeypatch.setenv("LLAMA_CPP_BIN", str(tmp_path / "build" / "bin"))
    with pytest.raises(UserError, match=r"LLAMA_CPP_BIN: .* has no llama-bench"):
        main(BenchSettings())
    (tmp_path / "build" / "bin").mkdir(parents=True)
    for tool in llama_cpp.TOOLS:
        (tmp_path / "build" / "bin" / tool).touch(mode=0o755)
    with pytest.raises(UserError, match=r"LLAMA_CPP_CONVERT: .* accepted: llama.cpp's convert_hf_to_gguf.py"):
        main(BenchSettings())
    (tmp_path / "convert_hf_to_gguf.py").touch()
    found = llama_cpp.find(is_asked_for=True)
    assert found is not None and found.converter == tmp_path / "convert_hf_to_gguf.py"


@pytest.fixture
def tiny() -> MiniMaxM1ForCausalLM:
    """A network of which a step takes milliseconds."""
    config = MiniMaxM1Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rotary_dim=16, attn_type_list=(0, 1), num_local_experts=4,
        max_position_embeddings=4096, postnorm=True,
    )  # fmt: skip
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    return model.eval()


TRAINING_CASES = [
    "tiny train 4x512",
    "tiny train 4x512, no optimizer",
    "tiny train 4x512, its products",
    "tiny train, lengths mixed",
    "tiny packed / padded, both ours",
]


def test_training_is_measured_without_a_peer(tiny):
    """The padded batch is ours as well, so its ratio is there; its tokens that fill are no throughput."""
    figures = list(training.run("tiny", tiny, None, MACHINE, ("train", "train-mix"), quick=True))
    assert [figure.case for figure in figures] == TRAINING_CASES
    assert all(figure.ours > 0 for figure in figures)
    assert [figure.case for figure in figures if figure.peer is not None] == TRAINING_CASES[-1:]
    whole, alone, products = figures[:3]
    assert whole.ceiling == alone.ceiling > max(whole.ours, alone.ours)
    assert 0 < products.ours < products.ceiling == 1e6
    assert not tiny.training and all(parameter.grad is None for parameter in tiny.parameters())


@pytest.mark.slow
def test_training_is_measured_beside_transformers_trainer(tiny):
    pytest.importorskip("transformers", reason="transformers is not installed: it is the peer")
    twin = network.transformers_twin(tiny)
    before = [parameter.detach().clone() for parameter in twin.parameters()]
    figures = list(training.run("tiny", tiny, twin, MACHINE, ("train", "train-mix"), quick=True))
    assert [figure.case for figure in figures] == TRAINING_CASES
    ratios = {figure.case: figure.ours / figure.peer for figure in figures if figure.peer is not None}
    assert set(ratios) == {TRAINING_CASES[0], *TRAINING_CASES[3:]} and all(ratio > 0 for ratio in ratios.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))  # it did train


def test_mixed_lengths_are_the_same_every_time_and_padding_is_not_learned():
    lengths = training.length_mix(5)
    assert lengths == training.length_mix(5) and [len(step) for step in lengths] == [training.SAMPLES] * 5
    assert all(16 <= n <= 1024 for step in lengths for n in step)
    assert 100 < statistics.median(n for step in training.length_mix(200) for n in step) < 260
    step = training.random_samples(64, [3, 5])
    padded = [training._padded(sample, step) for sample in step]
    assert [len(sample.ids) for sample in padded] == [5, 5]
    assert [sum(sample.learned) for sample in padded] == [3, 5] and padded[0].ids[:3] == step[0].ids


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
def test_peak_memory_of_a_training_step_grows_with_the_sequence():
    """In a process of its own: a peak never falls."""
    code = "from minimax_m1.benchmark.training import train_alone; train_alone('nano', 1024)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    short, peak = map(int, done.stdout.split())
    state = 16 * parameters(MiniMaxM1Config.preset("nano"))  # weights, gradients, moments
    assert state < short < peak
