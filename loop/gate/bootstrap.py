"""The cluster bootstrap: intervals for figures of rows that are not independent. Pure numpy.

Rows of one rater go together: whole clusters are drawn with replacement (Cameron, Gelbach, Miller 2008,
"Bootstrap-Based Improvements for Inference with Clustered Errors"; percentile intervals). A resample is a vector of row
weights, and a statistic maps weights [b, n] to figures [b, k], so all resamples are matrix operations, and figures that
are taken from one call (candidate, live, their difference) are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Statistic = Callable[[F64], F64]

ELEMENTS_AT_A_TIME = 1 << 22
MAX_UNDEFINED_SHARE = 0.05
"""Share of resamples on which a figure may be undefined (no row of one label, say) before it has no interval."""


@dataclass(frozen=True)
class Interval:
    """A figure on all rows and its bounds; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def cluster_bootstrap(
    clusters: Sequence[str], statistic: Statistic, *, samples: int, confidence: float, seed: int = 0
) -> list[Interval]:
    """An interval for each of the k figures of `statistic`; undefined figures are NaN in what it returns.

    With a single cluster there is nothing to resample, and no interval.
    """
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    count, rows = len(names), len(codes)
    if rows == 0:
        return []
    values = statistic(np.ones((1, rows)))[0]
    if count < 2:
        return [Interval(_number(value)) for value in values]
    random = np.random.default_rng(seed)
    step = max(1, ELEMENTS_AT_A_TIME // max(rows, count))
    drawn = []
    for begin in range(0, samples, step):
        draws = random.integers(0, count, (min(step, samples - begin), count))
        # How often each cluster was drawn, [b, count], by one bincount over all resamples.
        offsets = np.arange(len(draws))[:, None] * count
        times = np.bincount((draws + offsets).ravel(), minlength=len(draws) * count).reshape(len(draws), count)
        drawn.append(statistic(times[:, codes].astype(np.float64)))
    return [_interval(value, column, confidence) for value, column in zip(values, np.concatenate(drawn).T, strict=True)]


def means(columns: F64, weights: F64) -> Statistic:
    """The statistic of weighted means of the columns: [n, k] and row weights [n]."""

    def statistic(resample: F64) -> F64:
        w = resample * weights
        with np.errstate(invalid="ignore", divide="ignore"):
            result: F64 = (w @ columns) / w.sum(1, keepdims=True)
        return result

    return statistic


def _interval(value: float, drawn: F64, confidence: float) -> Interval:
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(defined) < (1 - MAX_UNDEFINED_SHARE) * len(drawn):
        return Interval(_number(value))
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(low), float(high))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
