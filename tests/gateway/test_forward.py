"""From the spool to the broker: everything arrives, in order, whatever fails in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loop.log import LogUnavailableError, NewRecord, RecordTooLargeError
from loop.log.embedded import EmbeddedLog
from services.gateway.forward import BATCH, forward_once

TOPICS = ("responses", "feedback")


class Broker:
    """The far side: keeps what was acknowledged, and fails on demand, before or after it kept it."""

    def __init__(self) -> None:
        self.records: list[NewRecord] = []
        self.failures: list[str] = []

    def append(self, records: Sequence[NewRecord]) -> None:
        if any(len(record.value) > 100 for record in records):
            raise RecordTooLargeError("expected at most 100 bytes")
        failure = self.failures.pop() if self.failures else ""
        if failure == "before":
            raise LogUnavailableError("no broker")
        self.records += records
        if failure == "after":
            raise LogUnavailableError("acknowledgement lost")


def test_records_leave_the_spool_once_the_broker_has_them(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", partitions=2)
    written = [NewRecord(TOPICS[n % 2], f"{n % 5:016x}", str(n).encode()) for n in range(3 * BATCH)]
    spool.write(written)
    broker = Broker()
    broker.failures = ["after", "", "before", "", "before"]
    while True:
        try:
            if not forward_once(spool, broker, TOPICS):  # type: ignore[arg-type]
                break
        except LogUnavailableError:
            spool.close()
            spool = EmbeddedLog(tmp_path / "spool.db")  # as if the process had been killed
    values = [record.value for record in broker.records]
    assert set(values) == {record.value for record in written}
    for key in {record.key for record in written}:
        of_key = list(dict.fromkeys(int(r.value) for r in broker.records if (r.topic, r.key) == (TOPICS[0], key)))
        assert of_key == sorted(of_key)  # a key keeps its order, repetitions apart
    assert [spool.read(topic, p, 0, 1) for topic in TOPICS for p in range(2)] == [[]] * 4
    spool.close()


def test_an_empty_spool_sends_nothing(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db")
    broker = Broker()
    assert forward_once(spool, broker, TOPICS) == 0  # type: ignore[arg-type]
    assert broker.records == []
    spool.close()


def test_a_record_that_the_broker_never_takes_holds_up_no_other(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", partitions=1)
    spool.write([NewRecord(TOPICS[0], "k", value) for value in (b"1", b"x" * 101, b"2")])
    broker = Broker()
    assert forward_once(spool, broker, TOPICS) == 3  # type: ignore[arg-type]
    assert [record.value for record in broker.records] == [b"1", b"2"]
    assert spool.read(TOPICS[0], 0, 0, 1) == []
    spool.close()
