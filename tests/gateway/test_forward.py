"""From the spool to the broker: everything arrives, in order, whatever fails in between."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loop.events import decode_feedback, decode_response
from loop.log import LogUnavailableError, NewRecord, RecordTooLargeError
from loop.log.embedded import EmbeddedLog
from loop.log.partition import partition_of
from services.gateway import forward
from services.gateway.forward import BATCH, Forwarder
from tests.join.traffic import feedback, response, response_id

TOPICS = ("responses", "feedback")
PARTITIONS = 2


class Broker:
    """The far side: keeps what it is sent, and fails on demand, before or after that; its partitions may be away."""

    def __init__(self) -> None:
        self.records: list[NewRecord] = []
        self.most_bytes = 100
        self.failures: list[str] = []
        self.away: set[tuple[str, int]] = set()
        self.given_up = 0

    def send(self, records: Sequence[NewRecord]) -> Future[None]:
        sent: Future[None] = Future()
        if (records[0].topic, partition_of(records[0].key, PARTITIONS)) in self.away:
            return sent
        failure = self.failures.pop() if self.failures else ""
        if any(len(record.value) > self.most_bytes for record in records):
            sent.set_exception(RecordTooLargeError(f"expected at most {self.most_bytes} bytes"))
        elif failure == "before":
            sent.set_exception(LogUnavailableError("no broker"))
        else:
            self.records += records
            if failure == "after":
                sent.set_exception(LogUnavailableError("acknowledgement lost"))
            else:
                sent.set_result(None)
        return sent

    def give_up(self) -> None:
        self.given_up += 1


@pytest.fixture(autouse=True)
def tries_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "RETRY_S", 0.0)


def forwarder(spool: EmbeddedLog, broker: Broker) -> Forwarder:
    return Forwarder(spool, broker, TOPICS)  # type: ignore[arg-type]


def is_empty(spool: EmbeddedLog) -> bool:
    return not any(spool.read(topic, n, 0, 1) for topic in TOPICS for n in range(PARTITIONS))


def numbers(records: Sequence[NewRecord], topic: str, key: str) -> list[int]:
    """What was written under a key, repetitions apart."""
    return list(dict.fromkeys(int(r.value) for r in records if (r.topic, r.key) == (topic, key)))


def test_records_leave_the_spool_once_the_broker_has_them(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    written = [NewRecord(TOPICS[n % 2], f"{n % 5:016x}", str(n).encode()) for n in range(3 * BATCH)]
    spool.write(written)
    broker = Broker()
    broker.failures = ["after", "", "before", "", "before"]
    while not is_empty(spool):
        forwarder(spool, broker).step()  # what was sent and not seen to arrive is forgotten, as by a kill
        going = forwarder(spool, broker)
        for _ in range(2):
            going.step()
    assert {record.value for record in broker.records} == {record.value for record in written}
    for topic, key in {(record.topic, record.key) for record in written}:
        assert numbers(broker.records, topic, key) == numbers(written, topic, key)
    spool.close()


def test_no_more_is_on_its_way_than_memory_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "BATCH_BYTES", 250)
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    spool.write([NewRecord(TOPICS[0], "k", bytes(100)) for _ in range(10)])
    broker = Broker()
    going = forwarder(spool, broker)
    going.step()
    assert len(broker.records) == 3
    while not is_empty(spool):
        going.step()
    assert len(broker.records) == 10
    spool.close()


def test_an_empty_spool_sends_nothing(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    broker = Broker()
    going = forwarder(spool, broker)
    going.step()
    assert (broker.records, going.waits_for) == ([], [])
    spool.close()


def test_a_record_that_the_broker_never_takes_holds_up_no_other(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    spool.write([NewRecord(TOPICS[0], "k", value) for value in (b"1", b"x" * 101, b"2")])
    broker = Broker()
    going = forwarder(spool, broker)
    while not is_empty(spool):
        going.step()
    assert [record.value for record in broker.records] == [b"1", b"2"]
    assert not going.failing
    spool.close()


def test_a_response_that_the_broker_never_takes_is_logged_without_its_content(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    key = "0123456789abcdef"
    events = [response(response_id(key, n), message_id="m")._replace(topic=TOPICS[0]) for n in (1, 2, 3)]
    large = msgspec.json.decode(events[1].value)
    large["data"] |= {"messages": [{"role": "user", "content": "secret" * 1000}], "prompt_token_ids": [1] * 1000}
    events[1] = events[1]._replace(value=msgspec.json.encode(large))
    spool.write(events)
    broker = Broker()
    broker.most_bytes = 2000
    broker.failures = ["before", "", "before", "", ""]  # between them, the broker is away
    going = forwarder(spool, broker)
    while not is_empty(spool):
        going.step()
    first, bare, last = broker.records
    assert [first.value, last.value] == [events[0].value, events[2].value]
    assert (bare.topic, bare.key, len(bare.value) < 1000) == (events[1].topic, events[1].key, True)
    envelope = msgspec.json.decode(bare.value)
    assert envelope | {"data": None} == large | {"data": None}
    kept = decode_response(bare.value).data
    assert (kept.response_id, kept.message_id, kept.stored) == (large["data"]["response_id"], "m", False)
    assert (kept.choices, kept.messages, kept.prompt_token_ids) == ([], None, None)
    spool.close()


def test_a_vote_that_the_broker_never_takes_is_sent_without_its_texts(tmp_path: Path) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    texts: dict[str, Any] = {"comment": "secret" * 500, "reasons": ["secret"], "correction": "secret" * 500}
    id = response_id("0123456789abcdef", 1)
    vote = feedback("f", "down", 1 << 40, response_id=id, rater="ann", weight=0.5, choice_index=1, **texts)
    spool.write([vote._replace(topic=TOPICS[1])])
    broker = Broker()
    broker.most_bytes = 2000
    going = forwarder(spool, broker)
    while not is_empty(spool):
        going.step()
    (sent,) = broker.records
    kept = decode_feedback(sent.value).data
    assert kept == msgspec.structs.replace(decode_feedback(vote.value).data, comment=None, reasons=[], correction=None)
    assert b"secret" not in sent.value
    spool.close()


def test_a_partition_that_cannot_be_written_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = EmbeddedLog(tmp_path / "spool.db", PARTITIONS)
    written = [NewRecord(TOPICS[n % 2], f"{n % 5:016x}", str(n).encode()) for n in range(3 * BATCH)]
    spool.write(written)
    broker = Broker()
    away = (TOPICS[0], partition_of(written[0].key, PARTITIONS))
    broker.away = {away}
    going = forwarder(spool, broker)
    for _ in range(5):
        going.step()
    expected = [r for r in written if (r.topic, partition_of(r.key, PARTITIONS)) != away]
    assert {record.value for record in broker.records} == {record.value for record in expected}
    assert len(going.waits_for) == 1
    monkeypatch.setattr(forward, "GIVE_UP_S", 0.0)
    going = forwarder(spool, broker)
    going.step()
    assert (list(going.failing), going.waits_for, broker.given_up) == ([away], [], 1)
    broker.away = set()
    while not is_empty(spool):
        going.step()
    assert not going.failing
    for topic, key in {(record.topic, record.key) for record in written}:
        assert numbers(broker.records, topic, key) == numbers(written, topic, key)
    spool.close()
