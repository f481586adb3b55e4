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
    messages = [message for row in rows for message in row.messages]
    answers = [("assistant", row.answer) for row in rows]
    columns = {
        "prompt": _message_lists([len(row.messages) for row in rows], messages),
        "completion": _message_lists([1] * len(rows), answers),
        "prompt_ids": _id_lists([row.prompt_ids for row in rows]),
        "completion_ids": _id_lists([row.completion_ids for row in rows]),
        "example_id": strings([row.example_id for row in rows]),
        "conversation_id": strings([row.conversation_id for row in rows]),
        "rater": strings([label.rater for label in labels]),
        "raters": string_lists([label.raters for label in labels]),
        "adapter": strings([row.adapter for row in rows]),
        "source": strings(["template" if row.prompt_ids is None else "served" for row in rows]),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)


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


def _id_lists(texts: Sequence[bytes | None]) -> pa.Array:
    """A list of token ids, or none, for each text. Raises ValueError where they are no such numbers."""
    known = [text for text in texts if text is not None]
    sizes = np.array([0 if text is None else text.count(b",") + 1 for text in texts])
    try:  # all at once: of a number each, they would take longest of all
        ids = np.fromstring(b",".join(known), np.int64, int(sizes.sum()), sep=",")
        are_tokens = len(ids) == sizes.sum() and bool(((ids >= 0) & (ids < 2**31)).all())
    except ValueError:
        are_tokens = False
    if not are_tokens:
        raise ValueError("an example's token ids are not whole numbers from 0 to 2^31 - 1")
    mask = pa.array([text is None for text in texts])
    return pa.ListArray.from_arrays(_offsets(sizes), pa.array(ids.astype(np.int32)), mask=mask)


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
        self._pending: list[pa.Table] = []

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()
        self._writer.close()

    def add(self, rows: pa.Table, labels: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64]) -> None:
        """Append rows of ROW_SCHEMA with their labels and weights."""
        columns = {name: rows[name] for name in ROW_SCHEMA.names} | {"label": labels, "weight": weights}
        self._pending.append(pa.table({name: columns[name] for name in SCHEMA.names}, SCHEMA))
        pending = pa.concat_tables(self._pending)
        whole = len(pending) - len(pending) % ROW_GROUP
        for begin in range(0, whole, ROW_GROUP):
            self._write(pending.slice(begin, ROW_GROUP))
        self._pending = [pending.slice(whole)]

    def finish(self) -> str:
        """Write what is left; returns the file's SHA-256."""
        if self._pending and len(self._pending[0]):
            self._write(self._pending.pop())
        self._wait(0)
        self._writer.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return digest

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
