"""Batches to join, and what came of them."""

from __future__ import annotations

from datetime import date

from sqlalchemy import Engine, delete

from loop.join import Batch, read_batch
from loop.log import NewRecord, Record
from loop.store import write
from loop.store.examples import stream_examples
from loop.store.joining import Offsets, Reader
from loop.store.schema import metadata
from tests.join.oracle import Examples
from tests.join.traffic import RESPONSES

READER = Reader("g", "one log")
START = Offsets(0, 0)


def empty(store: Engine) -> None:
    """Delete every row."""
    with write(store) as connection:
        for table in metadata.sorted_tables:
            connection.execute(delete(table))


def batch_of(*records: NewRecord) -> Batch:
    """The records as a joiner reads them."""
    return read_batch([Record(r.topic, 0, n, r.key, r.value, 0) for n, r in enumerate(records)], RESPONSES)


def examples_in(store: Engine) -> Examples:
    """The store's examples in the oracle's form."""
    return {
        (e.response_id, e.choice_index): {
            "votes": {v["rater"]: (v["value"], v["weight"], v["hlc"]) for v in e.votes},
            "up": e.up,
            "down": e.down,
            "event": e.event,
        }
        for e in stream_examples(store, date.min, page_rows=7)
    }
