"""Dead letters: written in the join's transaction, sent to `<topic>.dlt` afterwards, and replayed after a fix."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Column, ColumnElement, Engine, Row, and_, func, select, true, tuple_, update

from loop.log import EventLog, NewRecord, RecordTooLargeError
from loop.store.engine import write
from loop.store.schema import IS_UNSENT, dead_letters

logger = logging.getLogger("thumbwheel.joiner")

PAGE, PAGE_BYTES = 500, 8 << 20
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

    Headers say where a letter was: `thumbwheel-topic`, `-partition`, `-offset` and `-reason`. Raises
    LogUnavailableError, and what the store raises.
    """
    return _append_and_mark(engine, log, _columns.sent, chosen.condition(), _letter)


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
            log,
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
    log: EventLog,
    mark: Column[bool],
    condition: ColumnElement[bool],
    make: Callable[[Row[Any]], NewRecord],
) -> int:
    """Page by page, append a record for each row that is not marked yet, then mark it: in this order, to lose none.

    One that the log does not take, for it is too large, stays as it is, and stops no other.
    """
    query = select(*_place, func.length(_columns.value)).where(mark.is_(False), condition).order_by(*_place)
    done, after = 0, None
    while True:
        behind = true() if after is None else tuple_(*_place) > after
        with engine.connect() as connection:
            places = _first_of(connection.execute(query.where(behind).limit(PAGE)).all())
            rows = connection.execute(select(dead_letters).where(tuple_(*_place).in_(places)).order_by(*_place)).all()
        if not places:
            return done
        after = places[-1]
        refused = set(_append(log, [make(row) for row in rows]))
        taken = [(row.topic, row.partition, row.offset, row.log_id) for n, row in enumerate(rows) if n not in refused]
        with write(engine) as connection:
            connection.execute(update(dead_letters).where(tuple_(*_place).in_(taken)).values({mark: True}))
        done += len(taken)


def _first_of(rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The places of so many of these (*place, size) as have PAGE_BYTES together; one at the least."""
    ends = accumulate(row[-1] for row in rows)
    return [tuple(row[:-1]) for n, (row, end) in enumerate(zip(rows, ends, strict=True)) if n == 0 or end <= PAGE_BYTES]


def _append(log: EventLog, letters: Sequence[NewRecord], first: int = 0) -> list[int]:
    """Append them; returns the numbers of those that are too large, counted from `first`."""
    try:
        log.append(letters)
    except RecordTooLargeError as exc:
        if len(letters) > 1:
            return [n for i, letter in enumerate(letters) for n in _append(log, [letter], i)]
        action = {"action": "dead_letter_too_large", "topic": letters[0].topic, **letters[0].headers}
        logger.error("a dead letter stays in the store: %s", exc, extra=action)
        return [first]
    return []
