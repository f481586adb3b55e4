"""The engine's replicas: which one takes a request, which are up, and the connections to them that wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from loop.settings import EngineSettings
from services.gateway.connection import Connection, GarbageError
from services.gateway.errors import UNREADABLE, Refusal

HEALTH_EVERY_S = 1.0
HEALTH_TIMEOUT_S = 2.0
# A busy engine may miss one; its requests are left with it for as long as it may be no more than that.
DEAD_AFTER_MISSES = 3
RETRY_AFTER_S = 1
# Uvicorn closes idle connections after 5 s: one that we might find closed is better not used any more.
IDLE_CONNECTION_S = 4.0
# A replica that has not the adapter (it was restarted) is not asked for it, if another one can be; then it may have it.
LACKS_FOR_S = 1.0

_log = logging.getLogger(__name__)


class AdapterLostError(Refusal):
    """No replica that could be asked serves the model."""

    def __init__(self, model: str) -> None:
        message = f"no engine serves the model {model!r} now; try again"
        super().__init__(503, message, code="adapter_not_loaded", retry_after_s=RETRY_AFTER_S)


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


_models = msgspec.json.Decoder(_Models)


def read_models(body: bytes) -> list[dict[str, Any]]:
    """The entries of an engine's list of models. Raises GarbageError."""
    try:
        return _models.decode(body).data
    except UNREADABLE as exc:
        raise GarbageError(f"its list of models cannot be read: {exc}") from exc


class Replica:
    """One engine server, and the connections to it that wait for a request, the freshest last."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.open_requests = 0
        self.is_up = True
        self.misses = 0
        """Checks of its health in a row that it did not answer."""
        self.lacks: dict[str, float] = {}
        """Until when no request for such a model is for it, by the event loop's clock."""
        self.unanswered: set[Connection] = set()
        """Those whose answer's first byte has not come, and whose request another replica may be asked."""
        self._idle: list[tuple[float, Connection]] = []
        parts = urlsplit(url)
        self.host = parts.netloc.rpartition("@")[2]
        self.base_path = parts.path.rstrip("/")
        self._is_tls = parts.scheme == "https"
        self._address = parts.hostname or "", parts.port or (443 if self._is_tls else 80)

    def take(self) -> Connection | None:
        """A connection that waits, if there is one."""
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.is_idle and time.monotonic() - since_s < IDLE_CONNECTION_S:
                return connection
            connection.abort()
        return None

    def give_back(self, connection: Connection) -> None:
        """For the next request; hangs up where the answer was not read to its end, which ends the request."""
        if connection.is_idle:
            self._idle.append((time.monotonic(), connection))
        else:
            connection.abort()

    async def connect(self, timeout_s: float) -> Connection:
        """A new connection. Raises ConnectionError."""
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, *self._address, ssl=self._is_tls or None
                )
        except OSError as exc:  # TimeoutError among them
            raise ConnectionError(f"{self.url} cannot be reached: {exc}") from exc
        return connection

    def prune(self, idle_s: float) -> None:
        """Hang up what has waited for so long."""
        while self._idle and time.monotonic() - self._idle[0][0] >= idle_s:
            self._idle.pop(0)[1].abort()


class Answer:
    """An engine's answer. `first` is the body's first bytes, or all of it, unless it `is_stream`.

    To be used in a `with`: leaving that early ends the request upstream.
    """

    first = b""

    def __init__(self, replica: Replica, connection: Connection, deadline_s: float) -> None:
        self.status = connection.status
        self.headers = connection.headers
        # The engine's own word on whether it streams: it is more lenient than we in what it takes for `true`.
        self.is_stream = connection.status == 200 and connection.content_type == "text/event-stream"
        self.deadline_s = deadline_s
        """When the request's time is over, by the event loop's clock."""
        self.read = connection.read
        self._replica = replica
        self._connection = connection

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self._replica.open_requests -= 1
        self._replica.give_back(self._connection)


OnHeaders = Callable[[Answer], object]


class Engines:
    """The replicas. Nothing is limited here but time: `Parts.admitted` bounds the requests."""

    def __init__(self, settings: EngineSettings) -> None:
        self.replicas = [Replica(url.rstrip("/")) for url in settings.urls]
        self._fixed = "Content-Type: application/json\r\n"
        if settings.api_key is not None:
            self._fixed += f"Authorization: Bearer {settings.api_key.get_secret_value()}\r\n"
        self._loop = asyncio.get_running_loop()
        self._timeout_s = settings.request_timeout_s
        self._connect_timeout_s = settings.connect_timeout_s

    @property
    def is_up(self) -> bool:
        """Whether any replica takes requests."""
        return any(replica.is_up for replica in self.replicas)

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str], model: str, on_headers: OnHeaders | None = None
    ) -> Answer:
        """The answer of the least loaded replica that serves the model, from the body's first byte on. One that fails
        before that is left for another one; `on_headers` is called with each answer when it has its headers only.

        Raises Refusal 502 or 503, the latter as AdapterLostError where no replica serves the model.
        """
        return await self._send("POST", path, body, headers, model, on_headers)

    async def get(self, path: str) -> Answer:
        """The same for a GET."""
        return await self._send("GET", path, b"", {}, None, None)

    async def watch(self) -> None:
        """Look after the replicas' health for ever."""
        while True:
            await asyncio.gather(*map(self._check, self.replicas))
            await asyncio.sleep(HEALTH_EVERY_S)

    def close(self) -> None:
        """Hang up what waits."""
        for replica in self.replicas:
            replica.prune(0.0)

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        model: str | None,
        on_headers: OnHeaders | None,
    ) -> Answer:
        tried: list[Replica] = []
        # A single replica gets a second try too: a pooled connection may have been closed at that very moment.
        for tries_left in reversed(range(max(2, len(self.replicas)))):
            replica = self._least_loaded(model, tried)
            head = self._head(replica, method, path, body, headers)
            try:
                return await self._ask(replica, head, body, model, on_headers, may_move=tries_left > 0)
            except (ConnectionError, AdapterLostError) as exc:
                tried.append(replica)
                failure = exc
                if isinstance(exc, AdapterLostError) and len(self.replicas) == 1:
                    break
            except TimeoutError as exc:
                message = f"the engine did not answer within {self._timeout_s:g} s"
                raise Refusal(503, message, code="engine_timeout", retry_after_s=RETRY_AFTER_S) from exc
            except GarbageError as exc:
                raise Refusal(502, f"the engine's answer is not HTTP: {exc}", code="engine_failed") from exc
        if isinstance(failure, AdapterLostError):
            raise failure
        message = f"no engine takes requests now ({type(failure).__name__}); try again"
        raise Refusal(503, message, code="engine_unavailable", retry_after_s=RETRY_AFTER_S) from failure

    def _least_loaded(self, model: str | None, tried: Sequence[Replica]) -> Replica:
        if len(self.replicas) == 1:
            return self.replicas[0]
        now_s = self._loop.time()
        return min(
            self.replicas,
            key=lambda replica: (
                replica in tried,
                not replica.is_up,
                model is not None and replica.lacks.get(model, 0.0) > now_s,
                replica.open_requests,
            ),
        )

    async def _ask(
        self,
        replica: Replica,
        head: bytes,
        body: bytes,
        model: str | None,
        on_headers: OnHeaders | None,
        *,
        may_move: bool,
    ) -> Answer:
        """The answer up to its first byte, for until then another replica can give it; all of it where the engine does
        not stream. Raises AdapterLostError, ConnectionError, TimeoutError and GarbageError.
        """
        replica.open_requests += 1
        connection = None
        try:
            connection = replica.take() or await self._connect(replica)
            if may_move:
                replica.unanswered.add(connection)
            deadline_s = self._loop.time() + self._timeout_s
            await connection.ask(head, body, deadline_s)
            answer = Answer(replica, connection, deadline_s)
            if on_headers is not None:
                on_headers(answer)
            answer.first = await (connection.read() if answer.is_stream else connection.read_all())
            if answer.status == 404 and model is not None:
                await self._look_for(model, replica)
            elif answer.status >= 500 and may_move:
                await self._look_after(replica)
            return answer
        except BaseException:  # on cancellation too: the client has left
            replica.open_requests -= 1
            if connection is not None:
                connection.abort()
            raise
        finally:
            if connection is not None:
                replica.unanswered.discard(connection)

    async def _look_for(self, model: str, replica: Replica) -> None:
        """After a 404. Raises AdapterLostError where the replica has not the model, ConnectionError where it does not
        say.
        """
        _, body = await self._get(replica, "/v1/models")
        try:
            names = {entry.get("id") for entry in read_models(body)}
        except GarbageError as exc:
            raise ConnectionError(f"{replica.url}: {exc}") from exc
        if model not in names:
            replica.lacks[model] = self._loop.time() + LACKS_FOR_S
            raise AdapterLostError(model)

    async def _look_after(self, replica: Replica) -> None:
        """After an error of its own. Raises ConnectionError where the replica is ill: vLLM's server outlives its
        engine for a moment, in which every request is a 500.
        """
        status, _ = await self._get(replica, "/health")
        if status != 200:
            self._mark(replica, False)
            raise ConnectionError(f"{replica.url} is ill: its health is a {status}")

    async def _get(self, replica: Replica, path: str) -> tuple[int, bytes]:
        """The status and the body of a small answer, on a connection of its own. Raises ConnectionError."""
        connection = await replica.connect(HEALTH_TIMEOUT_S)
        try:
            head = self._head(replica, "GET", path, b"", {})
            await connection.ask(head, b"", self._loop.time() + HEALTH_TIMEOUT_S)
            return connection.status, await connection.read_all()
        except (TimeoutError, GarbageError) as exc:
            raise ConnectionError(f"{replica.url} did not answer GET {path}: {exc!r}") from exc
        finally:
            connection.abort()

    def _head(self, replica: Replica, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        given = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return (
            f"{method} {replica.base_path}{path} HTTP/1.1\r\nHost: {replica.host}\r\n"
            f"{self._fixed}{given}Content-Length: {len(body)}\r\n\r\n"
        ).encode()

    async def _connect(self, replica: Replica) -> Connection:
        try:
            return await replica.connect(self._connect_timeout_s)
        except ConnectionError:
            self._mark(replica, False)
            raise

    async def _check(self, replica: Replica) -> None:
        replica.prune(IDLE_CONNECTION_S)
        try:
            status, _ = await self._get(replica, "/health")
            self._mark(replica, status == 200)
            replica.misses = 0
        except ConnectionError:
            self._mark(replica, False)
            replica.misses += 1
            if replica.misses >= DEAD_AFTER_MISSES and self.is_up:
                self._move_from(replica)

    def _move_from(self, dead: Replica) -> None:
        """Hang up where no byte has come, so that another replica is asked: one that hangs closes no connection."""
        if dead.unanswered:
            message = "%d requests move away from engine %s, which hangs"
            _log.warning(message, len(dead.unanswered), dead.url, extra={"action": "engine_hangs"})
        for connection in dead.unanswered:
            connection.abort()

    def _mark(self, replica: Replica, is_up: bool) -> None:
        if is_up is not replica.is_up:
            replica.is_up = is_up
            _log.warning("engine %s is %s", replica.url, "up" if is_up else "down", extra={"action": "engine_health"})
