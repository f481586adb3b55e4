"""What a store has come to, in the oracle's form, and whether it is all that the log has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import date
from typing import TypeVar

from sqlalchemy import Engine

from loop.log import EventLog, LogUnavailableError
from loop.settings import Settings
from loop.store.examples import stream_examples
from loop.store.joining import Reader, start_positions
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
        positions = start_positions(store, Reader(settings.joiner.group, log.identity()), ends[0])
    except LogUnavailableError:
        return False
    return all(tuple(offsets) == (ends[0][n], ends[1][n]) for n, offsets in positions.items())


def examples_in(store: Engine, page_rows: int = 1_000) -> Examples:
    """All examples of the store."""
    return {
        (e.response_id, e.choice_index): {
            "votes": {v["rater"]: (v["value"], v["weight"], v["hlc"], v.get("correction")) for v in e.votes},
            "up": e.up,
            "down": e.down,
            "event": e.event,
        }
        for e in stream_examples(store, date.min, page_rows=page_rows)
    }
