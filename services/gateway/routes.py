"""What the gateway goes by, route and keys: read from the store every moment, kept in the spool for when it is down.

The gateway acknowledges the generation that it routes by and the oldest one of its open requests, so that the rollout
knows when nobody needs an adapter any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from loop import metrics
from loop.keys import ApiKey
from loop.log import LogUnavailableError
from loop.log.embedded import EmbeddedLog
from loop.rollout.routing import Route
from loop.settings import StoreSettings
from services.gateway.identity import KeyRing
from services.gateway.tally import Tally

if TYPE_CHECKING:
    from sqlalchemy import Engine

_KEYS = "api_keys"  # the meta entry with the keys' hashes

_log = logging.getLogger(__name__)


class _Use:
    """A generator under `contextmanager` would take three times as long."""

    __slots__ = ("_open", "_route", "_tally")

    def __init__(self, route: Route, open_requests: Counter[int], tally: Tally) -> None:
        self._route, self._open, self._tally = route, open_requests, tally

    def __enter__(self) -> Route:
        self._open[self._route.generation] += 1
        self._tally.add(metrics.gateway_open_requests.inc)
        return self._route

    def __exit__(self, *_: object) -> None:
        self._tally.add(metrics.gateway_open_requests.dec)
        self._open[self._route.generation] -= 1
        if not self._open[self._route.generation]:
            del self._open[self._route.generation]


class RouteWatch:
    """The alias's route and the `keys`. `is_known` is set once both were read, from the store or from the last run's
    spool, or the store could not be read.
    """

    def __init__(
        self,
        alias: str,
        gateway_id: str,
        store: StoreSettings,
        spool: EmbeddedLog,
        poll_s: float,
        keys: KeyRing,
        tally: Tally,
    ) -> None:
        self.is_known = asyncio.Event()
        self.is_store_up = False
        self._gateway_id = gateway_id
        self._store_settings = store
        self._store: Engine | None = None
        self._spool = spool
        self._poll_s = poll_s
        self._tally = tally
        self._open: Counter[int] = Counter()
        self._lock = asyncio.Lock()
        self._meta = f"route:{alias}"
        self._is_warned = False
        self.route = Route(alias)
        self.keys = keys
        self._kept: tuple[Route, list[ApiKey]] | None = None
        kept, kept_keys = spool.get_meta(self._meta), spool.get_meta(_KEYS)
        if kept is not None and kept_keys is not None:
            self.route = msgspec.json.decode(kept, type=Route)
            keys.learn(msgspec.json.decode(kept_keys, type=list[ApiKey]))
            self.is_known.set()

    def use(self) -> _Use:
        """The route for one request, open upstream until the block ends."""
        return _Use(self.route, self._open, self._tally)

    async def watch(self) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._poll_s)

    async def refresh(self) -> None:
        """Read route and keys now and acknowledge the route; without the store the last known ones stay."""
        async with self._lock:
            try:
                route, keys = await asyncio.to_thread(self._read)
                if (route, keys) != self._kept:
                    self.route = route
                    self.keys.learn(keys)
                    await asyncio.to_thread(self._keep, route, keys)
                metrics.gateway_route_generation.labels(route.alias).set(route.generation)
                await asyncio.to_thread(self._acknowledge, route.generation, min(self._open, default=route.generation))
                self.is_store_up, self._is_warned = True, False
            except Exception as exc:  # supervisor: whatever the store's driver raises, the chat goes on
                self.is_store_up = False
                if not self._is_warned:
                    self._is_warned = True
                    _log.warning("route not refreshed: %s", exc, extra={"action": "route_refresh_failed"})
            self.is_known.set()

    async def close(self) -> None:
        """Tell the rollout that nobody needs to wait for this gateway."""
        with contextlib.suppress(Exception):
            await asyncio.to_thread(self._forget)

    # In a thread, and the driver imported there: the gateway must be up before SQLAlchemy is.

    def _read(self) -> tuple[Route, list[ApiKey]]:
        from loop.store import open_store
        from loop.store.keys import read_keys
        from loop.store.routes import read_route

        if self._store is None:
            self._store = open_store(self._store_settings)
        return read_route(self._store, self.route.alias), read_keys(self._store)

    def _keep(self, route: Route, keys: list[ApiKey]) -> None:
        values = {self._meta: route, _KEYS: keys}
        with contextlib.suppress(LogUnavailableError):  # the next refresh tries again
            self._spool.write((), {name: msgspec.json.encode(value).decode() for name, value in values.items()})
            self._kept = route, keys

    def _acknowledge(self, generation: int, oldest_open: int) -> None:
        from loop.store.routes import acknowledge_route

        assert self._store is not None
        acknowledge_route(self._store, self._gateway_id, generation, oldest_open, int(time.time() * 1000))

    def _forget(self) -> None:
        from loop.store.routes import forget_gateway

        if self._store is not None:
            forget_gateway(self._store, self._gateway_id)
            self._store.dispose()
