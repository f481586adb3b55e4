"""Which route the gateway uses: read from the store every moment, kept in the spool for the time when it is down.

The gateway acknowledges the generation that it routes by and the oldest one of its open requests, so that the rollout
knows when nobody needs an adapter any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from loop import metrics
from loop.log import LogUnavailableError
from loop.log.embedded import EmbeddedLog
from loop.rollout.routing import Route
from loop.settings import StoreSettings

if TYPE_CHECKING:
    from sqlalchemy import Engine

_log = logging.getLogger(__name__)


class RouteWatch:
    """The alias's route. `is_known` is set once it was read, from the store or from the last run's spool."""

    def __init__(self, alias: str, gateway_id: str, store: StoreSettings, spool: EmbeddedLog, poll_s: float) -> None:
        self.is_known = asyncio.Event()
        self.is_store_up = False
        self._gateway_id = gateway_id
        self._store_settings = store
        self._store: Engine | None = None
        self._spool = spool
        self._poll_s = poll_s
        self._open: Counter[int] = Counter()
        self._lock = asyncio.Lock()
        self._meta = f"route:{alias}"
        self._is_warned = False
        self.route = Route(alias)
        if (kept := spool.get_meta(self._meta)) is not None:
            self.route = msgspec.json.decode(kept, type=Route)
            self.is_known.set()

    @contextlib.contextmanager
    def use(self) -> Iterator[Route]:
        """The route for one request, open upstream until the block ends."""
        route = self.route
        self._open[route.generation] += 1
        metrics.gateway_open_requests.inc()
        try:
            yield route
        finally:
            metrics.gateway_open_requests.dec()
            self._open[route.generation] -= 1
            if not self._open[route.generation]:
                del self._open[route.generation]

    @property
    def open_requests(self) -> int:
        """Requests that are open upstream."""
        return self._open.total()

    async def watch(self) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._poll_s)

    async def refresh(self) -> None:
        """Read the route now and acknowledge it; without the store the last known one stays."""
        async with self._lock:
            try:
                route = await asyncio.to_thread(self._read)
                if route != self.route:
                    self.route = route
                    await asyncio.to_thread(self._keep, route)
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

    def _read(self) -> Route:
        from loop.store import open_store
        from loop.store.routes import read_route

        if self._store is None:
            self._store = open_store(self._store_settings)
        return read_route(self._store, self.route.alias)

    def _keep(self, route: Route) -> None:
        with contextlib.suppress(LogUnavailableError):
            self._spool.put_meta(self._meta, msgspec.json.encode(route).decode())

    def _acknowledge(self, generation: int, oldest_open: int) -> None:
        from loop.store.routes import acknowledge_route

        assert self._store is not None
        acknowledge_route(self._store, self._gateway_id, generation, oldest_open, int(time.time() * 1000))

    def _forget(self) -> None:
        from loop.store.routes import forget_gateway

        if self._store is not None:
            forget_gateway(self._store, self._gateway_id)
            self._store.dispose()
