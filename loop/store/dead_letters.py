"""The outbox of dead letters: written in the join's transaction, sent to `<topic>.dlt` afterwards, then marked."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Engine, and_, or_, select, update

from loop.log import EventLog, NewRecord
from loop.store.engine import write
from loop.store.schema import dead_letters

PAGE = 500
SUFFIX = ".dlt"


def send_dead_letters(engine: Engine, log: EventLog, partitions: Collection[int]) -> int:
    """Send what waits from these partitions; returns how many. Killed in between, it sends some twice, loses none.

    Headers say where a letter was: `thumbwheel-topic`, `-partition`, `-offset` and `-reason`. Raises
    LogUnavailableError, and what the store raises.
    """
    sent = 0
    columns = dead_letters.c
    query = (
        select(dead_letters)
        .where(columns.sent.is_(False), columns.partition.in_(partitions))
        .order_by(columns.topic, columns.partition, columns.offset)
        .limit(PAGE)
    )
    while True:
        with engine.connect() as connection:
            letters = connection.execute(query).all()
        if not letters:
            return sent
        log.append(
            [
                NewRecord(
                    letter.topic + SUFFIX,
                    letter.key,
                    bytes(letter.value),
                    {
                        "thumbwheel-topic": letter.topic,
                        "thumbwheel-partition": str(letter.partition),
                        "thumbwheel-offset": str(letter.offset),
                        "thumbwheel-reason": letter.reason,
                    },
                )
                for letter in letters
            ]
        )
        with write(engine) as connection:
            places = [
                and_(columns.topic == x.topic, columns.partition == x.partition, columns.offset == x.offset)
                for x in letters
            ]
            connection.execute(update(dead_letters).where(or_(*places)).values(sent=True))
        sent += len(letters)
