"""Several processes on this machine that talk to each other, as torchrun would start them, but sooner.

`python -m tests.ranks NUM_RANKS MODULE ARGUMENTS` imports the module, and with it torch, once; its ranks are forks.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def launch(module: str, num_ranks: int, *arguments: str, seconds: float = 500) -> None:
    """Call `main(*arguments)` of a module on so many ranks; fail with what they wrote if one of them fails or hangs."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(num_ranks), module, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=PROJECT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        code = process.returncode
        assert code == 0, f"{module} on {num_ranks} ranks: exit code {code}\n{output.read()[-5000:]}"


def main(num_ranks: int, module: str, *arguments: str) -> None:
    """Be the process that `launch` starts."""
    work = importlib.import_module(module).main
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
    ranks = []
    for rank in range(num_ranks):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            work(*arguments)
            return
    for _ in range(num_ranks):
        rank, status = os.wait()
        ranks.remove(rank)
        if status:
            for other in ranks:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a rank ended with status {status}")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
