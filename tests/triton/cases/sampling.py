"""Choosing tokens of M1's vocabulary: one launch that reads, one that chooses."""

import numpy as np
import torch

from minimax_m1.continuation import _adjust_on_gpu, _Adjustment
from minimax_m1.kernels import sampling_triton
from minimax_m1.sampling import SamplingParams, TokenCounts

V, FORBIDDEN = 200_064, np.arange(200_025, 200_064)


def case_choice():
    """All ways of choosing are in one program. What is asked comes from the host, and only the answer goes back."""
    logits = torch.empty(64, V, device="meta")
    params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5)
    masked = _Adjustment({7: 1.0}, None, np.arange(V) > 9, (3,))
    penalised = _Adjustment({}, TokenCounts((1, 2)), None, ())
    scores = _adjust_on_gpu(logits, [params, params], [(5, masked), (2, penalised)], FORBIDDEN)
    asked = np.array([(1.0, 40, 0.95, 0.01, 0.5, -1, -1, 5)] * 64, dtype=sampling_triton.ASKED)
    answer = sampling_triton.choose_rows(logits, scores, asked, FORBIDDEN)
    assert answer.is_meta and answer.shape == (64, 15)
