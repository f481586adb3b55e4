"""The engine's replicas, as the gateway's HTTP client sees them: which one takes a request, and which are up."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import aiohttp
from yarl import URL

from loop.settings import EngineSettings
from services.gateway.errors import Refusal

HEALTH_EVERY_S = 1.0
HEALTH_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1
# Uvicorn closes idle connections after 5 s: one that we might find closed is better not used any more.
IDLE_CONNECTION_S = 4.0
_LARGE_BYTES = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Replica:
    """One engine server."""

    url: str
    open_requests: int = 0
    is_up: bool = True


@dataclass(slots=True)
class Answer:
    """An engine's answer from its first byte on: `first` is all of the body, unless there is a `rest` to stream."""

    status: int
    headers: Mapping[str, str]
    first: bytes
    rest: aiohttp.StreamReader | None


class Engines:
    """A connection pool over the replicas. Nothing is limited here but time: `Parts.admit` bounds the requests."""

    def __init__(self, settings: EngineSettings) -> None:
        self.replicas = [Replica(url.rstrip("/")) for url in settings.urls]
        self._headers = {"Content-Type": "application/json"}
        if settings.api_key is not None:
            self._headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        self._timeout_s = settings.request_timeout_s
        self._session = aiohttp.ClientSession(
            # aiohttp's own defaults are 100 connections and 300 s for a whole answer.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S),
            timeout=aiohttp.ClientTimeout(total=settings.request_timeout_s, sock_connect=settings.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),  # a compressed answer could not be read
            auto_decompress=False,
        )

    @property
    def is_up(self) -> bool:
        """Whether any replica takes requests."""
        return any(replica.is_up for replica in self.replicas)

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """The answer of the least loaded replica; leaving early ends the request upstream.

        A replica that fails before the first byte is left for another one. Raises Refusal 502 or 503.
        """
        replica, response, answer = await self._send("POST", path, body, headers)
        try:
            yield answer
        finally:
            replica.open_requests -= 1
            response.close()  # a connection whose body was read to its end is back in the pool already

    async def get(self, path: str) -> Answer:
        """A small answer. Raises Refusal 502 or 503."""
        replica, _, answer = await self._send("GET", path, None, {})
        replica.open_requests -= 1
        return answer

    async def watch(self) -> None:
        """Look after the replicas' health for ever."""
        while True:
            await asyncio.gather(*map(self._check, self.replicas))
            await asyncio.sleep(HEALTH_EVERY_S)

    async def close(self) -> None:
        await self._session.close()

    async def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[Replica, aiohttp.ClientResponse, Answer]:
        tried: list[Replica] = []
        # A single replica gets a second try too: a pooled connection may have been closed at that very moment.
        for _ in range(max(2, len(self.replicas))):
            replica = min(self.replicas, key=lambda r: (r in tried, not r.is_up, r.open_requests))
            replica.open_requests += 1
            try:
                return replica, *await self._begin(method, URL(replica.url + path, encoded=True), body, headers)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as exc:
                replica.open_requests -= 1
                tried.append(replica)
                failure: Exception = exc
                if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                    self._mark(replica, False)
            except TimeoutError as exc:
                replica.open_requests -= 1
                message = f"the engine did not answer within {self._timeout_s:g} s"
                raise Refusal(503, message, code="engine_timeout", retry_after_s=RETRY_AFTER_S) from exc
            except aiohttp.ClientError as exc:
                replica.open_requests -= 1
                raise Refusal(502, f"the engine's answer is not HTTP: {exc}", code="engine_failed") from exc
            except BaseException:  # the client has left
                replica.open_requests -= 1
                raise
        message = f"no engine takes requests now ({type(failure).__name__}); try again"
        raise Refusal(503, message, code="engine_unavailable", retry_after_s=RETRY_AFTER_S) from failure

    async def _begin(
        self, method: str, url: URL, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[aiohttp.ClientResponse, Answer]:
        """The answer up to its first byte, for until then another replica can give it; all of it where the engine does
        not stream.
        """
        # aiohttp sends large bytes at one go and warns of it; a file of them goes in pieces.
        data = body if body is None or len(body) < _LARGE_BYTES else io.BytesIO(body)
        response = await self._session.request(method, url, data=data, headers={**self._headers, **headers})
        try:
            # The engine's own word on whether it streams: it is more lenient than we in what it takes for `true`.
            if response.status == 200 and response.content_type == "text/event-stream":
                first, rest = await response.content.readany(), response.content
            else:
                first, rest = await response.read(), None
        except BaseException:
            response.close()
            raise
        return response, Answer(response.status, response.headers, first, rest)

    async def _check(self, replica: Replica) -> None:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(replica.url + "/health", timeout=timeout) as response:
                self._mark(replica, response.status == 200)
        except (aiohttp.ClientError, TimeoutError):
            self._mark(replica, False)

    def _mark(self, replica: Replica, is_up: bool) -> None:
        if is_up is not replica.is_up:
            replica.is_up = is_up
            _log.warning("engine %s is %s", replica.url, "up" if is_up else "down", extra={"action": "engine_health"})
