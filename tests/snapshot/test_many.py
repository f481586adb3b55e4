"""Windows that are read by several processes, and the memory that a row takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine

from loop.settings import SnapshotSettings, StoreSettings
from loop.snapshot import make, make_snapshot
from loop.snapshot.collect import collect
from loop.store import open_store, write
from loop.store.bulk import Row
from loop.store.engine import StoreUnavailableError
from loop.store.examples import Block
from loop.store.schema import examples
from tests.bench.snapshot import NOW_MS, Traffic, fill

SETTINGS = SnapshotSettings(held_out_share=0.2)


def put(store: Engine, rows: list[Row]) -> None:
    names = [column.name for column in examples.columns]
    values = [dict(zip(names, row, strict=True)) for row in rows]
    for value in values:
        value |= {"day": date.fromisoformat(value["day"]), "votes": json.loads(value["votes"])}
    with write(store) as connection:
        connection.execute(examples.insert(), values)


def test_processes_read_the_same_as_one(
    store_settings: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "SMALL_WINDOW", 100)
    store = open_store(store_settings)
    put(store, Traffic(2_000).rows(0, 2_000)[0])
    made = [
        make_snapshot(
            store,
            SETTINGS.model_copy(update={"processes": processes}),
            out=tmp_path / str(processes),
            now_ms=NOW_MS,
        )
        for processes in (1, 3)
    ]
    store.dispose()
    assert made[0].snapshot_id == made[1].snapshot_id
    assert made[0].steps == made[1].steps
    assert (made[0].read, made[0].steps["exact_duplicates"] > 0) == (2_000, True)
    ids = pq.read_table(made[0].train_path)["example_id"].to_pylist()
    assert ids == pq.read_table(made[1].train_path)["example_id"].to_pylist()
    assert len(set(ids)) == len(ids) > 800


BLOCKS = [Block(date(2026, 9, n + 1), "", "~") for n in range(20)]


def test_a_store_that_is_away_is_told_apart_from_a_failure(tmp_path: Path) -> None:
    away = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with pytest.raises(StoreUnavailableError, match="is it running"):
        collect(away, SETTINGS, BLOCKS, tmp_path, 2)


def test_a_process_that_fails_says_why(store: Engine, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(RuntimeError, match="FileExistsError"):
        collect(store, SETTINGS, BLOCKS, tmp_path, 2)


MEASURED = """
import sys
from functools import partial
from pathlib import Path
from pydantic import SecretStr
from loop.settings import SnapshotSettings, StoreSettings
import pyarrow
from loop.snapshot import collect, make_snapshot, spool, write
from loop.store import open_store
from tests.bench.snapshot import NOW_MS

# What is kept whatever the number of rows, made small; and freed at once.
collect.stream_examples = partial(collect.stream_examples, page_rows=100)
spool.BATCH_ROWS, write.ROW_GROUP = 512, 256
pyarrow.set_memory_pool(pyarrow.system_memory_pool())
store = open_store(StoreSettings(url=SecretStr(sys.argv[1])))
made = make_snapshot(store, SnapshotSettings(processes=1), out=Path(sys.argv[2]), now_ms=NOW_MS)
status = Path("/proc/self/status").read_text()  # ru_maxrss has what the parent had when it forked
print(made.read, status.split("VmHWM:")[1].split()[0])
"""


def test_a_row_takes_less_memory_than_it_is_long(tmp_path: Path) -> None:
    read, peak_kib = [], []
    for count in (10_000, 50_000):
        url = f"sqlite:///{tmp_path}/{count}.db"
        event_bytes = fill(StoreSettings(url=SecretStr(url)), count)
        command = [sys.executable, "-c", MEASURED, url, str(tmp_path / str(count))]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # what threads keep for themselves is no row's
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        for values, value in zip((read, peak_kib), done.stdout.split(), strict=True):
            values.append(int(value))
    assert read == [10_000, 50_000]
    bytes_a_row = (peak_kib[1] - peak_kib[0]) * 1024 / 40_000
    assert bytes_a_row < 1_500 < event_bytes
