"""The event log: one Protocol, two implementations (embedded, Kafka). Only `kafka.py` knows a Kafka client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class NewRecord(NamedTuple):
    """One record to append; records of one key keep their order."""

    topic: str
    key: str
    value: bytes
    headers: Mapping[str, str] = {}


class Record(NamedTuple):
    """One record as it was read."""

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes
    timestamp_ms: int
    headers: Mapping[str, str] = {}


class LogUnavailableError(ConnectionError):
    """The log cannot be reached now; the caller waits and tries again."""


class RecordTooLargeError(ValueError):
    """The log will never take this record; trying again is in vain."""


class Consumer(Protocol):
    """One member of a consumer group. The store, not the log, says where to read on: see `seek`."""

    def assigned(self) -> set[int]:
        """Partition numbers that this member owns now (the same ones of every topic it reads)."""

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read on at `offset`; nothing to do for a partition that is not ours any more, as the next poll says."""

    def position(self, topic: str, partition: int) -> int:
        """Where the next poll reads on: behind offsets that no record has, or none any more, where that is known."""

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records of the assigned partitions, in order within each; empty after `timeout_s`.

        Raises LogUnavailableError.
        """

    def commit(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Tell the log the next offset of each (topic, partition), only so that lag tools see it."""

    def close(self) -> None: ...


class EventLog(Protocol):
    """A partitioned, durable, ordered log of bytes."""

    def append(self, records: Sequence[NewRecord]) -> None:
        """Durable when it returns. Raises LogUnavailableError, with nothing lost that an earlier call appended, and
        RecordTooLargeError.
        """

    def consumer(self, group: str, topics: Sequence[str]) -> Consumer: ...

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The next offset of each partition; those that no broker leads now are left out."""

    def identity(self) -> str:
        """What offsets belong to: another one, once topics or file were made anew. Raises LogUnavailableError."""

    def close(self) -> None: ...
