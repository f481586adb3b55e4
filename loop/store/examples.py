"""Reads examples: a response's choice with the votes that stand on it. Written by the joiner (`loop.store.joining`).

By the raw drivers and in the order in which they lie in the store, which is about that of time: by (day, response_id)
each of ten million rows would be looked up somewhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from itertools import starmap
from typing import Any

import msgspec
from sqlalchemy import Engine, func, select

from loop.events import ResponseLogged, decode_response
from loop.store.engine import reaching
from loop.store.schema import examples


class Example(msgspec.Struct, frozen=True, gc=False):
    """One example, as it is stored."""

    response_id: str
    choice_index: int
    day: date
    adapter: str
    conversation_id: str | None
    up: int
    down: int
    votes_json: str
    """One entry for each rater whose last vote stands, sorted by rater:
    {"rater", "value": "up" | "down", "weight", "source", "hlc", "correction" (where there is one)}."""
    event: bytes
    """The response's event, byte for byte as it was logged."""

    @property
    def votes(self) -> list[dict[str, Any]]:
        """`votes_json`, decoded."""
        votes: list[dict[str, Any]] = json.loads(self.votes_json)
        return votes

    @property
    def body(self) -> ResponseLogged:
        """The response in `event`, decoded."""
        return decode_response(self.event).data


_COLUMNS = "response_id, choice_index, day, adapter, conversation_id, up, down, votes, body"
_PAGE = f"SELECT {_COLUMNS} FROM examples WHERE rowid BETWEEN ? AND ? AND day >= ?"
_COPY = (
    f"COPY (SELECT {_COLUMNS.replace('votes', 'votes::text')} FROM examples WHERE day >= '%s'"
    " AND (hashtext(response_id) & 1023) %% %d = %d) TO STDOUT (FORMAT BINARY)"
)
_COPY_TYPES = ("text", "int4", "date", "text", "text", "int4", "int4", "text", "bytea")


def stream_examples(
    engine: Engine, since_day: date, *, part: int = 0, parts: int = 1, page_rows: int = 256
) -> Iterator[Example]:
    """Every example from `since_day` on, in memory for one page at most; of `parts` that are read side by side, one.

    On SQLite pages are transactions of their own, so that a long read does not hold back the journal's checkpoints:
    votes that arrive meanwhile may be seen, and an example that is retracted and comes back meanwhile may be seen
    twice. On Postgres it is one statement, for whose minutes vacuum leaves dead rows where they are. Raises
    StoreUnavailableError.
    """
    with reaching(engine):
        if engine.dialect.name == "sqlite":
            for rows in _pages(engine, since_day, part, parts, page_rows):
                yield from starmap(Example, rows)
        else:
            yield from starmap(Example, _copied(engine, since_day, part, parts))


def _pages(engine: Engine, since_day: date, part: int, parts: int, page_rows: int) -> Iterator[list[tuple[Any, ...]]]:
    with engine.connect() as connection:
        connection.detach()  # a connection of its own, closed at the end: what it read once it need not keep
        connection.exec_driver_sql("PRAGMA cache_size = -2048")
        first, last = connection.exec_driver_sql("SELECT min(rowid), max(rowid) FROM examples").one()
        connection.commit()
        cursor = connection.connection.cursor()
        pages = range(0) if first is None else range(first // page_rows, last // page_rows + 1)
        for page in pages:
            if page % parts == part:
                begin = page * page_rows
                # By itself a transaction, as it is all of one statement.
                rows = cursor.execute(_PAGE, (begin, begin + page_rows - 1, since_day.isoformat())).fetchall()
                yield [(*row[:2], _day(row[2]), *row[3:]) for row in rows]


def _copied(engine: Engine, since_day: date, part: int, parts: int) -> Iterator[tuple[Any, ...]]:
    with engine.connect() as connection:
        cursor: Any = connection.connection.cursor()
        with cursor.copy(_COPY % (since_day.isoformat(), parts, part)) as copy:
            copy.set_types(_COPY_TYPES)
            yield from copy.rows()


_day = lru_cache(maxsize=1024)(date.fromisoformat)


def has_more_examples(engine: Engine, since_day: date, than: int) -> bool:
    """Whether there are more examples from `since_day` on than these."""
    query = select(examples.c.day).where(examples.c.day >= since_day).offset(than).limit(1)
    with engine.connect() as connection:
        return connection.execute(query).first() is not None


def count_labels(engine: Engine, since_day: date) -> int:
    """How many examples from `since_day` on have a label: more thumbs of one value than of the other."""
    query = select(func.count()).where(examples.c.day >= since_day, examples.c.up != examples.c.down)
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())
