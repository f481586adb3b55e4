"""Runs, their finished stages, and leases, in the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from loop.store.engine import write
from loop.store.schema import leases, runs
from loop.store.schema import run_stages as stages

RunState = Literal["requested", "running", "done", "skipped", "failed"]
Trigger = Literal["clock", "operator"]


@dataclass(frozen=True)
class Run:
    """One nightly retrain. `outcome` says in words how it ended."""

    run_id: str
    trigger: Trigger
    state: RunState
    outcome: str
    created_at_ms: int
    finished_at_ms: int | None


@dataclass(frozen=True)
class Stage:
    """A finished stage of a run, with what it produced."""

    run_id: str
    stage: str
    output: dict[str, Any]
    started_at_ms: int
    finished_at_ms: int


def request_run(engine: Engine, run_id: str, trigger: Trigger, now_ms: int) -> Run:
    """Ask the scheduler for a run; where one is requested or running already, that one is returned instead."""
    with write(engine) as connection:
        open_run = connection.execute(
            select(runs).where(runs.c.state.in_(("requested", "running"))).order_by(runs.c.created_at_ms)
        ).first()
        if open_run is not None:
            return Run(**open_run._mapping)
        run = Run(run_id, trigger, "requested", "", now_ms, None)
        connection.execute(insert(runs).values(**run.__dict__))
    return run


def next_run(engine: Engine) -> Run | None:
    """The run to work on: an interrupted one before a requested one."""
    with engine.connect() as connection:
        rows = connection.execute(
            select(runs).where(runs.c.state.in_(("requested", "running"))).order_by(runs.c.created_at_ms)
        ).all()
    found = sorted((Run(**row._mapping) for row in rows), key=lambda run: run.state != "running")
    return found[0] if found else None


def set_run(engine: Engine, run_id: str, state: RunState, outcome: str, now_ms: int | None = None) -> None:
    """Change a run's state; `now_ms` where it has ended."""
    with write(engine) as connection:
        connection.execute(
            update(runs).where(runs.c.run_id == run_id).values(state=state, outcome=outcome, finished_at_ms=now_ms)
        )


def list_runs(engine: Engine, limit: int = 50) -> list[Run]:
    """The last runs, the newest first."""
    with engine.connect() as connection:
        rows = connection.execute(select(runs).order_by(runs.c.created_at_ms.desc()).limit(limit)).all()
    return [Run(**row._mapping) for row in rows]


def get_run(engine: Engine, run_id: str) -> Run | None:
    with engine.connect() as connection:
        row = connection.execute(select(runs).where(runs.c.run_id == run_id)).one_or_none()
    return None if row is None else Run(**row._mapping)


def run_stages(engine: Engine, run_id: str) -> list[Stage]:
    """A run's finished stages, in the order in which they finished."""
    with engine.connect() as connection:
        rows = connection.execute(
            select(stages).where(stages.c.run_id == run_id).order_by(stages.c.finished_at_ms, stages.c.started_at_ms)
        ).all()
    return [Stage(**row._mapping) for row in rows]


def record_stage(engine: Engine, stage: Stage) -> None:
    """A stage has finished: it will not be done again."""
    with write(engine) as connection:
        connection.execute(delete(stages).where(stages.c.run_id == stage.run_id, stages.c.stage == stage.stage))
        connection.execute(insert(stages).values(**stage.__dict__))


def take_lease(engine: Engine, name: str, holder: str, now_ms: int, ttl_ms: int) -> bool:
    """Take or renew a lease; False while somebody else holds it."""
    values = {"holder": holder, "expires_at_ms": now_ms + ttl_ms}
    try:
        with write(engine) as connection:
            mine_or_over = (leases.c.holder == holder) | (leases.c.expires_at_ms < now_ms)
            taken = connection.execute(update(leases).where(leases.c.name == name, mine_or_over).values(**values))
            if taken.rowcount == 0:
                connection.execute(insert(leases).values(name=name, **values))
    except IntegrityError:  # the row is there, and somebody else's
        return False
    return True


def is_leased(engine: Engine, name: str, now_ms: int) -> bool:
    """Whether somebody holds a lease now."""
    with engine.connect() as connection:
        expires = connection.execute(select(leases.c.expires_at_ms).where(leases.c.name == name)).scalar()
    return expires is not None and expires >= now_ms


def drop_lease(engine: Engine, name: str, holder: str) -> None:
    """Give a lease back."""
    with write(engine) as connection:
        connection.execute(delete(leases).where(leases.c.name == name, leases.c.holder == holder))
