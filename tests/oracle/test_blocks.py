"""Half a layer in one call gives, to the bit, what its operations give one by one."""

import pytest
import torch

from minimax_m1.cache import HybridCache
from minimax_m1.config import MiniMaxM1Config, QuantizationConfig
from minimax_m1.kernels import blocks, compiled
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.quantization import quantize_model

pytestmark = pytest.mark.skipif(not compiled.library, reason="the compiled kernels were not built here")


def make_model(weights: str) -> MiniMaxM1ForCausalLM:
    config = MiniMaxM1Config(
        vocab_size=89,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=20,
        rotary_dim=20,
        attn_type_list=(0, 1, 0),
        num_local_experts=5,
        num_experts_per_tok=2,
    )
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    if weights == "bfloat16":
        return model.to(torch.bfloat16).eval()
    if weights != "float32":
        quantize_model(model, QuantizationConfig.parse(weights))
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int8-experts", "int4-g32"])
def test_one_call_gives_the_bits_of_many(weights, rows, monkeypatch):
    model = make_model(weights)
    used = []
    for name in ("lightning_block", "moe_block"):
        original = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *args, f=original, n=name: used.append(n) or f(*args))
    results = []
    for one_call in (True, False):
        cache = HybridCache(model.config, rows, 256)
        generator = torch.Generator().manual_seed(1)
        for slot in range(rows):
            ids = torch.randint(0, 89, (70 + slot,), generator=generator)
            model.forward_packed(ids, cache.batch([slot], [len(ids)], num_decodes=0), cache)
        hidden = []
        for _ in range(3):
            ids = torch.randint(0, 89, (rows,), generator=generator)
            # a batch whose drafts are kept goes through the operations one by one
            batch = cache.batch(list(range(rows)), [1] * rows, keep_drafts=not one_call)
            out, routings = model.forward_packed(ids, batch, cache)
            hidden += [out, *(tensor for routing in routings for tensor in routing)]
        results.append((hidden, [cache.read_states(slot) for slot in range(rows)]))
        assert len(used) == 3 * (2 + 3)  # in the first round only: 2 lightning layers, 3 mixtures, 3 steps
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
