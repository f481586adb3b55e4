"""Do the held-out votes prefer the candidate? Balanced accuracy, AUC and true pairs of the implicit reward. Pure numpy.

The reward of an answer is β (log π(y|x) − log π_ref(y|x)), the reference being the base (arXiv 2402.01306, section 3).
It says "desirable" where it exceeds β z0, z0 being the mean log-ratio of mismatched pairs (x, y′), at least 0. Ties
count half. So the base itself, whose ratios are all 0, has a balanced accuracy and an AUC of exactly one half: it is a
proper opponent for a first night's candidate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from loop.gate.bootstrap import F64, cluster_bootstrap
from loop.gate.verdict import Check, information, must_be_above
from loop.settings import GateSettings

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
CHANCE = 0.5
MAX_PAIRS_PER_PROMPT = 100


@dataclass(frozen=True)
class Ratios:
    """log π(y|x) − log π_ref(y|x) in nats: of each row, [n], and of its mismatched answer, [n], NaN without one."""

    matched: F64
    mismatched: F64

    @classmethod
    def of_base(cls, rows: int) -> Ratios:
        return cls(np.zeros(rows), np.zeros(rows))


@dataclass(frozen=True)
class HeldOut:
    """What the gate knows of the held-out rows: labels and weights [n], and who belongs together."""

    desirable: Flags
    weight: F64
    clusters: Sequence[str]
    """The rater, or without one the conversation, of each row."""
    prompts: Sequence[Hashable]


def reference_point(ratios: Ratios, weights: F64) -> F64:
    """z0 on each resample: weights [b, n] -> [b]."""
    has_other = np.isfinite(ratios.mismatched)
    used = weights[:, has_other]
    total = used.sum(1)
    mean: F64 = np.divide(used @ ratios.mismatched[has_other], total, out=np.zeros_like(total), where=total > 0)
    return mean.clip(min=0)


def balanced_accuracy(ratios: Ratios, desirable: Flags, weights: F64) -> F64:
    """Mean of the shares of either label that the reward gets right: weights [b, n] -> [b]; NaN without a label.

    z0 is estimated anew on each resample, so its uncertainty is in the interval.
    """
    over = ratios.matched[None] - reference_point(ratios, weights)[:, None]  # [b, n]
    says_yes = np.where(over > 0, 1.0, np.where(over == 0, 0.5, 0.0))
    right = np.where(desirable[None], says_yes, 1.0 - says_yes)
    return (_share(right, weights * desirable) + _share(right, weights * ~desirable)) / 2


def auc(scores: F64, desirable: Flags, weights: F64) -> F64:
    """Weighted share of (desirable, undesirable) couples that the scores order rightly: [n], [n], [b, n] -> [b]."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.nonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))[0]
    up = np.add.reduceat((weights * desirable)[:, order], starts, axis=1)  # [b, distinct scores]
    down = np.add.reduceat((weights * ~desirable)[:, order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2  # of the same score: half
    with np.errstate(invalid="ignore", divide="ignore"):
        result: F64 = (up * below).sum(1) / (up.sum(1) * down.sum(1))
    return result


def true_pairs(desirable: Flags, prompts: Sequence[Hashable]) -> tuple[Indices, Indices]:
    """Indices of (desirable, undesirable) rows of one prompt, at most MAX_PAIRS_PER_PROMPT of each prompt."""
    by_prompt: defaultdict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, prompt in enumerate(prompts):
        by_prompt[prompt][0 if desirable[index] else 1].append(index)
    pairs: list[tuple[int, int]] = []
    for ups, downs in by_prompt.values():
        pairs += [(up, down) for up in ups for down in downs][:MAX_PAIRS_PER_PROMPT]
    found = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def evidence_checks(held_out: HeldOut, settings: GateSettings) -> list[Check]:
    """Whether there is enough to judge by; `insufficient` where there is not."""
    clusters = len(set(held_out.clusters))
    rarer = int(min(held_out.desirable.sum(), (~held_out.desirable).sum()))
    return [
        Check(
            name,
            title,
            "pass" if value >= least else "insufficient",
            float(value),
            threshold=float(least),
            rule=f"at least {least}",
            unit=unit,
        )
        for name, title, value, least, unit in (
            ("evidence_clusters", "Held-out raters", clusters, settings.min_clusters, "raters"),
            ("evidence_rows", "Held-out rows of the rarer label", rarer, settings.min_rows_per_label, "rows"),
        )
    ]


def preference_checks(candidate: Ratios, live: Ratios, held_out: HeldOut, settings: GateSettings) -> list[Check]:
    """Evidence, gain, AUC and pairs, candidate against live on the same rows and the same resamples."""
    evidence = evidence_checks(held_out, settings)
    if len(held_out.desirable) == 0:
        return evidence
    desirable = held_out.desirable
    ups, downs = true_pairs(desirable, held_out.prompts)
    codes = np.unique(np.asarray(held_out.clusters, dtype=str), return_inverse=True)[1]
    is_own = codes[ups] == codes[downs]
    pair_weight = np.sqrt(held_out.weight[ups] * held_out.weight[downs])

    def statistic(resample: F64) -> F64:
        weights = resample * held_out.weight
        figures = []
        for ratios in (candidate, live):
            figures.append(balanced_accuracy(ratios, desirable, weights))
            figures.append(auc(ratios.matched, desirable, weights))
            # A pair of one cluster is drawn as often as the cluster is, one across two as often as both are.
            times = np.where(is_own, resample[:, ups], resample[:, ups] * resample[:, downs])
            figures.append(_share(_ordered(ratios.matched[ups], ratios.matched[downs])[None], times * pair_weight))
        mine, other = figures[:3], figures[3:]
        return np.stack([*figures, *(a - b for a, b in zip(mine, other, strict=True))], axis=1)

    names = ("balanced accuracy", "AUC", "true pairs")
    found = cluster_bootstrap(
        held_out.clusters, statistic, samples=settings.bootstrap_samples, confidence=settings.confidence
    )
    checks = [
        must_be_above("preference_gain", "Balanced accuracy, candidate − live", found[6], settings.min_preference_gain),
        must_be_above("reward_auc", "AUC of the candidate's reward", found[1], CHANCE),
    ]
    if any(check.verdict == "insufficient" for check in evidence):
        too_few = "too few held-out raters or rows to judge by"
        checks = [replace(check, verdict="insufficient", text=too_few) for check in checks]
    checks += [
        information(f"{who}_{name.replace(' ', '_').lower()}", f"{who.capitalize()}: {name}", found[place])
        for who, first in (("candidate", 0), ("live", 3))
        for place, name in enumerate(names, first)
        if not (who == "candidate" and name == "AUC") and (name != "true pairs" or len(ups))
    ]
    return evidence + checks


def _ordered(higher: F64, lower: F64) -> F64:
    """1 where the first is above the second, a half where they are equal, else 0: [p], [p] -> [p]."""
    return np.where(higher == lower, 0.5, (higher > lower).astype(np.float64))


def _share(right: F64, weights: F64) -> F64:
    """Weighted mean of right [b or 1, m] under weights [b, m] -> [b]; NaN where nothing has weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result: F64 = (right * weights).sum(1) / weights.sum(1)
    return result
