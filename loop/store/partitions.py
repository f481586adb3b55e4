"""Postgres' partitions of `responses`, one a UTC day, so that retention drops tables and deletes no rows.

On SQLite there are none, and nothing to attach or drop.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Connection, Engine, func, select, text

from loop.store.engine import lock_schema, write
from loop.store.schema import ONLY_ADDED, responses

DAYS_AHEAD = 2
LOCK_TIMEOUT_S = 2.0
_LOCK_TIMEOUT_MS = int(LOCK_TIMEOUT_S * 1000)
# A table that a process did not come to drop may be on its way out ("pending") or be out of `responses` ("detached").
_TABLES = text(
    """SELECT relname,
        CASE WHEN inhrelid IS NULL THEN 'detached' WHEN inhdetachpending THEN 'pending' ELSE 'attached' END
    FROM pg_class LEFT JOIN pg_inherits ON inhrelid = oid
    WHERE relkind = 'r' AND relname ~ '^responses_[0-9]{8}$'
    AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'responses'::regclass)"""
)


def ensure_days(engine: Engine, days: Iterable[str] = ()) -> None:
    """Attach the partitions of these days (YYYY-MM-DD) and of the next ones, where one of them is not there.

    In a transaction of its own, before a batch's. A table that is made apart and then attached locks out no reader or
    writer of the others, as one made in its place would.
    """
    if engine.dialect.name != "postgresql":
        return
    wanted = {_name(date.fromisoformat(day)): date.fromisoformat(day) for day in days}
    with engine.connect() as connection:
        there = _attached(connection)
    if wanted and wanted.keys() <= there:
        return
    today = datetime.now(UTC).date()
    wanted |= {_name(day): day for day in (today + timedelta(n) for n in range(DAYS_AHEAD + 1))}
    settings = ", ".join(f"{name} = {value}" for name, value in ONLY_ADDED.items())
    with write(engine) as connection:
        lock_schema(connection)
        for name in sorted(wanted.keys() - _attached(connection)):
            _drop_detached(connection, name)  # a late event's day, which is on its way out
            first, next_ = wanted[name], wanted[name] + timedelta(1)
            connection.execute(text(f"CREATE TABLE {name} (LIKE responses INCLUDING ALL) WITH ({settings})"))
            connection.execute(
                text(f"ALTER TABLE responses ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{next_}')")
            )


def oldest_day(engine: Engine) -> date | None:
    """The first day that has bodies, or had some; None in an empty store."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            names = connection.execute(_TABLES).scalars()
            return min((datetime.strptime(name, "responses_%Y%m%d").date() for name in names), default=None)
        oldest: date | None = connection.execute(select(func.min(responses.c.day))).scalar_one()
        return oldest


def drop_day(engine: Engine, day: date) -> None:
    """Detach the day's partition, then drop it. Raises OperationalError where somebody who reads for long is still in
    it after LOCK_TIMEOUT_S: then nobody who comes later sees it, and the next call goes on.

    Detaching concurrently waits for earlier readers without a lock, where DROP alone, and whoever came behind it, would
    wait for them with one on all of `responses`.
    """
    if engine.dialect.name != "postgresql":
        return
    name = _name(day)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if name in _attached(connection):
            connection.execute(text(f"SET lock_timeout = {_LOCK_TIMEOUT_MS}"))
            try:
                connection.execute(text(f"ALTER TABLE responses DETACH PARTITION {name} CONCURRENTLY"))
            finally:
                connection.execute(text("RESET lock_timeout"))
    with write(engine) as connection:
        lock_schema(connection)
        _drop_detached(connection, name)


def _attached(connection: Connection) -> set[str]:
    return {name for name, state in connection.execute(_TABLES) if state == "attached"}


def _is_pending(connection: Connection, name: str) -> bool:
    return any(row == (name, "pending") for row in connection.execute(_TABLES))


def _drop_detached(connection: Connection, name: str) -> None:
    """Drop the table, if there is one; it may be on its way out still. Raises OperationalError as `drop_day`."""
    connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}"))
    if _is_pending(connection, name):
        connection.execute(text(f"ALTER TABLE responses DETACH PARTITION {name} FINALIZE"))
    connection.execute(text(f"DROP TABLE IF EXISTS {name}"))


def _name(day: date) -> str:
    return f"responses_{day:%Y%m%d}"
