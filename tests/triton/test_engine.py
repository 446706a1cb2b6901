"""The engine with the Triton backend: prompts, padded decoding steps and drafts give what PyTorch's operations give."""

import pytest
import torch

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.engine import Engine
from minimax_m1.engine.decode_graphs import DecodeGraphs
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams
from minimax_m1.settings import EngineSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
def test_requests_get_what_they_get_from_the_torch_backend(monkeypatch):
    monkeypatch.setattr("minimax_m1.engine.decode_graphs.padded_size", lambda count, most: most)
    config = MiniMaxM1Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        attn_type_list=(0, 1),
        num_local_experts=4,
        initializer_range=0.2,
    )
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    model = model.to(DEVICE).eval()
    settings = EngineSettings(max_batch_size=4, cache_bytes=1 << 20, max_model_len=128, speculative_tokens=2)
    prompts = [[1, 2, 3], [5] * 20]  # no drafts for the first at the beginning, two for the second
    params = [SamplingParams(max_new_tokens=4, temperature=0.0, logprobs=0) for _ in prompts]
    outcomes = []
    for backend in ("torch", "triton"):
        engine = Engine(model, None, settings, backend)
        if backend == "triton":
            engine.runner.graphs = DecodeGraphs(model, engine.cache, backend)
        outcomes.append(engine.generate(prompts, params))
    assert engine.runner.graphs is not None and engine.runner.graphs.sizes == [4]
    for expected, found in zip(*outcomes, strict=True):
        assert found.token_ids == expected.token_ids
        ours, theirs = ([entry.logprob for entry in result.logprobs] for result in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)
