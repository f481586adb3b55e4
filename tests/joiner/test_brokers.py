"""Two brokers, and one of them away: what the other one leads goes on, and nothing is lost. On real Apache Kafka."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import starmap
from pathlib import Path

import pytest
from pydantic import SecretStr

from loop.log import EventLog, LogUnavailableError, NewRecord, Record
from loop.log.embedded import EmbeddedLog
from loop.log.open import open_log
from loop.log.partition import partition_of
from loop.settings import LogSettings, Settings, StoreSettings
from loop.store import open_store
from loop.store.joining import Reader, read_positions
from services.gateway.forward import forwarding
from tests.conftest import wait_until
from tests.join.joined import examples_in, is_joined, told
from tests.join.oracle import examples_of
from tests.join.traffic import colliding_events
from tests.joiner.test_joiner import Start, on_topics_of, start  # noqa: F401
from tests.services_real import RealKafka


@pytest.fixture(scope="module")
def brokers(apache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RealKafka, RealKafka]]:
    """The controller, which also keeps the groups' offsets, and one that may go away."""
    with ExitStack() as stack:

        def started(name: str, first: RealKafka | None = None) -> RealKafka:
            broker = RealKafka(apache_home, tmp_path_factory.mktemp(name), first=first)
            stack.callback(broker.stop, kill=True)
            broker.start()
            return broker

        first = started("first")
        log = open_log(first.settings())
        consumer = log.consumer("makes the offsets' topic", ["t"])
        made = first.folder / "log" / "__consumer_offsets-0"
        wait_until(lambda: consumer.poll(1, 0.1) == [] and made.exists(), "made")
        consumer.close()
        log.close()
        yield first, started("second", first)


def read_all(log: EventLog, settings: LogSettings) -> list[Record]:
    """Everything in both topics."""
    topics = (settings.responses_topic, settings.feedback_topic)
    number = told(lambda: sum(sum(log.end_offsets(topic).values()) for topic in topics))
    consumer = log.consumer("reads all", topics)
    read: list[Record] = []
    wait_until(lambda: bool(read.extend(consumer.poll(2_000, 0.5))) or len(read) >= number, "read")
    consumer.close()
    return read


def by_key(records: Sequence[NewRecord | Record]) -> dict[tuple[str, str], list[bytes]]:
    """What was written under each key in its order, repetitions apart."""
    found: dict[tuple[str, str], dict[bytes, None]] = {}
    for record in records:
        found.setdefault((record.topic, record.key), {})[record.value] = None
    return {key: list(values) for key, values in found.items()}


def test_a_broker_away_holds_up_only_what_it_leads(
    brokers: tuple[RealKafka, RealKafka],
    start: Start,  # noqa: F811
    tmp_path: Path,
) -> None:
    first, second = brokers
    log_settings = first.settings(bootstrap_servers=[first.server, second.server])
    settings = Settings(log=log_settings, store=StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/store.db")))
    store, log = open_store(settings.store), open_log(settings.log)
    spool = EmbeddedLog(tmp_path / "spool.db", settings.log.partitions)
    good = on_topics_of(settings, colliding_events(21, 900))
    topics = (settings.log.responses_topic, settings.log.feedback_topic)
    # With each key, so that every partition of every `.dlt` gets some, those without a leader among them.
    rubbish = [NewRecord(event.topic, event.key, b"{%d" % n) for n, event in enumerate(good[::9])]
    events = [event for n, one in enumerate(good) for event in (*rubbish[n // 9 : n // 9 + (n % 9 == 0)], one)]

    def left() -> set[tuple[str, int]]:
        """Partitions with records that are still in the spool."""
        places = ((topic, n) for topic in topics for n in range(settings.log.partitions))
        return {place for place in places if spool.read(*place, 0, 1)}

    def away() -> set[tuple[str, int]]:
        """Those that have no leader, as far as brokers know by now."""
        led = told(lambda: {(topic, n) for topic in topics for n in log.end_offsets(topic)})
        return {(e.topic, partition_of(e.key, settings.log.partitions)) for e in events} - led

    joiner = start(settings)

    def unseen() -> float:
        return joiner.metric("thumbwheel_joiner_unseen_partitions{")

    with forwarding(spool, settings.log):
        spool.append(events[:300])
        wait_until(lambda: not left() and is_joined(store, log, settings), "joined the first part")
        second.stop(kill=True)
        spool.append(events[300:600])
        wait_until(lambda: unseen() > 0, "seen that some have no leader")
        spool.append(events[600:])
        wait_until(lambda: left() == away() != set(), "sent all but what has no broker")
        assert len(away()) < 8
        ends = told(lambda: [log.end_offsets(topic) for topic in topics])
        reader = Reader(settings.joiner.group, told(log.identity))

        def is_behind(topic: int, partition: int, end: int) -> bool:
            return read_positions(store, reader)[partition][topic] < end

        behind = [(n, partition, end) for n in (0, 1) for partition, end in ends[n].items()]
        wait_until(lambda: not any(starmap(is_behind, behind)), "joined that")
        wait_until(lambda: unseen() == len(away()), "seen which have none")
        assert joiner.metric("thumbwheel_joiner_unsent_dead_letters") > 0
        second.start()
        wait_until(lambda: not left() and is_joined(store, log, settings), "joined the rest")
        wait_until(lambda: unseen() == 0, "seen all again")
        wait_until(lambda: joiner.metric("thumbwheel_joiner_unsent_dead_letters") == 0, "sent all dead letters")
    assert joiner.signal(signal.SIGTERM) == 0
    assert examples_in(store) == examples_of(good, settings.log.responses_topic)
    assert by_key(read_all(log, settings.log)) == by_key(events)
    dead = settings.log.model_copy(update={"responses_topic": f"{topics[0]}.dlt", "feedback_topic": f"{topics[1]}.dlt"})
    assert {record.value for record in read_all(log, dead)} == {record.value for record in rubbish}
    spool.close()
    log.close()
    store.dispose()


def test_without_enough_replicas_nothing_is_taken_and_nothing_is_lost(
    brokers: tuple[RealKafka, RealKafka], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = brokers
    settings = first.settings(
        bootstrap_servers=[first.server, second.server], replication_factor=2, min_insync_replicas=2
    )
    log = open_log(settings)
    topic = settings.responses_topic
    records = [NewRecord(topic, f"{n % 20:016x}", str(n).encode()) for n in range(300)]
    log.append(records[:100])
    second.stop(kill=True)
    monkeypatch.setattr("loop.log.kafka.DELIVERY_S", 3.0)
    with pytest.raises(LogUnavailableError, match="not acknowledged within 3 s"):
        log.append(records[100:200])
    second.start()
    monkeypatch.undo()
    log.append(records[100:200])
    log.append(records[200:])
    assert by_key(read_all(log, settings)) == by_key(records)
    log.close()
