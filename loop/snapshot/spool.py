"""Rows on the way through curation: in files, a column each.

Curation, split and caps look at few columns at a time, as arrays of 8 bytes a row and less; the rows' texts and token
ids stay on disk, in Arrow's format and in the snapshot's own columns, until they are written. So a snapshot takes some
tens of bytes of memory a row, whatever is in it.

A folder of these files is written by one process; several are read as one, whose rows are theirs one after the other.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loop.minhash import SKETCH, shingle_sets
from loop.snapshot.curate import Label, Row, Vote
from loop.snapshot.near import band_keys, count_bands, signatures
from loop.snapshot.split import CLUSTER, CONVERSATION, RATER, units_of
from loop.snapshot.write import ROW_SCHEMA, row_batch, uncache

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
Column = npt.NDArray[Any]

COLUMNS = {
    "pair": np.uint64,  # digest of prompt and answer
    "exact_prompt": np.uint64,  # and of the prompt alone
    "prompt": np.uint64,  # unit
    "conversation": np.uint64,  # unit
    "rater": np.uint64,  # unit of whom the label is ascribed to; 0 for nobody
    "voters": np.uint64,  # units of all who voted, some to a row
    "voters_size": np.int32,
    "votes": np.uint8,  # msgpack, some bytes to a row
    "votes_size": np.int32,
    "asked": np.uint8,  # the words that the prompt is clustered on, some bytes to a row
    "asked_size": np.int32,
    "shingles": np.int32,  # how many the prompt has
    "signature": np.uint64,  # of these
    "label": np.int8,  # 1 desirable, 0 undesirable, -1 where the votes come to nothing
    "weight": np.float64,
    "hlc": np.int64,
}
ROWS = "rows"
BATCH_ROWS = 2_048
BATCH_BYTES = 16 << 20
_PIECES_AT_ONCE = 10_000
_READ_BYTES = 1 << 20
_encode_votes = msgspec.msgpack.Encoder().encode
_decode_votes = msgspec.msgpack.Decoder(list[Vote]).decode


class Spool:
    """Appends rows to the files of a folder of its own. Use as a context manager: at its end all is on disk."""

    def __init__(self, folder: Path, salt: str, similarity: float) -> None:
        folder.mkdir(parents=True)
        self._salt, self._similarity = salt, similarity
        names = [*COLUMNS, *(f"band_{n}" for n in range(count_bands(similarity)))]
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}
        self._rows_file = (folder / ROWS).open("wb")
        self._rows = pa.ipc.new_stream(self._rows_file, ROW_SCHEMA)
        self._batch: list[tuple[Row, Label | None]] = []
        self._batch_bytes = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self._flush()
        finally:
            for file in (self._rows, self._rows_file, *self._files.values()):
                file.close()

    def add(self, row: Row, label: Label | None) -> None:
        """Append a row; `label` is what its own votes come to."""
        self._batch.append((row, label))
        self._batch_bytes += len(row.example.content)
        if len(self._batch) == BATCH_ROWS or self._batch_bytes > BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if not batch:
            return
        rows, settled = zip(*batch, strict=True)
        labels = [label or _NO_LABEL for label in settled]
        asked = [row.content.asked for row in rows]
        voters: list[str] = []
        voters_sizes = []
        for row in rows:
            begin = len(voters)
            for vote in row.votes:
                if vote.named:
                    voters.append(vote.who)
            voters_sizes.append(len(voters) - begin)
        voter_units = units_of(self._salt, RATER, [who.encode() for who in voters])
        unit_of = dict(zip(voters, voter_units.tolist(), strict=True))
        votes = [_encode_votes(row.votes) for row in rows]
        sketch = np.frombuffer(b"".join([row.example.sketch for row in rows]), SKETCH)
        columns: dict[str, Column] = {
            # Answers that read alike but were sampled as other tokens are one: people voted on what they read.
            "pair": np.array([row.pair_digest for row in rows], np.int64).view(np.uint64),
            "exact_prompt": np.array([row.content.prompt_digest for row in rows], np.int64).view(np.uint64),
            "prompt": units_of(self._salt, CLUSTER, asked),
            "conversation": units_of(self._salt, CONVERSATION, [row.conversation_id.encode() for row in rows]),
            "rater": np.array([unit_of[label.rater] if label.rater is not None else 0 for label in labels], np.uint64),
            "voters": voter_units,
            "voters_size": np.array(voters_sizes),
            "votes": np.frombuffer(b"".join(votes), np.uint8),
            "votes_size": np.array(list(map(len, votes))),
            "asked": np.frombuffer(b"".join(asked), np.uint8),
            "asked_size": np.array(list(map(len, asked))),
            "shingles": sketch["size"],
            "signature": signatures(sketch["least"]),
            "label": np.array([-1 if label is None else label.desirable for label in settled]),
            "weight": np.array([label.weight for label in labels]),
            "hlc": np.array([label.hlc for label in labels]),
        }
        for name, values in columns.items():
            self._files[name].write(np.ascontiguousarray(values, COLUMNS[name]).data)
        for n, keys in enumerate(band_keys(sketch["least"], self._similarity)):
            self._files[f"band_{n}"].write(keys.data)
        self._rows.write_batch(row_batch(rows, labels))
        uncache(self._rows_file)


_NO_LABEL = Label(desirable=False, weight=0.0, rater=None, hlc=0, raters=[])


class Spooled:
    """The rows of some spools' folders, as one. Use as a context manager."""

    def __init__(self, folders: Sequence[Path], similarity: float) -> None:
        self._folders = folders
        self.bands = count_bands(similarity)
        self._votes, self._asked = (_Pieces([folder / name for folder in folders]) for name in ("votes", "asked"))

    def __enter__(self) -> Spooled:
        return self

    def __exit__(self, *exc: object) -> None:
        self._votes.close()
        self._asked.close()

    def column(self, name: str) -> Column:
        """A column of all rows, in an array of its own."""
        dtype = np.dtype(COLUMNS.get(name, np.uint32))
        sizes = [(folder / name).stat().st_size for folder in self._folders]
        values = np.empty(sum(sizes) // dtype.itemsize, dtype)
        into, at = values.view(np.uint8).data, 0
        for folder, size in zip(self._folders, sizes, strict=True):
            with (folder / name).open("rb", buffering=0) as file:
                while size:
                    read = file.readinto(into[at : at + size])
                    at, size = at + read, size - read
        return values

    def shingles(self, starts: I64, sizes: I64) -> U32:
        """The shingles of prompts, flat, whose words these are of all asked ones' bytes."""
        return shingle_sets(self._asked.read(starts.tolist(), sizes.tolist()))[0]

    def read_ahead(self) -> None:
        """Have the system read what `shingles` will be asked for: in order, not by the piece."""
        self._asked.read_ahead()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, in order, once: what was read is gone from the disk."""
        for folder in self._folders:
            with (folder / ROWS).open("rb", buffering=0) as file, pa.ipc.open_stream(file) as batches:
                for batch in batches:
                    uncache(file)
                    yield batch
            (folder / ROWS).unlink()

    def votes(self, starts: I64, sizes: I64) -> Iterator[list[Vote]]:
        """The votes on each of the rows that take these of all votes' bytes."""
        for begin in range(0, len(starts), _PIECES_AT_ONCE):
            part = slice(begin, begin + _PIECES_AT_ONCE)
            yield from map(_decode_votes, self._votes.read(starts[part].tolist(), sizes[part].tolist()))


class _Pieces:
    """Files that are read as one. No one read goes over a file's end."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb", buffering=0) for path in paths]
        self._begins = list(accumulate((path.stat().st_size for path in paths[:-1]), initial=0))

    def read(self, starts: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """So many bytes from each of these places on."""
        pieces = [bisect_right(self._begins, start) - 1 for start in starts]
        spans = [
            (self._files[n].fileno(), size, start - self._begins[n])
            for n, start, size in zip(pieces, starts, sizes, strict=True)
        ]
        for file, size, start in spans:  # so that the disk is asked for all of it at once, not for one after the other
            os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
        return [os.pread(*span) for span in spans]

    def read_ahead(self) -> None:
        """Read all of it, for the system's cache."""
        buffer = bytearray(_READ_BYTES)
        for file in self._files:
            while file.readinto(buffer):
                pass

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
