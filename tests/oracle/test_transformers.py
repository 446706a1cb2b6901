"""The network against Transformers' port (MiniMaxForCausalLM), float32, where the two are the same function.

The official code wins where they differ, and the shapes here avoid it: rotary_dim = head_dim, head counts that are
powers of two, a last layer that is softmax, no shared expert, positions given to the port's cached forward.
"""

import pytest
import torch

from minimax_m1.benchmark.network import transformers_twin
from minimax_m1.cache import HybridCache
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from tests.tolerances import LOGITS, relative_error

pytest.importorskip("transformers", reason="transformers is not installed: it is the oracle here")


def make_pair(seed=0, **changes):
    config = MiniMaxM1Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_type_list=(0, 1, 0, 1),
        num_local_experts=4,
        postnorm=True,
    ).replace(**changes)
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed)
    for parameter in model.parameters():  # larger than at the start of training, so that errors show
        parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval(), transformers_twin(model)


SCALES = {
    "layernorm_linear_attention_alpha": 1.7,
    "layernorm_linear_attention_beta": 0.6,
    "layernorm_full_attention_alpha": 2.1,
    "layernorm_full_attention_beta": 1.3,
    "layernorm_mlp_alpha": 1.4,
    "layernorm_mlp_beta": 0.8,
}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, SCALES, {"num_experts_per_tok": 1}, {"num_key_value_heads": 4}], ids=str)
@pytest.mark.parametrize("length", [1, 20, 256, 257, 1025])
def test_logits(changes, length):
    model, twin = make_pair(**changes)
    ids = torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(length))
    assert relative_error(model(ids).logits, twin(ids).logits) < LOGITS


@torch.no_grad()
def test_cached_decode():
    model, twin = make_pair()
    ids = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    cache, past = HybridCache(model.config, 1, 60), None
    for start, end in [(0, 40), *((t, t + 1) for t in range(40, 60))]:
        positions = torch.arange(start, end)[None]
        output = twin(ids[:, start:end], past_key_values=past, position_ids=positions, use_cache=True)
        past = output.past_key_values
        hidden, _ = model.forward_packed(ids[0, start:end], cache.batch([0], [end - start]), cache)
        assert relative_error(model.compute_logits(hidden[-1:]), output.logits[:, -1]) < LOGITS


def test_loss_auxiliary_loss_and_gradients():
    model, twin = make_pair(router_aux_loss_coef=0.1)
    ids = torch.randint(0, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids, labels=ids), twin(ids, labels=ids, output_router_logits=True)
    assert relative_error(ours.aux_loss, theirs.aux_loss) < LOGITS
    assert relative_error(ours.loss, theirs.loss) < LOGITS
    ours.loss.backward()
    theirs.loss.backward()
    assert relative_error(model.lm_head.weight.grad, twin.lm_head.weight.grad) < LOGITS
    assert relative_error(model.model.embed_tokens.weight.grad, twin.model.embed_tokens.weight.grad) < 10 * LOGITS
    for mine, theirs_layer in zip(model.model.layers, twin.model.layers, strict=True):
        experts = mine.block_sparse_moe.experts
        assert relative_error(experts.w13.grad, theirs_layer.mlp.experts.gate_up_proj.grad) < 10 * LOGITS
        assert relative_error(experts.w2.grad, theirs_layer.mlp.experts.down_proj.grad) < 10 * LOGITS
        assert relative_error(mine.block_sparse_moe.gate.weight.grad, theirs_layer.mlp.gate.weight.grad) < 10 * LOGITS
