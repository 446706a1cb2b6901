"""The kernels, compiled for an H200 where there is none: what TRITON_INTERPRET=1 accepts, the compiler may not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

OFFLINE = Path(__file__).parents[1] / "triton" / "offline.py"
SHARED_MEMORY = 227 << 10  # bytes that a program may have on compute capability 9.0
NETWORKS = {"model", "training"}  # files of cases that run whole networks, whose kernels the other files have
OPERATIONS = sorted({path.stem for path in (OFFLINE.parent / "cases").glob("*.py")} - NETWORKS)


def offline(*arguments: str) -> list[dict]:
    done = subprocess.run([sys.executable, OFFLINE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_launch_compiles_and_spills_nothing(name):
    kernels = offline(name)
    assert kernels
    assert not [kernel for kernel in kernels if kernel["stack"]]  # registers that went to memory
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED_MEMORY]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_step_asks_the_device_for_nothing(name):
    """On the meta device there is nothing to be asked for; what the step launches is not even compiled."""
    assert {kernel["case"].split(".")[0] for kernel in offline("--launch", name)} == {name}
