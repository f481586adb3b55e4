"""Joiner speed: `python -m tests.bench.join [--on embedded kafka]`. One JSON line for each run, then medians.

`embedded`: the embedded log and SQLite. `kafka`: a real Apache Kafka and a real Postgres on the same machine. One
joiner and two, each a process. Beside each run a bare loop that only reads and decodes the same log: the limit. Two
cores are not enough for two joiners and their Postgres: `--share 0.35` holds each joiner to so much of one (as root).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer
from pydantic import SecretStr
from rich.progress import track
from sqlalchemy import create_engine, func, make_url, select, text

from loop.events import (
    Choice,
    FeedbackGiven,
    HybridClock,
    ResponseLogged,
    decode_feedback,
    decode_response,
    encode,
    random_key,
    uuid7,
)
from loop.log import NewRecord
from loop.log.open import open_log
from loop.settings import JoinerSettings, LogSettings, Settings, StoreSettings
from loop.store import open_store
from loop.store.schema import positions
from tests.bench.share import held
from tests.ports import free_port
from tests.services_real import RealKafka, kafka_home, postgres_binaries, running_postgres

NOW_MS = 1_760_000_000_000
FEEDBACK_SHARE = 0.03
LONG_SHARE = 0.02
"""Of responses with 20 KB instead of 2 KB, on Kafka and Postgres."""
WARM_UP = 0.2
"""Share of the events after which a joiner's clock begins: members have joined and partitions are theirs by then."""
DEFAULTS = {"embedded": (150_000, 5), "kafka": (500_000, 5)}
JOINERS = (1, 2)
NewSettings = Callable[[int], Settings]


def main() -> None:
    """Fill a log, then read it bare and join it, some times over."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.join", description=__doc__.splitlines()[0])
    parser.add_argument("--on", nargs="+", choices=list(DEFAULTS), default=list(DEFAULTS))
    parser.add_argument("--events", type=int)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--share", type=float, help="of a core, for each joiner")
    options = parser.parse_args()
    for on in options.on:
        events, runs = options.events or DEFAULTS[on][0], options.runs or DEFAULTS[on][1]
        with {"embedded": embedded, "kafka": kafka_and_postgres}[on]() as new_settings:
            size = fill(new_settings(0), events, 0.0 if on == "embedded" else LONG_SHARE)
            compare(on, new_settings, events, runs, size, options.share)


def compare(on: str, new_settings: NewSettings, events: int, runs: int, size: float, share: float | None) -> None:
    """Print each run's figures, and their medians."""
    lines = []
    for n in range(runs):
        bare = read_bare(new_settings(n), events)
        line = {"bare_per_s": bare}
        for joiners in JOINERS:
            joined = join_all(new_settings(n * 10 + joiners), events, joiners, share)
            line |= {f"{name}_{joiners}": value for name, value in joined.items()}
            line[f"of_bare_{joiners}"] = joined["events_per_s"] / bare
        line["two_of_one"] = line["events_per_s_2"] / line["events_per_s_1"]
        lines.append(line)
        _print("join_run", {"on": on, **line})
    medians = {name: statistics.median(line[name] for line in lines) for name in lines[0]}
    held_to = {} if share is None else {"share_of_a_core_each": share}
    _print("join", {"on": on, **medians, **held_to, "events": events, "event_bytes": size, "runs": runs})


@contextmanager
def embedded() -> Iterator[NewSettings]:
    """One log file; a new SQLite store for each run."""
    with tempfile.TemporaryDirectory() as folder:
        yield lambda run: Settings(
            log=LogSettings(path=Path(folder) / "log.db"),
            store=StoreSettings(url=SecretStr(f"sqlite:///{folder}/store-{run}.db")),
            joiner=JoinerSettings(group=f"bench-{run}"),
        )


@contextmanager
def kafka_and_postgres() -> Iterator[NewSettings]:
    """One broker and one cluster; a new database for each run."""
    home, binaries = kafka_home(), postgres_binaries()
    if home is None or binaries is None:
        raise SystemExit("expected KAFKA_HOME to be an unpacked Apache Kafka, with Java on the PATH, and a Postgres")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_postgres(binaries, ("max_wal_size=8GB", "shared_buffers=2GB")) as postgres,  # as in deploy/compose.yaml
    ):
        broker = RealKafka(home, Path(folder))
        broker.start()
        try:
            log = broker.settings(partitions=8)
            yield lambda run: Settings(log=log, store=postgres.new_store(), joiner=JoinerSettings(group=f"bench-{run}"))
        finally:
            broker.stop()


def fill(settings: Settings, events: int, long_share: float) -> float:
    """Append responses of about 2 KB (some of 20 KB) and votes on them; returns the mean size in bytes."""
    random_ = random.Random(0)
    clock = HybridClock()
    log = open_log(settings.log)
    bodies = [_body(random_, 10 if n < 200 * long_share else 1) for n in range(200)]
    ids: list[str] = []
    batch: list[NewRecord] = []
    total = 0
    for n in track(range(events), "events", disable=not sys.stderr.isatty()):
        now_ms = NOW_MS + n
        if ids and random_.random() < FEEDBACK_SHARE:
            id = random_.choice(ids)
            key = id.split("-")[1]
            value: Any = random_.choice(["up", "down"])
            vote = FeedbackGiven(feedback_id=f"f{n}", value=value, hlc=clock.tick(now_ms), response_id=id, rater=f"{n}")
            record = NewRecord(
                settings.log.feedback_topic, key, encode(vote, event_id=f"{n}", key=key, source="b", now_ms=now_ms)
            )
        else:
            key = random_key()
            id = f"chatcmpl-{key}-{uuid7(now_ms)}"
            ids.append(id)
            data = ResponseLogged(
                response_id=id,
                conversation_id=f"conversation-{key}",
                started_at_ms=now_ms,
                **random_.choice(bodies),
            )
            record = NewRecord(
                settings.log.responses_topic,
                key,
                encode(data, event_id=f"{key}-{now_ms}", key=key, source="bench", now_ms=now_ms),
            )
        total += len(record.value)
        batch.append(record)
        if len(batch) == 2_000 or n == events - 1:
            log.append(batch)
            batch = []
    log.close()
    return total / events


def _body(random_: random.Random, times: int) -> dict[str, Any]:
    text = "".join(random_.choices("abcdefghijklmnopqrstuvwxyz ", k=420 * times))
    answer = Choice(
        {"role": "assistant", "content": text},
        token_ids=[random_.randrange(100_000) for _ in range(90 * times)],
        finish_reason="stop",
    )
    return {
        "choices": [answer],
        "messages": [{"role": "user", "content": text[: 200 * times]}],
        "prompt_token_ids": [random_.randrange(100_000) for _ in range(45 * times)],
        "alias": "assistant",
        "adapter": "assistant@v000001",
        "generation": 3,
        "params": {"temperature": 0.7, "max_tokens": 512},
        "first_token_s": 0.12,
        "duration_s": 1.5,
    }


def read_bare(settings: Settings, events: int) -> float:
    """Events a second of a loop that reads and decodes the whole log and does nothing else."""
    began, read = 0.0, 0
    for values in _kafka_values(settings) if settings.log.kind == "kafka" else _embedded_values(settings):
        began = began or time.perf_counter()
        for is_response, value in values:
            (decode_response if is_response else decode_feedback)(value)
        read += len(values)
        if read == events:
            break
    return events / (time.perf_counter() - began)


def _embedded_values(settings: Settings) -> Iterator[list[tuple[bool, bytes]]]:
    log = open_log(settings.log)
    topic = settings.log.responses_topic
    consumer = log.consumer("bare", (topic, settings.log.feedback_topic))
    try:
        while True:
            yield [(r.topic == topic, r.value) for r in consumer.poll(settings.joiner.batch_events, 0.0)]
    finally:
        consumer.close()
        log.close()


def _kafka_values(settings: Settings) -> Iterator[list[tuple[bool, bytes]]]:
    """By kafka-python alone, as it comes."""
    topic = settings.log.responses_topic
    consumer = KafkaConsumer(
        topic,
        settings.log.feedback_topic,
        bootstrap_servers=settings.log.bootstrap_servers,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    try:
        while True:
            polled = consumer.poll(timeout_ms=500, max_records=settings.joiner.batch_events)
            yield [(place.topic == topic, r.value) for place, records in polled.items() for r in records]
    finally:
        consumer.close()


def join_all(settings: Settings, events: int, joiners: int, share: float | None) -> dict[str, float]:
    """Events a second that `joiners` processes join into a new store, after WARM_UP of them; most memory of one, at the
    warm-up's end and at the end.
    """
    store = open_store(settings.store)
    query = select(func.coalesce(func.sum(positions.c.responses_next + positions.c.feedback_next), 0))

    def joined() -> int:
        with store.connect() as connection:
            return int(connection.execute(query).scalar_one())

    processes = [_start(settings) for _ in range(joiners)]
    holding = ExitStack()
    try:
        for process in processes:
            holding.enter_context(nullcontext() if share is None else held(process.pid, share))
        while (first := joined()) < WARM_UP * events:
            time.sleep(0.1)  # how often we look: not so often that a reader is in the way
        began, early_mb = time.perf_counter(), _peak_mb(processes)
        while joined() < events:
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        return {"events_per_s": (events - first) / seconds, "early_mb": early_mb, "peak_mb": _peak_mb(processes)}
    finally:
        holding.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        store.dispose()
        _drop(settings.store)


def _drop(settings: StoreSettings) -> None:
    """The run's database, whose autovacuum would take a tenth of the processor from the next run."""
    url = make_url(settings.url.get_secret_value())
    if url.get_backend_name() == "postgresql":
        server = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {url.database} WITH (FORCE)"))
        server.dispose()


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    port = free_port()
    environment = os.environ | {
        f"THUMBWHEEL_{section.upper()}__{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for section, values in {
            "log": settings.log.model_dump(mode="json", exclude_none=True),
            "store": {"url": settings.store.url.get_secret_value()},
            "joiner": settings.joiner.model_dump(mode="json") | {"metrics_port": port},
        }.items()
        for name, value in values.items()
    }
    command = [sys.executable, "-m", "services.cli", "joiner"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def _peak_mb(processes: list[subprocess.Popen[bytes]]) -> float:
    lines = [Path(f"/proc/{process.pid}/status").read_text().splitlines() for process in processes]
    return max(int(line.split()[1]) / 1024 for of_one in lines for line in of_one if line.startswith("VmHWM:"))


def _print(bench: str, values: dict[str, Any]) -> None:
    rounded = {
        name: value if isinstance(value, str) else round(value, 3) if value < 10 else round(value)
        for name, value in values.items()
    }
    print(json.dumps({"bench": bench, **rounded}), flush=True)


if __name__ == "__main__":
    main()
