"""Rows on the way through curation: in files, a column each, and read back by columns or by rows.

Curation, split and caps look at few columns at a time, as arrays of 8 bytes a row and less; the rows' texts and token
ids stay on disk, as Arrow batches of the snapshot's own columns, until they are written. So a snapshot takes some tens
of bytes of memory a row, whatever is in it.

A folder of these files is written by one process; several are read as one, whose rows are theirs one after the other.
Within a batch rows lie in the order of `id`, which is the snapshot's: a range of ids is one slice of each batch.
"""

from __future__ import annotations

import mmap
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loop.snapshot.curate import Label, Row, Vote
from loop.snapshot.near import band_keys, count_bands, shingle_sets
from loop.snapshot.prompts import asked, normal_words
from loop.snapshot.split import CLUSTER, CONVERSATION, RATER, hasher, units_of
from loop.snapshot.write import ANSWER, ROW_SCHEMA, id_lists, message_lists

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
Column = npt.NDArray[Any]

COLUMNS = {
    "id": np.uint64,  # hash of the example's id: what rows are sorted by, so that no order of arrival shows
    "day": np.int32,
    "pair": np.uint64,  # hash of the exact prompt and answer
    "exact_prompt": np.uint64,
    "prompt": np.uint64,  # unit
    "conversation": np.uint64,  # unit
    "rater": np.uint64,  # unit of whom the label is ascribed to; 0 for nobody
    "voters": np.uint64,  # units of all who voted, some to a row
    "voters_size": np.int32,
    "votes": np.uint8,  # msgpack, some bytes to a row
    "votes_size": np.int32,
    "set": np.uint32,  # the prompt's shingles, some to a row
    "set_size": np.int32,
    "label": np.int8,  # 1 desirable, 0 undesirable, -1 where the votes come to nothing
    "weight": np.float64,
    "hlc": np.int64,
}
ROWS = "rows.arrow"
BATCH_ROWS = 16_384
BATCH_BYTES = 32 << 20
_encode_votes = msgspec.msgpack.Encoder().encode
_decode_votes = msgspec.msgpack.Decoder(list[Vote]).decode


class Spool:
    """Appends rows to the files of a folder of its own. Use as a context manager: at its end all is on disk."""

    def __init__(self, folder: Path, salt: str, similarity: float) -> None:
        folder.mkdir(parents=True)
        self._similarity = similarity
        names = [*COLUMNS, *(f"band_{n}" for n in range(count_bands(similarity)))]
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}
        self._rows = pa.OSFile(str(folder / ROWS), "wb")
        self._batches = pa.ipc.new_file(self._rows, ROW_SCHEMA)
        kinds = ("example", "exact", "pair", CLUSTER, CONVERSATION, RATER)
        self._id, self._exact, self._pair, self._cluster, self._conversation, self._rater = (
            hasher(salt, kind) for kind in kinds
        )
        self._batch = _Batch()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._flush()
        self._batches.close()
        self._rows.close()
        for file in self._files.values():
            file.close()

    def add(self, row: Row, label: Label | None, day: int) -> None:
        """Append a row; `label` is what its own votes come to, `day` which of two rows is the later one."""
        batch, digests = self._batch, self._batch.digests
        prompt = "\0".join([f"{role}\1{text}" for role, text in row.messages]).encode()
        exact = self._exact(prompt)
        # Answers that read the same but were sampled as other tokens are one answer: people voted on what they read.
        digests["pair"].append(self._pair(exact + row.answer.encode()))
        digests["exact_prompt"].append(exact)
        words = " ".join(normal_words(asked(row.messages)))
        digests["prompt"].append(self._cluster(words.encode()))
        digests["id"].append(self._id(row.example_id.encode()))
        digests["conversation"].append(self._conversation(row.conversation_id.encode()))
        voters = {vote.who: self._rater(vote.who.encode()) for vote in row.votes if vote.named}
        digests["voters"].append(b"".join(voters.values()))
        digests["rater"].append(voters[label.rater] if label is not None and label.rater is not None else _NOBODY)
        batch.texts.append(words)
        batch.votes.append(_encode_votes(row.votes))
        batch.days.append(day)
        batch.labels.append(-1 if label is None else int(label.desirable))
        batch.hlcs.append(0 if label is None else label.hlc)
        batch.weights.append(0.0 if label is None else label.weight)
        batch.add(row, label)
        if len(batch.days) == BATCH_ROWS or batch.bytes > BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch = self._batch, _Batch()
        if not batch.days:
            return
        ids = units_of(batch.digests["id"])
        order = np.argsort(ids, kind="stable")
        places = order.tolist()
        columns: dict[str, Column] = {
            name: units_of(batch.digests[name])[order] for name in ("pair", "exact_prompt", "prompt", "conversation")
        }
        named = units_of(batch.digests["rater"])
        columns |= {
            "id": ids[order],
            "rater": np.where([digest != _NOBODY for digest in batch.digests["rater"]], named, 0)[order],
            "voters": units_of([batch.digests["voters"][n] for n in places]),
            "voters_size": np.array([len(digests) // 8 for digests in batch.digests["voters"]])[order],
            "votes": np.frombuffer(b"".join([batch.votes[n] for n in places]), np.uint8),
            "votes_size": np.array([len(votes) for votes in batch.votes])[order],
            "day": np.asarray(batch.days)[order],
            "label": np.asarray(batch.labels)[order],
            "weight": np.asarray(batch.weights)[order],
            "hlc": np.asarray(batch.hlcs)[order],
        }
        columns["set"], columns["set_size"] = shingle_sets([batch.texts[n] for n in places])
        for name, values in columns.items():
            values.astype(COLUMNS[name], copy=False).tofile(self._files[name])
        for n, keys in enumerate(band_keys(columns["set"], columns["set_size"], self._similarity).T):
            keys.tofile(self._files[f"band_{n}"])
        self._batches.write_batch(batch.rows().take(pa.array(order)))


_NOBODY = bytes(8)


class _Batch:
    """Rows in memory, in the order in which they came."""

    def __init__(self) -> None:
        self.digests: dict[str, list[bytes]] = {
            name: [] for name in ("id", "pair", "exact_prompt", "prompt", "conversation", "rater", "voters")
        }
        self.texts: list[str] = []
        self.votes: list[bytes] = []
        self.days, self.labels, self.hlcs, self.weights = array("i"), array("b"), array("q"), array("d")
        self.bytes = 0
        self._ids: list[str] = []
        self._turns = array("i")
        self._roles: list[str] = []
        self._contents: list[str] = []
        self._answers: list[str] = []
        self._prompt_ids: list[bytes | None] = []
        self._completion_ids: list[bytes | None] = []
        self._conversations: list[str] = []
        self._adapters: list[str] = []
        self._raters: list[str | None] = []
        self._all_raters: list[list[str]] = []

    def add(self, row: Row, label: Label | None) -> None:
        """Append what is written of the row."""
        for role, text in row.messages:
            self._roles.append(role)
            self._contents.append(text)
            self.bytes += len(text)
        self._turns.append(len(row.messages))
        self._ids.append(row.example_id)
        self._answers.append(row.answer)
        self._prompt_ids.append(row.prompt_ids)
        self._completion_ids.append(row.completion_ids)
        self._conversations.append(row.conversation_id)
        self._adapters.append(row.adapter)
        self._raters.append(None if label is None else label.rater)
        self._all_raters.append([] if label is None else label.raters)
        self.bytes += len(row.answer) + len(row.prompt_ids or b"") + len(row.completion_ids or b"")

    def rows(self) -> pa.RecordBatch:
        """The rows in the columns of the snapshot."""
        served = [ids is not None for ids in self._prompt_ids]
        columns = {
            "prompt": message_lists(self._turns, self._roles, self._contents),
            "completion": message_lists([1] * len(self._ids), [ANSWER] * len(self._ids), self._answers),
            "prompt_ids": id_lists(self._prompt_ids),
            "completion_ids": id_lists(self._completion_ids),
            "example_id": pa.array(self._ids),
            "conversation_id": pa.array(self._conversations),
            "rater": pa.array(self._raters, pa.string()),
            "raters": pa.array(self._all_raters, pa.list_(pa.string())),
            "adapter": pa.array(self._adapters),
            "source": pa.array(["served" if known else "template" for known in served]),
        }
        return pa.RecordBatch.from_pydict(columns, schema=ROW_SCHEMA)


class Spooled:
    """The rows of some spools' folders, as one. Use as a context manager."""

    def __init__(self, folders: Sequence[Path], similarity: float) -> None:
        self._folders = folders
        self.bands = count_bands(similarity)
        for name in ("votes", "set"):  # what is read here and there; so there is one place to look
            for folder in folders[1:]:
                with (folder / name).open("rb") as source, (folders[0] / name).open("ab") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        self._votes, self._sets = _Mapped(folders[0] / "votes"), _Mapped(folders[0] / "set")
        self._rows = [_Mapped(folder / ROWS) for folder in folders]
        self._batches: list[pa.RecordBatch] = []
        for rows in self._rows:
            reader = pa.ipc.open_file(pa.py_buffer(rows.map))
            self._batches += [reader.get_batch(n) for n in range(reader.num_record_batches)]

    def __enter__(self) -> Spooled:
        return self

    def __exit__(self, *exc: object) -> None:
        self._batches.clear()

    def column(self, name: str) -> Column:
        """A column of all rows, in an array of its own."""
        dtype = np.dtype(COLUMNS.get(name, np.uint64))
        sizes = [(folder / name).stat().st_size for folder in self._folders]
        values = np.empty(sum(sizes) // dtype.itemsize, dtype)
        into, at = values.view(np.uint8).data, 0
        for folder, size in zip(self._folders, sizes, strict=True):
            with (folder / name).open("rb", buffering=0) as file:
                while size:
                    read = file.readinto(into[at : at + size])
                    at, size = at + read, size - read
        return values

    def sets(self, starts: I64, sizes: I64) -> U32:
        """The shingles of these many rows' prompts, flat; `starts` are places among all of them."""
        ends = np.cumsum(sizes)
        at = np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
        found: U32 = np.frombuffer(self._sets.map, np.uint32)[at]
        self._sets.release()
        return found

    def votes(self, start: int, size: int) -> list[Vote]:
        """The votes on the row that takes these of all votes' bytes."""
        votes: list[Vote] = _decode_votes(self._votes.map[start : start + size])
        return votes

    def ranges(self, ids: U64) -> Iterator[tuple[I64, pa.Table]]:
        """All rows with their numbers, by ranges of `ids` (the column) that go up and fit into memory; within one, in
        the order of their numbers.
        """
        count = 1 + sum(len(rows.map) for rows in self._rows) // BATCH_BYTES
        bounds = np.array([(n << 64) // count for n in range(1, count)], np.uint64)
        starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        cuts = [
            [begin, *(begin + np.searchsorted(ids[begin:end], bounds)), end] for begin, end in pairwise(starts.tolist())
        ]
        for n in range(count):
            spans = [(cut[n], cut[n + 1]) for cut in cuts]
            slices = [
                batch.slice(begin - first, end - begin)
                for batch, first, (begin, end) in zip(self._batches, starts.tolist(), spans, strict=False)
            ]
            numbers = np.concatenate([np.zeros(0, np.int64), *(np.arange(begin, end) for begin, end in spans)])
            yield numbers, pa.Table.from_batches(slices, ROW_SCHEMA).combine_chunks()
            for rows in self._rows:
                rows.release()


class _Mapped:
    """A file's bytes, mapped to be read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            is_empty = os.fstat(file.fileno()).st_size == 0
            self.map: Any = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def release(self) -> None:
        """Count what was read no longer as this process's memory; it stays in the system's cache."""
        if self.map:
            self.map.madvise(mmap.MADV_DONTNEED)
