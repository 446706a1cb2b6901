"""Servers for the tests: processes of their own, as users start them, on 127.0.0.1 and a free port."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Server:
    """A running server: its address, its process, and what it has written to stderr."""

    url: str
    process: subprocess.Popen[str]
    stderr: list[str] = field(default_factory=list)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            match = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if labels.items() <= found.items():
                    total += float(match[3])
        return total


@contextlib.contextmanager
def running_server(*flags: str, usage_db: Path, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Start `minimax-m1 serve` with the shipped model unless the flags say otherwise; end it behind the block."""
    command = [sys.executable, "-m", "minimax_m1", "serve", "--port", "0", "--usage-db", str(usage_db)]
    process = subprocess.Popen(
        [*command, *([] if "--cache-bytes" in flags else ["--cache-bytes", str(256 << 20)]), *flags],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    server = Server("", process)
    reader = threading.Thread(target=lambda: server.stderr.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        for line in process.stdout:
            found = re.search(r"http://\S+:\d+", line)
            if found:
                server.url = found[0]
                break
        assert server.url, "".join(server.stderr)
        with httpx.Client(transport=httpx.HTTPTransport(retries=3)) as client:
            assert client.get(f"{server.url}/health", timeout=30).status_code == 200
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        reader.join(5)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of the shipped model for all tests that leave it as it is."""
    with running_server(usage_db=tmp_path_factory.mktemp("usage") / "usage.sqlite") as running:
        yield running
