"""Postgres' partitions of `responses`, one a UTC day, so that retention drops tables and deletes no rows.

On SQLite there are none, and nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Engine, text

from loop.store.engine import lock_schema, write

DAYS_AHEAD = 2


def ensure_days(engine: Engine, days: Iterable[str]) -> None:
    """Make the partitions of these days (YYYY-MM-DD) where they are not there, and then those of the next days too.

    In a transaction of its own, before a batch's: making one locks the whole table for a moment.
    """
    if engine.dialect.name != "postgresql":
        return
    wanted = {_name(date.fromisoformat(day)): date.fromisoformat(day) for day in days}
    query = text(
        "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'responses'::regclass"
    )
    with engine.connect() as connection:
        there = set(connection.execute(query).scalars())
    if wanted.keys() <= there:
        return
    today = datetime.now(UTC).date()
    wanted |= {_name(day): day for day in (today + timedelta(n) for n in range(DAYS_AHEAD + 1))}
    with write(engine) as connection:
        lock_schema(connection)  # IF NOT EXISTS alone does not stand two makers at once
        for name, day in sorted(wanted.items()):
            connection.execute(
                text(
                    f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF responses"
                    f" FOR VALUES FROM ('{day}') TO ('{day + timedelta(1)}')"
                )
            )


def _name(day: date) -> str:
    return f"responses_{day:%Y%m%d}"
