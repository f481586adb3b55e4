"""The snapshot's files: Parquet that `datasets` and KTO trainers read, and a manifest that says where it came from."""

from __future__ import annotations

import hashlib
import io
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

from loop.snapshot.curate import Label, Row

Flags = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]

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
# The first bytes of all ids, then all second ones: smaller, and sooner compressed.
_OF_IDS = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("prompt_ids", "completion_ids")}
ROW_GROUP = 4_096
_WRITES_AHEAD = 4


def row_batch(rows: Sequence[Row], labels: Sequence[Label]) -> pa.RecordBatch:
    """Rows, and whom their labels are ascribed to, in the columns of ROW_SCHEMA."""
    contents = [row.content for row in rows]
    is_known = [row.content.prompt_ids is not None and row.correction is None for row in rows]
    answers = [row.content.answer if row.correction is None else row.correction.encode() for row in rows]
    columns = {
        "prompt": _messages(
            _sizes([one.role_sizes for one in contents]) // 4,
            _texts([one.roles for one in contents], _numbers([one.role_sizes for one in contents])),
            _texts([one.texts for one in contents], _numbers([one.text_sizes for one in contents])),
        ),
        "completion": _messages(
            np.ones(len(rows), np.int64), pa.repeat("assistant", len(rows)), _texts(answers, _sizes(answers))
        ),
        "prompt_ids": _id_lists([one.prompt_ids for one in contents], is_known),
        "completion_ids": _id_lists([one.completion_ids for one in contents], is_known),
        "example_id": strings([row.example_id for row in rows]),
        "conversation_id": strings([row.conversation_id for row in rows]),
        "rater": strings([label.rater for label in labels]),
        "raters": string_lists([label.raters for label in labels]),
        "adapter": strings([row.example.adapter for row in rows]),
        "source": strings(["served" if known else "template" for known in is_known]),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)


def strings(texts: Sequence[str | None]) -> pa.Array:
    """A column of texts."""
    return pa.array(texts, pa.string())


def string_lists(lists: Sequence[Sequence[str]]) -> pa.Array:
    """A column of lists of texts."""
    return pa.array(lists, pa.list_(pa.string()))


def _messages(sizes: I64, roles: pa.Array, contents: pa.Array) -> pa.Array:
    """So many messages for each row."""
    return pa.ListArray.from_arrays(_offsets(sizes), pa.StructArray.from_arrays([roles, contents], ["role", "content"]))


def _texts(joined: Sequence[bytes], sizes: npt.NDArray[Any]) -> pa.Array:
    """A column of texts of these sizes, in UTF-8, which stand one behind the other."""
    return pa.StringArray.from_buffers(len(sizes), _offsets(sizes).buffers()[1], pa.py_buffer(b"".join(joined)))


def _id_lists(packed: Sequence[bytes | None], are_known: Sequence[bool]) -> pa.Array:
    """A list of token ids, or none, for each row."""
    known = [ids if ids is not None and is_known else b"" for ids, is_known in zip(packed, are_known, strict=True)]
    mask = ~np.array(are_known, bool)
    return pa.ListArray.from_arrays(_offsets(_sizes(known) // 4), pa.array(_numbers(known)), mask=pa.array(mask))


def _numbers(packed: Sequence[bytes]) -> npt.NDArray[np.int32]:
    return np.frombuffer(b"".join(packed), "<i4")


def _sizes(parts: Sequence[bytes]) -> I64:
    return np.array(list(map(len, parts)), np.int64)


def _offsets(sizes: npt.NDArray[Any]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))


class RowFile:
    """One Parquet file under way, written by a thread of its own in row groups that depend on the rows alone. Use as a
    context manager.
    """

    def __init__(self, path: Path) -> None:
        self._file = _HashedFile(path)
        self._writer = pq.ParquetWriter(
            self._file, SCHEMA, compression="zstd", use_dictionary=_OF_FEW_VALUES, column_encoding=_OF_IDS
        )
        self._thread = ThreadPoolExecutor(1, "parquet")
        self._writes: deque[Future[None]] = deque()
        self._pending: list[pa.RecordBatch] = []
        self._rows = self._up = 0

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()
        self._writer.close()
        self._file.close()

    def add(self, rows: pa.RecordBatch, labels: Flags, weights: npt.NDArray[np.float64]) -> None:
        """Append rows of ROW_SCHEMA with their labels and weights."""
        columns = {"label": pa.array(labels), "weight": pa.array(weights)}
        columns |= {name: rows[name] for name in ROW_SCHEMA.names}
        self._pending.append(pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA))
        self._rows, self._up = self._rows + len(labels), self._up + int(labels.sum())
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
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"sha256": self._file.sha256.hexdigest(), "desirable": self._up, "undesirable": self._rows - self._up}

    def _write(self, rows: pa.Table) -> None:
        self._writes.append(self._thread.submit(self._write_group, rows.combine_chunks()))
        self._wait(_WRITES_AHEAD)

    def _write_group(self, rows: pa.Table) -> None:
        self._writer.write_table(rows)
        uncache(self._file)

    def _wait(self, ahead: int) -> None:
        while len(self._writes) > ahead:
            self._writes.popleft().result()


class _HashedFile(io.BufferedWriter):
    """A new file, and the hash of what is written to it, one after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return super().write(data)


def uncache(file: io.IOBase) -> None:
    """Take what was read from a file, or written to it, out of the system's cache, as far as it is on disk. Nobody will
    want these gigabytes soon, and the memory is there for the next ones.
    """
    os.posix_fadvise(file.fileno(), 0, os.lseek(file.fileno(), 0, os.SEEK_CUR), os.POSIX_FADV_DONTNEED)


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
