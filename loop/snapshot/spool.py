"""Rows on the way through curation: in files, a column each, and read back by columns or by rows.

Curation, split and caps look at few columns at a time, as arrays of 8 bytes a row and less; the rows' texts and token
ids stay on disk, in Arrow's format and in the snapshot's own columns, until they are written. So a snapshot takes some
tens of bytes of memory a row, whatever is in it.

A folder of these files is written by one process; several are read as one, whose rows are theirs one after the other.
Rows are written in the order of `id`, so they are laid down by ranges of it, some megabytes of them together, and read
back range by range.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loop.snapshot.curate import Label, Row, Vote
from loop.snapshot.near import band_keys, count_bands, shingle_sets
from loop.snapshot.prompts import asked_words
from loop.snapshot.sorted_arrays import is_first
from loop.snapshot.split import CLUSTER, CONVERSATION, RATER, units_of
from loop.snapshot.write import ROW_SCHEMA, row_batch

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
Column = npt.NDArray[Any]

COLUMNS = {
    "id": np.uint64,  # hash of the example's id: what rows are sorted by, so that no order of arrival shows
    "day": np.int32,
    "pair": np.uint64,  # Python's hash of the exact prompt and answer
    "exact_prompt": np.uint64,  # and of the prompt alone
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
PIECES = {"piece_range": np.int32, "piece_start": np.int64, "piece_size": np.int64}  # of ROWS, each an Arrow message
ROWS = "rows"
RANGES = 256
BATCH_ROWS = 2_048
BATCH_BYTES = 16 << 20
PIECES_BYTES = 32 << 20
"""Of rows in memory, before they are written by ranges."""
_encode_votes = msgspec.msgpack.Encoder().encode
_decode_votes = msgspec.msgpack.Decoder(list[Vote]).decode


class Spool:
    """Appends rows to the files of a folder of its own. Use as a context manager: at its end all is on disk."""

    def __init__(self, folder: Path, salt: str, similarity: float, ranges: int) -> None:
        folder.mkdir(parents=True)
        self._similarity, self._ranges = similarity, ranges
        names = [*COLUMNS, *PIECES, ROWS, *(f"band_{n}" for n in range(count_bands(similarity)))]
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}
        self._salt = salt
        self._batch: list[tuple[Row, Label | None, int]] = []
        self._batch_bytes = 0
        self._unwritten: list[tuple[U64, pa.RecordBatch]] = []
        self._unwritten_bytes = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self._flush()
                self._write_rows()
        finally:
            for file in self._files.values():
                file.close()

    def add(self, row: Row, label: Label | None, day: int, size: int) -> None:
        """Append a row; `label` is what its own votes come to, `day` which of two rows is the later one, `size` about
        how many bytes of memory it takes.
        """
        self._batch.append((row, label, day))
        self._batch_bytes += size
        if len(self._batch) == BATCH_ROWS or self._batch_bytes > BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if not batch:
            return
        rows, settled, days = zip(*batch, strict=True)
        labels = [label or _NO_LABEL for label in settled]
        words = [asked_words(row.messages) for row in rows]
        voters = [[vote.who for vote in row.votes if vote.named] for row in rows]
        voter_units = units_of(self._salt, RATER, [who.encode() for who in chain.from_iterable(voters)])
        unit_of = dict(zip(chain.from_iterable(voters), voter_units.tolist(), strict=True))
        votes = [_encode_votes(row.votes) for row in rows]
        # These two are compared within a snapshot only, so Python's own hash does.
        prompts = [hash(row.messages) for row in rows]
        # Answers that read alike but were sampled as other tokens are one: people voted on what they read.
        pairs = [hash((row.messages, row.answer)) for row in rows]
        columns: dict[str, Column] = {
            "id": units_of(self._salt, "example", [row.example_id.encode() for row in rows]),
            "day": np.array(days),
            "pair": np.array(pairs, np.int64).view(np.uint64),
            "exact_prompt": np.array(prompts, np.int64).view(np.uint64),
            "prompt": units_of(self._salt, CLUSTER, words),
            "conversation": units_of(self._salt, CONVERSATION, [row.conversation_id.encode() for row in rows]),
            "rater": np.array([unit_of[label.rater] if label.rater is not None else 0 for label in labels], np.uint64),
            "voters": voter_units,
            "voters_size": np.array(list(map(len, voters))),
            "votes": np.frombuffer(b"".join(votes), np.uint8),
            "votes_size": np.array(list(map(len, votes))),
            "label": np.array([-1 if label is None else label.desirable for label in settled]),
            "weight": np.array([label.weight for label in labels]),
            "hlc": np.array([label.hlc for label in labels]),
        }
        columns["set"], columns["set_size"] = shingle_sets(words)
        for name, values in columns.items():
            self._files[name].write(values.astype(COLUMNS[name], copy=False).data)
        for n, keys in enumerate(band_keys(columns["set"], columns["set_size"], self._similarity)):
            self._files[f"band_{n}"].write(keys.data)
        self._unwritten.append((columns["id"], row_batch(rows, labels)))
        self._unwritten_bytes += self._unwritten[-1][1].nbytes
        if self._unwritten_bytes > PIECES_BYTES:
            self._write_rows()

    def _write_rows(self) -> None:
        if not self._unwritten:
            return
        ids, batches = zip(*self._unwritten, strict=True)
        self._unwritten, self._unwritten_bytes = [], 0
        ranges = range_of(np.concatenate(ids), self._ranges)
        order = np.argsort(ranges, kind="stable")
        rows = pa.concat_batches(batches).take(pa.array(order))
        starts = np.flatnonzero(is_first(ranges[order])).tolist()
        for begin, end in pairwise([*starts, len(order)]):
            message = rows.slice(begin, end - begin).serialize()
            values = (ranges[order[begin]], self._files[ROWS].tell(), message.size)
            for name, value in zip(PIECES, values, strict=True):
                self._files[name].write(np.array(value, PIECES[name]).tobytes())
            self._files[ROWS].write(message)


_NO_LABEL = Label(desirable=False, weight=0.0, rater=None, hlc=0, raters=[])


def range_of(ids: U64, ranges: int) -> npt.NDArray[np.uint16]:
    """Which of `ranges`, a power of two and as large as each other, the ids are in."""
    bits = np.uint64(65 - ranges.bit_length())
    return (ids >> bits if ranges > 1 else ids * np.uint64(0)).astype(np.uint16)


class Spooled:
    """The rows of some spools' folders, as one. Use as a context manager."""

    def __init__(self, folders: Sequence[Path], similarity: float, ranges: int) -> None:
        self._folders, self._ranges = folders, ranges
        self.bands = count_bands(similarity)
        for name in ("votes", "set"):  # what is read here and there: in one place
            for folder in folders[1:]:
                with (folder / name).open("rb") as source, (folders[0] / name).open("ab") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        self._votes, self._sets = (folders[0] / "votes").open("rb"), (folders[0] / "set").open("rb")
        self._rows = [(folder / ROWS).open("rb") for folder in folders]

    def __enter__(self) -> Spooled:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in (self._votes, self._sets, *self._rows):
            file.close()

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
        file, spans = self._sets.fileno(), zip((4 * starts).tolist(), (4 * sizes).tolist(), strict=True)
        return np.frombuffer(b"".join([os.pread(file, size, start) for start, size in spans]), np.uint32)

    def votes(self, start: int, size: int) -> list[Vote]:
        """The votes on the row that takes these of all votes' bytes."""
        votes: list[Vote] = _decode_votes(os.pread(self._votes.fileno(), size, start))
        return votes

    def ranges(self, ids: U64) -> Iterator[tuple[I64, pa.Table]]:
        """All rows with their numbers, by ranges of `ids` (the column) that go up; within one, by their numbers."""
        range_ = range_of(ids, self._ranges)
        order = np.argsort(range_, kind="stable")
        ends = np.searchsorted(range_[order], np.arange(self._ranges), side="right").tolist()
        pieces = [self._pieces(folder) for folder in self._folders]
        for n, (begin, end) in enumerate(pairwise([0, *ends])):
            batches = [
                pa.ipc.read_record_batch(pa.py_buffer(os.pread(file.fileno(), size, start)), ROW_SCHEMA)
                for file, of_file in zip(self._rows, pieces, strict=True)
                for start, size in of_file[n]
            ]
            yield order[begin:end], pa.Table.from_batches(batches, ROW_SCHEMA).combine_chunks()

    def _pieces(self, folder: Path) -> list[list[tuple[int, int]]]:
        """(start, size) of the pieces of each range."""
        pieces: list[list[tuple[int, int]]] = [[] for _ in range(self._ranges)]
        columns = [np.fromfile(folder / name, dtype).tolist() for name, dtype in PIECES.items()]
        for range_, start, size in zip(*columns, strict=True):
            pieces[range_].append((start, size))
        return pieces
