"""What sorted arrays tell: where runs of equal values begin, and whether a value is there, and how often. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]
Sorted = npt.NDArray[Any]

_MARK_BITS = 24


def is_first(values: Sorted) -> Flags:
    """Which values are unlike the one before them."""
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return first


def run_starts(values: Sorted) -> npt.NDArray[np.int64]:
    """Where the run begins that each value is in."""
    places = np.arange(len(values))
    return np.maximum.accumulate(np.where(is_first(values), places, 0))


def contains(values: Sorted, wanted: npt.NDArray[Any]) -> Flags:
    """Which of `wanted`, in whatever order, are among the sorted values."""
    if len(values) == 0:
        return np.zeros(len(wanted), bool)
    found: Flags = values[np.minimum(np.searchsorted(values, wanted), len(values) - 1)] == wanted
    return found


def distinct(values: npt.NDArray[Any]) -> Sorted:
    """The values once each, sorted. Unlike numpy's `unique` it sorts first, which is faster from some thousands on."""
    ordered = np.sort(values)
    return ordered[is_first(ordered)]


def find_frequent(values: npt.NDArray[Any], limit: int) -> npt.NDArray[np.int64]:
    """Where, in unsigned ones of any order, the values are that there are more than `limit` of: [n] -> [places].

    Where that is so of few it is little but a sort, which takes half the time of an `argsort`.
    """
    ordered = np.sort(values)
    frequent = distinct(ordered[limit:][ordered[limit:] == ordered[:-limit]])
    # A mark at the values' first bits leaves little more than what is to be looked up.
    shift = values.dtype.type(8 * values.itemsize - _MARK_BITS)
    marks = np.zeros(1 << _MARK_BITS, bool)
    marks[frequent >> shift] = True
    maybe = np.flatnonzero(marks[values >> shift])
    return maybe[contains(frequent, values[maybe])]
