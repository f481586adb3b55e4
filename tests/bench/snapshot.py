"""Snapshot speed and memory: `python -m tests.bench.snapshot [--examples N]`. One JSON line.

Examples of about 2 KB, each with a prompt of its own, in a SQLite store; the snapshot is made in a process of its own,
whose most memory is told.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pydantic import SecretStr

from loop.events import Choice, ResponseLogged, encode, uuid7
from loop.settings import SnapshotSettings, StoreSettings
from loop.snapshot import make_snapshot
from loop.store import open_store
from loop.store.bulk import open_bulk
from loop.store.engine import write
from loop.store.schema import examples

NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000
RATERS = 100_000
VOCABULARY = 20_000


def main() -> None:
    """Fill a store, then make its snapshot."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.snapshot", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.examples)
        subprocess.run([sys.executable, "-m", "tests.bench.snapshot", "--make", folder], check=True)


def fill(folder: Path, count: int) -> None:
    """Put examples into the store, as the joiner leaves them."""
    random_ = random.Random(0)
    words = [
        "".join(random_.choices("abcdefghijklmnopqrstuvwxyz", k=random_.randint(2, 10))) for _ in range(VOCABULARY)
    ]
    store = open_store(_store(folder))
    for start in range(0, count, 2_000):
        rows = [_row(random_, words, n, count) for n in range(start, min(start + 2_000, count))]
        with write(store) as connection:
            open_bulk(connection).insert(examples, rows)
    store.dispose()


def _row(random_: random.Random, words: list[str], n: int, count: int) -> tuple[object, ...]:
    at_ms = NOW_MS - 7 * DAY_MS + n * 7 * DAY_MS // count
    key = f"{random_.getrandbits(64):016x}"
    id = f"chatcmpl-{key}-{uuid7(at_ms)}"
    body = ResponseLogged(
        response_id=id,
        messages=[{"role": "user", "content": " ".join(random_.choices(words, k=30))}],
        choices=[
            Choice(
                {"role": "assistant", "content": " ".join(random_.choices(words, k=60))},
                token_ids=[random_.randrange(100_000) for _ in range(90)],
                finish_reason="stop",
            )
        ],
        prompt_token_ids=[random_.randrange(100_000) for _ in range(45)],
        started_at_ms=at_ms,
    )
    value = random_.choice(["up", "down"])
    vote = {"rater": f"{random_.randrange(RATERS):032x}", "value": value, "weight": 1.0, "source": "explicit", "hlc": n}
    day = time.strftime("%Y-%m-%d", time.gmtime(at_ms / 1000))
    event = encode(body, event_id=f"{key}-{n}", key=key, source="bench", now_ms=at_ms)
    is_up = int(value == "up")
    adapter, conversation = "assistant@v000001", f"conversation-{key}"
    return (id, 0, key, day, adapter, "live", conversation, is_up, 1 - is_up, json.dumps([vote]), at_ms, event)


def make(folder: Path) -> None:
    """Make the snapshot and print what it took."""
    store = open_store(_store(folder))
    before_mb, began = _peak_mb(), time.perf_counter()
    made = make_snapshot(store, SnapshotSettings(), out=folder / "snapshot", now_ms=NOW_MS)
    seconds = time.perf_counter() - began
    figures = {
        "examples": made.read,
        "rows_per_s": round(made.read / seconds),
        "peak_mb": round(_peak_mb()),
        "before_mb": round(before_mb),
        "snapshot_id": made.snapshot_id,
    }
    print(json.dumps({"bench": "snapshot", **figures}), flush=True)
    store.dispose()


def _store(folder: Path) -> StoreSettings:
    return StoreSettings(url=SecretStr(f"sqlite:///{folder}/store.db"))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
