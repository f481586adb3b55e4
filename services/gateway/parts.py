"""What the handlers share: the open clients, the clock and the secrets of one gateway process."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import NoReturn

from aiohttp import web
from aiohttp.hdrs import AUTHORIZATION, ORIGIN
from aiohttp.typedefs import Handler

from loop import metrics
from loop.events import HybridClock, RandomBytes
from loop.keys import Scope
from loop.settings import GatewaySettings, Settings
from services.gateway.engines import RETRY_AFTER_S, Engines
from services.gateway.errors import Refusal
from services.gateway.identity import ANYBODY, Caller, TokenSigner
from services.gateway.limits import RateLimit, Room
from services.gateway.recent import Recent
from services.gateway.redactor import Redactor
from services.gateway.routes import RouteWatch
from services.gateway.spool import Spool
from services.gateway.tally import Tally

MAX_HEADERS = 100
VOTE_BYTES = 64 * 1024 * 1024  # of the bodies of open requests that are for no engine


@dataclass
class Parts:
    """One gateway's parts; `settings` is only read while it is made."""

    settings: Settings
    engines: Engines
    routes: RouteWatch
    spool: Spool
    recent: Recent
    redactor: Redactor | None
    clock: HybridClock
    tally: Tally
    is_draining: bool = False
    in_progress: int = 0
    """Requests of any kind that have no answer yet."""
    open_requests: int = 0
    """Those that are for the engine."""
    gateway: GatewaySettings = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.gateway = settings.gateway
        self.alias, self.base_name = settings.engine.alias, settings.engine.base_name
        self.responses_topic, self.feedback_topic = settings.log.responses_topic, settings.log.feedback_topic
        self.source = f"thumbwheel/gateway/{settings.gateway.gateway_id}"
        self.rater_salt = settings.gateway.rater_salt.get_secret_value().encode()
        secret = settings.gateway.token_secret
        # Without a secret, tokens hold until the next start.
        self.signer = TokenSigner(
            os.urandom(32) if secret is None else secret.get_secret_value().encode(),
            [old.get_secret_value().encode() for old in settings.gateway.previous_token_secrets],
        )
        self._key_limit = _limit(self.gateway.key_requests_per_s, self.gateway.rate_burst_s)
        self._rater_limit = _limit(self.gateway.rater_requests_per_s, self.gateway.rate_burst_s)
        self.room, self.vote_room = Room(self.gateway.max_open_bytes), Room(VOTE_BYTES)
        self.random = RandomBytes()
        self.langfuse = settings.langfuse
        gateway = settings.gateway
        weights = {"regenerate": gateway.regenerate_weight, "copy": gateway.copy_weight, "edit": gateway.edit_weight}
        self.implicit_weights = {source: weight for source, weight in weights.items() if weight is not None}

    async def caller(self, request: web.Request) -> Caller | None:
        """Who calls, by the API key; None without a valid one. Raises Refusal 503 while that cannot be known."""
        keys, authorization = self.routes.keys, request.headers.get(AUTHORIZATION)
        found = keys.find(authorization)
        if found is None and not keys.is_known and (keys.is_local or authorization is not None):  # just started
            await self.routes.is_known.wait()
            found = keys.find(authorization)
            if found is None and not keys.is_known:
                message = "the store, which has the API keys, cannot be reached yet; send it again"
                raise _refused(503, message, "not_ready", retry_after_s=1)
        return found

    async def check_key(self, request: web.Request, scope: Scope) -> Caller:
        """Who calls. Raises Refusal 401 without a valid API key, 403 where the key has not this scope or another site's
        page calls without one, 429 where the key is used too fast, 431 for too many or too large headers, 503 while the
        keys cannot be known.
        """
        self.check_headers(request)
        caller = await self.caller(request)
        if caller is None:
            raise _refused(401, "no valid API key; send `Authorization: Bearer <key>`", "invalid_api_key")
        if caller is ANYBODY and self._is_foreign(request):
            message = (
                f"origin {request.headers[ORIGIN][:120]!r} may not call without an API key; gateway.cors_origins names "
                "those that may"
            )
            raise _refused(403, message, "foreign_origin")
        self.check_scope(caller, scope)
        self._limit_key(caller)
        return caller

    async def voter(self, request: web.Request) -> Caller | None:
        """Who votes, by the API key, which a token may stand in for. Raises Refusal 429, 431 or 503."""
        self.check_headers(request)
        caller = await self.caller(request)
        if caller is ANYBODY and self._is_foreign(request):
            return None
        if caller is not None:
            self._limit_key(caller)
        return caller

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may call."""
        return not {origin, "*"}.isdisjoint(self.gateway.cors_origins)

    def _is_foreign(self, request: web.Request) -> bool:
        """Whether another site's page sends this. A browser lets every page post to this machine, and only keeps the
        answer from it; so where no key is asked for, the page that a user is on could teach his model.
        """
        origin = request.headers.get(ORIGIN)
        return origin is not None and not self.allows(origin)

    def check_scope(self, caller: Caller, scope: Scope) -> None:
        """Raises Refusal 403."""
        if scope not in caller.scopes:
            has = ", ".join(sorted(caller.scopes)) or "none"
            message = (
                f"API key {caller.key_id} has not the scope {scope!r} (but: {has}); `thumbwheel keys add` makes one"
            )
            raise _refused(403, message, "missing_scope")

    def check_headers(self, request: web.Request) -> None:
        """Raises Refusal 431. What is beyond these limits by far, aiohttp does not even read (`app.py`)."""
        headers, most = request.raw_headers, self.gateway.max_header_bytes
        if len(headers) > MAX_HEADERS or sum(map(len, chain.from_iterable(headers))) > most:
            message = (
                f"the headers are more than {MAX_HEADERS}, or larger than {most} bytes, which is the most taken here"
            )
            raise _refused(431, message, "headers_too_large")

    def _limit_key(self, caller: Caller) -> None:
        """Take one of the key's requests. Raises Refusal 429."""
        if self._key_limit is not None and caller.key_id:
            _take(self._key_limit, caller.key_id, f"API key {caller.key_id}")

    def limit_rater(self, rater: str) -> None:
        """Take one of the rater's requests. Raises Refusal 429."""
        if self._rater_limit is not None and rater:
            _take(self._rater_limit, rater, "this rater")

    @contextmanager
    def admitted(self, endpoint: str) -> Iterator[Callable[[int], None]]:
        """The room of one request to the engine; what it gives is told of the body's bytes as they come. Both raise
        Refusal 503 where there is none.
        """
        if self.open_requests >= self.gateway.max_open_requests:
            self._overloaded(endpoint, f"{self.open_requests} requests are open, which is the most that is taken here")
        self.open_requests += 1
        try:
            with self.room.share(partial(self._overloaded, endpoint)) as hold:
                yield hold
        finally:
            self.open_requests -= 1

    def _overloaded(self, endpoint: str, why: str) -> NoReturn:
        metrics.gateway_requests.labels(endpoint, "", "503").inc()
        raise Refusal(503, f"{why}; try again", code="overloaded", retry_after_s=RETRY_AFTER_S)

    def stamp(self) -> int:
        """The next stamp of the hybrid clock, above all that this machine's gateways have given."""
        self.clock.last = max(self.clock.last, self.recent.stamp)
        self.recent.stamp = stamp = self.clock.tick(int(time.time() * 1000))
        return stamp


def _limit(per_s: float | None, burst_s: float) -> RateLimit | None:
    return None if per_s is None else RateLimit(per_s, per_s * burst_s)


def _take(limit: RateLimit, subject: str, who: str) -> None:
    wait_s = limit.wait_s(subject, time.monotonic())
    if wait_s:
        after_s = math.ceil(wait_s)
        message = f"{who} asks too often; ask again in {after_s} s"
        raise _refused(429, message, "rate_limit_exceeded", retry_after_s=after_s)


def _refused(status: int, message: str, code: str, retry_after_s: int = 0) -> Refusal:
    metrics.gateway_refused.labels(code).inc()
    return Refusal(status, message, code=code, retry_after_s=retry_after_s)


PARTS = web.AppKey("parts", Parts)


HOLD: web.RequestKey[Callable[[int], None]] = web.RequestKey("hold")


def for_no_engine(handler: Handler) -> Handler:
    """The handler with a `request[HOLD]` for the body's bytes: who sends much of it takes no room from the chat."""

    async def held(request: web.Request) -> web.StreamResponse:
        with request.app[PARTS].vote_room.share(_no_room) as request[HOLD]:
            return await handler(request)

    return held


def _no_room(why: str) -> NoReturn:
    raise _refused(503, f"{why}; try again", "overloaded", RETRY_AFTER_S)
