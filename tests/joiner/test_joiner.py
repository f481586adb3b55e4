"""The consumer loop as a real process: killed, stopped, fed with rubbish, with its log and store away."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from pydantic import SecretStr
from sqlalchemy import Engine, delete, func, select, update

from loop.log import EventLog, NewRecord, Record
from loop.log.groups import GroupConsumer
from loop.log.kafka import SESSION_TIMEOUT_S
from loop.log.open import open_log
from loop.settings import JoinerSettings, LogSettings, Settings, StoreSettings
from loop.store import open_store, write
from loop.store.engine import IDLE_IN_TRANSACTION_S
from loop.store.joining import Reader, start_positions
from loop.store.schema import examples, positions, response_index, responses, votes
from services.joiner import Joiner
from tests.conftest import wait_until
from tests.join.joined import examples_in, is_joined, told
from tests.join.oracle import examples_of
from tests.join.traffic import RESPONSES, START_MS, colliding_events, feedback, response, response_id
from tests.ports import free_port
from tests.services_real import RealKafka, RealPostgres


class Process:
    """`thumbwheel joiner`, or another module with its arguments, on the settings' log and store."""

    def __init__(self, settings: Settings, folder: Path, *command: str) -> None:
        self.command = [sys.executable, "-m", *(command or ("services.cli", "joiner"))]
        self.metrics_port = free_port()
        store, log = settings.store, settings.log
        values: dict[str, Any] = {
            "STORE__URL": store.url.get_secret_value(),
            "LOG__KIND": log.kind,
            "LOG__PATH": log.path,
            "LOG__BOOTSTRAP_SERVERS": f'["{log.bootstrap_servers[0]}"]',
            "LOG__RESPONSES_TOPIC": log.responses_topic,
            "LOG__FEEDBACK_TOPIC": log.feedback_topic,
            "JOINER__BATCH_EVENTS": 100,
            "JOINER__POLL_TIMEOUT_S": 0.1,
            "JOINER__METRICS_PORT": self.metrics_port,
        }
        self.environment = os.environ | {f"THUMBWHEEL_{name}": str(value) for name, value in values.items()}
        self.log = folder / f"joiner-{self.metrics_port}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)

    def signal(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(180)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def actions(self) -> str:
        return self.log.read_text()

    def metric(self, name: str) -> float:
        """The sum over all that begin so."""
        return self._sums(name)[name]

    def metrics(self, *names: str) -> dict[str, float]:
        """Several of the joiner's own, as they were at one moment."""
        sums = self._sums(*(f"thumbwheel_joiner_{name}" for name in names))
        return {name: sums[f"thumbwheel_joiner_{name}"] for name in names}

    def _sums(self, *names: str) -> dict[str, float]:
        """Each name's series added up; NaN where there is none."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = {name: [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)] for name in names}
        return {name: sum(values) if values else math.nan for name, values in found.items()}


Start = Callable[..., Process]
HLC = (START_MS << 16) + 1


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts joiners; those that a failed test left are killed."""
    started: list[Process] = []

    def start_one(settings: Settings, *command: str) -> Process:
        started.append(Process(settings, tmp_path, *command))
        return started[-1]

    yield start_one
    for joiner in started:
        if joiner.process.poll() is None:
            joiner.signal(signal.SIGKILL)


def embedded(folder: Path) -> Settings:
    return Settings(
        log=LogSettings(path=folder / "log.db"), store=StoreSettings(url=SecretStr(f"sqlite:///{folder}/store.db"))
    )


def test_killed_at_random_points_under_load_it_ends_equal_to_the_oracle(start: Start, tmp_path: Path) -> None:
    settings = embedded(tmp_path)
    log, store = open_log(settings.log), open_store(settings.store)
    random_ = random.Random(4)
    events = colliding_events(4, 4_000)
    joiner = start(settings)
    kills = 0
    for first in range(0, len(events), 500):
        log.append(events[first : first + 500])
        before = _offset(store)
        if first % 1_000 == 0:
            wait_until(partial(_has_moved, store, before), "joining")
            log.append(random_.sample(events, 100))  # and some again
            joiner.signal(signal.SIGKILL)
            kills += 1
            joiner.start()
    wait_until(lambda: is_joined(store, log, settings), "joined")
    assert kills == 4
    assert examples_in(store) == examples_of(events, RESPONSES)
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def _has_moved(store: Engine, before: int) -> bool:
    return _offset(store) > before


def _offset(store: Engine) -> int:
    with store.connect() as connection:
        return int(
            connection.exec_driver_sql(
                "SELECT coalesce(sum(responses_next + feedback_next), 0) FROM positions"
            ).scalar_one()
        )


def test_rubbish_goes_to_dead_letters_and_the_stream_goes_on(start: Start, tmp_path: Path) -> None:
    settings = embedded(tmp_path)
    log, store = open_log(settings.log), open_store(settings.store)
    id = response_id("a" * 16, 1)
    deep = b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    rubbish = [NewRecord(RESPONSES, "a" * 16, text) for text in (b"\xff{", deep)]
    rubbish.append(NewRecord(settings.log.feedback_topic, "", b""))
    log.append([*rubbish, response(id), feedback("f", "up", START_MS << 16, response_id=id)])
    joiner = start(settings)
    wait_until(lambda: is_joined(store, log, settings), "joined")
    dead = [f"{topic}.dlt" for topic in (RESPONSES, settings.log.feedback_topic)]
    wait_until(lambda: [sum(log.end_offsets(topic).values()) for topic in dead] == [2, 1], "sent")
    assert list(examples_in(store)) == [(id, 0)]
    expected = {"dead_letters_total{": 3, "events_total{": 5, "pending_votes": 0}
    wait_until(lambda: joiner.metrics(*expected) == expected, f"shown: {expected}")  # a batch is counted when it is in
    assert joiner.signal(signal.SIGTERM) == 0
    assert all(f'"action": "{action}"' in joiner.actions() for action in ("joiner_dead_letter", "joiner_stopped"))
    log.close()
    store.dispose()


def test_what_people_watch_is_on_metrics(start: Start, tmp_path: Path) -> None:
    settings = embedded(tmp_path)
    log, store = open_log(settings.log), open_store(settings.store)
    id, unseen, unstored = (response_id(letter * 16, 1) for letter in "abc")
    votes = [feedback("f", "up", START_MS << 16, response_id=id), feedback("g", "retract", HLC, response_id=id)]
    log.append([response(id), *votes, *votes, feedback("h", "up", HLC, response_id=unseen)])
    log.append([response(unstored, n=0, stored=False), feedback("i", "up", HLC, response_id=unstored)])
    joiner = start(settings)
    wait_until(lambda: is_joined(store, log, settings), "joined")
    expected = {
        'votes_total{value="retract"}': 1,
        "unstored_votes_total": 1,
        'duplicates_total{topic="thumbwheel.feedback"}': 2,
        "lag_records{": 0,
        "lag_seconds{": 0,
        "rebalances_total": 1,
        "up{": 2,  # the log and the store
        "pending_votes": 1,
    }
    # A batch is counted after its transaction, and what waits is asked of the store at times of its own.
    wait_until(lambda: joiner.metrics(*expected) == expected, f"shown: {expected}")

    def is_age_shown() -> bool:
        age_s = time.time() - START_MS / 1000
        return joiner.metric("thumbwheel_joiner_pending_oldest_seconds") == pytest.approx(age_s, abs=60)

    def is_every_batch_timed() -> bool:
        counts = ('batches_total{result="committed"}', "batch_seconds_count", "transaction_seconds_count")
        return len({*joiner.metrics(*counts).values()}) == 1

    wait_until(is_age_shown, "shown how long the oldest has waited")
    wait_until(is_every_batch_timed, "timed as often as counted")
    log.append([response(id, at_ms=START_MS + 1)])
    wait_until(lambda: joiner.metric("thumbwheel_joiner_stale_versions_total") == 1, "counted as stale")
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def test_how_far_it_is_behind_is_shown_while_the_store_holds_it_up(start: Start, tmp_path: Path) -> None:
    settings = embedded(tmp_path)
    log, store = open_log(settings.log), open_store(settings.store)
    ids = [response_id(f"{n:016x}", 1) for n in range(40)]
    log.append([response(id) for id in ids])
    joiner = start(settings)
    wait_until(lambda: is_joined(store, log, settings), "joined")
    shown = "lag_records{", "lag_seconds{"
    wait_until(lambda: joiner.metrics(*shown) == dict.fromkeys(shown, 0), "shown as joined")
    with write(store):  # the only writer meanwhile
        log.append([feedback(f"f{n}", "up", HLC, response_id=id) for n, id in enumerate(ids)])
        wait_until(lambda: joiner.metrics(*shown)["lag_records{"] == 40, "shown as behind")
        wait_until(lambda: joiner.metrics(*shown)["lag_seconds{"] > 0, "shown for how long")
    wait_until(lambda: joiner.metrics(*shown) == dict.fromkeys(shown, 0), "shown as joined again")
    assert len(examples_in(store)) == 40
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def test_offsets_that_no_record_has_are_no_lag(start: Start, apache_kafka: RealKafka, tmp_path: Path) -> None:
    settings = embedded(tmp_path).model_copy(update={"log": apache_kafka.settings(partitions=2)})
    log, store = open_log(settings.log), open_store(settings.store)
    topic = settings.log.responses_topic
    ids = [response_id(f"{n:016x}", 1) for n in range(40)]
    log.append([response(id)._replace(topic=topic) for id in ids[:20]])
    admin = KafkaAdminClient(bootstrap_servers=[apache_kafka.server])
    ends = {TopicPartition(topic, n): end for n, end in log.end_offsets(topic).items()}
    admin.delete_records(ends)  # as retention does
    admin.close()
    producer = KafkaProducer(bootstrap_servers=[apache_kafka.server], transactional_id=topic)
    producer.init_transactions()
    producer.begin_transaction()
    for id in ids[20:]:
        record = response(id)
        producer.send(topic, key=record.key.encode(), value=record.value)
    producer.commit_transaction()  # whose marker takes an offset
    producer.close()
    joiner = start(settings)

    def joined() -> int:
        with store.connect() as connection:
            return connection.execute(select(func.count()).select_from(response_index)).scalar_one()

    wait_until(lambda: joined() == 20, "joined")
    shown = "lag_records{", "lag_seconds{"
    wait_until(lambda: joiner.metrics(*shown) == dict.fromkeys(shown, 0), "shown as joined")
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


@contextmanager
def joining(settings: Settings, store: Engine, log: EventLog) -> Iterator[Future[None]]:
    """A joiner in a thread, stopped with the block; what it raised is raised then."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        joined = beside.submit(Joiner(settings, store, log).run, stop)
        try:
            yield joined
        finally:
            stop.set()
        joined.result()


def memory_in_use() -> int:
    time.sleep(0.05)  # what was joined is let go of in the next round
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_its_memory_does_not_grow_with_what_it_joins(tmp_path: Path) -> None:
    settings = embedded(tmp_path).model_copy(update={"joiner": JoinerSettings(batch_events=100, poll_timeout_s=0.01)})
    log, store = open_log(settings.log), open_store(settings.store)
    events = colliding_events(3, 4_000)
    grown_by = []
    tracemalloc.start()
    try:
        with joining(settings, store, log) as joined:
            for first in range(0, 4_000, 1_000):
                log.append(events[first : first + 1_000])
                wait_until(lambda: is_joined(store, log, settings) or joined.done(), "joined")
                grown_by.append(min(memory_in_use() for _ in range(10)))
    finally:
        tracemalloc.stop()
    size = sum(len(event.value) for event in events[2_000:])
    # The first ones warm caches up; of the rest not even a twentieth stays.
    assert grown_by[3] - grown_by[1] < size / 20, grown_by
    log.close()
    store.dispose()


def test_two_joiners_share_the_work(start: Start, tmp_path: Path) -> None:
    settings = embedded(tmp_path)
    log, store = open_log(settings.log), open_store(settings.store)
    joiners = [start(settings) for _ in range(2)]
    wait_until(lambda: all('"joiner_assigned"' in joiner.actions() for joiner in joiners), "both assigned")
    events = colliding_events(9, 2_000)
    log.append(events)
    wait_until(lambda: is_joined(store, log, settings), "joined")
    assert examples_in(store) == examples_of(events, RESPONSES)
    wait_until(lambda: all(joiner.metric("thumbwheel_joiner_events_total{") > 0 for joiner in joiners), "both counted")
    assert [joiner.signal(signal.SIGTERM) for joiner in joiners] == [0, 0]
    log.close()
    store.dispose()


def test_on_kafka_and_postgres_with_both_restarted_meanwhile(
    start: Start, apache_kafka: RealKafka, postgres: RealPostgres
) -> None:
    kafka = apache_kafka
    settings = Settings(log=kafka.settings(), store=postgres.new_store())
    log, store = open_log(settings.log), open_store(settings.store)
    events = on_topics_of(settings, colliding_events(11, 1_500))
    joiner = start(settings)
    log.append(events[:500])
    wait_until(lambda: is_joined(store, log, settings), "joined the first part")
    postgres.stop("immediate")
    log.append(events[500:1_000])
    wait_until(lambda: '"joiner_waits"' in joiner.actions(), "waiting for the store")
    postgres.start()
    wait_until(lambda: is_joined(store, log, settings), "joined the second part")
    kafka.stop(kill=True)
    kafka.start()
    log.append([*events[1_000:], *events[:200]])
    wait_until(lambda: is_joined(store, log, settings), "joined the last part")
    assert examples_in(store) == examples_of(events, settings.log.responses_topic)
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def test_what_is_away_at_the_start_is_waited_for(start: Start, postgres: RealPostgres, tmp_path: Path) -> None:
    settings = Settings(log=embedded(tmp_path).log, store=postgres.new_store())
    postgres.stop()
    joiner = start(settings)
    wait_until(lambda: '"joiner_waits"' in joiner.actions(), "waiting")
    postgres.start()
    wait_until(lambda: '"joiner_started"' in joiner.actions(), "started")
    assert joiner.signal(signal.SIGTERM) == 0


def test_brokers_that_are_away_are_waited_for(start: Start, apache_kafka: RealKafka, tmp_path: Path) -> None:
    settings = Settings(log=apache_kafka.settings(), store=embedded(tmp_path).store)
    events = on_topics_of(settings, colliding_events(12, 400))
    log_up = 'thumbwheel_joiner_up{part="log"}'
    apache_kafka.stop()
    joiner = start(settings)
    wait_until(lambda: f"waiting for the log: Kafka at {apache_kafka.server}" in joiner.actions(), "waiting")
    apache_kafka.start()
    log, store = open_log(settings.log), open_store(settings.store)
    log.append(events[:200])
    wait_until(lambda: is_joined(store, log, settings), "joined the first part")
    wait_until(lambda: joiner.metric(log_up) == 1, "shown as up")
    apache_kafka.stop(kill=True)
    wait_until(lambda: joiner.metric(log_up) == 0, "shown as down")
    apache_kafka.start()
    log.append(events[200:])
    wait_until(lambda: joiner.metric(log_up) == 1, "shown as up again")
    wait_until(lambda: is_joined(store, log, settings), "joined the rest")
    assert examples_in(store) == examples_of(events, settings.log.responses_topic)
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


@pytest.mark.parametrize("is_asleep", [False, True])  # then it never sees that they were not there
def test_topics_made_anew_are_joined_from_their_beginning(
    start: Start, apache_kafka: RealKafka, tmp_path: Path, is_asleep: bool
) -> None:
    settings = Settings(log=apache_kafka.settings(), store=embedded(tmp_path).store)
    log, store = open_log(settings.log), open_store(settings.store)
    events = on_topics_of(settings, colliding_events(14, 400))
    joiner = start(settings)
    log.append(events[:300])
    wait_until(lambda: is_joined(store, log, settings), "joined the first ones")
    old = log.identity()
    if is_asleep:
        joiner.process.send_signal(signal.SIGSTOP)
        wait_until(joiner.is_stopped, "stopped")
    admin = KafkaAdminClient(bootstrap_servers=[apache_kafka.server])
    topics = [settings.log.responses_topic, settings.log.feedback_topic]
    admin.delete_topics(topics)
    wait_until(lambda: not {*topics} & {topic["name"] for topic in admin.describe_topics()}, "deleted")
    admin.close()
    log.close()
    log = told(lambda: open_log(settings.log))  # makes them, with other ids and offsets from 0
    assert log.identity().split()[0] == old.split()[0]
    assert not set(log.identity().split()[1:]) & set(old.split()[1:])
    log.append(events[300:])
    joiner.process.send_signal(signal.SIGCONT)
    wait_until(lambda: is_joined(store, log, settings), "joined what is in the new ones")
    assert examples_in(store) == examples_of(events, settings.log.responses_topic)
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def test_a_log_that_lost_what_was_joined_is_joined_from_its_beginning(
    start: Start, apache_kafka: RealKafka, tmp_path: Path
) -> None:
    log_settings = apache_kafka.settings(partitions=2)
    settings = embedded(tmp_path).model_copy(update={"log": log_settings})
    log, store = open_log(settings.log), open_store(settings.store)
    events = on_topics_of(settings, colliding_events(29, 300))
    joiner = start(settings)
    log.append(events[:100])
    wait_until(lambda: is_joined(store, log, settings), "joined")
    assert joiner.signal(signal.SIGTERM) == 0
    # As if there had been more, joined and then lost by the brokers with their machine.
    with write(store) as connection:
        moved = {positions.c.responses_next: positions.c.responses_next + 1_000}
        connection.execute(update(positions).where(positions.c.partition == 0).values(moved))
    joiner.start()
    log.append(events[100:])
    wait_until(lambda: is_joined(store, log, settings), "joined")
    assert examples_in(store) == examples_of(events, settings.log.responses_topic)
    assert '"action": "joiner_back"' in joiner.actions()
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def test_a_log_that_lost_what_was_joined_and_has_grown_past_it_is_joined_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = embedded(tmp_path)
    settings = settings.model_copy(update={"log": settings.log.model_copy(update={"partitions": 1})})
    log, store = open_log(settings.log), open_store(settings.store)
    events, topics = colliding_events(31, 300), (settings.log.responses_topic, settings.log.feedback_topic)
    log.append(events[:100])
    joined_to = [log.end_offsets(topic)[0] for topic in topics]
    reader = Reader(settings.joiner.group, log.identity())
    start_positions(store, reader, [0])
    ahead = [end + 20 for end in joined_to]
    with write(store) as connection:  # as if 20 more of each had been joined, and then lost
        connection.execute(update(positions).values(responses_next=ahead[0], feedback_next=ahead[1]))
    log.append(events[100:])
    assert all(log.end_offsets(topic)[0] > next_ for topic, next_ in zip(topics, ahead, strict=True))
    poll, polls = GroupConsumer.poll, []

    def cut(consumer: GroupConsumer, max_records: int, timeout_s: float) -> list[Record]:
        polls.append(max_records)
        if len(polls) == 2:  # as Kafka's client does when it learns of it, by the leader's epoch
            for topic in topics:
                consumer.seek(topic, 0, 0)
        return poll(consumer, max_records, timeout_s)

    monkeypatch.setattr(GroupConsumer, "poll", cut)
    with joining(settings, store, log) as joined:
        wait_until(lambda: joined.done() or examples_in(store) == examples_of(events, RESPONSES), "joined", 60.0)
    assert is_joined(store, log, settings)
    log.close()
    store.dispose()


def test_a_store_that_lost_its_last_moments_is_joined_again_though_no_event_follows(
    start: Start, tmp_path: Path
) -> None:
    settings = embedded(tmp_path)
    log, store = open_log(settings.log), open_store(settings.store)
    events = colliding_events(32, 300)
    joiner = start(settings)
    log.append(events)
    wait_until(lambda: is_joined(store, log, settings), "joined")
    with write(store) as connection:  # as a crash of Postgres does to what was committed just before
        connection.execute(update(positions).values(responses_next=0, feedback_next=0))
        for table in (examples, response_index, responses, votes):
            connection.execute(delete(table))
    wait_until(lambda: is_joined(store, log, settings), "joined again")
    assert examples_in(store) == examples_of(events, RESPONSES)
    assert joiner.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def test_a_second_group_on_another_number_of_partitions_comes_to_the_same(
    start: Start, apache_kafka: RealKafka, postgres: RealPostgres, tmp_path: Path
) -> None:
    events = colliding_events(15, 1_200)
    stores = []
    for partitions, store_settings in ((3, embedded(tmp_path).store), (7, postgres.new_store())):
        log_settings = apache_kafka.settings(partitions=partitions)
        settings = Settings(log=log_settings, store=store_settings)
        log, store = open_log(settings.log), open_store(settings.store)
        joiner = start(settings)
        log.append(on_topics_of(settings, events))
        wait_until(partial(is_joined, store, log, settings), "joined")
        assert joiner.signal(signal.SIGTERM) == 0
        assert set(log.end_offsets(log_settings.feedback_topic)) == set(range(partitions))
        log.close()
        stores.append(examples_in(store))
        store.dispose()
        random.Random(15).shuffle(events)
    assert stores[0] == stores[1] == examples_of(events, RESPONSES)


@pytest.mark.parametrize(
    ("point", "result"),
    [("copy", "moved"), ("positions", "unavailable"), ("votes", "unavailable"), ("answer", "unavailable")],
)
def test_a_zombie_blocks_nobody_and_changes_nothing(
    start: Start, apache_kafka: RealKafka, postgres: RealPostgres, point: str, result: str
) -> None:
    settings = Settings(log=apache_kafka.settings(), store=postgres.new_store())
    log, store = open_log(settings.log), open_store(settings.store)
    events = on_topics_of(settings, colliding_events(13, 600))
    log.append(events[:300])
    zombie = start(settings, "tests.joiner.stopping", point)
    wait_until(zombie.is_stopped, "stopped")
    if point == "copy":
        assert locked_tables(store) == []
    else:
        assert "positions" in locked_tables(store)
    if point == "positions":
        wait_until(lambda: locked_tables(store) == [], "free of locks")
    assert IDLE_IN_TRANSACTION_S < SESSION_TIMEOUT_S  # so that nobody waits for them
    heir = start(settings)
    wait_until(lambda: is_joined(store, log, settings), "joined by its heir")
    assert zombie.is_stopped()
    joined = examples_in(store)
    assert joined == examples_of(events[:300], settings.log.responses_topic)
    zombie.process.send_signal(signal.SIGCONT)
    wait_until(lambda: zombie.metric(f'thumbwheel_joiner_batches_total{{result="{result}"}}') >= 1, "refused")
    assert examples_in(store) == joined
    assert heir.signal(signal.SIGTERM) == 0
    log.append(events[300:])
    wait_until(lambda: is_joined(store, log, settings), "joined by who was a zombie")
    assert examples_in(store) == examples_of(events, settings.log.responses_topic)
    assert zombie.signal(signal.SIGTERM) == 0
    log.close()
    store.dispose()


def locked_tables(store: Engine) -> list[str]:
    """The store's tables that another client has any lock on; what Postgres does in the background counts for none."""
    query = """
        SELECT DISTINCT relname FROM pg_locks JOIN pg_class ON pg_class.oid = relation JOIN pg_stat_activity USING (pid)
        WHERE granted AND backend_type = 'client backend' AND pid <> pg_backend_pid()
          AND datname = current_database() AND relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace
    """
    with store.connect() as connection:
        return list(connection.exec_driver_sql(query).scalars())


def on_topics_of(settings: Settings, events: list[NewRecord]) -> list[NewRecord]:
    """The events on the settings' topics."""
    topics = {RESPONSES: settings.log.responses_topic}
    return [event._replace(topic=topics.get(event.topic, settings.log.feedback_topic)) for event in events]
