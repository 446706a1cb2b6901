"""Several processes on this machine that talk to each other, as torchrun would start them, but sooner."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def launch(module: str, num_ranks: int, *arguments: str, seconds: float = 500) -> None:
    """Run `python -m module arguments` as so many ranks; fail with what they wrote if one of them fails or hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=PROJECT,
                stdout=output,
                stderr=output,
            )
            for rank in range(num_ranks)
        ]
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.1)
        output.seek(0)
        codes = [rank.returncode for rank in ranks]
        assert not any(codes), f"{module} on {num_ranks} ranks: exit codes {codes}\n{output.read()[-5000:]}"
