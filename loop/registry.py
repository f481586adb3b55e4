"""Adapter versions: states, lineage and manifests. What serves is always a version that stands here.

A version is never reused and never changes its weights; only its state moves, along TRANSITIONS, each move with its
reason in the history. Knows the store, not the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Engine, func, insert, select, update

from loop.store.engine import write
from loop.store.schema import adapter_history as history
from loop.store.schema import adapters

State = Literal["candidate", "rejected", "approved", "canary", "live", "retired", "rolled_back"]

# candidate: trained, at the gate | approved: may serve | canary, live: serves | retired: served until a successor came
TRANSITIONS: dict[State, frozenset[State]] = {
    "candidate": frozenset({"rejected", "approved"}),
    "rejected": frozenset(),
    "approved": frozenset({"canary", "live", "rolled_back"}),
    "canary": frozenset({"live", "rolled_back"}),
    "live": frozenset({"retired", "rolled_back"}),
    "retired": frozenset({"live"}),
    "rolled_back": frozenset({"live"}),
}
SERVABLE: frozenset[State] = frozenset({"approved", "canary", "live", "retired", "rolled_back"})


class RegistryError(ValueError):
    """A version is unknown, or may not take that state."""


@dataclass(frozen=True)
class Adapter:
    """One immutable adapter version. The manifest says what it came from: snapshot, settings, code, parent, verdict."""

    version: str
    alias: str
    state: State
    parent: str | None
    run_id: str | None
    path: str
    manifest: dict[str, Any]
    created_at_ms: int
    updated_at_ms: int


@dataclass(frozen=True)
class StateChange:
    """One line of an adapter's history."""

    version: str
    state: State
    reason: str
    at_ms: int


def register_candidate(
    engine: Engine, *, alias: str, parent: str | None, run_id: str, path: str, manifest: dict[str, Any], now_ms: int
) -> Adapter:
    """A new version, in the state `candidate`. The same run registers once: again, it gets the version it has."""
    with write(engine) as connection:
        known = connection.execute(select(adapters).where(adapters.c.run_id == run_id)).one_or_none()
        if known is not None:
            return Adapter(**known._mapping)
        newest = connection.execute(select(func.max(adapters.c.version))).scalar()
        version = f"v{int(newest[1:]) + 1 if newest else 1:06d}"
        row = {
            "version": version,
            "alias": alias,
            "state": "candidate",
            "parent": parent,
            "run_id": run_id,
            "path": path,
            "manifest": manifest,
            "created_at_ms": now_ms,
            "updated_at_ms": now_ms,
        }
        connection.execute(insert(adapters).values(**row))
        _note(connection, version, "candidate", f"trained by run {run_id}", now_ms)
    return Adapter(**row)  # type: ignore[arg-type]


def move(
    connection: Connection,
    version: str,
    state: State,
    reason: str,
    now_ms: int,
    *,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Move a version to `state`, adding `manifest` to its manifest. Moving it to where it is does nothing.

    Takes a connection, so that the route moves in the same transaction. Raises RegistryError where TRANSITIONS does
    not allow the move.
    """
    adapter = _get(connection, version)
    if adapter.state == state:
        return
    if state not in TRANSITIONS[adapter.state]:
        allowed = ", ".join(sorted(TRANSITIONS[adapter.state])) or "none"
        raise RegistryError(f"adapter {version} is {adapter.state} and cannot become {state}; it may be: {allowed}")
    connection.execute(
        update(adapters)
        .where(adapters.c.version == version)
        .values(state=state, updated_at_ms=now_ms, manifest=adapter.manifest | (manifest or {}))
    )
    _note(connection, version, state, reason, now_ms)


def mark_erased(engine: Engine, run_id: str, now_ms: int) -> list[str]:
    """Note on what a run has trained that somebody it learned from was erased since; returns the versions."""
    day = datetime.fromtimestamp(now_ms / 1000, UTC).date().isoformat()
    with write(engine) as connection:
        marked = connection.execute(select(adapters).where(adapters.c.run_id == run_id)).all()
        for row in marked:
            manifest = row.manifest | {"learned_from_erased": day}
            connection.execute(update(adapters).where(adapters.c.version == row.version).values(manifest=manifest))
            _note(connection, row.version, row.state, "has learned from what was erased; a new run does not", now_ms)
    return [row.version for row in marked]


def get_adapter(engine: Engine, version: str) -> Adapter:
    """One version. Raises RegistryError where it is not known."""
    with engine.connect() as connection:
        return _get(connection, version)


def list_adapters(engine: Engine) -> list[Adapter]:
    """Every version, the newest first."""
    with engine.connect() as connection:
        rows = connection.execute(select(adapters).order_by(adapters.c.version.desc())).all()
    return [Adapter(**row._mapping) for row in rows]


def adapter_history(engine: Engine, version: str) -> list[StateChange]:
    """The states that a version went through, the oldest first."""
    with engine.connect() as connection:
        rows = connection.execute(select(history).where(history.c.version == version).order_by(history.c.id)).all()
    return [StateChange(row.version, row.state, row.reason, row.at_ms) for row in rows]


def _get(connection: Connection, version: str) -> Adapter:
    row = connection.execute(select(adapters).where(adapters.c.version == version)).one_or_none()
    if row is None:
        raise RegistryError(f"adapter {version!r} is not registered; `thumbwheel adapters` lists the known ones")
    return Adapter(**row._mapping)


def _note(connection: Connection, version: str, state: State, reason: str, now_ms: int) -> None:
    assert state in get_args(State)
    connection.execute(insert(history).values(version=version, state=state, reason=reason, at_ms=now_ms))
