"""Experts on several ranks against all of them on one, forward and backward."""

import json

import pytest
import torch

from tests.ranks import launch
from tests.tolerances import KERNEL


@pytest.mark.slow
def test_experts_on_three_ranks_are_the_reference(tmp_path):
    launch("tests.oracle.divided_worker", 3, "exchange", str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert all(len(errors) == 10 for errors in found)
    for rank, errors in enumerate(found):
        wrong = {
            name: e for name, e in errors.items() if not e < KERNEL[torch.float64 if "64" in name else torch.float32]
        }
        assert not wrong, f"rank {rank}"
