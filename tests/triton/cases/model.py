"""The engine's steps through a layer of each kind of M1's, at full size: nothing asks the device for a value."""

import torch

from minimax_m1.cache import HybridCache
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.engine.speculation import roll_back
from minimax_m1.kernels.gpu import together_to_device
from minimax_m1.model import MiniMaxM1ForCausalLM

META = torch.device("meta")


def engine_parts():
    config = MiniMaxM1Config.preset("minimax-m1").replace(num_hidden_layers=2, attn_type_list=(0, 1))
    with META:
        model = MiniMaxM1ForCausalLM(config).to(torch.bfloat16).eval()
    return model, HybridCache(config, 70, 1 << 17, torch.bfloat16, META)


@torch.inference_mode()
def case_step_that_is_recorded():
    model, cache = engine_parts()
    for size in (1, 64):
        inputs = torch.zeros(3, size, dtype=torch.int64, device=META)
        cu_seqlens = torch.zeros(size + 1, dtype=torch.int32, device=META)
        batch = cache.decode_batch(inputs[2], inputs[1], cu_seqlens, "triton")
        hidden, _ = model.forward_packed(inputs[0], batch, cache)
        assert model.compute_logits(hidden, "triton", num_decodes=size).shape == (size, 200_064)


@torch.inference_mode()
def case_step_with_drafts_and_a_prompt():
    model, cache = engine_parts()
    cache.lens[:2] = [100_000, 77]
    states = {slot: cache.read_states(slot) for slot in (0, 1)}
    batch = cache.batch([0, 1, 2], [4, 1, 1000], "triton", num_decodes=2, keep_drafts=True)
    (ids,) = together_to_device([torch.zeros(1005, dtype=torch.int64)], META)
    hidden, _ = model.forward_packed(ids, batch, cache)
    model.compute_logits(hidden[:6], "triton", num_decodes=6)
    roll_back(model, cache, batch, {0: 2}, states)
