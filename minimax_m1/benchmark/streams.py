"""A client of many streams, in a process of its own so that it takes nothing from the server's; no imports of ours.

Reads one JSON object from stdin, `{"host", "port", "path", "bodies"}`; sends all bodies at once; prints `{"seconds",
"bytes"}`: from the first byte out to the last one in, and how many came.
"""

import asyncio
import json
import sys
import time
from typing import Any


async def main(task: dict[str, Any]) -> None:
    """Run the streams and print the figures."""
    start = time.perf_counter()
    sizes = await asyncio.gather(*(read_stream(task, body) for body in task["bodies"]))
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": sizes}))


async def read_stream(task: dict[str, Any], body: dict[str, Any]) -> int:
    """Send one request and read to the end of its stream; return the bytes."""
    reader, writer = await asyncio.open_connection(task["host"], task["port"])
    content = json.dumps(body).encode()
    head = f"POST {task['path']} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    size, first, tail = 0, b"", b""
    while piece := await reader.read(1 << 16):
        size += len(piece)
        first, tail = first or piece, (tail + piece)[-64:]
    writer.close()
    assert first.startswith(b"HTTP/1.1 200"), first
    assert b"[DONE]" in tail, tail
    return size


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
