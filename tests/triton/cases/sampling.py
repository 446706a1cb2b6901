"""Choosing tokens of M1's vocabulary: one launch that reads, one that chooses."""

import numpy as np
import torch

from minimax_m1.kernels import sampling_triton


def case_choice():
    """All ways of choosing are in one program. What is asked comes from the host, and only the answer goes back."""
    asked = np.array([(1.0, 40, 0.95, 0.01, 0.5, -1, -1, 5)] * 64, dtype=sampling_triton.ASKED)
    sampling_triton.choose_rows(torch.empty(64, 200_064, device="meta"), None, asked, np.arange(200_025, 200_064))
