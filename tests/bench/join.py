"""Joiner speed on the embedded log and SQLite: `python -m tests.bench.join`. One JSON line for each run, then medians.

Beside each run, in the same process, a bare loop that only reads and decodes the same log: the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import SecretStr

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
from services.joiner import Joiner

NOW_MS = 1_760_000_000_000


def main() -> None:
    """Fill a log, then read it bare and join it, some times over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--feedback", type=float, default=0.03)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(Path(folder), 0)
        size = fill(settings, options.events, options.feedback)
        lines = []
        for n in range(options.runs):
            settings = _settings(Path(folder), n)
            line = {}
            for name, seconds in (("bare", read_bare(settings)), ("joined", join_all(settings, options.events))):
                line |= {f"{name}_per_s": options.events / seconds[0], f"{name}_per_cpu_s": options.events / seconds[1]}
            lines.append(line | {"ratio": line["joined_per_s"] / line["bare_per_s"]})
            _print("join_run", lines[-1])
    medians = {name: statistics.median(line[name] for line in lines) for name in lines[0]}
    _print("join", {**medians, "events": options.events, "event_bytes": size, "runs": options.runs})


def fill(settings: Settings, events: int, feedback_share: float) -> float:
    """Append responses of about 2 KB and votes on them; returns the mean size in bytes."""
    random_ = random.Random(0)
    clock = HybridClock()
    log = open_log(settings.log)
    ids: list[str] = []
    batch: list[NewRecord] = []
    total = 0
    for n in range(events):
        now_ms = NOW_MS + n
        if ids and random_.random() < feedback_share:
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
            record = NewRecord(settings.log.responses_topic, key, _response(random_, id, key, now_ms))
        total += len(record.value)
        batch.append(record)
        if len(batch) == 2_000 or n == events - 1:
            log.append(batch)
            batch = []
    log.close()
    return total / events


def _response(random_: random.Random, id: str, key: str, now_ms: int) -> bytes:
    text = "".join(random_.choices("abcdefghijklmnopqrstuvwxyz ", k=420))
    answer = Choice(
        {"role": "assistant", "content": text},
        token_ids=[random_.randrange(100_000) for _ in range(90)],
        finish_reason="stop",
    )
    data = ResponseLogged(
        response_id=id,
        choices=[answer],
        messages=[{"role": "user", "content": text[:200]}],
        prompt_token_ids=[random_.randrange(100_000) for _ in range(45)],
        alias="assistant",
        adapter="assistant@v000001",
        generation=3,
        conversation_id=f"conversation-{key}",
        params={"temperature": 0.7, "max_tokens": 512},
        started_at_ms=now_ms,
        first_token_s=0.12,
        duration_s=1.5,
    )
    return encode(data, event_id=f"{key}-{now_ms}", key=key, source="bench", now_ms=now_ms)


def read_bare(settings: Settings) -> tuple[float, float]:
    """Seconds, and CPU seconds, to read and decode the whole log and do nothing else."""
    log = open_log(settings.log)
    topics = (settings.log.responses_topic, settings.log.feedback_topic)
    consumer = log.consumer("bare", topics)
    began, began_cpu = time.perf_counter(), time.process_time()
    while records := consumer.poll(settings.joiner.batch_events, 0.0):
        for record in records:
            if record.topic == topics[0]:
                decode_response(record.value)
            else:
                decode_feedback(record.value)
    seconds = time.perf_counter() - began, time.process_time() - began_cpu
    consumer.close()
    log.close()
    return seconds


def join_all(settings: Settings, events: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, until the joiner has joined the whole log into a new store."""
    store, log = open_store(settings.store), open_log(settings.log)
    stop = threading.Event()
    joiner = Joiner(settings, store, log)
    thread = threading.Thread(target=joiner.run, args=(stop,))
    began, began_cpu = time.perf_counter(), time.process_time()
    thread.start()
    while sum(joiner.positions.values()) < events:
        time.sleep(0.02)  # how often we look, within what is measured
    seconds = time.perf_counter() - began, time.process_time() - began_cpu
    stop.set()
    thread.join()
    log.close()
    store.dispose()
    return seconds


def _settings(folder: Path, run: int) -> Settings:
    return Settings(
        log=LogSettings(path=folder / "log.db"),
        store=StoreSettings(url=SecretStr(f"sqlite:///{folder}/store-{run}.db")),
        joiner=JoinerSettings(group=f"bench-{run}"),
    )


def _print(bench: str, values: dict[str, float]) -> None:
    rounded = {name: round(value, 3) if value < 10 else round(value) for name, value in values.items()}
    print(json.dumps({"bench": bench, **rounded}), flush=True)


if __name__ == "__main__":
    main()
