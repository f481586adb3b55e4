"""Erases a person's or a response's rows from the store, and keeps the tombstone that blocks their return.

The tombstone comes first, in a transaction that excludes the joiners': whoever joins afterwards sees it, and what was
joined before is found by the erasing that follows. Killed anywhere and called again, it ends the same.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from sqlalchemy import Engine, delete, select, text, tuple_

from loop.erasure import Erased, Kind
from loop.events import decode_response
from loop.sqlite import empty_journal
from loop.store.bulk import Bulk, open_bulk
from loop.store.engine import BUSY_TIMEOUT_S, end_stopped, reaching, write
from loop.store.joining import take_out_responses, take_out_votes
from loop.store.schema import dead_letters, erasures

ROWS = 500  # erased in one transaction


def erase(engine: Engine, kind: Kind, subject: str, now_ms: int) -> dict[str, int]:
    """Write the tombstone, then take out what it covers; returns how many rows that was."""
    with _alone(engine) as bulk:
        bulk.insert(erasures, [(kind, subject, now_ms)])
    ids = [subject] if kind == "response" else _asked_for_by(engine, subject) if kind == "user" else []
    responses = votes = 0
    for start in range(0, len(ids), ROWS):
        with _alone(engine) as bulk:
            taken = take_out_responses(bulk, ids[start : start + ROWS])
            responses, votes = responses + taken[0], votes + taken[1]
    found = ROWS if kind != "response" else 0
    while found == ROWS:
        with _alone(engine) as bulk:
            found = take_out_votes(bulk, subject, ROWS)
            votes += found
    letters = _delete_dead_letters(engine)
    if engine.dialect.name == "sqlite":  # the log of changes has what they were
        with reaching(engine), closing(engine.raw_connection()) as connection:
            assert isinstance(connection.driver_connection, sqlite3.Connection)
            empty_journal(connection.driver_connection, BUSY_TIMEOUT_S)
    return {"responses": responses, "votes": votes, "dead_letters": letters}


def read_erased(engine: Engine) -> Erased:
    """Every tombstone."""
    with engine.connect() as connection:
        rows = connection.execute(select(erasures.c.kind, erasures.c.subject)).all()
    return Erased.of((kind, subject) for kind, subject in rows)


@contextmanager
def _alone(engine: Engine) -> Iterator[Bulk]:
    """A writing transaction beside no joiner's: on SQLite writers take turns, on Postgres joiners move `positions`."""
    end_stopped(engine)
    with write(engine) as connection:
        bulk = open_bulk(connection)
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL synchronous_commit = on"))  # no log has what is erased
            connection.execute(text("LOCK TABLE positions IN SHARE ROW EXCLUSIVE MODE"))
        else:
            connection.exec_driver_sql("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        yield bulk


def _asked_for_by(engine: Engine, rater: str) -> list[str]:
    """The responses that somebody asked for. No index knows that: the server looks at every body."""
    found: set[str] = set()
    with engine.connect() as connection:
        for table in ("responses", "rated_bodies"):
            query = text(f"SELECT body FROM {table} WHERE {_holds(engine, 'body')}")
            for (body,) in connection.execute(query, {"subject": rater.encode()}):
                data = decode_response(bytes(body)).data
                if data.rater == rater:
                    found.add(data.response_id)
    return sorted(found)


def _delete_dead_letters(engine: Engine) -> int:
    erased, place = read_erased(engine), tuple(dead_letters.primary_key)
    with engine.connect() as connection:
        rows = connection.execution_options(yield_per=ROWS).execute(select(*place, dead_letters.c.value))
        named = [tuple(row[:-1]) for row in rows if erased.is_in(bytes(row.value))]
    for start in range(0, len(named), ROWS):
        with write(engine) as connection:
            connection.execute(delete(dead_letters).where(tuple_(*place).in_(named[start : start + ROWS])))
    return len(named)


def _holds(engine: Engine, column: str) -> str:
    """That the column's bytes have :subject in them."""
    if engine.dialect.name == "sqlite":
        return f"instr({column}, :subject) > 0"
    return f"position(:subject IN {column}) > 0"
