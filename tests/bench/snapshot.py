"""Snapshot speed and memory: `python -m tests.bench.snapshot [--examples N] [--on sqlite postgres]`. JSON lines.

Examples of about 2 KB over the whole window, most prompts distinct, some asked again in the same or nearly the same
words. The snapshot is made in a process of its own; told are seconds and processor time of each phase, and the most
memory of that process and its children together: all of it, and without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from rich.progress import track

from loop.content import content_of, encode_content
from loop.events import decode_response
from loop.minhash import sketches
from loop.settings import SnapshotSettings, StoreSettings
from loop.snapshot import make_snapshot
from loop.store import open_store
from loop.store.bulk import Row, open_bulk
from loop.store.engine import write
from loop.store.schema import examples, rated_bodies, turn
from tests.services_real import postgres_binaries, running_postgres

NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000
RATERS = 1_000_000
VOCABULARY = 50_000
PROMPT_WORDS, ANSWER_WORDS = 25, 50
ASKED_AGAIN, ASKED_ALMOST_AGAIN, ANSWERED_AGAIN = 0.04, 0.04, 0.01
"""Shares of prompts that are an earlier one, or one with another word in it; and of rows with an earlier answer too."""
BATCH = 10_000
SAMPLE_S = 0.05


def main() -> None:
    """Fill a store, then make its snapshot."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.snapshot", description=__doc__.splitlines()[0])
    parser.add_argument("--on", nargs="+", choices=list(STORES), default=["sqlite"])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--make", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make[0], Path(options.make[1]))
        return
    for on in options.on:
        with tempfile.TemporaryDirectory() as folder, STORES[on](Path(folder)) as settings:
            event_bytes = fill(settings, options.examples)
            for bench in ("snapshot", "snapshot again"):
                line = {"bench": bench, "on": on, "event_bytes": round(event_bytes)}
                print(json.dumps(line | measure(settings, Path(folder))), flush=True)


@contextmanager
def sqlite(folder: Path) -> Iterator[StoreSettings]:
    """A store in a file."""
    yield StoreSettings(url=SecretStr(f"sqlite:///{folder}/store.db"))


@contextmanager
def postgres(_folder: Path) -> Iterator[StoreSettings]:
    """A store on a real Postgres of its own."""
    binaries = postgres_binaries()
    if binaries is None:
        raise SystemExit("expected a Postgres server on this machine (Debian: postgresql)")
    with running_postgres(binaries) as cluster:
        yield cluster.new_store()


STORES = {"sqlite": sqlite, "postgres": postgres}


def fill(settings: StoreSettings, count: int) -> float:
    """Put examples into the store, as the joiner leaves them and in the order of time; returns an event's mean size."""
    store, made = open_store(settings), Traffic(count)
    size = 0
    for start in track(range(0, count, BATCH), "examples", disable=not sys.stderr.isatty()):
        rows, events = made.rows(start, min(start + BATCH, count))
        bodies = [(row[1], event) for row, event in zip(rows, events, strict=True)]
        size += sum(map(len, events))
        with write(store) as connection:
            for table, of_table in ((examples, rows), (rated_bodies, bodies)):
                if connection.dialect.name == "sqlite":
                    open_bulk(connection).insert(table, of_table)
                    continue
                cursor: Any = connection.connection.cursor()
                with cursor.copy(f"COPY {table.name} FROM STDIN") as copy:
                    for row in of_table:
                        copy.write_row(row)
    if store.dialect.name == "postgresql":  # which its autovacuum would do, but just when we measure
        with store.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("VACUUM (ANALYZE) examples")
    store.dispose()
    return size / count


class Traffic:
    """Rows of `examples`, made by the ten thousand: most of an event is taken from what was made beforehand."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._random, self._rng = random.Random(0), np.random.default_rng(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self._words = ["".join(self._random.choices(letters, k=self._random.randint(2, 10))) for _ in range(VOCABULARY)]
        self._answers = [" ".join(words) for words in self._texts(5_000, ANSWER_WORDS)]
        self._prompt_ids, self._ids = ([self._token_ids(n) for _ in range(5_000)] for n in (45, 75))
        self._earlier: list[tuple[list[str], str]] = []

    def rows(self, start: int, end: int) -> tuple[list[Row], list[bytes]]:
        """The rows from number `start` to before `end`, and their events."""
        count = end - start
        picks = self._rng.random((5, count)).T.tolist()
        bits = self._rng.integers(1 << 64, size=(3, count), dtype=np.uint64).T.tolist()
        texts = self._texts(count, PROMPT_WORDS)
        made = [self._row(start + n, texts[n], picks[n], bits[n]) for n in range(count)]
        bodies = [decode_response(event).data for _, event in made]
        contents = [content_of(data, data.choices[0]) for data in bodies]
        sketched = sketches([content.asked for content in contents])
        return [
            (*row, sketch, encode_content(content))
            for (row, _), content, sketch in zip(made, contents, sketched, strict=True)
        ], [event for _, event in made]

    def _texts(self, count: int, words: int) -> list[list[str]]:
        # As often as by Zipf's law.
        picks = (VOCABULARY ** self._rng.random((count, words)) - 1).astype(int).tolist()
        return [[self._words[n] for n in line] for line in picks]

    def _token_ids(self, count: int) -> str:
        return ",".join(map(str, (self._rng.random(count) ** 3 * 100_000).astype(int).tolist()))

    def _row(self, n: int, words: list[str], picks: list[float], bits: list[int]) -> tuple[Row, bytes]:
        kind, of_earlier, of_words, of_raters, is_up = picks
        answer = f"{self._answers[bits[0] % 5_000]} {n}"
        if self._earlier and kind < ASKED_AGAIN + ASKED_ALMOST_AGAIN:
            words, earlier_answer = self._earlier[int(of_earlier * len(self._earlier))]
            if kind < ANSWERED_AGAIN:
                answer = earlier_answer
            elif kind > ASKED_AGAIN:
                words = [*words[:12], self._words[int(of_words * VOCABULARY)], *words[13:]]
        elif len(self._earlier) < 100_000:
            self._earlier.append((words, answer))
        at_ms = NOW_MS - (self._count - n) * 29 * DAY_MS // self._count
        key, up = f"{bits[1]:016x}", is_up < 0.6
        id = f"chatcmpl-{key}-{at_ms >> 16:08x}-{at_ms & 0xFFFF:04x}-7000-8000-{bits[2] >> 16:012x}"
        first = int(of_raters * RATERS)
        raters = [
            f"{rater * 0x9E3779B97F4A7C15:032x}" for rater in (first, first + 1)[: 1 if bits[2] % 100 < 97 else 2]
        ]
        votes = ", ".join(
            f'{{"rater": "{rater}", "value": "{"up" if up else "down"}", "weight": 1.0, "source": "explicit",'
            f' "hlc": {at_ms << 16}}}'
            for rater in sorted(raters)
        )
        data = (
            f'{{"response_id":"{id}","choices":[{{"message":{{"role":"assistant","content":"{answer}"}},"index":0,'
            f'"token_ids":[{self._ids[n % 5_000]}],"finish_reason":"stop"}}],"messages":[{{"role":"system",'
            f'"content":"You are the support desk of a large shop."}},{{"role":"user","content":"{" ".join(words)}"}}],'
            f'"prompt_token_ids":[{self._prompt_ids[n % 5_000]}],"alias":"assistant","adapter":"assistant@v000001",'
            f'"generation":3,"conversation_id":"conversation-{key}","params":{{"temperature":0.7,"max_tokens":512}},'
            f'"started_at_ms":{at_ms},"first_token_s":0.12,"duration_s":1.5}}'
        )
        event = (
            f'{{"specversion":"1.0","id":"{key}-{n}","source":"bench","type":"thumbwheel.response.logged.v1",'
            f'"subject":"{id}","time":"2026-09-21T00:00:00.000+00:00","datacontenttype":"application/json","partitionkey":"{key}",'
            f'"data":{data}}}'
        )
        day = _day(at_ms // DAY_MS)
        ups, downs = (len(raters), 0) if up else (0, len(raters))
        conversation = f"conversation-{key}"
        row = (day, turn(id), 0, key, "assistant@v000001", "live", conversation, ups, downs, f"[{votes}]", at_ms)
        return row, event.encode()


@cache
def _day(number: int) -> str:
    return str(date(1970, 1, 1) + timedelta(number))


def measure(settings: StoreSettings, folder: Path) -> dict[str, Any]:
    """Make the snapshot in a child, and watch its memory."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "tests.bench.snapshot", "--make", settings.url.get_secret_value(), out]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        whole, own = 0.0, 0.0
        while child.poll() is None:
            now_whole, now_own = _memory_mb(child.pid)
            whole, own = max(whole, now_whole), max(own, now_own)
            time.sleep(SAMPLE_S)
        assert child.stdout is not None
        with child.stdout:
            figures = json.loads(child.stdout.read())
        sizes = {path.name: path.stat().st_size for path in (Path(out) / "snapshot").iterdir()}
        bytes_ = round(sum(sizes.values()) / figures["examples"])
    return {**figures, "peak_mb": round(whole), "peak_without_mapped_mb": round(own), "snapshot_bytes_a_row": bytes_}


def _memory_mb(pid: int) -> tuple[float, float]:
    """(all resident pages, those of no file) of a process and its children."""
    whole = own = 0.0
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        whole, own = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                of_child = _memory_mb(int(child))
                whole, own = whole + of_child[0], own + of_child[1]
    except (OSError, KeyError):  # it has just ended
        pass
    return whole, own


def make(url: str, folder: Path) -> None:
    """Make the snapshot and print what it took."""
    store = open_store(StoreSettings(url=SecretStr(url)))
    phases = Phases()
    logging.getLogger("thumbwheel.snapshot").addHandler(phases)
    logging.getLogger("thumbwheel.snapshot").setLevel(logging.INFO)
    began, cpu = time.perf_counter(), phases.cpu_s()
    made = make_snapshot(store, SnapshotSettings(), out=folder / "snapshot", now_ms=NOW_MS)
    seconds, cpu_s = time.perf_counter() - began, phases.cpu_s() - cpu
    figures = {
        "examples": made.read,
        "rows_per_s": round(made.read / seconds),
        "seconds": round(seconds, 1),
        "cpu_us_a_row": round(cpu_s / made.read * 1e6, 1),
        "phases": phases.lines,
        "snapshot_id": made.snapshot_id,
        "train": made.train_desirable + made.train_undesirable,
        "steps": {step: dropped for step, dropped in made.steps.items() if dropped},
    }
    print(json.dumps(figures), flush=True)
    store.dispose()


class Phases(logging.Handler):
    """Seconds and processor time between the lines that `make_snapshot` logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, dict[str, float]] = {}
        self._last = time.perf_counter(), self.cpu_s()

    @staticmethod
    def cpu_s() -> float:
        """Processor time of this process and of its children that have ended."""
        return sum(os.times()[:4])

    def emit(self, record: logging.LogRecord) -> None:
        now = time.perf_counter(), self.cpu_s()
        seconds, cpu_s = now[0] - self._last[0], now[1] - self._last[1]
        self.lines[record.phase] = {"s": round(seconds, 2), "cpu_s": round(cpu_s, 2)}  # type: ignore[attr-defined]
        self._last = now


if __name__ == "__main__":
    main()
