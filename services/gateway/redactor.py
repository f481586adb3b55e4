"""Takes what is private out of events before they reach the disk: in a child process, so that neither a slow recogniser
nor the interpreter's lock is in any stream's way.

An event is in memory only until it is clean, so a gateway that is killed with -9 loses those at hand; a response's last
byte waits for it as it waits for the spool, and feedback gets its 202 afterwards. What cannot be redacted is withheld:
a response is lost (counted), a vote stands without its texts. No event's content is ever in a message or in the log.

`python -m services.gateway.redactor builtin|presidio [CONFIG]` is the child: frames in, frames out, until its input
ends, as it does when the gateway dies.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import struct
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path

from loop import metrics
from services.gateway.redact import builtin, presidio, redact_event

START_TIMEOUT_S = 120.0  # of a recogniser that loads a language model
TIMEOUT_S = 30.0  # for one event
RETRY_S = 10.0  # until another is started where one could not be
_REQUEST = struct.Struct("<I")  # length
_ANSWER = struct.Struct("<?I")  # whether it went well, length

_log = logging.getLogger(__name__)


class RedactionError(Exception):
    """An event could not be redacted; it must not be written."""


class Redactor:
    """One child process and the events that wait for it, feedback ahead of responses."""

    def __init__(self, kind: str, config: Path | None) -> None:
        """Raises ValueError where `kind` is `presidio` and that is not installed."""
        if kind == "presidio" and importlib.util.find_spec("presidio_analyzer") is None:
            message = "gateway.redaction is 'presidio', which is not installed; pip install 'thumbwheel[presidio]'"
            raise ValueError(message)
        self._command = [sys.executable, "-m", "services.gateway.redactor", kind, *([str(config)] if config else [])]
        self._child: Process | None = None
        self._retry_at_s = 0.0
        self._waiting: asyncio.PriorityQueue[tuple[bool, int, bytes, asyncio.Future[bytes]]] = asyncio.PriorityQueue()
        self._count = 0
        self._task = asyncio.create_task(self._run())

    async def redact(self, event: bytes, *, is_feedback: bool) -> bytes:
        """The event without what is private. Raises RedactionError."""
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._count += 1
        self._waiting.put_nowait((not is_feedback, self._count, event, done))
        try:
            clean = await done
        except (RedactionError, asyncio.CancelledError):
            metrics.gateway_redactions.labels("failed").inc()
            raise
        metrics.gateway_redactions.labels("unchanged" if clean == event else "changed").inc()
        return clean

    async def close(self) -> None:
        """End the child; what still waits fails."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._end_child()
        while not self._waiting.empty():
            _fail(self._waiting.get_nowait()[3], "the gateway ends")

    async def _run(self) -> None:
        with suppress(RedactionError):
            await self._start()
        while True:
            *_, event, done = await self._waiting.get()
            if done.done():  # nobody waits for it any more
                continue
            try:
                clean = await self._ask(event)
            except RedactionError as exc:
                _log.error("event withheld: %s", exc, extra={"action": "redaction_failed"})
                _fail(done, str(exc))
            except asyncio.CancelledError:
                _fail(done, "the gateway ends")
                raise
            else:
                if not done.done():
                    done.set_result(clean)

    async def _ask(self, event: bytes) -> bytes:
        if self._child is None:
            await self._start()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                is_clean, answer = await self._exchange(event)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as exc:
            await self._end_child()  # the next event gets a new one
            raise RedactionError(f"the redactor gave no answer ({type(exc).__name__})") from exc
        if not is_clean:
            raise RedactionError(f"the redactor failed with {answer.decode()}")
        return answer

    async def _start(self) -> None:
        """A child that is ready: it answers an empty event. Raises RedactionError, at once where that was tried just
        now: those that wait must not wait for as many starts.
        """
        if time.monotonic() < self._retry_at_s:
            raise RedactionError("the redactor did not start; its own message is in the gateway's log")
        try:
            self._child = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._exchange(b"")
        except (OSError, asyncio.IncompleteReadError) as exc:  # there may be no room for a process
            await self._end_child()
            self._retry_at_s = time.monotonic() + RETRY_S
            raise RedactionError("the redactor does not start; its own message is in the gateway's log") from exc

    async def _exchange(self, event: bytes) -> tuple[bool, bytes]:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(_REQUEST.pack(len(event)) + event)
        await self._child.stdin.drain()
        is_clean, length = _ANSWER.unpack(await self._child.stdout.readexactly(_ANSWER.size))
        return is_clean, await self._child.stdout.readexactly(length)

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def _fail(done: asyncio.Future[bytes], why: str) -> None:
    if not done.done():
        done.set_exception(RedactionError(why))


def serve(kind: str, config: Path | None) -> None:
    """The child: answers every event until its input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group; the gateway says when it is over
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write between the answers
    recognise = presidio(config) if kind == "presidio" else builtin
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        event = requests.read(*_REQUEST.unpack(head))
        try:
            is_clean, answer = True, redact_event(event, recognise) if event else b""
        except Exception as exc:  # whatever a recogniser raises; its message may hold the text, its type does not
            is_clean, answer = False, type(exc).__name__.encode()
        answers.write(_ANSWER.pack(is_clean, len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
