"""The event log on Apache Kafka, by kafka-python. The only module that knows a Kafka client.

Keys are placed by Kafka's default partitioner (murmur2), so producers in other languages that keep theirs place them
alike. Offsets are committed only for lag tools: where to read on is what the store says.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.errors import (
    CommitFailedError,
    CorruptRecordError,
    IllegalGenerationError,
    IllegalStateError,
    KafkaError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    NoError,
    RebalanceInProgressError,
    TopicAlreadyExistsError,
    UnknownMemberIdError,
    UnsupportedCodecError,
    for_code,
)
from kafka.structs import OffsetAndMetadata

from loop.log import LogUnavailableError, NewRecord, Record, RecordTooLargeError
from loop.settings import LogSettings

BOOTSTRAP_S = 5.0
REQUEST_S = 10.0
DELIVERY_S = 30.0
CLOSE_S = 2.0
SEGMENT_S = 86_400  # of topics that we make: what is old enough to go waits for its segment's end
SESSION_TIMEOUT_S = 10.0  # above the store's idle-in-transaction limit: a zombie has no lock left when it is replaced

log = logging.getLogger("thumbwheel.log")


class KafkaLog:
    """An EventLog on the settings' brokers. Threads may share it; its consumers belong to one thread each."""

    def __init__(self, settings: LogSettings) -> None:
        """Makes the topics (and their dead-letter topics) that are not there, and checks those that are.

        Raises LogUnavailableError, and ValueError where the topics' partition counts differ.
        """
        # What it logs as an error is retried, or raised to us, who say it once.
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
        self._settings = settings
        self._client = _client_settings(settings)
        self._lock = threading.Lock()
        self._producer: Any = None
        self._is_sound = True  # the producer: it has failed no batch
        self._asker_lock = threading.Lock()
        self._asker: Any = None
        with self._reaching():
            _prepare_topics(settings, self._client)

    def append(self, records: Sequence[NewRecord]) -> None:
        """On all in-sync replicas when it returns. Raises LogUnavailableError, and RecordTooLargeError for one that no
        try can bring in; either way some of the records may have been taken, so appending again may double them.
        """
        try:
            self.send(records).result(DELIVERY_S)
        except TimeoutError as exc:
            self.give_up()
            where = ", ".join(self._client["bootstrap_servers"])
            raise LogUnavailableError(f"Kafka at {where}: not acknowledged within {DELIVERY_S:.0f} s") from exc

    def send(self, records: Sequence[NewRecord]) -> Future[None]:
        """Begin to append; what is returned is done when `append` would return, and fails as that does. While brokers
        are away it is open, and all of it is written when they are back, unless `give_up` comes before. Raises
        LogUnavailableError where no broker answers at all, with nothing begun.
        """
        sent: Future[None] = Future()
        taken = itertools.count()  # `next` is atomic: the client calls back in two threads

        def acknowledged(_: object) -> None:
            if next(taken) == len(records):
                sent.set_result(None)

        def refused(exc: Exception) -> None:
            # After one batch that cannot be written, kafka-python 3.0.12 fails all others and all that come, with the
            # same error: only the first failure says what was wrong with its record.
            error = exc if self._is_first_failure(producer) else KafkaError("the producer failed and is made anew")
            with suppress(InvalidStateError):
                sent.set_exception(self._ours(error))

        with self._reaching():
            producer = self._open_producer()
        try:
            with self._reaching():
                for record in records:
                    headers = [(name, value.encode()) for name, value in record.headers.items()]
                    future = producer.send(record.topic, key=record.key.encode(), value=record.value, headers=headers)
                    future.add_callback(acknowledged).add_errback(refused)
            acknowledged(None)  # the last of len(records) + 1: not before all are with the producer
        except (LogUnavailableError, RecordTooLargeError) as exc:
            with suppress(InvalidStateError):
                sent.set_exception(exc)
        return sent

    def give_up(self) -> None:
        """Let go of what was sent and not acknowledged: it fails. The next `send` has a new producer."""
        with self._lock:
            producer, self._producer, self._is_sound = self._producer, None, True
        if producer is not None:
            _discard(producer)  # not under the lock, which its last callbacks take

    def consumer(self, group: str, topics: Sequence[str]) -> KafkaGroupConsumer:
        """A new member of the group. Raises LogUnavailableError."""
        with self._reaching():
            consumer = KafkaConsumer(
                **self._client,
                group_id=group,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                isolation_level="read_committed",
                # The same partition numbers of every topic go to one member: a key's events meet there.
                partition_assignment_strategy=(RangePartitionAssignor,),
                session_timeout_ms=int(SESSION_TIMEOUT_S * 1000),
                heartbeat_interval_ms=int(SESSION_TIMEOUT_S * 1000 / 5),
                max_partition_fetch_bytes=4 * 1024 * 1024,
            )
            consumer.subscribe(list(topics))
        return KafkaGroupConsumer(consumer, self._client["bootstrap_servers"])

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The next offset of each partition that has a leader to ask. Raises LogUnavailableError."""
        with self._asking() as admin:
            partitions = [partition for found in _describe(admin, [topic]) for partition in found["partitions"]]
            led = sorted(partition["partition_index"] for partition in partitions if partition["leader_id"] >= 0)
            asked = {TopicPartition(topic, number): OffsetSpec.LATEST for number in led}
            ends = admin.list_partition_offsets(asked, timeout_ms=int(REQUEST_S * 1000))
            return {place.partition: ends[place].offset for place in asked}

    def identity(self) -> str:
        """The cluster's id and those of the two topics. Raises LogUnavailableError."""
        pair = [self._settings.responses_topic, self._settings.feedback_topic]
        with self._asking() as admin:
            ids = {topic["name"]: str(topic["topic_id"]) for topic in _describe(admin, pair)}
            return " ".join([str(admin.describe_cluster()["cluster_id"]), *(ids[topic] for topic in pair)])

    def keeps_s(self) -> float | None:
        """How long the topics and their `.dlt` keep a record at most: retention deletes a segment when its last one is
        old enough. None where one keeps them for ever, or we may not see how long. Raises LogUnavailableError.
        """
        topics, names = _topics(self._settings), ("retention.ms", "segment.ms")
        with self._asking() as admin:
            configs = _configs(admin, topics, names)
        ages_ms = [[int(configs.get(topic, {}).get(name, -1)) for name in names] for topic in topics]
        return max(map(sum, ages_ms)) / 1000 if min(map(min, ages_ms)) >= 0 else None

    def close(self) -> None:
        """Close the connections; what `append` returned from is with the brokers."""
        self.give_up()
        with self._asker_lock:
            if self._asker is not None:
                self._asker.close()

    def _open_producer(self) -> Any:
        if not self._is_sound:
            self.give_up()
        with self._lock:
            if self._producer is None:
                self._producer = KafkaProducer(
                    **self._client,
                    acks="all",
                    enable_idempotence=True,
                    linger_ms=5,
                    batch_size=min(256 * 1024, self._settings.max_message_bytes),
                    max_request_size=self._settings.max_message_bytes,
                    max_block_ms=int(REQUEST_S * 1000),
                    request_timeout_ms=int(REQUEST_S * 1000),
                    # For ever: once a batch that was tried runs out of time, kafka-python 3.0.12 never sends again.
                    delivery_timeout_ms=2**31 - 1,
                )
            return self._producer

    def _is_first_failure(self, producer: Any) -> bool:
        """Whether it is the producer's first one; the next `send` has a new producer."""
        with self._lock:
            was_sound = self._is_sound and self._producer is producer
            if was_sound:
                self._is_sound = False
            return was_sound

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """An admin client, which is kept until it fails: then it is lost for a while, whoever is there again."""
        with self._asker_lock, self._reaching():
            if self._asker is None:
                self._asker = KafkaAdminClient(**self._client, request_timeout_ms=int(REQUEST_S * 1000))
            try:
                yield self._asker
            except BaseException:
                asker, self._asker = self._asker, None
                asker.close()
                raise

    def _ours(self, exc: Exception) -> Exception:
        """The client's error as ours."""
        try:
            with self._reaching():
                raise exc
        except Exception as ours:
            return ours

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        hint = ""
        if self._settings.security_protocol != "PLAINTEXT":
            # A refused password looks like a broker that is away.
            names = "log.security_protocol, sasl_mechanism, sasl_username, sasl_password and ssl_cafile"
            hint = f"; are {names} the brokers'?"
        with translated(self._client["bootstrap_servers"], hint):
            yield


class KafkaGroupConsumer:
    """One member of a consumer group, for one thread."""

    def __init__(self, consumer: Any, servers: Sequence[str]) -> None:
        self._consumer = consumer
        self._servers = servers
        self._failed: dict[TopicPartition, int] = {}  # the position at which a partition could not be read, once

    def assigned(self) -> set[int]:
        """Partition numbers that this member owns now, as of the last poll."""
        return {place.partition for place in self._consumer.assignment()}

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read on at `offset`; where retention has taken that, at the first record that is left. Nothing to do for a
        partition that is not ours any more, as the client's own thread may have learned just now.
        """
        place = TopicPartition(topic, partition)
        with suppress(ValueError, KeyError):
            self._failed.pop(place, None)
            self._consumer.seek(place, offset)
            self._consumer.resume(place)  # if it was left out

    def position(self, topic: str, partition: int) -> int:
        """Where the next poll reads on: behind offsets that no record has, or none any more. 0 for a partition that is
        not ours any more. Raises LogUnavailableError.
        """
        with translated(self._servers), suppress(IllegalStateError):
            return self._consumer.position(TopicPartition(topic, partition), timeout_ms=0) or 0
        return 0

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records of the owned partitions, in order within each; empty after `timeout_s`, and while the
        brokers are away. Raises LogUnavailableError.
        """
        with translated(self._servers):
            # kafka-python 3.0.12 forgets a rejoin that new metadata began when it outlasts one poll: as the leader has
            # assigned by that metadata, it takes itself for joined and stays without partitions or heartbeat for ever.
            if self._consumer._coordinator.rejoining:
                self._consumer._coordinator.request_rejoin()
            earlier = self._consumer._fetcher._next_in_line_exception_metadata
            try:
                polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=max_records)
            except (CorruptRecordError, UnsupportedCodecError) as exc:
                polled = {}
                self._leave_out(exc, earlier)
        return [
            Record(
                place.topic,
                place.partition,
                found.offset,
                (found.key or b"").decode(errors="replace"),
                found.value or b"",
                found.timestamp,
                {name: (value or b"").decode(errors="replace") for name, value in found.headers},
            )
            for place, records in polled.items()
            for found in records
        ]

    def _leave_out(self, exc: KafkaError, earlier: Any) -> None:
        """Stop reading the partition whose bytes are broken on the broker's disk, or packed as nobody here can unpack
        them, so that the others go on; only when it fails again at its position, for kafka-python 3.0.12 keeps the
        answer to what it asked before a `seek`. `earlier` is what it kept from its last poll to raise in this one.
        """
        fetcher = self._consumer._fetcher
        fetched = fetcher._next_partition_records
        if earlier is not None and earlier.exception is exc:
            place = earlier.partition
        elif fetched:
            place = fetched.topic_partition
        else:  # the broker itself cannot read it: the client has just made it the last to be asked again
            place = next(reversed(self._consumer._subscription.assignment))
        if fetched and fetched.topic_partition == place:
            fetcher._next_partition_records = None  # else it would spin on it for ever in its next poll
        position = self.position(*place)
        if self._failed.get(place) != position:
            self._failed[place] = position
            return
        self._consumer.pause(place)
        message = "%s %d is left out until it is assigned anew: %s"
        log.error(message, place.topic, place.partition, exc, extra={"action": "partition_unreadable"})

    def commit(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Tell the brokers the next offsets, for lag tools. Raises LogUnavailableError."""
        offsets = {TopicPartition(*place): OffsetAndMetadata(next_, "", -1) for place, next_ in positions.items()}
        try:
            with translated(self._servers):
                self._consumer.commit(offsets, timeout_ms=int(REQUEST_S * 1000))
        except LogUnavailableError as exc:
            # The partitions moved on meanwhile, and their new owner commits: nothing is lost but a figure.
            moved = (CommitFailedError, IllegalGenerationError, RebalanceInProgressError, UnknownMemberIdError)
            if not isinstance(exc.__cause__, moved):
                raise

    def close(self) -> None:
        """Leave the group. Raises LogUnavailableError."""
        with translated(self._servers):
            self._consumer.close(autocommit=False)


@contextmanager
def translated(servers: Sequence[str], hint: str = "") -> Iterator[None]:
    """The client's errors as ours."""
    try:
        yield
    except MessageSizeTooLargeError as exc:
        raise RecordTooLargeError(f"Kafka: {exc}; expected at most log.max_message_bytes and the topic's") from exc
    except KafkaError as exc:
        raise LogUnavailableError(f"Kafka at {', '.join(servers)}: {type(exc).__name__}: {exc}{hint}") from exc


def _client_settings(settings: LogSettings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "client_id": "thumbwheel",
        "security_protocol": settings.security_protocol,
        "bootstrap_timeout_ms": int(BOOTSTRAP_S * 1000),
        "reconnect_backoff_max_ms": 2_000,
    }
    if settings.sasl_mechanism is not None:
        found |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.sasl_password.get_secret_value() if settings.sasl_password else None,
        }
    files = {
        "ssl_cafile": settings.ssl_cafile,
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
    }
    return found | {name: str(path) for name, path in files.items() if path is not None}


def _discard(producer: Any) -> None:
    """Close it at once; what it still holds fails."""
    producer._sender.force_close()  # else `close` waits for what cannot be delivered, and raises in the end
    with suppress(KafkaError):
        producer.close(timeout=CLOSE_S)


@contextmanager
def _admin(client: dict[str, Any]) -> Iterator[Any]:
    admin = KafkaAdminClient(**client, request_timeout_ms=int(REQUEST_S * 1000))
    try:
        yield admin
    finally:
        admin.close()


def _describe(admin: Any, topics: Sequence[str]) -> list[dict[str, Any]]:
    """Raises KafkaError for a topic that is not there or may not be seen: the client gives it a null id."""
    found: list[dict[str, Any]] = admin.describe_topics(list(topics))
    for topic in found:
        error = for_code(topic["error_code"])
        if error not in (NoError, LeaderNotAvailableError):
            raise error(f"topic {topic['name']}")
    return found


def _topics(settings: LogSettings) -> tuple[str, ...]:
    pair = (settings.responses_topic, settings.feedback_topic)
    return (*pair, *(f"{topic}.dlt" for topic in pair))


def _prepare_topics(settings: LogSettings, client: dict[str, Any]) -> None:
    pair = (settings.responses_topic, settings.feedback_topic)
    with _admin(client) as admin:
        there = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics() if topic["partitions"]}
        # The partner of a topic that is there must be like it.
        partitions = next((there[topic] for topic in pair if topic in there), settings.partitions)
        at_least = {
            "retention.ms": settings.retention_s * 1000,
            "max.message.bytes": settings.max_message_bytes,
            "min.insync.replicas": settings.min_insync_replicas,
        }
        configs = at_least | {"segment.ms": min(SEGMENT_S, settings.retention_s) * 1000}
        topics = _topics(settings)
        for topic in topics:
            if topic not in there:
                options = {
                    "num_partitions": partitions,
                    "replication_factor": settings.replication_factor,
                    "configs": {name: str(value) for name, value in configs.items()},
                }
                try:
                    admin.create_topics({topic: options}, wait_for_metadata=True)
                except TopicAlreadyExistsError:
                    continue  # another process of ours was quicker
        there = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(list(pair))}
        _check_configs(admin, topics, at_least)
    if len({there[topic] for topic in pair}) != 1:
        counts = ", ".join(f"{topic} has {there[topic]}" for topic in pair)
        raise ValueError(
            f"partition counts differ: {counts}; expected equal ones, for a response and its votes must meet"
        )


def _check_configs(admin: Any, topics: Sequence[str], at_least: Mapping[str, int]) -> None:
    """Warn of topics that take less than we may send, or promise less than we count on: somebody else's to change."""
    for topic, configs in _configs(admin, topics, at_least).items():
        for name, ours in at_least.items():
            found = int(configs.get(name, ours))
            if found < ours and not (name == "retention.ms" and found == -1):  # for ever
                log.warning(
                    "topic %s has %s=%d, expected at least %d: alter it, or set log.%s",
                    *(topic, name, found, ours, name.replace(".ms", "_s").replace(".", "_")),
                    extra={"action": "topic_config"},
                )


def _configs(admin: Any, topics: Iterable[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """These settings of the topics; brokers that do not let us see them answer with none."""
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic, list(names)) for topic in topics]
    found = admin.describe_configs(asked, config_filter="all").get("topic", {})
    return {topic: {name: one["value"] for name, one in configs.items()} for topic, configs in found.items()}
