"""Rates rise, stay and fall; Muon's updates have the shape of a rotation; the optimizer's state has names."""

import pytest
import torch

from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.optimizer import (
    aux_loss_coefficient,
    build_optimizers,
    learning_rate_factor,
    optimizer_state,
    orthogonalized,
)
from minimax_m1.training.settings import TrainSettings


def tiny_model():
    config = MiniMaxM1Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_type_list=(0, 1), num_local_experts=4,
    )  # fmt: skip
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(0)
    return model


def test_orthogonalized_has_singular_values_near_one():
    for shape in ((3, 8, 16), (16, 8), (8, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalized(x))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_learning_rate_rises_stays_and_falls():
    options = TrainSettings(steps=10, warmup_steps=2, decay_steps=4, final_lr_factor=0.2)
    rates = [learning_rate_factor(step, options) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


@pytest.mark.parametrize(
    ("aux_loss", "expected"), [((), [0.3] * 5), ((0.2,), [0.2] * 5), ((0.2, 0.0), [0.2, 0.15, 0.1, 0.05, 0.0])]
)
def test_balance_coefficient_goes_from_one_to_the_other(aux_loss, expected):
    options = TrainSettings(steps=5, aux_loss=aux_loss)
    assert [aux_loss_coefficient(step, options, 0.3) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_making_the_state_changes_nothing(muon_lr):
    model, twin = tiny_model(), tiny_model()
    options = TrainSettings(muon_lr=muon_lr, weight_decay=0.1)
    made, plain = build_optimizers(model, options), build_optimizers(twin, options)
    state = optimizer_state(model, made)
    assert all((tensor == 0).all() for tensor in state.values())
    roles = {"exp_avg", "exp_avg_sq", "step"} | ({"momentum"} if muon_lr else set())
    assert {name.rpartition(".")[2] for name in state} == roles
    assert {name.rpartition(".")[0] for name in state} == {name for name, _ in model.named_parameters()}
    for net, optimizers in ((model, made), (twin, plain)):
        net(torch.arange(8)[None]).logits.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert optimizer_state(model, made).keys() == state.keys()
