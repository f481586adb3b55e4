"""The embedded log: topics, partitions, offsets and groups in one SQLite file of its own, for one machine.

The gateways' spool is the same class: there `write` (survives kill -9) and `sync` (survives a power cut) are called
apart, `waiting_bytes` is held against the quota, and `drop_before` frees what was forwarded. It knows nothing of what
the bytes mean.

One object may be used by several threads (its methods take turns on one connection); each consumer has a connection of
its own and reads while others write.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from loop.log import LogUnavailableError, NewRecord, Record
from loop.log.file import (
    BUSY_TIMEOUT_S,
    NEXT_ID,
    OFFSET_BITS,
    next_id,
    open_file,
    read_slot,
    sync_folder,
    transaction,
    unavailable,
)
from loop.log.groups import GroupConsumer
from loop.log.partition import partition_of
from loop.sqlite import empty_journal

_INSERT = "INSERT INTO records (id, timestamp_ms, key, headers, value) VALUES "
_ROW = "(?, ?, ?, ?, ?)"
_RAISE = """
    INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
    WHERE CAST(value AS INTEGER) < CAST(excluded.value AS INTEGER)
"""
_ROWS = 100  # of one statement: each gives the interpreter's lock away, which a busy event loop is slow to give back
RETENTION_EVERY_S = 60.0
RETENTION_ROWS = 1_000  # deleted in one transaction, so that appends do not wait for long


class EmbeddedLog:
    """An EventLog in the file `path`, which is made where it is not there. Topics come to be when they are named."""

    def __init__(self, path: Path, partitions: int = 4, retention_s: float | None = None) -> None:
        """`partitions` is for a new file; an old one keeps its own, the same for all its topics (keys must meet).

        Raises LogUnavailableError.
        """
        self.path = path
        self._retention_s = retention_s
        self._next_retention = 0.0
        self._lock = threading.RLock()
        self._slots: dict[str, list[int]] = {}
        with unavailable(path):
            self._connection = open_file(path)
        with self._transaction() as connection:
            new = {"partitions": str(partitions), "identity": uuid.uuid4().hex}
            connection.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", new.items())
        self.partitions = int(self.get_meta("partitions") or partitions)
        self._wal = os.open(f"{path}-wal", os.O_RDONLY)
        sync_folder(path.parent)

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[NewRecord]) -> None:
        """Write and sync: on disk when it returns. Raises LogUnavailableError."""
        self.write(records)
        self.sync()

    def write(
        self,
        records: Sequence[NewRecord],
        meta: Mapping[str, str] | None = None,
        highest: Mapping[str, int] | None = None,
    ) -> None:
        """Commit the records, and `meta` with them, in one transaction: what survives kill -9 of the process, not yet a
        power cut. Of what `highest` names, the meta keeps the highest number that any process has written.

        Raises LogUnavailableError, with none of them written.
        """
        now_ms = int(time.time() * 1000)
        with self._transaction() as connection:
            next_ids: dict[int, int] = {}
            rows: list[tuple[int, int, str, str | None, bytes]] = []
            for topic, key, value, headers in records:
                slot = self._slot(connection, topic, key)
                row_id = next_ids[slot] if slot in next_ids else next_id(connection, slot)
                next_ids[slot] = row_id + 1
                written = json.dumps(dict(headers)) if headers else None
                rows.append((row_id, now_ms, key, written, value))
            for start in range(0, len(rows), _ROWS):
                some = rows[start : start + _ROWS]
                connection.execute(_INSERT + ", ".join([_ROW] * len(some)), list(chain.from_iterable(some)))
            for name, text in (meta or {}).items():
                connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, text))
            for name, number in (highest or {}).items():
                connection.execute(_RAISE, (name, str(number)))
        if self._retention_s is not None and time.monotonic() > self._next_retention:
            self._next_retention = time.monotonic() + RETENTION_EVERY_S
            self.drop_older_than(now_ms - int(self._retention_s * 1000))

    def sync(self) -> None:
        """fsync what `write` has committed. Raises LogUnavailableError."""
        try:
            # The WAL is enough: a checkpoint that moved rows into the database file has synced both by itself.
            os.fdatasync(self._wal)
        except OSError as exc:
            raise LogUnavailableError(f"embedded log {self.path}: {exc}") from exc

    def get_meta(self, name: str) -> str | None:
        """A value that `write` kept."""
        with self._lock, unavailable(self.path):
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def identity(self) -> str:
        """Of this file; another one, once it was made anew. Raises LogUnavailableError."""
        found = self.get_meta("identity")
        assert found is not None
        return found

    # --- reading -----------------------------------------------------------------------------------------------------

    def consumer(self, group: str, topics: Sequence[str]) -> GroupConsumer:
        """A new member of the group; it reads a partition from its first record on until it is told to seek."""
        slots = {}
        with self._transaction() as connection:
            for topic in topics:
                for partition, slot in enumerate(self._topic(connection, topic)):
                    slots[topic, partition] = slot
        return GroupConsumer(self.path, group, slots)

    def read(self, topic: str, partition: int, offset: int, max_records: int, max_bytes: int = 1 << 40) -> list[Record]:
        """At most `max_records` records from `offset` on, or from the first one that is still there, up to the one that
        brings their values to `max_bytes`.
        """
        with self._lock, unavailable(self.path):
            slot = self._topic(self._connection, topic)[partition]
            return read_slot(self._connection, topic, partition, slot, offset, max_records, max_bytes)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The next offset of each partition."""
        with self._lock, unavailable(self.path):
            query = f"SELECT partition, slot, {NEXT_ID} FROM slots WHERE topic = ? ORDER BY partition"
            rows = self._connection.execute(query, (topic,)).fetchall()
        found = {partition: end - (slot << OFFSET_BITS) for partition, slot, end in rows}
        return found or dict.fromkeys(range(self.partitions), 0)

    def used_bytes(self) -> int:
        """Disk that the records take, in whole pages; freed ones count no more, though the file does not shrink."""
        with self._lock, unavailable(self.path):
            pages, free, size = (
                self._connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
        return int((pages - free) * size)

    def waiting_bytes(self, group: str, topics: Sequence[str]) -> int:
        """Disk that the topics' records take which the group has not committed, at the size of the average record: so
        it looks at no value, and is asked often.
        """
        first = f"""coalesce((
            SELECT id FROM records WHERE id >= slot << {OFFSET_BITS} AND id < (slot + 1) << {OFFSET_BITS}
            ORDER BY id LIMIT 1
        ), {NEXT_ID})"""
        query = f"""SELECT {first}, (slot << {OFFSET_BITS}) + coalesce(committed.next, 0), {NEXT_ID}
            FROM slots LEFT JOIN committed ON consumer_group = ?
                AND committed.topic = slots.topic AND committed.partition = slots.partition
            WHERE slots.topic IN (SELECT value FROM json_each(?))"""
        with self._lock, unavailable(self.path):
            rows = self._connection.execute(query, (group, json.dumps(topics))).fetchall()
        held = sum(end - first for first, _, end in rows)
        waiting = sum(max(0, end - max(first, committed)) for first, committed, end in rows)
        return self.used_bytes() * waiting // held if held else 0

    # --- freeing -----------------------------------------------------------------------------------------------------

    def drop_before(self, topic: str, partition: int, offset: int) -> None:
        """Delete a partition's records below `offset`."""
        with self._transaction() as connection:
            slot = self._topic(connection, topic)[partition]
            _drop(connection, slot, (slot << OFFSET_BITS) + offset)

    def drop_older_than(self, timestamp_ms: int) -> int:
        """Delete records that were appended before `timestamp_ms`, oldest first; returns how many."""
        dropped = 0
        with self._lock, unavailable(self.path):
            slots = [slot for (slot,) in self._connection.execute("SELECT slot FROM slots").fetchall()]
        for slot in slots:
            while True:
                with self._transaction() as connection:
                    rows = connection.execute(
                        "SELECT id, timestamp_ms FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
                        (slot << OFFSET_BITS, slot + 1 << OFFSET_BITS, RETENTION_ROWS),
                    ).fetchall()
                    kept = next((id for id, at_ms in rows if at_ms >= timestamp_ms), None)
                    end = kept if kept is not None else rows[-1][0] + 1 if rows else slot << OFFSET_BITS
                    deleted = _drop(connection, slot, end)
                dropped += deleted
                if deleted < RETENTION_ROWS:
                    break
        return dropped

    def erase(self, is_erased: Callable[[bytes], bool]) -> int:
        """Overwrite and delete the records, wherever they are, whose value is to be erased; returns how many.

        Their offsets stay given away. From now on everything that is deleted through this object is overwritten.
        """
        erased, after = 0, -1
        with self._lock, unavailable(self.path):
            self._connection.execute("PRAGMA secure_delete = ON")
        page = "SELECT id, value FROM records WHERE id > ? ORDER BY id LIMIT ?"
        while True:
            with self._lock, unavailable(self.path):
                rows = self._connection.execute(page, (after, RETENTION_ROWS)).fetchall()
            if not rows:
                break
            after = rows[-1][0]
            found = [(id,) for id, value in rows if is_erased(value)]
            if found:
                with self._transaction() as connection:
                    given_away = "UPDATE slots SET dropped = max(dropped, ?1 + 1) WHERE slot = ?1 >> ?2"
                    connection.executemany(given_away, [(id, OFFSET_BITS) for (id,) in found])
                    connection.executemany("DELETE FROM records WHERE id = ?", found)
                erased += len(found)
        with self._lock, unavailable(self.path):
            empty_journal(self._connection, BUSY_TIMEOUT_S)
        return erased

    def close(self) -> None:
        """Close the file; consumers close by themselves."""
        with self._lock:
            self._connection.close()
            if self._wal >= 0:
                os.close(self._wal)
                self._wal = -1

    # --- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._connection, self.path) as connection:
            yield connection

    def _slot(self, connection: sqlite3.Connection, topic: str, key: str) -> int:
        slots = self._slots.get(topic) or self._topic(connection, topic)
        return slots[partition_of(key, len(slots))]

    def _topic(self, connection: sqlite3.Connection, topic: str) -> list[int]:
        query = "SELECT slot FROM slots WHERE topic = ? ORDER BY partition"
        slots = [slot for (slot,) in connection.execute(query, (topic,)).fetchall()]
        if not slots:
            rows = [(topic, partition) for partition in range(self.partitions)]
            # Another connection may make the topic at the same moment: the same rows, so either one will do.
            connection.executemany("INSERT OR IGNORE INTO slots (topic, partition, dropped) VALUES (?, ?, 0)", rows)
            slots = [slot for (slot,) in connection.execute(query, (topic,)).fetchall()]
            if connection.in_transaction:
                return slots  # not remembered: this transaction may still be rolled back
        self._slots[topic] = slots
        return slots


def _drop(connection: sqlite3.Connection, slot: int, end: int) -> int:
    """Delete a slot's records with ids below `end`, which stay given away; returns how many they were."""
    first = slot << OFFSET_BITS
    last = connection.execute(
        "SELECT id FROM records WHERE id >= ? AND id < ? ORDER BY id DESC LIMIT 1", (first, end)
    ).fetchone()
    if last is None:
        return 0
    connection.execute("UPDATE slots SET dropped = max(dropped, ?) WHERE slot = ?", (last[0] + 1, slot))
    return connection.execute("DELETE FROM records WHERE id >= ? AND id < ?", (first, end)).rowcount
