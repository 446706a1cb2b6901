"""How a server begins and ends: bad starts, draining, quotas through HTTP, a full queue."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from minimax_m1 import shipped
from minimax_m1.cli import main
from tests.server.conftest import PROJECT, Server, running_server

QUESTION = {"messages": [{"role": "user", "content": "What is 384 + 729?"}], "temperature": 0}
ENDLESS = {**QUESTION, "stream": True, "ignore_eos": True, "temperature": 3, "seed": 1}
CHAT = "/v1/chat/completions"


def fails_to_start(*flags: str) -> str:
    """Return what `minimax-m1 serve` says before it exits with status 2."""
    command = [sys.executable, "-m", "minimax_m1", "serve", *flags]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


class Stream:
    """A stream that is read in another thread."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        self._body, self._url = body, server.url + CHAT
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._has_begun.wait(30), self.error

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                    if len(self.events) > 3:
                        self._has_begun.set()
        except httpx.HTTPError as error:
            self.error = error

    def wait(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


# -- bad starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keys", "keys.toml"], "tokens_per_minute"),
        (["--port", "0", "--model-path", "/nowhere"], "model: there is no folder /nowhere"),
        (["--usage-db", "."], "usage_db"),
        (["--max-queue-size", "-1"], "max_queue_size: -1"),
    ],
)
def test_bad_starts(tmp_path: Path, monkeypatch, capsys, flags: list[str], message: str):
    (tmp_path / "keys.toml").write_text('[[keys]]\nname = "a"\nkey = "sk-1"\ntokens_per_minit = 5\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimax-m1", "serve", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.slow
def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port: cannot listen on 127.0.0.1:{port}" in fails_to_start("--port", port)[:80]


# -- draining -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_lets_a_stream_end(tmp_path: Path):
    model = ["--model-path", str(shipped.path()), "--served-model-name", "mine"]
    with running_server(*model, usage_db=tmp_path / "usage.sqlite") as server:
        stream = Stream(server, {**ENDLESS, "model": "mine", "max_tokens": 1500})
        kept = httpx.Client(base_url=server.url)  # a connection that a balancer keeps
        assert kept.get("/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while kept.get("/ready").status_code == 200:
            time.sleep(0.01)
        refused = kept.post(CHAT, json=QUESTION)
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        assert kept.get("/health").status_code == 200
        stream.wait()
        assert (
            stream.events[-1] == "[DONE]" and json.loads(stream.events[-2])["choices"][0]["finish_reason"] == "length"
        )
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_what_outlasts_the_draining_is_told(tmp_path: Path):
    with running_server("--drain-seconds", "0.5", usage_db=tmp_path / "usage.sqlite") as server:
        stream = Stream(server, ENDLESS)
        server.process.send_signal(signal.SIGTERM)
        stream.wait()
        assert stream.events[-1] == "[DONE]"
        assert json.loads(stream.events[-2])["error"]["code"] == "aborted"
        assert server.process.wait(30) == 0


# -- quotas and the queue -------------------------------------------------------------------------------------------


KEYS = """
[[keys]]
name = "small"
key = "sk-small"
tokens_per_minute = 130

[[keys]]
name = "single"
key = "sk-single"
max_concurrency = 1

[[keys]]
name = "boss"
key = "sk-boss"
admin = true
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.toml").write_text(KEYS)
    flags = ["--keys", str(folder / "keys.toml"), "--max-batch-size", "2", "--max-queue-size", "3"]
    with running_server(*flags, usage_db=folder / "usage.sqlite") as server:
        yield server


def ask(server: Server, name: str, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer sk-{name}"}
    return httpx.post(server.url + CHAT, json={**QUESTION, **fields}, headers=headers, timeout=60)


def test_a_minute_s_tokens(guarded):
    answers = [ask(guarded, "small") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    told = answers[-1]
    assert 1 <= int(told.headers["Retry-After"]) <= 60 and told.json()["error"]["type"] == "rate_limit_error"
    assert ask(guarded, "boss").status_code == 200  # another's quota is not touched


def test_requests_at_once(guarded):
    url, headers = guarded.url + CHAT, {"Authorization": "Bearer sk-single"}
    with httpx.stream("POST", url, json=ENDLESS, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()  # which closes the stream when it goes
        next(lines)
        assert ask(guarded, "single").status_code == 429
    until = time.monotonic() + 10
    while ask(guarded, "single", max_tokens=1).status_code == 429:  # until the server has seen that the client left
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_queue(guarded):
    url, headers = guarded.url + CHAT, {"Authorization": "Bearer sk-boss"}
    with httpx.stream("POST", url, json={**ENDLESS, "n": 5}, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        answer = ask(guarded, "boss")
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
    assert ask(guarded, "boss", n=6).status_code == 400  # more than ever fit
    until = time.monotonic() + 10
    while guarded.metric("vllm:num_requests_running") + guarded.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_usage_is_the_sum_of_what_was_told(guarded):
    def booked() -> dict[str, Any]:
        headers = {"Authorization": "Bearer sk-boss"}
        (total,) = httpx.get(f"{guarded.url}/v1/usage?by=total&key=boss", headers=headers).json()["data"]
        return total

    before = booked()
    usages = [ask(guarded, "boss", max_tokens=limit, n=2).json()["usage"] for limit in (1, 5, 40)]
    after = booked()
    assert after["requests"] - before["requests"] == 3
    for name in ("prompt_tokens", "completion_tokens", "flops"):
        assert after[name] - before[name] == sum(usage[name] for usage in usages)
    assert after["cost"] - before["cost"] == pytest.approx(sum(usage["cost"] for usage in usages))
    own = httpx.get(f"{guarded.url}/v1/usage?by=key", headers={"Authorization": "Bearer sk-small"}).json()["data"]
    assert [row["key"] for row in own] == ["small"]
    denied = httpx.get(f"{guarded.url}/v1/usage?key=boss", headers={"Authorization": "Bearer sk-small"})
    assert denied.status_code == 400


def test_the_access_log(guarded):
    request_id = "trace-me-1"
    headers = {"Authorization": "Bearer sk-boss", "X-Request-Id": request_id}
    assert (
        httpx.post(guarded.url + CHAT, json=QUESTION, headers=headers, timeout=60).headers["X-Request-Id"] == request_id
    )
    until = time.monotonic() + 5
    while not (lines := [line for line in guarded.stderr if request_id in line]):
        assert time.monotonic() < until
        time.sleep(0.01)
    line = json.loads(lines[0])
    assert line["key"] == "boss" and line["status"] == 200 and line["path"] == CHAT and line["completion_tokens"] > 0
    assert "sk-" not in "".join(guarded.stderr)
