"""Moves of the traffic: start a canary, widen it, go live, roll back; and unloading what nobody needs any more.

Every move is load on every replica, probe, then one transaction that sets the route and the adapters' states. Nothing
is unloaded here but by `unload_unneeded`, once every live gateway has left the generations that knew it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Engine

from loop import metrics, registry
from loop.rollout.routing import Route, adapter_name
from loop.rollout.vllm import Replica
from loop.settings import EngineSettings, RolloutSettings, Settings
from loop.store.engine import write
from loop.store.routes import oldest_generation_in_use, read_route, write_route

GATEWAY_SILENCE_MS = 15_000
"""A gateway that has not acknowledged a route for so long has ended; nobody waits for it."""


@dataclass(frozen=True)
class Fleet:
    """What a rollout works on: the store, the engine's replicas and their settings."""

    store: Engine
    replicas: Sequence[Replica]
    engine: EngineSettings
    settings: RolloutSettings

    def name(self, version: str) -> str:
        """The engine's name of a version."""
        return adapter_name(self.engine.alias, version)


def open_fleet(settings: Settings, store: Engine) -> Fleet:
    """The fleet that the settings describe."""
    key = settings.engine.api_key.get_secret_value() if settings.engine.api_key else None
    return Fleet(store, [Replica(url, key) for url in settings.engine.urls], settings.engine, settings.rollout)


def load_everywhere(fleet: Fleet, version: str) -> None:
    """Load a version on every replica and have each generate with it. Raises EngineError; then no route has moved."""
    adapter = registry.get_adapter(fleet.store, version)
    for replica in fleet.replicas:
        replica.load(fleet.name(version), Path(adapter.path))
        replica.probe(fleet.name(version))


def start_canary(fleet: Fleet, version: str, share: float, reason: str, now_ms: int) -> Route:
    """Give `share` of the traffic to `version`; again with another share, widen it."""
    _require_servable(fleet, version)
    load_everywhere(fleet, version)
    route = read_route(fleet.store, fleet.engine.alias)
    with write(fleet.store) as connection:
        route = write_route(connection, replace(route, canary=version, canary_share=share), now_ms)
        registry.move(connection, version, "canary", reason, now_ms)
    metrics.rollout_swaps.labels("canary").inc()
    return route


def go_live(fleet: Fleet, version: str, reason: str, now_ms: int) -> Route:
    """Give all of the traffic to `version`; its predecessor is retired and stays loaded."""
    _require_servable(fleet, version)
    started = time.monotonic()
    load_everywhere(fleet, version)
    route = read_route(fleet.store, fleet.engine.alias)
    if route.live == version and route.canary is None:
        return route
    with write(fleet.store) as connection:
        following = write_route(connection, replace(route, live=version, canary=None, canary_share=0.0), now_ms)
        registry.move(connection, version, "live", reason, now_ms)
        if route.live not in (None, version):
            registry.move(connection, route.live, "retired", f"{version} went live", now_ms)
        if route.canary not in (None, version):
            registry.move(connection, route.canary, "rolled_back", f"{version} went live instead", now_ms)
    metrics.rollout_swaps.labels("live").inc()
    metrics.rollout_swap_seconds.observe(time.monotonic() - started)
    return following


def roll_back(fleet: Fleet, reason: str, now_ms: int) -> Route:
    """Take back the canary where there is one, else the live version, which gives way to `predecessor`.

    Raises RegistryError where the base model is live already: there is nothing to take back.
    """
    route = read_route(fleet.store, fleet.engine.alias)
    if route.canary is not None:
        taken, following = route.canary, replace(route, canary=None, canary_share=0.0)
    elif route.live is not None:
        back_to = predecessor(fleet)
        if back_to is not None:
            load_everywhere(fleet, back_to)  # loaded already, unless the engine was restarted
        taken, following = route.live, replace(route, live=back_to)
    else:
        raise registry.RegistryError(f"{route.alias!r} is on the base model: there is nothing to roll back")
    with write(fleet.store) as connection:
        following = write_route(connection, following, now_ms)
        registry.move(connection, taken, "rolled_back", reason, now_ms)
        if following.live not in (None, route.live):
            registry.move(connection, following.live, "live", f"{taken} was rolled back", now_ms)
    metrics.rollout_swaps.labels("rollback").inc()
    return following


def predecessor(fleet: Fleet) -> str | None:
    """The version that was live last before the one that is; None: the base model."""
    retired = [a for a in registry.list_adapters(fleet.store) if a.state == "retired"]
    return max(retired, key=lambda adapter: adapter.updated_at_ms).version if retired else None


def needed_versions(fleet: Fleet, route: Route) -> list[str]:
    """What must be loaded: what serves, the latest predecessors, and candidates at the gate; what serves first."""
    adapters = registry.list_adapters(fleet.store)
    serving = [version for version in (route.live, route.canary) if version is not None]
    retired = sorted((a for a in adapters if a.state == "retired"), key=lambda a: a.updated_at_ms, reverse=True)
    at_the_gate = [a.version for a in adapters if a.state in ("candidate", "approved")]
    kept = [a.version for a in retired][: max(0, fleet.settings.keep_loaded - 1)]
    return list(dict.fromkeys(serving + kept + at_the_gate))


def unload_unneeded(fleet: Fleet, now_ms: int) -> list[str]:
    """Unload what no route needs, unless a gateway may still route by an older generation. Returns what went."""
    route = read_route(fleet.store, fleet.engine.alias)
    oldest = oldest_generation_in_use(fleet.store, now_ms - GATEWAY_SILENCE_MS)
    if oldest is not None and oldest < route.generation:
        return []
    needed = {fleet.name(version) for version in needed_versions(fleet, route)}
    gone: list[str] = []
    for replica in (replica for replica in fleet.replicas if replica.is_healthy()):
        for name in replica.models():
            if name.startswith(f"{fleet.engine.alias}@") and name not in needed:
                replica.unload(name)
                gone.append(name)
    return gone


def wait_for_gateways(fleet: Fleet, generation: int, timeout_s: float) -> bool:
    """Whether every live gateway has left the generations before `generation` within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        oldest = oldest_generation_in_use(fleet.store, int(time.time() * 1000) - GATEWAY_SILENCE_MS)
        if oldest is None or oldest >= generation:
            return True
        time.sleep(0.1)
    return False


def _require_servable(fleet: Fleet, version: str) -> None:
    adapter = registry.get_adapter(fleet.store, version)
    if adapter.state not in registry.SERVABLE:
        allowed = ", ".join(sorted(registry.SERVABLE))
        raise registry.RegistryError(
            f"adapter {version} is {adapter.state}; only what passed the gate serves: {allowed}"
        )
