"""The look at the rollout on every tick: give engines back what they lost, judge who is watched, unload what is done.

Reads the store and the engines, asks `canary.decide`, and carries its decision out through `swap`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import select

from loop import metrics, registry
from loop.rollout.canary import Decision, Thumbs, decide
from loop.rollout.routing import Route
from loop.rollout.swap import Fleet, go_live, needed_versions, predecessor, roll_back, start_canary, unload_unneeded
from loop.rollout.vllm import EngineError
from loop.store.routes import read_route
from loop.store.schema import examples

log = logging.getLogger("thumbwheel.rollout")


def tick(fleet: Fleet, now_ms: int) -> Decision | None:
    """One look. Returns what was decided about the adapter that is being watched; None where none is."""
    reload_lost(fleet)
    decision = judge(fleet, now_ms)
    unload_unneeded(fleet, now_ms)
    return decision


def reload_lost(fleet: Fleet) -> None:
    """Load what serves, or may have to again at once, into every healthy replica that has lost it (a restart)."""
    route = read_route(fleet.store, fleet.engine.alias)
    metrics.rollout_live_version.labels(route.alias).set(int(route.live[1:]) if route.live else 0)
    metrics.rollout_canary_share.labels(route.alias).set(route.canary_share)
    for replica in fleet.replicas:
        healthy = replica.is_healthy()
        metrics.engine_up.labels(replica.url).set(healthy)
        if not healthy:
            continue
        loaded = replica.models()
        for version in needed_versions(fleet, route):
            adapter = registry.get_adapter(fleet.store, version)
            if fleet.name(version) in loaded or adapter.state in ("candidate", "approved"):
                continue  # the gate loads its candidate itself
            try:
                replica.load(fleet.name(version), Path(adapter.path))
            except EngineError as exc:
                log.error("adapter not loaded", extra={"action": "reload_failed", "version": version, "why": str(exc)})
                continue
            metrics.rollout_reloads.inc()
            log.warning("adapter loaded again", extra={"action": "reload", "version": version, "engine": replica.url})


def judge(fleet: Fleet, now_ms: int) -> Decision | None:
    """Compare the watched adapter's thumbs with what it replaced, and roll back, hold or advance."""
    route = read_route(fleet.store, fleet.engine.alias)
    elapsed_s = (now_ms - route.since_ms) / 1000
    settings = fleet.settings
    if route.canary is not None:
        canary_since_ms = registry.get_adapter(fleet.store, route.canary).updated_at_ms  # widening does not move it
        new, old = thumbs(fleet, route.canary, 0), thumbs(fleet, route.live, canary_since_ms)
        step_s, min_votes = settings.canary_step_s, settings.canary_min_votes
    elif route.live is not None and elapsed_s < settings.watch_s:
        new, old = thumbs(fleet, route.live, 0), thumbs(fleet, predecessor(fleet), 0)
        step_s, min_votes = settings.watch_s, 0
    else:
        return None
    decision = decide(settings, new=new, old=old, elapsed_s=elapsed_s, step_s=step_s, min_votes=min_votes)
    _show(route, new, old, decision)
    if decision.action == "roll_back":
        log.error("rolling back", extra={"action": "rollback", "why": decision.reason})
        roll_back(fleet, decision.reason, now_ms)
    elif decision.action == "advance" and route.canary is not None:
        wider = [share for share in settings.canary_steps if share > route.canary_share]
        log.info("canary advances", extra={"action": "advance", "why": decision.reason})
        if wider:
            start_canary(fleet, route.canary, wider[0], decision.reason, now_ms)
        else:
            go_live(fleet, route.canary, decision.reason, now_ms)
    return decision


def thumbs(fleet: Fleet, version: str | None, since_ms: int) -> Thumbs:
    """Votes on a version's answers (None: the base's) since a time, one for each conversation: its last one."""
    name = fleet.engine.base_name if version is None else fleet.name(version)
    query = (
        select(examples.c.conversation_id, examples.c.turned_id, examples.c.up, examples.c.down)
        .where(examples.c.adapter == name, examples.c.voted_at_ms >= since_ms, examples.c.up + examples.c.down > 0)
        .order_by(examples.c.voted_at_ms, examples.c.turned_id)
    )
    with fleet.store.connect() as connection:
        last = {row.conversation_id or row.turned_id: row.up - row.down for row in connection.execute(query)}
    return Thumbs(sum(balance > 0 for balance in last.values()), sum(balance < 0 for balance in last.values()))


def _show(route: Route, new: Thumbs, old: Thumbs, decision: Decision) -> None:
    arms = {"canary": new, "live": old} if route.canary is not None else {"live": new, "predecessor": old}
    for arm, counts in arms.items():
        metrics.rollout_thumbs_up_share.labels(arm).set(counts.share)
        metrics.rollout_votes.labels(arm).set(counts.total)
    metrics.rollout_e_value.set(decision.e_value)
