"""Dead letters: written in the join's transaction, sent to `<topic>.dlt` afterwards, and replayed after a fix."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Engine, Row, and_, func, select, tuple_, update

from loop.log import EventLog, NewRecord, RecordTooLargeError
from loop.store.engine import write
from loop.store.schema import IS_UNSENT, dead_letters

logger = logging.getLogger("thumbwheel.joiner")

PAGE = 500
SUFFIX = ".dlt"
_columns = dead_letters.c
_place = (_columns.topic, _columns.partition, _columns.offset, _columns.log_id)


@dataclass(frozen=True)
class Chosen:
    """Which dead letters are meant: those of some topics; where they are set, of one partition and at one offset."""

    topics: Collection[str]
    partition: int | None = None
    offset: int | None = None

    def condition(self) -> ColumnElement[bool]:
        """The same in SQL."""
        wanted = {_columns.partition: self.partition, _columns.offset: self.offset}
        equal = (column == value for column, value in wanted.items() if value is not None)
        return and_(_columns.topic.in_(self.topics), *equal)


def count_dead_letters(engine: Engine) -> dict[tuple[str, int], tuple[int, int]]:
    """By (topic, partition), how many there are to be replayed, and how many were."""
    counts = (func.count().filter(_columns.replayed.is_(value)) for value in (False, True))
    with engine.connect() as connection:
        rows = connection.execute(select(*_place[:2], *counts).group_by(*_place[:2])).all()
    return {(topic, partition): (waiting, replayed) for topic, partition, waiting, replayed in rows}


def list_dead_letters(engine: Engine, chosen: Chosen, limit: int) -> list[dict[str, Any]]:
    """The first of those to be replayed: {topic, partition, offset, log_id, reason, sent}, by place."""
    query = select(*_place, _columns.reason, _columns.sent).where(_columns.replayed.is_(False), chosen.condition())
    with engine.connect() as connection:
        return [row._asdict() for row in connection.execute(query.order_by(*_place).limit(limit))]


def places_to_send(engine: Engine, partitions: Collection[int]) -> list[tuple[str, int]]:
    """The (topic, partition) of these partitions that have letters to be sent."""
    with engine.connect() as connection:
        query = select(*_place[:2]).where(IS_UNSENT, _columns.partition.in_(partitions))
        rows = connection.execute(query.distinct().order_by(*_place[:2])).all()
    return [(topic, partition) for topic, partition in rows]


def count_unsent(engine: Engine) -> int:
    """How many wait to be sent."""
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(dead_letters).where(IS_UNSENT)).scalar_one())


def send_dead_letters(engine: Engine, log: EventLog, chosen: Chosen) -> int:
    """Send those that wait; returns how many. Killed in between, it sends some twice, loses none.

    Headers say where a letter was: `thumbwheel-topic`, `-partition`, `-offset` and `-reason`. One that the log does not
    take, as it is too large with these, stays in the store alone. Raises LogUnavailableError, and what the store
    raises.
    """

    def append(letters: list[NewRecord]) -> None:
        try:
            log.append(letters)
        except RecordTooLargeError as exc:
            if len(letters) > 1:
                for letter in letters:
                    append([letter])
                return
            place = {name: letters[0].headers[f"thumbwheel-{name}"] for name in ("topic", "partition", "offset")}
            logger.error("dead letter not sent: %s", exc, extra={"action": "dead_letter_too_large", **place})

    return _append_and_mark(engine, append, _columns.sent, chosen.condition(), _letter)


def replay_dead_letters(engine: Engine, log: EventLog, chosen: Chosen) -> int:
    """Append those that were not replayed to the topics they came from, key and bytes as they were; returns how many.

    Killed in between, it appends some twice (events count once), loses none. Raises as `send_dead_letters` does.
    """
    part = (_columns.topic, _columns.partition, _columns.log_id)
    query = select(*part, func.max(_columns.offset)).where(_columns.replayed.is_(False), chosen.condition())
    with engine.connect() as connection:
        lasts = connection.execute(query.group_by(*part)).all()
    # What is still broken the joiner makes a dead letter again, behind the last: this replay must not chase its tail.
    return sum(
        _append_and_mark(
            engine,
            log.append,
            _columns.replayed,
            and_(
                chosen.condition(),
                *(column == value for column, value in zip(part, those, strict=True)),
                _columns.offset <= last,
            ),
            lambda row: NewRecord(row.topic, row.key, bytes(row.value)),
        )
        for *those, last in lasts
    )


def _letter(row: Row[Any]) -> NewRecord:
    headers = {
        "thumbwheel-topic": row.topic,
        "thumbwheel-partition": str(row.partition),
        "thumbwheel-offset": str(row.offset),
        "thumbwheel-reason": row.reason,
    }
    return NewRecord(row.topic + SUFFIX, row.key, bytes(row.value), headers)


def _append_and_mark(
    engine: Engine,
    append: Callable[[list[NewRecord]], None],
    mark: Column[bool],
    condition: ColumnElement[bool],
    make: Callable[[Row[Any]], NewRecord],
) -> int:
    """Page by page, append a record for each row that is not marked yet, then mark it: in this order, to lose none."""
    query = select(dead_letters).where(mark.is_(False), condition).order_by(*_place).limit(PAGE)
    done = 0
    while True:
        with engine.connect() as connection:
            rows = connection.execute(query).all()
        if not rows:
            return done
        append([make(row) for row in rows])
        with write(engine) as connection:
            places = [(row.topic, row.partition, row.offset, row.log_id) for row in rows]
            connection.execute(update(dead_letters).where(tuple_(*_place).in_(places)).values({mark: True}))
        done += len(rows)
