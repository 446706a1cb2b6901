"""The kernels, compiled for an H200 where there is none: what TRITON_INTERPRET=1 accepts, the compiler may not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

OFFLINE = Path(__file__).parent / "offline.py"
SHARED_MEMORY = 227 << 10  # bytes that a program may have on compute capability 9.0
CASES = {path.stem for path in (OFFLINE.parent / "cases").glob("*.py")}


@pytest.mark.slow
def test_every_launch_compiles_and_spills_nothing():
    """All files of cases in one process: many launches are the same, and PyTorch is imported once."""
    done = subprocess.run([sys.executable, OFFLINE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["case"].split(".")[0] for kernel in kernels} == CASES
    assert not [kernel for kernel in kernels if kernel["stack"]]  # registers that went to memory
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED_MEMORY]
