"""A training step's forward and backward through a layer of each kind: nothing asks the device for a value."""

import torch

from minimax_m1.batch import ForwardBatch
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.data import PackedBatch
from minimax_m1.training.loss import packed_losses
from minimax_m1.training.parallel import gradient_squares

META = torch.device("meta")


def case_losses_and_gradients():
    config = MiniMaxM1Config.preset("minimax-m1").replace(
        num_hidden_layers=2, attn_type_list=(0, 1), hidden_size=1024, intermediate_size=512, num_local_experts=8
    )
    lengths = [4096, 100, 3996]
    host = ForwardBatch.packed(lengths, backend="triton")
    with META:
        model = MiniMaxM1ForCausalLM(config).to(torch.bfloat16).train()
        model.lm_head.float()
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.float()
    batch = PackedBatch(torch.zeros_like(host.positions), host.positions, host).to(META)
    losses = packed_losses(model, batch, 1e-4)
    (losses.loss + 0.01 * losses.balance).backward()
    assert losses.expert_counts.shape == (2, 8)
    assert gradient_squares(model).shape == (len(list(model.parameters())),)
