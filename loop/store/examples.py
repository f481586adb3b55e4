"""Reads examples: a response's choice with the votes that stand on it. Written by the joiner (`loop.store.joining`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from sqlalchemy import Engine, func, select, tuple_

from loop.events import ResponseLogged, decode_response
from loop.store.schema import examples


@dataclass(frozen=True)
class Example:
    """One example. `votes` has one entry for each rater whose last vote stands, sorted by rater:
    {"rater", "value": "up" | "down", "weight", "source", "hlc", "correction" (where there is one)}.
    """

    response_id: str
    choice_index: int
    key: str
    day: date
    adapter: str
    arm: str
    conversation_id: str | None
    votes: list[dict[str, Any]]
    up: int
    down: int
    event: bytes
    """The response's event, byte for byte as it was logged."""

    @cached_property
    def body(self) -> ResponseLogged:
        """The response, decoded at the first use."""
        return decode_response(self.event).data


_columns = (  # as Example has them
    *(examples.c.response_id, examples.c.choice_index, examples.c.key, examples.c.day, examples.c.adapter),
    *(examples.c.arm, examples.c.conversation_id, examples.c.votes, examples.c.up, examples.c.down, examples.c.body),
)
_order = (examples.c.day, examples.c.response_id, examples.c.choice_index)


def stream_examples(engine: Engine, since_day: date, *, page_rows: int = 1_000) -> Iterator[Example]:
    """Every example from `since_day` on, by (day, response_id, choice_index), in memory for one page.

    Pages are transactions of their own, so that a long read holds back neither SQLite's checkpoints nor Postgres'
    vacuum: votes that arrive meanwhile may be seen, an example is never seen twice.
    """
    query = select(*_columns).order_by(*_order).limit(page_rows)
    page = query.where(examples.c.day >= since_day)
    while True:
        with engine.connect() as connection:
            rows = connection.execute(page).all()
        yield from (Example(*row) for row in rows)
        if len(rows) < page_rows:
            return
        last = rows[-1]
        page = query.where(tuple_(*_order) > (last.day, last.response_id, last.choice_index))


def count_labels(engine: Engine, since_day: date) -> int:
    """How many examples from `since_day` on have a label: more thumbs of one value than of the other."""
    query = select(func.count()).where(examples.c.day >= since_day, examples.c.up != examples.c.down)
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())
