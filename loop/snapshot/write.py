"""The snapshot's files: Parquet that `datasets` and KTO trainers read, and a manifest that says where it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from loop.content import Served, decode_served
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
# What is known of a row by itself: the label and its weight follow from all rows.
ROW_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in ("label", "weight")])
_OF_FEW_VALUES = ["adapter", "source", "prompt.list.element.role", "completion.list.element.role"]
ROW_GROUP = 4_096
_WRITES_AHEAD = 2


def row_batch(rows: Sequence[Row], labels: Sequence[Label]) -> pa.RecordBatch:
    """Rows, and whom their labels are ascribed to, in the columns of ROW_SCHEMA."""
    served = [_served(row) for row in rows]
    messages = [message for one in served for message in one.messages]
    columns = {
        "prompt": _message_lists([len(one.messages) for one in served], messages),
        "completion": _message_lists([1] * len(rows), [("assistant", one.answer) for one in served]),
        "prompt_ids": _id_lists([one.prompt_ids for one in served]),
        "completion_ids": _id_lists([one.completion_ids for one in served]),
        "example_id": strings([row.example_id for row in rows]),
        "conversation_id": strings([row.conversation_id for row in rows]),
        "rater": strings([label.rater for label in labels]),
        "raters": string_lists([label.raters for label in labels]),
        "adapter": strings([row.example.adapter for row in rows]),
        "source": strings(["template" if one.prompt_ids is None else "served" for one in served]),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)


def _served(row: Row) -> Served:
    served = decode_served(row.example.served)
    return served if row.correction is None else Served(served.messages, row.correction, None, None)


def strings(texts: Sequence[str | None]) -> pa.Array:
    """A column of texts."""
    return pa.array(texts, pa.string())


def string_lists(lists: Sequence[Sequence[str]]) -> pa.Array:
    """A column of lists of texts."""
    return pa.array(lists, pa.list_(pa.string()))


def _message_lists(sizes: Sequence[int], messages: Sequence[tuple[str, str]]) -> pa.Array:
    """So many messages for each row, of messages that follow each other."""
    roles, contents = (strings([message[n] for message in messages]) for n in range(2))
    return pa.ListArray.from_arrays(_offsets(sizes), pa.StructArray.from_arrays([roles, contents], ["role", "content"]))


def _id_lists(packed: Sequence[bytes | None]) -> pa.Array:
    """A list of token ids, or none, for each of what `Served` has of them."""
    known = [ids or b"" for ids in packed]
    sizes = np.array(list(map(len, known)), np.int64) // 4
    mask = pa.array([ids is None for ids in packed], pa.bool_())
    return pa.ListArray.from_arrays(_offsets(sizes), pa.array(np.frombuffer(b"".join(known), "<i4")), mask=mask)


def _offsets(sizes: Sequence[int] | npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))


class RowFile:
    """One Parquet file under way, written by a thread of its own in row groups that depend on the rows alone. Use as a
    context manager.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=_OF_FEW_VALUES)
        self._thread = ThreadPoolExecutor(1, "parquet")
        self._writes: deque[Future[None]] = deque()
        self._pending: list[pa.RecordBatch] = []
        self._rows = self._up = 0

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()
        self._writer.close()

    def add(self, rows: pa.RecordBatch, labels: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64]) -> None:
        """Append rows of ROW_SCHEMA with their labels and weights."""
        columns = {"label": pa.array(labels), "weight": pa.array(weights)}
        columns |= {name: rows[name] for name in ROW_SCHEMA.names}
        self._pending.append(pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA))
        self._rows, self._up = self._rows + len(rows), self._up + int(labels.sum())
        pending = sum(map(len, self._pending))
        if pending >= ROW_GROUP:
            table = pa.Table.from_batches(self._pending)
            whole = pending - pending % ROW_GROUP
            for begin in range(0, whole, ROW_GROUP):
                self._write(table.slice(begin, ROW_GROUP))
            self._pending = table.slice(whole).to_batches()

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns the file's SHA-256, and how many rows of either label it has."""
        if self._pending:
            self._write(pa.Table.from_batches(self._pending))
        self._wait(0)
        self._writer.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return {"sha256": digest, "desirable": self._up, "undesirable": self._rows - self._up}

    def _write(self, rows: pa.Table) -> None:
        self._writes.append(self._thread.submit(lambda: self._writer.write_table(rows.combine_chunks())))
        self._wait(_WRITES_AHEAD)

    def _wait(self, ahead: int) -> None:
        while len(self._writes) > ahead:
            self._writes.popleft().result()


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
