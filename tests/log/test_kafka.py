"""What only the log on Kafka does: its topics, and what the brokers refuse. On real Apache Kafka."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource

from loop.log import NewRecord, RecordTooLargeError
from loop.log.open import open_log
from loop.settings import LogSettings
from tests.services_real import RealKafka

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def sockets_are_collected() -> Iterator[None]:
    """kafka-python leaves those of its connection attempts to the garbage collector: not to a later test's."""
    yield
    gc.collect()


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
    expected = {"retention.ms": "7200000", "max.message.bytes": "100000", "min.insync.replicas": "1"}
    # Only what was set for the topic itself is listed.
    assert {name: {key: c["value"] for key, c in configs.items()} for name, configs in found.items()} == dict.fromkeys(
        topics, expected
    )
    assert {len(topic["partitions"]) for topic in admin.describe_topics(topics)} == {3}
    log.append([NewRecord(topics[0], "k", bytes(99_000))])
    for size in (99_990, 100_001):  # the brokers refuse the first, with its batch's head; the client the second
        with pytest.raises(RecordTooLargeError, match=r"log\.max_message_bytes"):
            log.append([NewRecord(topics[0], "k", bytes(size))])
    log.close()


def test_a_topic_that_takes_less_than_we_send_is_warned_of(
    apache_kafka: RealKafka, caplog: pytest.LogCaptureFixture
) -> None:
    settings = apache_kafka.settings(max_message_bytes=100_000)
    open_log(settings).close()
    open_log(settings).close()
    assert not caplog.records
    open_log(settings.model_copy(update={"max_message_bytes": 200_000})).close()
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 4
    assert f"topic {settings.feedback_topic} has max.message.bytes=100000, expected at least 200000" in warned[1]
    assert "log.max_message_bytes" in warned[1]


def test_topics_of_unequal_partition_counts_are_refused(apache_kafka: RealKafka, admin: Any) -> None:
    settings = apache_kafka.settings()
    for topic, partitions in ((settings.responses_topic, 2), (settings.feedback_topic, 3)):
        admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
    with pytest.raises(ValueError, match=r"partition counts differ: .*responses has 2, .*feedback has 3"):
        open_log(settings)


def test_more_replicas_in_sync_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log\.min_insync_replicas is 2 but log\.replication_factor is 1"):
        LogSettings(min_insync_replicas=2)
