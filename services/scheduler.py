"""The clock: starts the nightly run, works on what was requested, watches the rollout.

Four APScheduler jobs, each never beside itself: the crontab line asks for a run; the worker does the run that is
asked for or was interrupted, under a lease with a heartbeat; the watch looks at the rollout every tick, also while a
run is going on; once an hour, what has come of age leaves the store. It takes no decisions: those are in
`loop.nightly`, `loop.rollout` and `loop.store.retention`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from prometheus_client import start_http_server
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from loop import metrics
from loop.nightly import Interrupted, new_run_id, run_night
from loop.rollout.swap import Fleet, open_fleet
from loop.rollout.vllm import EngineError
from loop.rollout.watch import tick
from loop.settings import Settings
from loop.store import open_store
from loop.store.retention import retire_days, retire_letters, retire_votes
from loop.store.routes import RouteChangedError
from loop.store.runs import Run, drop_lease, next_run, request_run, take_lease
from services.waiting import RETRY_S, when_there

TIDY_S = 3600.0

log = logging.getLogger("thumbwheel.scheduler")


def run_scheduler(settings: Settings, stop: threading.Event) -> None:
    """Serve until `stop` is set. A run in progress is interrupted at its stage and resumed by the next start. A store
    that is away is waited for.
    """
    clock = settings.scheduler
    start_http_server(clock.metrics_port, addr=settings.gateway.host)
    store = when_there(lambda: open_store(settings.store), stop, _say)
    if store is None:
        return
    fleet = open_fleet(settings, store)
    holder = f"{socket.gethostname()}-{os.getpid()}"
    lead_s = max(clock.lease_s, 10 * clock.tick_s)
    scheduler = BackgroundScheduler(timezone=clock.timezone)
    trigger = CronTrigger.from_crontab(clock.cron, timezone=clock.timezone)

    def ask() -> None:
        if _take(store, "rollout", holder, lead_s):  # of several schedulers, one leads
            ask_for_run(store)

    def ask_when_there() -> None:  # a night is not skipped because the store is away at that moment
        while not stop.is_set() and not _does(ask):
            stop.wait(RETRY_S)

    scheduler.add_job(ask_when_there, trigger, id="clock", coalesce=True, misfire_grace_time=3600)

    def work() -> None:
        run = next_run(store)
        if run is not None:
            work_on(settings, fleet, run, holder, stop)

    def watch() -> None:
        next_at = scheduler.get_job("clock").next_run_time
        metrics.scheduler_next_run_timestamp_seconds.set(next_at.timestamp() if next_at else 0)
        if not _take(store, "rollout", holder, lead_s):
            return
        try:
            tick(fleet, int(time.time() * 1000))
        except (EngineError, RouteChangedError) as exc:
            log.error("rollout not looked at", extra={"action": "watch_failed", "why": str(exc)})

    def tidy() -> None:
        if _take(store, "rollout", holder, lead_s):
            tidy_up(store, settings.store.retention_s, stop)

    for name, job, seconds in (("work", work, clock.tick_s), ("watch", watch, clock.tick_s), ("tidy", tidy, TIDY_S)):
        scheduler.add_job(partial(_does, job), "interval", seconds=seconds, id=name, max_instances=1, coalesce=True)
    scheduler.modify_job("tidy", next_run_time=datetime.now(UTC))
    scheduler.start()
    log.info("scheduler started", extra={"action": "started", "next_run": scheduler.get_job("clock").next_run_time})
    stop.wait()
    scheduler.shutdown(wait=True)
    _does(lambda: drop_lease(store, "rollout", holder))
    store.dispose()


def _does(job: Callable[[], object]) -> bool:
    """Whether the job could be done: not so where the store is away, and it is done again at its next time."""
    try:
        job()
    except SQLAlchemyError as exc:
        why = str(exc).split("\n")[0]
        log.warning("store not reached: %s", why, extra={"action": "store_failed"})
        return False
    return True


def _say(exc: Exception) -> None:
    log.warning("waiting for the store: %s", exc, extra={"action": "scheduler_waits"})


def work_on(settings: Settings, fleet: Fleet, run: Run, holder: str, stop: threading.Event) -> bool:
    """Do a run, or what is left of it, under the lease that lets one run go on at a time; False where it is taken."""
    store, lease_s = fleet.store, settings.scheduler.lease_s
    if not _take(store, "run", holder, lease_s):
        return False
    with _Heartbeat(lambda: _take(store, "run", holder, lease_s), lease_s / 3, stop) as lost_or_stopped:
        try:
            run_night(settings, fleet, run, lost_or_stopped)
        except Interrupted as exc:
            log.warning("run interrupted", extra={"action": "run_interrupted", "run": run.run_id, "why": str(exc)})
        finally:
            _does(lambda: drop_lease(store, "run", holder))  # else it runs out
    return True


def tidy_up(store: Engine, retention_s: float, stop: threading.Event) -> None:
    """Let go of what is older than the store's retention; what cannot be done now is done in an hour."""
    before_ms = int((time.time() - retention_s) * 1000)
    try:
        orphaned = retire_votes(store, before_ms, stop)
        metrics.store_orphaned_votes.inc(orphaned)
        letters = retire_letters(store, before_ms, stop)
        days = [str(day) for day in retire_days(store, before_ms, stop)]
    except SQLAlchemyError as exc:
        log.warning("store not tidied", extra={"action": "tidy_failed", "why": str(exc)})
        return
    if days or orphaned or letters:
        done = {"days": days, "orphaned_votes": orphaned, "dead_letters": letters}
        log.info("store tidied", extra={"action": "tidied", **done})


def ask_for_run(store: Engine) -> Run:
    """What the clock does: ask for a run, unless one is asked for already."""
    now_ms = int(time.time() * 1000)
    run = request_run(store, new_run_id(now_ms), "clock", now_ms)
    log.info("run requested", extra={"action": "run_requested", "run": run.run_id})
    return run


def _take(store: Engine, name: str, holder: str, lease_s: float) -> bool:
    return take_lease(store, name, holder, int(time.time() * 1000), int(lease_s * 1000))


class _Heartbeat:
    """Renews a lease in the background; the event that it gives is set once the lease is lost or the process stops."""

    def __init__(self, renew: Callable[[], bool], every_s: float, stop: threading.Event) -> None:
        self._renew, self._every_s, self._stop = renew, every_s, stop
        self._over = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> threading.Event:
        self._thread.start()
        return self._ended

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.1):
            if self._stop.is_set():
                self._ended.set()
                return
            if time.monotonic() - last < self._every_s:
                continue
            last = time.monotonic()
            try:
                held = self._renew()
            except SQLAlchemyError as exc:
                log.error("heartbeat failed", extra={"action": "heartbeat_failed", "why": str(exc)})
                continue
            if not held:
                self._ended.set()
                return
