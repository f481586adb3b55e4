"""The snapshot's files: Parquet that `datasets` and KTO trainers read, and a manifest that says where it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loop.snapshot.curate import Label, Row

FORMAT = 1
TRAIN, HELD_OUT, MANIFEST = "train.parquet", "held_out.parquet", "manifest.json"
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("prompt", _MESSAGES),
        ("completion", _MESSAGES),
        ("label", pa.bool_()),
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("weight", pa.float64()),
        ("example_id", pa.string()),
        ("conversation_id", pa.string()),
        ("rater", pa.string()),
        ("raters", pa.list_(pa.string())),  # all whose votes made the label: who is erased must be found
        ("adapter", pa.string()),
        ("source", pa.string()),  # served: the ids are what the engine sampled; template: there are none
    ]
)


def record(row: Row, label: Label, weight: float) -> dict[str, Any]:
    """One line of the Parquet file."""
    return {
        "prompt": [{"role": role, "content": text} for role, text in row.messages],
        "completion": [{"role": "assistant", "content": row.answer}],
        "label": label.desirable,
        "prompt_ids": row.prompt_ids,
        "completion_ids": row.completion_ids,
        "weight": weight,
        "example_id": row.example_id,
        "conversation_id": row.conversation_id,
        "rater": label.rater,
        "raters": label.raters,
        "adapter": row.adapter,
        "source": "served" if row.prompt_ids is not None else "template",
    }


def write_rows(path: Path, batches: Iterable[list[dict[str, Any]]]) -> str:
    """Write the batches, one row group each; returns the file's SHA-256."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def identify(content: dict[str, Any]) -> str:
    """The snapshot's id: the SHA-256 of what it contains, files by their hashes, as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def publish(made: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Move the finished folder `made` to `out`. The manifest is written last before it, so its presence means whole."""
    with (made / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    made.rename(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
