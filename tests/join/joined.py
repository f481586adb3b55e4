"""What a store has come to, in the oracle's form, and whether it is all that the log has."""

from __future__ import annotations

from datetime import date

from sqlalchemy import Engine

from loop.log import EventLog
from loop.settings import Settings
from loop.store.examples import stream_examples
from loop.store.joining import start_positions
from tests.join.oracle import Examples


def is_joined(store: Engine, log: EventLog, settings: Settings) -> bool:
    """Whether the store's positions are the log's ends."""
    topics = (settings.log.responses_topic, settings.log.feedback_topic)
    ends = {(topic, n): end for topic in topics for n, end in log.end_offsets(topic).items()}
    return start_positions(store, settings.joiner.group, ends) == ends


def examples_in(store: Engine) -> Examples:
    """All examples of the store."""
    return {
        (e.response_id, e.choice_index): {
            "votes": {v["rater"]: (v["value"], v["weight"], v["hlc"]) for v in e.votes},
            "up": e.up,
            "down": e.down,
            "event": e.event,
        }
        for e in stream_examples(store, date.min)
    }
