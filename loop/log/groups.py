"""Consumers of the embedded log: members of a group share its partitions by leases in the file.

Each member says every second that it is there; the living members, sorted, get equal ranges of the partition numbers
(as Kafka's range assignor does). A member takes a partition over once its holder has let go of it, or is dead. The
leases only keep two members from doing the same work: what protects the state is the store's compare and set.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from loop.log import Record
from loop.log.file import connect, read_slot, transaction, unavailable

HEARTBEAT_S = 1.0
SESSION_TIMEOUT_S = 10.0
POLL_EVERY_S = 0.01
POLL_BYTES = 32 * 1024 * 1024  # about, of values


class GroupConsumer:
    """One member of a group, for one thread. Reads each partition from its first record on until told to seek."""

    def __init__(self, path: Path, group: str, slots: Mapping[tuple[str, int], int]) -> None:
        """`slots` are the rows' slots of each topic and partition."""
        # Sorted by the time of joining: a newcomer takes from the end, and as little as can be moves.
        self.member = f"{time.time_ns():020d}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._path = path
        self._group = group
        self._slots = dict(slots)
        self._partitions = sorted({partition for _, partition in slots})
        self._next = dict.fromkeys(slots, 0)
        self._owned: set[int] = set()
        self._next_heartbeat = 0.0
        self._turn = 0
        self._idle_version = -1
        with unavailable(path):
            self._connection = connect(path)

    def assigned(self) -> set[int]:
        """Partition numbers that this member owns now. Raises LogUnavailableError."""
        self._heartbeat()
        return set(self._owned)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read on at `offset`."""
        self._next[topic, partition] = offset
        self._idle_version = -1

    def position(self, topic: str, partition: int) -> int:
        """Where the next poll reads on."""
        return self._next[topic, partition]

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records of the owned partitions, in order within each; empty after `timeout_s`.

        Raises LogUnavailableError.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._heartbeat()
            if found := self._read(max_records):
                return found
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return []
            time.sleep(min(POLL_EVERY_S, left_s))

    def commit(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Keep the group's next offsets, for lag tools. Raises LogUnavailableError."""
        rows = [(self._group, topic, partition, offset) for (topic, partition), offset in positions.items()]
        with transaction(self._connection, self._path) as connection:
            connection.executemany("INSERT OR REPLACE INTO committed VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Leave the group, so that the others take over at once."""
        with transaction(self._connection, self._path) as connection:
            gone = (self._group, self.member)
            connection.execute("DELETE FROM members WHERE consumer_group = ? AND member = ?", gone)
            connection.execute("DELETE FROM leases WHERE consumer_group = ? AND member = ?", gone)
        self._connection.close()

    def _read(self, max_records: int) -> list[Record]:
        # A file that nobody has written to since nothing was found in it holds nothing new: one cheap pragma to know.
        with unavailable(self._path):
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version == self._idle_version:
                return []
            found: list[Record] = []
            places = [place for place in self._slots if place[1] in self._owned]
            self._turn += 1  # another partition first each time, so that a full one does not starve the others
            places = places[self._turn % len(places) :] + places[: self._turn % len(places)] if places else []
            # As many of each, so that what came at about the same time gets into the store together.
            bytes_left = POLL_BYTES
            while places and len(found) < max_records and bytes_left > 0:
                share = -(-(max_records - len(found)) // len(places))
                with_more = []
                for place in places:
                    wanted = min(share, max_records - len(found))
                    slot, next_ = self._slots[place], self._next[place]
                    if rows := read_slot(self._connection, *place, slot, next_, wanted, bytes_left // len(places)):
                        self._next[place] = rows[-1].offset + 1
                        found += rows
                        bytes_left -= sum(len(record.value) for record in rows)
                        with_more.append(place)
                places = with_more
            if not found:
                self._idle_version = version
            return found

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now < self._next_heartbeat:
            return
        self._next_heartbeat = now + HEARTBEAT_S
        now_ms = int(time.time() * 1000)
        group = self._group
        with transaction(self._connection, self._path) as connection:
            expires_at_ms = now_ms + int(SESSION_TIMEOUT_S * 1000)
            connection.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", (group, self.member, expires_at_ms))
            connection.execute("DELETE FROM members WHERE consumer_group = ? AND expires_at_ms < ?", (group, now_ms))
            members = [
                member
                for (member,) in connection.execute(
                    "SELECT member FROM members WHERE consumer_group = ? ORDER BY member", (group,)
                )
            ]
            share = range_share(self._partitions, members.index(self.member), len(members))
            holders = dict(
                connection.execute("SELECT partition, member FROM leases WHERE consumer_group = ?", (group,)).fetchall()
            )
            for partition in self._partitions:
                holder = holders.get(partition)
                if partition in share and (holder is None or holder not in members):
                    connection.execute(
                        "INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", (group, partition, self.member)
                    )
                    holders[partition] = self.member
                elif partition not in share and holder == self.member:
                    connection.execute(
                        "DELETE FROM leases WHERE consumer_group = ? AND partition = ?", (group, partition)
                    )
                    del holders[partition]
        owned = {partition for partition, holder in holders.items() if holder == self.member}
        if owned != self._owned:
            self._owned = owned
            self._idle_version = -1


def range_share(partitions: list[int], index: int, members: int) -> set[int]:
    """The partitions of the member at `index`: contiguous ranges, the first ones longer by one."""
    size, longer = divmod(len(partitions), members)
    start = index * size + min(index, longer)
    return set(partitions[start : start + size + (index < longer)])
