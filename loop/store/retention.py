"""What leaves the store by age: responses that nobody rated, votes whose response never came, and dead letters.

A rated response stays, as its example, and can still be voted on. On Postgres a day of bodies is a table that is
dropped; on SQLite its rows are deleted, in transactions as short as the joiner's.
"""

from __future__ import annotations

import threading
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import Column, Engine, Select, Table, delete, select, tuple_

from loop.store.engine import write
from loop.store.partitions import drop_day, ensure_days, oldest_day
from loop.store.schema import IS_PENDING, dead_letters, examples, response_index, responses, votes

ROWS = 1_000  # deleted in one transaction


def retire_votes(engine: Engine, before_ms: int, stop: threading.Event) -> int:
    """Delete the votes from before that time (Unix ms) whose response was not seen; returns how many it was. Raises
    what SQLAlchemy raises.
    """
    columns = votes.c.key, votes.c.feedback_id
    page = select(*columns).where(IS_PENDING, votes.c.hlc < before_ms << 16).order_by(votes.c.hlc).limit(ROWS)
    return _delete_by_page(engine, votes, columns, page, stop)


def retire_letters(engine: Engine, before_ms: int, stop: threading.Event) -> int:
    """Delete the dead letters from before that time (Unix ms); returns how many it was. Raises what SQLAlchemy
    raises.
    """
    place = tuple(dead_letters.primary_key)
    page = select(*place).where(dead_letters.c.at_ms < before_ms).limit(ROWS)
    return _delete_by_page(engine, dead_letters, place, page, stop)


def retire_days(engine: Engine, before_ms: int, stop: threading.Event) -> list[date]:
    """Take out the unrated responses of whole days (UTC) before that time (Unix ms), and attach the next days'
    partitions; returns the days. Ended anywhere, by `stop` too, it goes on with the next call. Raises what SQLAlchemy
    raises.
    """
    ensure_days(engine)
    first_kept = datetime.fromtimestamp(before_ms / 1000, UTC).date()
    days: list[date] = []
    while (day := oldest_day(engine)) is not None and day < first_kept and _forget(engine, day, stop):
        drop_day(engine, day)
        days.append(day)
    return days


def _forget(engine: Engine, day: date, stop: threading.Event) -> bool:
    """Take the day's responses out of the index, but for those with examples; False where `stop` came before the end.

    On SQLite their bodies go with them.
    """
    after = ""
    query = select(responses.c.turned_id).where(responses.c.day == day).order_by(responses.c.turned_id).limit(ROWS)
    while not stop.is_set():
        with write(engine) as connection:
            ids = connection.execute(query.where(responses.c.turned_id > after)).scalars().all()
            if not ids:
                return True
            rated = select(examples.c.turned_id).where(examples.c.day == day, examples.c.turned_id.in_(ids))
            unrated = set(ids).difference(connection.execute(rated).scalars())
            connection.execute(delete(response_index).where(response_index.c.turned_id.in_(unrated)))
            if engine.dialect.name == "sqlite":
                connection.execute(delete(responses).where(responses.c.day == day, responses.c.turned_id.in_(ids)))
            after = ids[-1]
    return False


def _delete_by_page(
    engine: Engine, table: Table, key: tuple[Column[Any], ...], page: Select[Any], stop: threading.Event
) -> int:
    deleted, found = 0, ROWS
    while found == ROWS and not stop.is_set():
        with write(engine) as connection:
            found = connection.execute(delete(table).where(tuple_(*key).in_(page))).rowcount
        deleted += found
    return deleted
