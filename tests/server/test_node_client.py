"""OpenAI's client for Node on a tour through the server: tests/server/node/tour.mjs."""

import shutil
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parent / "node"


def test_the_tour(server) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    if not (NODE / "node_modules" / "openai").is_dir():
        pytest.skip("OpenAI's client is not installed: npm ci --prefix tests/server/node")
    url = f"{server.url}/v1"
    tour = subprocess.run([node, "tour.mjs", url], cwd=NODE, capture_output=True, text=True, timeout=120)
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert tour.stdout.count("ok ") == (NODE / "tour.mjs").read_text().count('\n  async "')
