"""What the pages show, read from the store: plain values, no HTML. Blocking; the handlers call it in a thread."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from apscheduler.triggers.cron import CronTrigger
from sqlalchemy import Engine, func, select

from loop.nightly import STAGES
from loop.registry import Adapter, StateChange, adapter_history, list_adapters
from loop.rollout.routing import Route, adapter_name
from loop.settings import SchedulerSettings, Settings
from loop.store.examples import count_labels
from loop.store.routes import read_route
from loop.store.runs import Run, Stage, list_runs, run_stages
from loop.store.schema import examples

DAY_S = 86_400


@dataclass(frozen=True)
class ArmFigures:
    """A share of the traffic, what serves it, and the thumbs on its answers so far."""

    arm: str
    version: str | None
    traffic: float
    up: int
    down: int

    @property
    def share(self) -> float | None:
        """Thumbs up of all thumbs; None without any."""
        return self.up / (self.up + self.down) if self.up + self.down else None


@dataclass(frozen=True)
class RunFigures:
    """A run with its finished stages and, where it is going on, the one that it is at."""

    run: Run
    stages: list[Stage]

    @property
    def current(self) -> str | None:
        done = {stage.stage for stage in self.stages}
        return next((name for name in STAGES if name not in done), None) if self.run.state == "running" else None

    @property
    def gate(self) -> dict[str, Any] | None:
        return self._output("gate")

    @property
    def version(self) -> str | None:
        registered = self._output("register")
        return registered["version"] if registered else None

    @property
    def total_s(self) -> float | None:
        """The whole run's time; None while it goes on."""
        ended = self.run.finished_at_ms
        return None if ended is None else (ended - self.run.created_at_ms) / 1000

    def _output(self, name: str) -> dict[str, Any] | None:
        return next((stage.output for stage in self.stages if stage.stage == name), None)


@dataclass(frozen=True)
class Overview:
    """The state of the loop."""

    route: Route
    arms: list[ArmFigures]
    labels: int
    min_labels: int
    window_days: int
    next_run_ms: int | None
    runs: list[RunFigures]
    last_gated: RunFigures | None
    last_change: StateChange | None


def read_overview(store: Engine, settings: Settings, now_ms: int) -> Overview:
    """Everything on the first page."""
    route = read_route(store, settings.engine.alias)
    snapshot = settings.snapshot
    since = datetime.fromtimestamp(now_ms / 1000 - snapshot.window_days * DAY_S, UTC).date()
    runs = read_runs(store, 8)
    adapters = list_adapters(store)
    changed = max(adapters, key=lambda adapter: adapter.updated_at_ms, default=None)
    history = adapter_history(store, changed.version) if changed else []
    return Overview(
        route=route,
        arms=read_arms(store, settings, route, adapters),
        labels=count_labels(store, since),
        min_labels=snapshot.min_labels,
        window_days=snapshot.window_days,
        next_run_ms=next_run_ms(settings.scheduler, now_ms),
        runs=runs,
        last_gated=next((run for run in runs if run.gate), None),
        last_change=history[-1] if history else None,
    )


def read_arms(store: Engine, settings: Settings, route: Route, adapters: list[Adapter]) -> list[ArmFigures]:
    """The arms that serve, and what live replaced, with the thumbs on all of their answers."""
    shares: list[tuple[str, str | None, float]] = [("live", route.live, 1.0 - route.canary_share)]
    if route.canary is not None:
        shares.append(("canary", route.canary, route.canary_share))
    if route.live is not None:
        parent = next((adapter.parent for adapter in adapters if adapter.version == route.live), None)
        shares.append(("previous", parent, 0.0))
    names = {v: adapter_name(route.alias, v) if v else settings.engine.base_name for _, v, _ in shares}
    query = (
        select(examples.c.adapter, func.sum(examples.c.up).label("up"), func.sum(examples.c.down).label("down"))
        .where(examples.c.adapter.in_(names.values()))
        .group_by(examples.c.adapter)
    )
    with store.connect() as connection:
        thumbs = {row.adapter: (int(row.up), int(row.down)) for row in connection.execute(query)}
    return [ArmFigures(arm, v, traffic, *thumbs.get(names[v], (0, 0))) for arm, v, traffic in shares]


def read_runs(store: Engine, limit: int) -> list[RunFigures]:
    """The last runs with their stages, the newest first."""
    return [RunFigures(run, run_stages(store, run.run_id)) for run in list_runs(store, limit)]


def next_run_ms(settings: SchedulerSettings, now_ms: int) -> int | None:
    """When the clock starts the next run."""
    trigger = CronTrigger.from_crontab(settings.cron, timezone=settings.timezone)
    at = trigger.get_next_fire_time(None, datetime.fromtimestamp(now_ms / 1000, UTC))
    return None if at is None else int(at.timestamp() * 1000)
