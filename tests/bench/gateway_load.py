"""The gateway bench's load generator: keep-alive connections that ask again as soon as they are answered, for so
many seconds (0: each of them once).

Raw sockets under asyncio with as little of its own as can be, so that what is measured is what stands in between.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from urllib.parse import urlsplit

import uvloop


def request_bytes(kind: str, chunks: int, pace_s: float) -> bytes:
    """One request, the same for all."""
    body = {
        "model": "assistant",  # which the stub knows too, when it is asked directly
        "messages": [
            {"role": "system", "content": "You are a support assistant. Be exact and brief."},
            {"role": "user", "content": "My order 1234 has not arrived. Where is it, and when will it come?"},
        ],
        "temperature": 0.7,
        "max_tokens": 64,
        "stub": {"chunks": chunks, "pace_s": pace_s},
    }
    if kind == "stream":
        body["stream"] = True
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Client(asyncio.Protocol):
    """One connection; an answer ends with its Content-Length or with the last chunk."""

    def __init__(self, request: bytes, until: float, gap_s: float) -> None:
        self.request = request
        self.until = until
        self.gap_s = gap_s
        self.latencies_ms: list[float] = []
        self.first_chunk_ms: list[float] = []
        self.chunks = 0
        self.is_dropped = False
        self.done = asyncio.get_running_loop().create_future()
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.send()

    def send(self) -> None:
        self.buffer = b""
        self.end = -1
        self.has_begun = False
        self.started = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if count := data.count(b"data: "):
            self.chunks += count
            if not self.has_begun:
                self.has_begun = True
                self.first_chunk_ms.append((time.perf_counter() - self.started) * 1000)
        if self.end < 0:
            split = self.buffer.find(b"\r\n\r\n")
            if split < 0:
                return
            head = self.buffer[:split].lower()
            assert head.startswith(b"http/1.1 200"), self.buffer[:500]
            at = head.find(b"content-length:")
            self.end = 0 if at < 0 else split + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) >= self.end if self.end else self.buffer.endswith(b"0\r\n\r\n"):
            now = time.perf_counter()
            self.latencies_ms.append((now - self.started) * 1000)
            if now < self.until:
                if self.gap_s:
                    time.sleep(random.uniform(0, self.gap_s))
                self.send()
            else:
                self.transport.close()
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():  # in the middle of an answer
            self.is_dropped = True
            self.done.set_result(None)


async def main(url: str, kind: str, clients: int, seconds: float, chunks: int, pace_s: float) -> None:
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    started = time.perf_counter()
    loop = asyncio.get_running_loop()
    request = request_bytes(kind, chunks, pace_s)
    # Timers tick by the millisecond, for all processes at once: a client alone, whose answer came with a tick, asks at
    # any time between two.
    gap_s = 0.002 if pace_s and clients == 1 else 0.0
    made = [
        (await loop.create_connection(lambda: Client(request, started + seconds, gap_s), host, port))[1]
        for _ in range(clients)
    ]
    await asyncio.gather(*(client.done for client in made))
    found = {
        "latencies_ms": [value for client in made for value in client.latencies_ms],
        "first_chunk_ms": [value for client in made for value in client.first_chunk_ms],
        "chunks": sum(client.chunks for client in made),
        "dropped": sum(client.is_dropped for client in made),
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    _, url_, kind_, clients_, seconds_, chunks_, pace_ = sys.argv
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(url_, kind_, int(clients_), float(seconds_), int(chunks_), float(pace_)))
