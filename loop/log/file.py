"""The embedded log's file: its tables, its connections, and how one partition is read. For `embedded` and `groups`."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loop.log import LogUnavailableError, Record

BUSY_TIMEOUT_S = 10.0
# A record's row id is its slot (a topic's partition) and its offset in it, so that a partition is a range of the table.
OFFSET_BITS = 44

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slots (
    slot INTEGER PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL, dropped INTEGER NOT NULL,
    UNIQUE (topic, partition)
);
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY, timestamp_ms INTEGER NOT NULL, key TEXT NOT NULL, headers TEXT, value BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS committed (
    consumer_group TEXT, topic TEXT, partition INTEGER, next INTEGER NOT NULL,
    PRIMARY KEY (consumer_group, topic, partition)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS members (
    consumer_group TEXT, member TEXT, expires_at_ms INTEGER NOT NULL, PRIMARY KEY (consumer_group, member)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    consumer_group TEXT, partition INTEGER, member TEXT NOT NULL, PRIMARY KEY (consumer_group, partition)
) WITHOUT ROWID;
"""


# The id of a slot's next record: behind its last one, or behind the last one that was ever dropped from it. Looked up,
# not counted: a counter would be one more page to write with each record.
NEXT_ID = f"""max(dropped, slot << {OFFSET_BITS}, coalesce((
    SELECT id + 1 FROM records WHERE id >= slot << {OFFSET_BITS} AND id < (slot + 1) << {OFFSET_BITS}
    ORDER BY id DESC LIMIT 1
), 0))"""
_NEXT_ID = f"SELECT {NEXT_ID} FROM slots WHERE slot = ?"


@contextmanager
def unavailable(path: Path) -> Iterator[None]:
    """SQLite's errors (locked for too long, disk full, I/O) as what callers of a log wait for."""
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise LogUnavailableError(f"embedded log {path}: {exc}") from exc


def connect(path: Path) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time; transactions are begun by hand."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    # NORMAL: a commit writes the WAL and does not fsync it (`sync` does), and a checkpoint fsyncs in the right order.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 2000")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[sqlite3.Connection]:
    """A writing transaction. Raises LogUnavailableError."""
    with unavailable(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has rolled back by itself after some errors
                connection.execute("ROLLBACK")
            raise


def next_id(connection: sqlite3.Connection, slot: int) -> int:
    """The row id that the slot's next record gets."""
    ((found,),) = connection.execute(_NEXT_ID, (slot,)).fetchall()
    return int(found)


def read_slot(
    connection: sqlite3.Connection, topic: str, partition: int, slot: int, offset: int, max_records: int, max_bytes: int
) -> list[Record]:
    """The records of one slot from `offset` on, up to the one that brings their values to `max_bytes`."""
    first = slot << OFFSET_BITS
    rows = connection.execute(
        "SELECT id - ?, key, value, timestamp_ms, headers FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
        (first, first + offset, slot + 1 << OFFSET_BITS, max_records),
    )
    records = []
    for offset, key, value, timestamp_ms, headers in rows:
        of_record = json.loads(headers) if headers else {}
        records.append(Record(topic, partition, offset, key, value, timestamp_ms, of_record))
        max_bytes -= len(value)
        if max_bytes <= 0:
            break
    return records


def open_file(path: Path) -> sqlite3.Connection:
    """The first connection to the file, which is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        connection = connect(path)
        try:
            connection.execute("PRAGMA page_size = 8192")  # of 4 KiB pages, each would hold one record of 2 KiB
            connection.execute("PRAGMA journal_mode = WAL")
            with transaction(connection, path):
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    connection.execute(statement)
            return connection
        except (sqlite3.OperationalError, LogUnavailableError) as exc:
            connection.close()
            # Changing to WAL does not wait for the busy time-out while another process does the same.
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def sync_folder(folder: Path) -> None:
    """fsync the folder, so that a file made in it is found again after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
