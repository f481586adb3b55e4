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
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loop.snapshot.curate import Label, Row, Vote
from loop.snapshot.near import band_keys, count_bands, shingle_sets
from loop.snapshot.prompts import asked, normal_words
from loop.snapshot.split import CLUSTER, CONVERSATION, RATER, hasher, units_of
from loop.snapshot.write import ROW_SCHEMA, row_batch

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
BATCH_ROWS = 8_192
BATCH_BYTES = 32 << 20
RANGE_BYTES = 64 << 20
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
        self._batch: list[_Hashed] = []
        self._bytes = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None and self._batch:
            self._flush()
        self._batches.close()
        self._rows.close()
        for file in self._files.values():
            file.close()

    def add(self, row: Row, label: Label | None, day: int) -> None:
        """Append a row; `label` is what its own votes come to, `day` which of two rows is the later one."""
        prompt = "\0".join([f"{role}\1{text}" for role, text in row.messages]).encode()
        exact, answer = self._exact(prompt), row.answer.encode()
        words = " ".join(normal_words(asked(row.messages))).encode()
        voters = {vote.who: self._rater(vote.who.encode()) for vote in row.votes if vote.named}
        hashed = _Hashed(
            self._id(row.example_id.encode()),
            exact,
            # Answers that read alike but were sampled as other tokens are one answer: people voted on what they read.
            self._pair(exact + answer),
            self._cluster(words),
            self._conversation(row.conversation_id.encode()),
            b"" if label is None or label.rater is None else voters[label.rater],
            b"".join(voters.values()),
            words,
            _encode_votes(row.votes),
            day,
            row,
            label or _NO_LABEL,
            -1 if label is None else int(label.desirable),
        )
        self._batch.append(hashed)
        self._bytes += len(prompt) + len(answer) + len(row.completion_ids or b"") + len(row.prompt_ids or b"")
        if len(self._batch) == BATCH_ROWS or self._bytes > BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        ids = units_of([hashed.id for hashed in self._batch])
        order = np.argsort(ids, kind="stable")
        batch = [self._batch[n] for n in order.tolist()]
        self._batch, self._bytes = [], 0
        raters = [hashed.rater or bytes(8) for hashed in batch]
        columns: dict[str, Column] = {
            "id": ids[order],
            "day": np.array([hashed.day for hashed in batch]),
            "pair": units_of([hashed.pair for hashed in batch]),
            "exact_prompt": units_of([hashed.exact_prompt for hashed in batch]),
            "prompt": units_of([hashed.prompt for hashed in batch]),
            "conversation": units_of([hashed.conversation for hashed in batch]),
            "rater": np.where([hashed.rater != b"" for hashed in batch], units_of(raters), 0),
            "voters": units_of([hashed.voters for hashed in batch]),
            "voters_size": np.array([len(hashed.voters) // 8 for hashed in batch]),
            "votes": np.frombuffer(b"".join([hashed.votes for hashed in batch]), np.uint8),
            "votes_size": np.array([len(hashed.votes) for hashed in batch]),
            "label": np.array([hashed.desirable for hashed in batch]),
            "weight": np.array([hashed.label.weight for hashed in batch]),
            "hlc": np.array([hashed.label.hlc for hashed in batch]),
        }
        columns["set"], columns["set_size"] = shingle_sets([hashed.words for hashed in batch])
        for name, values in columns.items():
            values.astype(COLUMNS[name], copy=False).tofile(self._files[name])
        for n, keys in enumerate(band_keys(columns["set"], columns["set_size"], self._similarity).T):
            keys.tofile(self._files[f"band_{n}"])
        self._batches.write_batch(row_batch([(hashed.row, hashed.label) for hashed in batch]))


class _Hashed(NamedTuple):
    """A row on its way into the files, with what it is known by."""

    id: bytes
    exact_prompt: bytes
    pair: bytes
    prompt: bytes
    conversation: bytes
    rater: bytes
    voters: bytes
    words: bytes
    votes: bytes
    day: int
    row: Row
    label: Label
    desirable: int


_NO_LABEL = Label(desirable=False, weight=0.0, rater=None, hlc=0, raters=[])


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
        count = 1 + sum(len(rows.map) for rows in self._rows) // RANGE_BYTES
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
