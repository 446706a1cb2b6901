"""The server beside its own engine: what HTTP costs in tokens a second, and until the first token."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minimax_m1 import shipped
from minimax_m1.benchmark.engine import CACHE_BYTES
from minimax_m1.benchmark.measure import Figure
from minimax_m1.engine import Engine
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams
from minimax_m1.server.accounts import Accounts
from minimax_m1.server.app import Server, run_loop
from minimax_m1.server.service import Service
from minimax_m1.settings import EngineSettings, ServeSettings
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

CASE = "server"
ROUTE = "/v1/chat/completions"
NUM_TOKENS = 128  # of an answer


def run(size: str, model: MiniMaxM1ForCausalLM, *, quick: bool) -> Iterator[Figure]:
    """Yield the figures of one preset: 1, 16 and 64 streams beside `Engine.generate`, and the time that HTTP adds."""
    rounds = 1 if quick else 3
    engine = Engine(
        model,
        MiniMaxM1Tokenizer.from_pretrained(shipped.path()),
        EngineSettings(max_batch_size=64, cache_bytes=CACHE_BYTES, prefix_cache=False, routing_log=True),
    )
    _engine_alone(engine, 4)  # warm-up
    with _served(engine) as (service, port):
        for num_streams in (1, 16, 64):
            alone = functools.partial(_engine_alone, engine, num_streams)
            pairs = [(_over_http(port, num_streams), _in_engine_thread(service, alone)) for _ in range(rounds)]
            ours, peer = (num_streams * NUM_TOKENS / statistics.median(s) for s in zip(*pairs, strict=True))
            yield Figure(f"{size} {num_streams} streams over HTTP", "tok/s", ours, peer)
        yield Figure(f"{size} first token over HTTP, more by", "ms", _overhead(service, port, 5 if quick else 40))


@contextlib.contextmanager
def _served(engine: Engine) -> Iterator[tuple[Service, int]]:
    """Serve an engine in another thread, as `minimax-m1 serve` does; yield the service and its port."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ServeSettings(access_log=False, drain_seconds=0)
        service = Service(engine, "bench", settings, Accounts([], database=Path(folder) / "usage.sqlite"))
        server = Server(service)
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        thread = threading.Thread(target=lambda: run_loop(server.serve([listener])))
        thread.start()
        try:
            yield service, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            asyncio.run(service.close())


def _in_engine_thread(service: Service, function: Callable[[], float]) -> float:
    """Run a function where the server's engine runs, for two threads must not step it."""
    return asyncio.run(service.async_engine.call(function))


def _messages(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {100 + index} + 729?"}]


def _body(index: int, num_tokens: int) -> dict[str, Any]:
    how = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    return {"messages": _messages(index), **how}


def _over_http(port: int, num_streams: int) -> float:
    """Return the seconds that so many streams take, read by another process."""
    bodies = [_body(i, NUM_TOKENS) for i in range(num_streams)]
    task = {"host": "127.0.0.1", "port": port, "path": ROUTE, "bodies": bodies}
    script = Path(__file__).with_name("streams.py")
    client = subprocess.run(
        [sys.executable, script], input=json.dumps(task), capture_output=True, text=True, check=True
    )
    return json.loads(client.stdout)["seconds"]


def _engine_alone(engine: Engine, num_requests: int, num_tokens: int = NUM_TOKENS) -> float:
    """Return the seconds that the same requests take without a server."""
    params = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.chat([_messages(i) for i in range(num_requests)], params, routing_log=False)
    return time.perf_counter() - start


def _overhead(service: Service, port: int, rounds: int) -> float:
    """Return the median milliseconds from the request to the first token over HTTP, less those of the engine."""
    more = []
    for i in range(rounds):
        alone = _in_engine_thread(service, functools.partial(_engine_alone_first, service.engine, i))
        more.append(1000 * (_seconds_to_first_token(port, i) - alone))
    return statistics.median(more)


def _seconds_to_first_token(port: int, index: int) -> float:
    """Return the seconds to the first event that has text, or the end; the one before it has the role alone."""
    content = json.dumps(_body(index, 2)).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    with socket.create_connection(("127.0.0.1", port)) as client:
        start = time.perf_counter()
        client.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + content)
        answer, seconds = b"", 0.0
        while piece := client.recv(1 << 16):
            answer += piece
            if not seconds and answer.count(b"data: ") > 1:
                seconds = time.perf_counter() - start
        assert b"[DONE]" in answer, answer
        return seconds


def _engine_alone_first(engine: Engine, index: int) -> float:
    start = time.perf_counter()
    tokenizer = engine.needs_tokenizer("prompt")
    params = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
    engine.add(tokenizer.apply_chat_template(_messages(index)), params, routing_log=False)
    seconds = 0.0
    while engine.has_work():
        if any(delta.text or delta.result for delta in engine.step()) and not seconds:
            seconds = time.perf_counter() - start
    return seconds
