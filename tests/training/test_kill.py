"""A run that is killed while it saves is found again where its last complete save left it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes that import torch, and are killed

KILLS = int(os.environ.get("MINIMAX_M1_KILLS", "25"))


def kill(folder: Path, kills: int, ranks: int) -> None:
    """Kill so many runs; kill_worker.py checks what each leaves."""
    script = Path(__file__).with_name("kill_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(folder), str(kills), str(ranks), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300 + 10 * kills)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["last"] >= kills, "hardly anything was saved, so hardly anything was tested"


def test_a_process_killed_at_any_moment(tmp_path: Path) -> None:
    kill(tmp_path, KILLS, 1)


def test_one_or_both_of_two_ranks_killed_at_any_moment(tmp_path: Path) -> None:
    kill(tmp_path, max(3, KILLS // 10), 2)
