"""Batches to join, and who joins them."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Engine, delete

from loop.join import Batch, read_batch
from loop.log import NewRecord, Record
from loop.store import joining, write
from loop.store.joining import Applied, Offsets, Reader, Span, prepare
from loop.store.schema import metadata
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


def apply(store: Engine, reader: Reader, batch: Batch, spans: Mapping[int, Span]) -> Applied:
    """Join a batch that is not prepared yet."""
    return joining.apply(store, reader, prepare(store, batch), spans)
