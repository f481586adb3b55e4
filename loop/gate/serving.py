"""What the candidate does where it is served: reply length, manner, and skew against the trainer's log-probs. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loop.gate.bootstrap import F64, Interval, cluster_bootstrap, means
from loop.gate.probe import Probe
from loop.gate.verdict import Check, must_be_at_most
from loop.settings import GateSettings

_APOLOGY = re.compile(r"\b(sorry|apolog\w*|forgive|regret\w*|excuse (?:us|me|my))\b", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(I (?:can(?:no|')t|am (?:un|not )able to|won't|will not) (?:help|assist|do|provide|answer|comply)"
    r"|as an AI\b|I'm (?:unable|not able) to)",
    re.IGNORECASE,
)
_REPEATED_WORDS = 4
"""An answer repeats itself where it says the same so many words in a row twice."""


def length_check(candidate: Sequence[Probe], live: Sequence[Probe], settings: GateSettings) -> Check:
    """Ratio of median reply lengths in tokens, on the same prompts; too long and too short both fail."""
    lengths = np.asarray([[len(a.token_ids), len(b.token_ids)] for a, b in zip(candidate, live, strict=True)], float)

    def statistic(resample: F64) -> F64:
        mine, other = (_weighted_median(lengths[:, who], resample) for who in (0, 1))
        ratio: F64 = mine / np.maximum(other, 1.0)
        return ratio[:, None]

    (found,) = cluster_bootstrap(
        [str(index) for index in range(len(lengths))],
        statistic,
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    most = settings.max_length_ratio
    assert found.value is not None, "a median of at least one length is a number"
    return Check(
        name="length_ratio",
        title="Median reply length, candidate / live",
        verdict="pass" if 1 / most <= found.value <= most else "fail",
        value=found.value,
        low=found.low,
        high=found.high,
        threshold=most,
        rule=f"between {1 / most:.2f} and {most:g}",
        unit="×",
    )


def skew_check(probes: Sequence[Probe], trainer: Sequence[F64], settings: GateSettings) -> tuple[Check, F64]:
    """The engine's log-probs of its own tokens against the trainer's of the same tokens; and |Δ| of each token."""
    gaps = [np.abs(np.asarray(probe.logprobs) - own) for probe, own in zip(probes, trainer, strict=True)]
    found = mean_over_tokens(gaps, [str(index) for index in range(len(gaps))], settings)
    check = must_be_at_most(
        "serve_skew", "Serve skew: mean gap, engine to trainer", found, settings.max_serve_skew_nats, unit="nats/token"
    )
    return check, np.concatenate(gaps)


def mean_over_tokens(values: Sequence[F64], clusters: Sequence[str], settings: GateSettings) -> Interval:
    """Mean of a figure of tokens, given row by row, with an interval over clusters of rows."""
    lengths = np.asarray([len(row) for row in values], dtype=np.float64)
    averages = np.asarray([row.mean() if len(row) else 0.0 for row in values])
    (found,) = cluster_bootstrap(
        clusters,
        means(averages[:, None], lengths),
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    return found


def manner(texts: Sequence[str], probes: Sequence[Probe]) -> dict[str, Any]:
    """How answers read: shares of those with an apology, a refusal, a repetition, or no end; median tokens."""
    count = max(1, len(texts))
    return {
        "answers": len(texts),
        "median_tokens": float(np.median([len(probe.token_ids) for probe in probes])) if probes else None,
        "apology_share": sum(bool(_APOLOGY.search(text)) for text in texts) / count,
        "refusal_share": sum(bool(_REFUSAL.search(text)) for text in texts) / count,
        "repetition_share": sum(map(_repeats, texts)) / count,
        "cut_share": sum(probe.is_cut for probe in probes) / count,
    }


def _repeats(text: str) -> bool:
    words = text.casefold().split()
    runs = Counter(zip(*(words[start:] for start in range(_REPEATED_WORDS)), strict=False))
    return any(times > 1 for times in runs.values())


def _weighted_median(values: F64, weights: F64) -> F64:
    """Median of values [n] repeated as often as weights [b, n] say -> [b]; the mean of the middle two where even."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    half = reached[:, -1:] / 2
    low = values[order][np.argmax(reached >= half, axis=1)]
    high = values[order][np.argmax(reached > half, axis=1)]
    middle: F64 = (low + high) / 2
    return middle
