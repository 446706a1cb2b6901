"""RMSNorm over the hidden size and over the width of lightning attention, with what is around it in a layer."""

import torch

from minimax_m1.kernels.linear import add_rms_norm, rms_norm


def rows(size, dtype=torch.bfloat16):
    return torch.empty(16_384, size, dtype=dtype, device="meta", requires_grad=True)


def case_norm():
    weight = torch.empty(6144, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rms_norm(rows(6144), weight, 1e-5, "triton").sum().backward()


def case_norm_after_the_residual():
    weight = torch.empty(6144, dtype=torch.bfloat16, device="meta", requires_grad=True)
    add_rms_norm(rows(6144), 3.5, rows(6144), 1.0, weight, 1e-5, "triton").sum().backward()


def case_gated_norm_of_lightning_attention():
    weight = torch.empty(8192, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rms_norm(rows(8192), weight, 1e-6, "triton", rows(8192)).sum().backward()


def case_small_and_float32():
    weight = torch.empty(1000, device="meta", requires_grad=True)
    rms_norm(rows(1000, torch.float32), weight, 1e-5, "triton").sum().backward()
