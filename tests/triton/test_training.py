"""A training step's losses and gradients with the Triton backend are those of the plain formula."""

import pytest
import torch

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.data import Sample, pack
from minimax_m1.training.loss import packed_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_formula():
    config = MiniMaxM1Config(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attn_type_list=(0, 1),
        num_local_experts=4,
        initializer_range=0.2,
    )
    model = MiniMaxM1ForCausalLM(config).train()
    model.init_weights(seed=0)
    model = model.to(DEVICE)
    samples = [Sample(list(range(1, 1 + n)), [i > 1 for i in range(n)]) for n in (5, 1, 19)]
    losses, gradients = {}, {}
    for backend in ("reference", "triton"):
        model.zero_grad()
        result = packed_losses(model, pack(samples, DEVICE, backend), z_loss=0.01)
        (result.loss / 20 + 0.1 * result.balance).backward()
        losses[backend] = [x.double() for x in result]
        gradients[backend] = {name: p.grad for name, p in model.named_parameters()}
    for expected, actual in zip(losses["reference"], losses["triton"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for name, expected in gradients["reference"].items():
        error = (gradients["triton"][name] - expected).norm() / expected.norm()
        assert error < 1e-4, (name, error)
