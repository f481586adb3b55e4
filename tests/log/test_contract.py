"""What every event log does. One suite, on the embedded log and on real Apache Kafka."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from loop.log import Consumer, EventLog, NewRecord, Record
from loop.log.open import open_log
from loop.log.partition import partition_of
from loop.settings import LogSettings

# kafka-python leaves sockets of its connection attempts to the garbage collector.
KEYS = [f"{n:016x}" for n in range(40)]
Open = Callable[[], EventLog]


def new_settings(request: pytest.FixtureRequest, tmp_path: Path) -> LogSettings:
    """Settings of a log that holds nothing yet."""
    if request.param == "embedded":
        return LogSettings(path=tmp_path / "log.db")
    found: LogSettings = request.getfixturevalue(request.param).settings()
    return found


settings = pytest.fixture(new_settings, params=["embedded", "kafka"], name="settings")
# For tests that ask for end offsets, which Tansu gets wrong.
exact_settings = pytest.fixture(new_settings, params=["embedded", "apache_kafka"], name="exact_settings")


@pytest.fixture
def log(settings: LogSettings) -> Iterator[EventLog]:
    opened = open_log(settings)
    yield opened
    opened.close()


def read_until(consumer: Consumer, is_enough: Callable[[list[Record]], bool], seconds: float = 180.0) -> list[Record]:
    """Poll until what was read is enough."""
    read: list[Record] = []
    deadline = time.monotonic() + seconds
    while not is_enough(read):
        assert time.monotonic() < deadline, f"read {len(read)} records only"
        read += consumer.poll(500, 0.2)
    return read


def fill(log: EventLog, topic: str, number: int) -> list[NewRecord]:
    records = [NewRecord(topic, KEYS[n % len(KEYS)], b"%d" % n) for n in range(number)]
    log.append(records)
    return records


def test_what_was_appended_is_read_in_order_within_each_key(log: EventLog, settings: LogSettings) -> None:
    written = fill(log, settings.responses_topic, 500)
    consumer = log.consumer("readers", [settings.responses_topic])
    read = read_until(consumer, lambda read: len(read) >= 500)
    consumer.close()
    for key in KEYS:
        assert [r.value for r in read if r.key == key] == [r.value for r in written if r.key == key]
    assert len({(r.partition, r.offset) for r in read}) == 500


def test_both_logs_place_a_key_in_the_same_partition(log: EventLog, settings: LogSettings) -> None:
    fill(log, settings.responses_topic, len(KEYS))
    consumer = log.consumer("readers", [settings.responses_topic])
    read = read_until(consumer, lambda read: len(read) >= len(KEYS))
    consumer.close()
    assert {r.key: r.partition for r in read} == {key: partition_of(key, settings.partitions) for key in KEYS}


def test_headers_bytes_and_time_come_through(log: EventLog, settings: LogSettings) -> None:
    value = bytes(range(256)) * 10
    before_ms = int(time.time() * 1000)
    log.append([NewRecord(settings.feedback_topic, "k", value, {"reason": "größer"})])
    consumer = log.consumer("readers", [settings.feedback_topic])
    (record,) = read_until(consumer, bool)
    consumer.close()
    assert (record.key, record.value, record.headers) == ("k", value, {"reason": "größer"})
    assert before_ms - 1000 <= record.timestamp_ms <= int(time.time() * 1000) + 1000


def test_end_offsets_count_each_partition(exact_settings: LogSettings) -> None:
    settings, log = exact_settings, open_log(exact_settings)
    assert log.end_offsets(settings.responses_topic) == dict.fromkeys(range(settings.partitions), 0)
    fill(log, settings.responses_topic, 100)
    ends = log.end_offsets(settings.responses_topic)
    assert sum(ends.values()) == 100
    assert log.end_offsets(settings.feedback_topic) == dict.fromkeys(range(settings.partitions), 0)
    log.close()


def test_a_consumer_reads_on_where_it_is_told_to(log: EventLog, settings: LogSettings) -> None:
    fill(log, settings.responses_topic, 200)
    consumer = log.consumer("readers", [settings.responses_topic])
    first = read_until(consumer, lambda read: len(read) >= 200)
    partition = first[0].partition
    consumer.seek(settings.responses_topic, partition, 1)
    ours = [r for r in first if r.partition == partition and r.offset >= 1]
    again = read_until(consumer, lambda read: len(read) >= len(ours))
    consumer.close()
    assert again == ours


def test_groups_read_apart(log: EventLog, settings: LogSettings) -> None:
    fill(log, settings.responses_topic, 50)
    for group in ("one", "two"):
        consumer = log.consumer(group, [settings.responses_topic])
        assert len(read_until(consumer, lambda read: len(read) >= 50)) == 50
        consumer.close()


def test_two_members_share_the_partitions_and_the_one_left_has_all(log: EventLog, settings: LogSettings) -> None:
    topics = [settings.responses_topic, settings.feedback_topic]
    group = uuid4().hex
    one, two = log.consumer(group, topics), log.consumer(group, topics)
    everything = set(range(settings.partitions))

    def poll_until(is_so: Callable[[], bool], *members: Any) -> None:
        deadline = time.monotonic() + 180
        while not is_so():
            assert time.monotonic() < deadline, [member.assigned() for member in members]
            for member in members:
                member.poll(10, 0.05)

    poll_until(lambda: one.assigned() == everything, one)

    def are_shared() -> bool:
        # Not at every moment: a member goes by its last poll, and what it owned then may be the other one's by now.
        shares = (one.assigned(), two.assigned())
        return all(shares) and sorted([*shares[0], *shares[1]]) == sorted(everything)

    poll_until(are_shared, one, two)
    one.close()
    poll_until(lambda: two.assigned() == everything, two)
    two.close()


def test_a_partition_of_both_topics_has_one_owner(settings: LogSettings) -> None:
    """Their number is odd: round robin over both topics' partitions would tear them apart."""
    topics = [f"{uuid4().hex}.{name}" for name in ("responses", "feedback")]
    changes = {"partitions": 3, "responses_topic": topics[0], "feedback_topic": topics[1]}
    odd = open_log(settings.model_copy(update=changes | {"path": settings.path.with_name("odd.db")}))
    members = [odd.consumer("readers", topics) for _ in range(2)]
    keys = {partition_of(key, 3): key for key in KEYS}
    read: list[set[tuple[str, int]]] = [set(), set()]
    deadline = time.monotonic() + 180
    while sorted(map(len, read)) != [2, 4]:  # one of them has two partitions of each topic
        assert time.monotonic() < deadline, read
        odd.append([NewRecord(topic, key, b"v") for topic in topics for key in keys.values()])
        shares = [member.assigned() for member in members]
        read = [{(record.topic, record.partition) for record in member.poll(500, 0.1)} for member in members]
        if shares != [member.assigned() for member in members]:
            read = [set(), set()]  # they were just being assigned
    for seen in read:
        assert seen == {(topic, partition) for topic in topics for _, partition in seen}
    assert not read[0] & read[1]
    for member in members:
        member.close()
    odd.close()


def test_what_was_appended_is_there_after_closing(exact_settings: LogSettings) -> None:
    log = open_log(exact_settings)
    fill(log, exact_settings.responses_topic, 20)
    log.close()
    log = open_log(exact_settings)
    assert sum(log.end_offsets(exact_settings.responses_topic).values()) == 20
    log.close()


def test_a_committed_offset_does_not_say_where_to_read(log: EventLog, settings: LogSettings) -> None:
    fill(log, settings.responses_topic, 30)
    consumer = log.consumer("readers", [settings.responses_topic])
    read = read_until(consumer, lambda read: len(read) >= 30)
    consumer.commit({(r.topic, r.partition): r.offset + 1 for r in read})
    for partition in consumer.assigned():
        consumer.seek(settings.responses_topic, partition, 0)
    assert len(read_until(consumer, lambda read: len(read) >= 30)) == 30
    consumer.close()


def test_a_rejoin_that_outlasts_a_poll_is_finished_by_the_next_ones(kafka: Any) -> None:
    """New metadata makes a member rejoin; kafka-python forgets about it when the poll ends before the join does."""
    settings = kafka.settings()
    log = open_log(settings)
    consumer = log.consumer("readers", [settings.responses_topic])
    fill(log, settings.responses_topic, 10)
    read_until(consumer, lambda read: len(read) >= 10)
    coordinator = consumer._consumer._coordinator  # type: ignore[attr-defined]
    coordinator._assignment_snapshot = {}
    kafka.process.send_signal(signal.SIGSTOP)
    try:
        consumer.poll(10, 0.2)
        assert coordinator.rejoining
    finally:
        kafka.process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 180
    while coordinator.rejoining:
        assert time.monotonic() < deadline, "the member takes itself for joined, without heartbeats"
        time.sleep(0.1)  # the join ends between two polls
        consumer.poll(10, 0.05)
    assert coordinator.stable()
    assert consumer.assigned() == set(range(settings.partitions))
    consumer.close()
    log.close()
