"""The files as others read them: `datasets`, and TRL's own functions on rows of its form."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from loop.settings import SnapshotSettings
from loop.snapshot import Snapshot, make_snapshot
from tests.snapshot.stored import NOW_MS, example, put


@pytest.fixture
def snapshot(store: Engine, tmp_path: Path) -> Snapshot:
    rows = [example(n, votes=[(f"r{n}", "up" if n % 3 else "down", 1.0, n)]) for n in range(60)]
    rows += [example(100 + n, prompt_ids=None, completion_ids=None, votes=[("", "up", 1.0, n)]) for n in range(20)]
    put(store, rows)
    return make_snapshot(store, SnapshotSettings(held_out_share=0.2), out=tmp_path / "snapshot", now_ms=NOW_MS)


def test_datasets_reads_both_files(snapshot: Snapshot, tmp_path: Path) -> None:
    from datasets import load_dataset

    files = {"train": str(snapshot.train_path), "held_out": str(snapshot.held_out_path)}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == snapshot.train_desirable + snapshot.train_undesirable
    assert loaded["held_out"].num_rows == snapshot.held_out_desirable + snapshot.held_out_undesirable
    served = [row for row in loaded["train"] if row["source"] == "served"]
    template = [row for row in loaded["train"] if row["source"] == "template"]
    assert served[0]["prompt_ids"][:3] == [1, 2, 3]
    assert {row["rater"] for row in template} == {None}
    assert {row["prompt_ids"] for row in template} == {row["completion_ids"] for row in template} == {None}


def test_rows_have_trls_kto_form(snapshot: Snapshot, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    loaded = load_dataset(
        "parquet", data_files=str(snapshot.train_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    row = loaded[0]
    assert is_conversational({key: row[key] for key in ("prompt", "completion", "label")})
    assert [message["role"] for message in row["completion"]] == ["assistant"]
    assert isinstance(row["label"], bool)


def test_the_trainer_reads_them_with_the_served_ids(snapshot: Snapshot) -> None:
    from loop.kto.rows import read_records, row_of

    record = next(record for _, record in read_records(snapshot.train_path) if record["source"] == "served")
    row = row_of(record, "here", None, None, (1.0, 1.0))
    assert (row.prompt_ids, row.weight) == (record["prompt_ids"], record["weight"])
