"""An engine's answer on its way to the app: passed on as it comes, with a tee to the log beside the copy loop.

A failure of the capture costs an event and a counter, never a response. The last byte waits for the spool, but not for
longer than `capture_timeout_s`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable

from aiohttp import web
from multidict import CIMultiDict

from loop import metrics
from loop.log import NewRecord
from services.gateway.answers import EventStream, Rename, Transcript
from services.gateway.capture import Exchange, asked_of, build_record
from services.gateway.connection import GarbageError
from services.gateway.engines import Answer
from services.gateway.identity import FEEDBACK_TOKEN, Claim
from services.gateway.parts import Parts
from services.gateway.regenerate import judge_earlier
from services.gateway.spool import ASIDE_BYTES

RESPONSE_ID = "X-Thumbwheel-Response-Id"
# Headers that concern one connection, or that only the server in front may set.
_NOT_PASSED_ON = frozenset(
    {"connection", "content-length", "date", "keep-alive", "server", "te", "trailer", "transfer-encoding", "upgrade"}
)

_first_byte_seconds = functools.cache(lambda *labels: metrics.gateway_first_byte_seconds.labels(*labels).observe)
_responses_logged = functools.cache(lambda arm: metrics.gateway_responses_logged.labels(arm).inc)


class Relay:
    """The way of one exchange's answer to the app."""

    def __init__(self, request: web.Request, exchange: Exchange, parts: Parts) -> None:
        self._request = request
        self._exchange = exchange
        self._parts = parts
        # When the engine is at work, but before anything of its answer is read.
        asyncio.get_running_loop().call_soon(self._prepare_ahead)

    def _prepare_ahead(self) -> None:
        """What needs nothing of the answer."""
        exchange, parts = self._exchange, self._parts
        if not exchange.ask.is_captured:
            return
        expiry_s = exchange.started_at_ms // 1000 + parts.gateway.token_ttl_s
        self._token = parts.signer.sign(Claim(exchange.response_id, exchange.ask.rater or ""), expiry_s)
        if exchange.ask.size <= ASIDE_BYTES:
            exchange.asked = asked_of(exchange.ask)

    def prepare(self, answer: Answer) -> None:
        """All that needs no byte of the body. A stream's headers come before the engine has read the prompt: what is
        done now delays nobody's first token.
        """
        exchange = self._exchange
        ask = exchange.ask
        self._is_logged = ask.is_logged and answer.status == 200
        self._is_captured = self._is_logged and ask.is_stored
        self._headers = relayed_headers(answer)
        if self._is_logged:
            self._headers[RESPONSE_ID] = exchange.response_id
        if self._is_captured:
            self._headers[FEEDBACK_TOKEN] = self._token
        # What the app did not ask for was asked for by us, in `Ask.upstream_body`.
        strip_token_ids = self._is_captured and not ask.wants_token_ids
        self._rename = _rename(exchange.adapter, exchange.shown_model, strip_token_ids)
        if answer.is_stream:
            self._stream = EventStream(self._rename, Transcript() if self._is_captured else None)
            self._response = _StreamResponse(headers=self._headers)

    async def send(self, answer: Answer) -> web.StreamResponse:
        """Pass the answer, which was prepared for, on and log it."""
        exchange, parts = self._exchange, self._parts
        exchange.first_byte_s = time.monotonic()
        waited_s = exchange.first_byte_s - exchange.started_s
        parts.tally.add(_first_byte_seconds(exchange.ask.endpoint, exchange.arm), waited_s)
        if self._is_captured and exchange.ask.message_id is not None:
            count = str(exchange.ask.choices)
            # One is what is taken for granted, but for a message that had several before.
            if count != (parts.recent.get("choices", exchange.key) or "1"):
                parts.recent.put("choices", exchange.key, count)
        timer = asyncio.get_running_loop().call_at(answer.deadline_s, self._hang_up)
        try:
            return await (self._send_stream(answer) if answer.is_stream else self._send_whole(answer))
        finally:
            timer.cancel()

    def _hang_up(self) -> None:
        """On a client that has not read the answer in time: to close the connection would wait for it."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _send_whole(self, answer: Answer) -> web.StreamResponse:
        if self._is_logged:
            read = functools.partial(_read_body, answer.first) if self._is_captured else Transcript
            await self._wait(self._log(read, len(answer.first)))
        response = web.Response(body=self._rename.answer(answer.first), status=answer.status, headers=self._headers)
        await self._end(response)  # now, while aiohttp would do it behind all of our accounts
        return response

    async def _end(self, response: web.StreamResponse, rest: bytes = b"") -> None:
        """Send what there is still to be sent."""
        if self._parts.is_draining:
            response.force_close()
        try:
            await response.prepare(self._request)
            await response.write_eof(rest)
        except ConnectionError:  # the client has left, maybe with everything but the end
            pass

    async def _send_stream(self, answer: Answer) -> web.StreamResponse:
        response = self._response
        is_complete = False
        try:
            await response.prepare(self._request)
            is_complete = await _copy(answer, response, self._stream)
        except (TimeoutError, ConnectionError):  # of the engine; a client that has left: closing tells the engine
            pass
        finally:  # on cancellation too, which is how aiohttp says that the client has left
            written = self._log_stream(is_complete) if self._is_logged else None
        if not is_complete:
            if self._request.transport is not None:
                # Without the last chunk, so that the app sees an answer cut off, as we did.
                self._request.transport.close()
            return response
        if written is not None:
            await self._wait(written)
        await self._end(response, self._stream.rest())
        return response

    def _log_stream(self, is_complete: bool) -> asyncio.Future[bool]:
        is_whole = is_complete and self._stream.is_done
        read = self._stream.finish if self._is_captured else Transcript
        return self._log(read, self._stream.kept_bytes, is_aborted=not is_whole)

    def _log(self, read: Callable[[], Transcript], size: int, *, is_aborted: bool = False) -> asyncio.Future[bool]:
        """Hand the response to the spool."""
        exchange, parts = self._exchange, self._parts
        if exchange.prompt_key is not None and not is_aborted:
            judge_earlier(exchange.prompt_key, exchange.response_id, exchange.ask.rater, parts)
        ended_s = time.monotonic()

        def build() -> NewRecord:
            transcript = read()
            return build_record(
                exchange,
                transcript,
                topic=parts.responses_topic,
                source=parts.source,
                aborted=is_aborted or (exchange.ask.is_captured and not transcript.has_finished),
                ended_s=ended_s,
            )

        return parts.spool.put_response(build, size + exchange.ask.size)

    async def _wait(self, written: asyncio.Future[bool]) -> None:
        """Until the response is in the spool or its time is over: then it counts as lost, though it may still get
        there.
        """
        parts, arm = self._parts, self._exchange.arm
        if written.done():  # in the journal
            if written.result():
                parts.tally.add(_responses_logged(arm))
            return
        timer = asyncio.get_running_loop().call_later(parts.gateway.capture_timeout_s, _expire, written)
        if await written:
            parts.tally.add(_responses_logged(arm))
        timer.cancel()


class _StreamResponse(web.StreamResponse):
    _send_headers_immediately = False  # but with the first chunk, in one packet


@functools.lru_cache(maxsize=256)
def _rename(adapter: str, shown: str, strip_token_ids: bool) -> Rename:
    return Rename(adapter, shown, strip_token_ids=strip_token_ids)


def relayed_headers(answer: Answer) -> CIMultiDict[str]:
    """The engine's headers for the app, without those of its connection (RFC 9110, section 7.6.1); cross-origin rules
    are the gateway's own.
    """
    relayed = CIMultiDict([header for header in answer.headers if _is_passed_on(header[0])])
    for name, value in answer.headers:
        if name.lower() == "connection":
            for named in value.split(","):
                relayed.popall(named.strip(), None)
    return relayed


@functools.lru_cache(maxsize=1024)
def _is_passed_on(name: str) -> bool:
    lower = name.lower()
    return lower not in _NOT_PASSED_ON and not lower.startswith("access-control-")


async def _copy(answer: Answer, response: web.StreamResponse, stream: EventStream) -> bool:
    """Whether the engine came to its end; what it sends goes to the app at once."""
    block = answer.first
    while block:
        if ready := stream.feed(block):
            await response.write(ready)
        try:
            block = await answer.read()
        except (ConnectionError, GarbageError):
            return stream.is_done
    return True


def _read_body(body: bytes) -> Transcript:
    transcript = Transcript()
    transcript.read_body(body)
    return transcript


def _expire(written: asyncio.Future[bool]) -> None:
    if not written.done():
        metrics.gateway_responses_lost.labels("late").inc()
        written.set_result(False)
