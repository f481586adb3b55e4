"""Rows on the way through curation: their bodies in a temporary file, of each only a few numbers in memory.

So a snapshot takes a few hundred bytes of memory a row, not the row; curation, split and caps are array operations.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from loop.snapshot.curate import Label, Row
from loop.snapshot.prompts import DistinctPrompts, asked, normal_words
from loop.snapshot.split import CLUSTER, CONVERSATION, RATER, unit_of

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Row)


@dataclass
class Columns:
    """What is known of each row in memory; all arrays are [n] but the raters', which are [votes]."""

    offset: I64
    order: tuple[U64, I64]
    """(hash of the example's id, day): what rows are sorted by, so that no order of arrival shows."""
    pair: U64
    """Hash of the exact prompt and answer."""
    exact_prompt: U64
    prompt: I64
    """Index among the distinct prompts."""
    conversation: U64
    rater: U64
    """Who the label is ascribed to; 0 for nobody."""
    voters: U64
    voter_row: I64
    """The row that each entry of `voters` has voted on."""
    label: npt.NDArray[np.int8]
    """1 desirable, 0 undesirable, -1 where the votes come to nothing."""
    weight: npt.NDArray[np.float64]
    hlc: I64


class Spool:
    """An append-only file of rows with their columns. Use as a context manager; the file is the caller's to delete."""

    def __init__(self, path: Path, salt: str) -> None:
        self._file = path.open("w+b")
        self._salt = salt
        self._end = 0
        self._ints = {name: array("q") for name in ("offset", "day", "prompt", "voter_row", "hlc", "label")}
        self._hashes = {name: array("Q") for name in ("id", "pair", "exact_prompt", "conversation", "rater", "voters")}
        self._weights = array("d")
        self.prompts = DistinctPrompts()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, row: Row, label: Label | None, day: int) -> None:
        """Append a row; `label` is what its own votes come to, `day` orders the snapshot."""
        ints, hashes, number = self._ints, self._hashes, len(self)
        ints["offset"].append(self._end)
        body = _encode(row)
        self._file.write(len(body).to_bytes(4, "little"))
        self._file.write(body)
        self._end += 4 + len(body)
        prompt = "\0".join(f"{role}\1{text}" for role, text in row.messages)
        # Answers that read the same but were sampled as other tokens are one answer: people voted on what they read.
        hashes["pair"].append(unit_of(self._salt, "pair", f"{prompt}\2{row.answer}"))
        hashes["exact_prompt"].append(unit_of(self._salt, "exact", prompt))
        words = normal_words(asked([{"role": role, "content": text} for role, text in row.messages]))
        ints["prompt"].append(self.prompts.add(words, unit_of(self._salt, CLUSTER, " ".join(words))))
        hashes["id"].append(unit_of(self._salt, "example", row.example_id))
        hashes["conversation"].append(self.unit(CONVERSATION, row.conversation_id))
        hashes["rater"].append(0 if label is None or label.rater is None else self.unit(RATER, label.rater))
        for vote in row.votes:
            if vote.named:
                hashes["voters"].append(self.unit(RATER, vote.who))
                ints["voter_row"].append(number)
        ints["day"].append(day)
        ints["label"].append(-1 if label is None else int(label.desirable))
        ints["hlc"].append(0 if label is None else label.hlc)
        self._weights.append(0.0 if label is None else label.weight)

    def unit(self, kind: str, name: str) -> int:
        return unit_of(self._salt, kind, name)

    def columns(self) -> Columns:
        """The columns of all rows, as arrays over the same memory: nothing is added afterwards."""
        ints = {name: np.asarray(values, dtype=np.int64) for name, values in self._ints.items()}
        hashes = {name: np.asarray(values, dtype=np.uint64) for name, values in self._hashes.items()}
        return Columns(
            offset=ints["offset"],
            order=(hashes["id"], ints["day"]),
            pair=hashes["pair"],
            exact_prompt=hashes["exact_prompt"],
            prompt=ints["prompt"],
            conversation=hashes["conversation"],
            rater=hashes["rater"],
            voters=hashes["voters"],
            voter_row=ints["voter_row"],
            label=ints["label"].astype(np.int8),
            weight=np.asarray(self._weights, dtype=np.float64),
            hlc=ints["hlc"],
        )

    def read(self, offsets: Sequence[int] | I64) -> list[Row]:
        """The rows at these offsets, in this order."""
        rows = []
        for offset in offsets:
            self._file.seek(int(offset))
            size = int.from_bytes(self._file.read(4), "little")
            rows.append(_decoder.decode(self._file.read(size)))
        return rows
