"""What only the log on Kafka does: its topics, and what the brokers refuse. On real Apache Kafka."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import ConfigResource

from loop.log import LogUnavailableError, NewRecord, Record, RecordTooLargeError
from loop.log.kafka import KafkaLog
from loop.log.open import open_log
from loop.log.partition import partition_of
from loop.settings import LogSettings
from tests.services_real import START_S, RealKafka


@pytest.fixture
def admin(apache_kafka: RealKafka) -> Iterator[Any]:
    client = KafkaAdminClient(bootstrap_servers=[apache_kafka.server])
    yield client
    client.close()


def test_topics_are_made_as_the_settings_say(apache_kafka: RealKafka, admin: Any) -> None:
    settings = apache_kafka.settings(partitions=3, retention_s=7200, max_message_bytes=100_000)
    log = open_log(settings)
    pair = [settings.responses_topic, settings.feedback_topic]
    topics = [*pair, *(f"{topic}.dlt" for topic in pair)]
    found = admin.describe_configs([ConfigResource("TOPIC", topic) for topic in topics])["topic"]
    sizes = {"max.message.bytes": "100000", "min.insync.replicas": "1"}
    expected = {"retention.ms": "7200000", "segment.ms": "7200000", **sizes}
    # Only what was set for the topic itself is listed.
    assert {name: {key: c["value"] for key, c in configs.items()} for name, configs in found.items()} == dict.fromkeys(
        topics, expected
    )
    assert {len(topic["partitions"]) for topic in admin.describe_topics(topics)} == {3}
    log.append([NewRecord(topics[0], "k", bytes(99_000))])
    for size in (99_990, 100_001):  # the brokers refuse the first, with its batch's head; the client the second
        with pytest.raises(RecordTooLargeError, match=r"log\.max_message_bytes"):
            log.append([NewRecord(topics[0], "k", bytes(size))])
    log.append([NewRecord(topics[0], "k", b"goes on")])
    assert sum(log.end_offsets(topics[0]).values()) == 2
    log.close()


def test_tools_see_an_idempotent_producer_and_committed_offsets(apache_kafka: RealKafka, admin: Any) -> None:
    settings = apache_kafka.settings(partitions=1)
    place = TopicPartition(settings.responses_topic, 0)
    log = open_log(settings)
    log.append([NewRecord(place.topic, "k", b"v")])
    assert len(admin.describe_producers([place])[place].active_producers) == 1  # of others the broker keeps no state
    consumer = log.consumer("readers", [place.topic])
    while not consumer.poll(1, 0.2):
        pass
    consumer.commit({tuple(place): 1})
    assert admin.list_group_offsets("readers")["readers"][place].offset == 1
    consumer.close()
    log.close()


def test_only_the_record_that_is_too_large_is_called_so(apache_kafka: RealKafka) -> None:
    settings = apache_kafka.settings(max_message_bytes=100_000)
    log = KafkaLog(settings)
    keys = list({partition_of(str(n), 4): str(n) for n in range(100)}.values())
    refused = log.send([NewRecord(settings.responses_topic, keys[0], bytes(99_990))])
    others = [log.send([NewRecord(settings.responses_topic, key, b"v")]) for key in keys[1:] for _ in range(20)]
    assert isinstance(refused.exception(180), RecordTooLargeError)
    # With it the producer fails, and what is on its way is to be sent again.
    assert {type(sent.exception(180)) for sent in others} <= {type(None), LogUnavailableError}
    log.append([NewRecord(settings.responses_topic, key, b"again") for key in keys])
    log.close()


def test_a_topic_that_promises_less_than_we_count_on_is_warned_of(
    apache_kafka: RealKafka, admin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = apache_kafka.settings(max_message_bytes=100_000)

    def warned_of() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "thumbwheel.log"]

    open_log(settings).close()
    open_log(settings).close()
    assert warned_of() == []
    open_log(settings.model_copy(update={"max_message_bytes": 200_000})).close()
    warned = warned_of()
    assert len(warned) == 4
    assert f"topic {settings.feedback_topic} has max.message.bytes=100000, expected at least 200000" in warned[1]
    assert "log.max_message_bytes" in warned[1]
    caplog.clear()
    open_log(settings.model_copy(update={"retention_s": settings.retention_s + 1})).close()
    assert len(warned_of()) == 4
    ours, theirs = (settings.retention_s + 1) * 1000, settings.retention_s * 1000
    said = f"topic {settings.feedback_topic} has retention.ms={theirs}, expected at least {ours}"
    assert said in warned_of()[1]
    assert "log.retention_s" in warned_of()[1]
    caplog.clear()
    open_log(settings.model_copy(update={"min_insync_replicas": 2})).close()
    assert f"topic {settings.feedback_topic} has min.insync.replicas=1, expected at least 2" in warned_of()[1]
    assert "log.min_insync_replicas" in warned_of()[1]
    caplog.clear()
    config = ConfigResource("TOPIC", settings.feedback_topic, {"retention.ms": -1})  # for ever
    admin.alter_configs([config])
    open_log(settings).close()
    assert warned_of() == []


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_what_is_packed_by_the_brokers_or_other_producers_is_read(
    apache_kafka: RealKafka, apache_home: Path, admin: Any, codec: str, tmp_path: Path
) -> None:
    program = tmp_path / "Send.java"
    program.write_text(
        """import org.apache.kafka.clients.producer.*; import org.apache.kafka.common.serialization.StringSerializer;
        public class Send { public static void main(String[] args) {
        java.util.Map<String, Object> how = java.util.Map.of("bootstrap.servers", args[0], "compression.type", args[2]);
        try (var producer = new KafkaProducer<>(how, new StringSerializer(), new StringSerializer())) {
        for (int n = 0; n < 50; n++) {
        var record = new ProducerRecord<>(args[1], "k", ("" + n).repeat(50));
        record.headers().add("nothing", null).add("h", "v".getBytes());
        producer.send(record); } } } }"""
    )
    settings = apache_kafka.settings(partitions=1)
    log = open_log(settings)
    topic = settings.responses_topic
    admin.alter_configs([ConfigResource("TOPIC", topic, {"compression.type": codec})])
    command = ["java", "-cp", f"{apache_home}/libs/*", str(program), apache_kafka.server, topic, codec]
    subprocess.run(command, check=True, capture_output=True, timeout=START_S)
    sent = [str(n).encode() * 50 for n in range(100)]
    log.append([NewRecord(topic, "k", value) for value in sent[50:]])
    consumer = log.consumer(codec, [topic])
    found: list[Record] = []
    while len(found) < len(sent):
        found += consumer.poll(100, 0.2)
    assert [record.value for record in found] == sent
    assert found[0].headers == {"nothing": "", "h": "v"}
    consumer.close()
    log.close()


def test_topics_of_unequal_partition_counts_are_refused(apache_kafka: RealKafka, admin: Any) -> None:
    settings = apache_kafka.settings()
    for topic, partitions in ((settings.responses_topic, 2), (settings.feedback_topic, 3)):
        admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
    with pytest.raises(ValueError, match=r"partition counts differ: .*responses has 2, .*feedback has 3"):
        open_log(settings)


def test_more_replicas_in_sync_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log\.min_insync_replicas is 2 but log\.replication_factor is 1"):
        LogSettings(min_insync_replicas=2)


@pytest.mark.parametrize(("by", "max_records"), [("us", 2), ("the broker", 2), ("the broker", 100)])
def test_a_partition_that_cannot_be_read_does_not_stop_the_others(
    apache_kafka: RealKafka, caplog: pytest.LogCaptureFixture, by: str, max_records: int
) -> None:
    settings = apache_kafka.settings(partitions=3)
    log = open_log(settings)
    keys = {partition_of(str(n), 3): str(n) for n in range(100)}
    for value in (b"one", b"two"):
        log.append([NewRecord(settings.feedback_topic, keys[n], value) for n in range(3)])
    segment = apache_kafka.folder / "log" / f"{settings.feedback_topic}-1" / f"{0:020}.log"
    whole = segment.read_bytes()
    second = 12 + int.from_bytes(whole[8:12])  # where the next batch begins, with its offset and size
    if by == "the broker":  # who walks over the sizes from there to what is asked for
        damaged, begin = whole[: second + 8] + bytes(4) + whole[second + 12 :], 2
    else:
        damaged, begin = whole.replace(b"two", b"too"), 0
    with segment.open("r+b") as file:
        file.write(damaged)  # as a bad disk would
    log.append([NewRecord(settings.feedback_topic, keys[n], b"three") for n in range(3)])
    consumer = log.consumer("readers", [settings.feedback_topic])
    while consumer.assigned() != {0, 1, 2}:
        consumer.poll(1, 0.2)
    for partition in range(3):
        consumer.seek(settings.feedback_topic, partition, begin if partition == 1 else 0)
    read: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
    while [len(read[n]) for n in (0, 2)] != [3, 3] or "left out" not in caplog.text:
        for record in consumer.poll(max_records, 0.2):
            read[record.partition].append(record.value)
    (said,) = (found.getMessage() for found in caplog.records if found.levelname == "ERROR")
    assert said.startswith(f"{settings.feedback_topic} 1 is left out")
    with segment.open("r+b") as file:
        file.write(whole)  # mended
    consumer.seek(settings.feedback_topic, 1, 0)
    again: list[bytes] = []
    while len(again) < 3:
        again += [record.value for record in consumer.poll(2, 0.2)]
    consumer.close()
    log.close()
    assert again == [b"one", b"two", b"three"]
    assert (read[0], read[2]) == ([b"one", b"two", b"three"],) * 2
    # Where one poll meets both, what comes before the broken bytes waits with them: the store's position is before it.
    assert read[1] in ([], [b"one"])


def test_keys_are_placed_as_the_java_producer_places_them(apache_home: Path, tmp_path: Path) -> None:
    program = tmp_path / "Place.java"
    program.write_text(
        """public class Place { public static void main(String[] keys) { for (String key : keys) System.out.println(
        org.apache.kafka.clients.producer.internals.BuiltInPartitioner.partitionForKey(
        key.getBytes(java.nio.charset.StandardCharsets.UTF_8), 12)); } }"""
    )
    random_ = random.Random(5)
    keys = [f"{random_.getrandbits(64):016x}" for _ in range(200)] + ["a", "ab", "abc", "größer", "\U0001f44d" * 3]
    placed = subprocess.run(
        ["java", "-cp", f"{apache_home}/libs/*", program, *keys],
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
        timeout=START_S,
    ).stdout
    assert [int(line) for line in placed.split()] == [partition_of(key, 12) for key in keys]
