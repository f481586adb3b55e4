"""What each row's votes come to, as columns; of rows that stand for several, with the votes on all of them."""

from __future__ import annotations

import os
from array import array
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loop.snapshot.curate import Label
from loop.snapshot.split import RATER, units_of
from loop.snapshot.spool import Spooled
from loop.snapshot.write import string_lists, strings
from loop.sorted_arrays import contains

Ascribed = tuple[str | None, list[str]]
"""The rater that a label is ascribed to, and all whose votes made it."""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Ascribed).decode


class Labels:
    """Columns [rows]. Who made the labels that were set stands in a file. Use as a context manager."""

    def __init__(self, rows: Spooled, path: Path, salt: str) -> None:
        self.desirable: npt.NDArray[np.int8] = rows.column("label")  # as there: -1 for no label
        self.weight: npt.NDArray[np.float64] = rows.column("weight")
        self.hlc: npt.NDArray[np.int64] = rows.column("hlc")
        self.rater: npt.NDArray[np.uint64] = rows.column("rater")
        self._salt = salt
        self._file = path.open("w+b")
        self._set, self._ends = array("q"), array("q", [0])

    def __enter__(self) -> Labels:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def set(self, row: int, label: Label | None) -> None:
        """Give a row another label than its own votes'; each row once."""
        self.desirable[row] = -1 if label is None else int(label.desirable)
        if label is None:
            return
        self.weight[row], self.hlc[row] = label.weight, label.hlc
        self.rater[row] = 0 if label.rater is None else units_of(self._salt, RATER, [label.rater.encode()])[0]
        self._set.append(row)
        self._ends.append(self._ends[-1] + self._file.write(_encode((label.rater, label.raters))))

    def ascribe(self, batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """The batch of these rows, which are sorted, with `rater` and `raters` of the labels that were set."""
        if len(rows) == 0:
            return batch
        nth = np.arange(*np.searchsorted(self._sorted, (rows[0], rows[-1] + 1)))
        nth = nth[contains(rows, self._sorted[nth])]
        if len(nth) == 0:
            return batch
        at = np.searchsorted(rows, self._sorted[nth])
        ascribed = [self._ascribed(n) for n in self._order[nth].tolist()]
        # Behind the batch's own values, to be taken from there.
        source = np.arange(len(rows))
        source[at] = len(rows) + np.arange(len(at))
        raters, all_raters = zip(*ascribed, strict=True)
        for name, values in (("rater", strings(raters)), ("raters", string_lists(all_raters))):
            place = batch.schema.get_field_index(name)
            column = pa.concat_arrays([batch[name], values]).take(pa.array(source))
            batch = batch.set_column(place, batch.schema.field(name), column)
        return batch

    @cached_property
    def _order(self) -> npt.NDArray[np.int64]:
        """In the order of rows, once all are set."""
        self._file.flush()
        return np.argsort(np.asarray(self._set, dtype=np.int64))

    @cached_property
    def _sorted(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._set, dtype=np.int64)[self._order]

    def _ascribed(self, nth: int) -> Ascribed:
        begin, end = self._ends[nth : nth + 2]
        found: Ascribed = _decode(os.pread(self._file.fileno(), end - begin, begin))
        return found
