"""One HTTP/1.1 connection to an engine: one request at a time, its answer read as it comes.

Not aiohttp's client, whose redirects, cookies and tracing cost four times as much (`tests/bench/RESULTS.md`). Knows
nothing of replicas, retries and time limits: those are for `engines.py`.
"""

from __future__ import annotations

import asyncio

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

_MAX_HEAD_BYTES = 64 * 1024
_HIGH_WATER_BYTES = 128 * 1024  # of a body that waits to be read


class GarbageError(Exception):
    """What the engine sent is not HTTP."""


class Connection(asyncio.Protocol):
    """A connection to an engine."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self._loop = asyncio.get_running_loop()
        self._blocks: list[bytes] = []
        self.on_body = self._blocks.append  # called for each chunk of a stream, so with nothing around it
        self._parser = HttpResponseParser(self)
        self._is_open = True
        self._is_complete = True
        self._waiting_bytes = 0
        self._is_paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, head: bytes, body: bytes, deadline_s: float) -> None:
        """Send a request and wait for its answer's `status` and `headers`.

        `deadline_s`, by the event loop's clock and never before the last request's, ends this and reading the answer.
        Raises ConnectionError, GarbageError and TimeoutError.
        """
        self._is_complete = False
        self._deadline_s = deadline_s
        if self._timer is None:  # else it looks again when it is due: one timer for many requests
            self._timer = self._loop.call_at(deadline_s, self._look_at_the_time)
        self.status, self.headers, self._waiting_bytes = 0, [], 0
        self._transport.writelines((head, body))
        while not self.status:
            await self._more()

    async def read(self) -> bytes:
        """What has come of the body; empty at its end. Raises ConnectionError, GarbageError and TimeoutError."""
        while not self._blocks and not self._is_complete:
            await self._more()
        block = b"".join(self._blocks)
        self._blocks.clear()
        self._waiting_bytes = 0
        if self._is_paused:
            self._is_paused = False
            if not self._transport.is_closing():  # uvloop's raises there
                self._transport.resume_reading()
        return block

    async def read_all(self) -> bytes:
        """The body. Raises ConnectionError, GarbageError and TimeoutError."""
        blocks = []
        while block := await self.read():
            blocks.append(block)
        return b"".join(blocks)

    @property
    def is_idle(self) -> bool:
        """Whether it can take a request: everything was sent, and read to its end."""
        is_read = self._is_complete and not self._blocks
        return self._is_open and is_read and not self._transport.get_write_buffer_size()

    @property
    def content_type(self) -> str:
        """The answer's, without parameters; empty where it has none."""
        found = next((value for name, value in self.headers if name.lower() == "content-type"), "")
        return found.partition(";")[0].strip().lower()

    def abort(self) -> None:
        """Hang up."""
        self._is_open = False
        self._transport.abort()

    def _look_at_the_time(self) -> None:
        self._timer = None
        if self._is_complete:
            return
        if self._loop.time() >= self._deadline_s:
            self._fail(TimeoutError())
        else:
            self._timer = self._loop.call_at(self._deadline_s, self._look_at_the_time)

    def _fail(self, error: Exception) -> None:
        if self._error is None and not self._is_complete:
            self._error = error
            self._wake()

    # --- as the transport and the parser call it ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        if self._is_complete:  # nobody has asked
            self.abort()
            return
        self._waiting_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not self.status and self._waiting_bytes > _MAX_HEAD_BYTES:
                raise HttpParserError(f"headers of more than {_MAX_HEAD_BYTES} bytes")
        except (HttpParserError, HttpParserUpgrade) as exc:
            self._fail(GarbageError(str(exc.__context__ or exc)))
            self.abort()
        else:
            if self._waiting_bytes > _HIGH_WATER_BYTES and not self._is_paused:
                self._is_paused = True
                self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._is_open = False
        names = {name.lower() for name, _ in self.headers}
        if self.status and names.isdisjoint({"content-length", "transfer-encoding"}):
            self._is_complete = True  # the only end that such a body has
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
        self._fail(exc if isinstance(exc, ConnectionError) else ConnectionResetError("the engine hung up"))
        del self._parser  # which refers to us

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else a trailer
            self.headers.append((name.decode("latin-1"), value.decode(errors="surrogateescape")))

    def on_headers_complete(self) -> None:
        if self._is_complete:
            raise ValueError("more than the answer")
        status = self._parser.get_status_code()
        if status < 200:  # an interim one
            self.headers.clear()
        else:
            self.status = status

    def on_message_complete(self) -> None:
        if self.status:
            self._is_complete = True
            self._is_open = self._parser.should_keep_alive()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        if self._transport.is_closing():
            raise ConnectionResetError("the engine hung up")
        self._waiter = self._loop.create_future()
        await self._waiter
