"""What a store has come to, in the oracle's form, and whether it is all that the log has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeVar

from sqlalchemy import Engine, select

from loop.events import ResponseLogged, decode_response
from loop.log import EventLog, LogUnavailableError
from loop.settings import Settings
from loop.store.joining import Reader, read_positions
from loop.store.schema import examples, rated_bodies, turn_back
from tests.conftest import wait_until
from tests.join.oracle import Examples

T = TypeVar("T")


def told(ask: Callable[[], T]) -> T:
    """What the log answers, once it can be asked: brokers may just be coming back, or one of them be gone."""
    answers: list[T] = []

    def is_told() -> bool:
        with suppress(LogUnavailableError):
            answers.append(ask())
        return bool(answers)

    wait_until(is_told, "answered by the log")
    return answers[0]


def is_joined(store: Engine, log: EventLog, settings: Settings) -> bool:
    """Whether the store's positions are the log's ends; not, as far as one knows, while the log cannot be asked."""
    try:
        ends = [log.end_offsets(topic) for topic in (settings.log.responses_topic, settings.log.feedback_topic)]
        positions = read_positions(store, Reader(settings.joiner.group, log.identity()))
    except LogUnavailableError:
        return False
    return all(positions.get(n, (0, 0)) == (end, ends[1][n]) for n, end in ends[0].items())


@dataclass(frozen=True)
class Stored:
    """An example with the event that it is of."""

    response_id: str
    choice_index: int
    day: date
    conversation_id: str | None
    up: int
    down: int
    votes: list[dict[str, Any]]
    event: bytes

    @property
    def body(self) -> ResponseLogged:
        return decode_response(self.event).data


def read_examples(store: Engine) -> list[Stored]:
    """All examples of the store, in the order of their days and ids."""
    names = ("turned_id", "choice_index", "day", "conversation_id", "up", "down", "votes")
    columns = [examples.c[name] for name in names]
    query = select(*columns, rated_bodies.c.body).outerjoin_from(
        examples, rated_bodies, rated_bodies.c.turned_id == examples.c.turned_id
    )
    with store.connect() as connection:
        rows = connection.execute(query.order_by(*examples.primary_key)).all()
        bodies = connection.execute(select(rated_bodies.c.turned_id)).scalars().all()
    assert set(bodies) == {row.turned_id for row in rows}  # none is missing, none is left behind
    return [Stored(turn_back(row[0]), *row[1:-1], bytes(row.body)) for row in rows]


def examples_in(store: Engine) -> Examples:
    """All examples of the store."""
    return {
        (e.response_id, e.choice_index): {
            "votes": {v["rater"]: (v["value"], v["weight"], v["hlc"], v.get("correction")) for v in e.votes},
            "up": e.up,
            "down": e.down,
            "event": e.event,
        }
        for e in read_examples(store)
    }
