"""Postgres' partitions of `responses`, one a UTC day, so that retention drops tables and deletes no rows.

On SQLite there are none, and nothing to attach or drop.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Engine, func, select, text

from loop.store.engine import lock_schema, write
from loop.store.schema import ONLY_ADDED, responses

DAYS_AHEAD = 2
LOCK_TIMEOUT_S = 1.0  # longer than a joiner's transaction
_PARTITIONS = text(
    "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'responses'::regclass"
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
        there = set(connection.execute(_PARTITIONS).scalars())
    if wanted and wanted.keys() <= there:
        return
    today = datetime.now(UTC).date()
    wanted |= {_name(day): day for day in (today + timedelta(n) for n in range(DAYS_AHEAD + 1))}
    settings = ", ".join(f"{name} = {value}" for name, value in ONLY_ADDED.items())
    with write(engine) as connection:
        lock_schema(connection)
        for name in sorted(wanted.keys() - set(connection.execute(_PARTITIONS).scalars())):
            first, next_ = wanted[name], wanted[name] + timedelta(1)
            connection.execute(text(f"CREATE TABLE {name} (LIKE responses INCLUDING ALL) WITH ({settings})"))
            connection.execute(
                text(f"ALTER TABLE responses ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{next_}')")
            )


def oldest_day(engine: Engine) -> date | None:
    """The first day that has bodies, or had some; None in an empty store."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            names = connection.execute(_PARTITIONS).scalars()
            return min((datetime.strptime(name, "responses_%Y%m%d").date() for name in names), default=None)
        oldest: date | None = connection.execute(select(func.min(responses.c.day))).scalar_one()
        return oldest


def drop_day(engine: Engine, day: date) -> None:
    """Detach the day's partition and drop it, with its bodies. Raises OperationalError where the lock is not had within
    LOCK_TIMEOUT_S, so that nobody waits behind us for a reader who takes his time.

    Not concurrently: that leaves a partition half detached where such a reader is about, for later events of its day
    and for the next day's to wait for.
    """
    if engine.dialect.name != "postgresql":
        return
    with write(engine) as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = {int(LOCK_TIMEOUT_S * 1000)}"))
        lock_schema(connection)
        connection.execute(text(f"ALTER TABLE responses DETACH PARTITION {_name(day)}"))
        connection.execute(text(f"DROP TABLE {_name(day)}"))


def _name(day: date) -> str:
    return f"responses_{day:%Y%m%d}"
