"""Checks and what they come to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loop.gate.bootstrap import Interval

Verdict = Literal["pass", "fail", "insufficient"]
# not_asked: the job says that this is not to be checked. not_counted: a figure beside the checks; it decides nothing.
CheckVerdict = Literal["pass", "fail", "insufficient", "not_asked", "not_counted"]


@dataclass(frozen=True)
class Check:
    """One condition on a candidate. `low` and `high` bound `value` at the configured confidence."""

    name: str
    title: str
    verdict: CheckVerdict
    value: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    rule: str = ""
    """What the threshold asks, in words."""
    unit: str = ""
    text: str = ""
    """Why the verdict is what it is, where the numbers do not say it."""


def must_be_above(name: str, title: str, interval: Interval, threshold: float, *, unit: str = "") -> Check:
    """Passes where the lower bound is above the threshold; not shown is not passed."""
    rule = f"lower bound above {threshold:g}"
    is_met = interval.low is not None and interval.low > threshold
    return _judged(name, title, interval, threshold, rule, is_met, unit)


def must_be_at_most(name: str, title: str, interval: Interval, threshold: float, *, unit: str = "") -> Check:
    """Passes where the upper bound is at most the threshold."""
    rule = f"upper bound at most {threshold:g}"
    is_met = interval.high is not None and interval.high <= threshold
    return _judged(name, title, interval, threshold, rule, is_met, unit)


def information(name: str, title: str, interval: Interval, *, unit: str = "", text: str = "") -> Check:
    """A figure with its interval that decides nothing."""
    return Check(name, title, "not_counted", interval.value, interval.low, interval.high, unit=unit, text=text)


def uncomputed(name: str, title: str, text: str, threshold: float | None = None) -> Check:
    """A check that should have been made and could not be."""
    return Check(name, title, "insufficient", threshold=threshold, text=text)


def decide(checks: Sequence[Check]) -> Verdict:
    """`fail` if any check fails; else `insufficient` if any is, or if none passed; else `pass`."""
    verdicts = {check.verdict for check in checks}
    if "fail" in verdicts:
        return "fail"
    if "insufficient" in verdicts or "pass" not in verdicts:
        return "insufficient"
    return "pass"


def _judged(name: str, title: str, interval: Interval, threshold: float, rule: str, is_met: bool, unit: str) -> Check:
    if interval.value is None or interval.low is None or interval.high is None:
        text = "no interval: too many resamples lack what the figure needs"
        return Check(name, title, "insufficient", interval.value, threshold=threshold, rule=rule, unit=unit, text=text)
    verdict: CheckVerdict = "pass" if is_met else "fail"
    return Check(name, title, verdict, interval.value, interval.low, interval.high, threshold, rule, unit)
