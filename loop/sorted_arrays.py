"""What sorted arrays tell: where runs of equal values begin, how long they are, and whether a value is there. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]
Sorted = npt.NDArray[Any]


def is_first(values: Sorted) -> Flags:
    """Which values are unlike the one before them."""
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return first


def run_starts(values: Sorted) -> npt.NDArray[np.int64]:
    """Where the run begins that each value is in."""
    places = np.arange(len(values))
    return np.maximum.accumulate(np.where(is_first(values), places, 0))


def run_sizes(values: Sorted) -> npt.NDArray[np.int64]:
    """How long the run is that each value is in."""
    starts = np.flatnonzero(is_first(values))
    sizes = np.diff(starts, append=len(values))
    return np.repeat(sizes, sizes)


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
