"""Is the new adapter worse? An anytime-valid sequential test on thumbs, and what follows from it. Pure.

The e-process: for one Bernoulli stream with s successes of n, the Beta(1, 1) mixture
M(p) = B(s + 1, n - s + 1) / (p^s (1 - p)^(n - s)) is a nonnegative martingale of mean 1 at the true p (Robbins 1970;
Howard et al., Annals of Statistics 2021, sec. 4.3). The product over two independent streams is one too, at the true
pair, and its minimum over every pair that the null allows is never above that. So by Ville's inequality the chance that
`e_value` ever reaches 1 / alpha, while the new adapter is not worse by more than the tolerated drop, is at most alpha:
one may look after every vote. It depends on the counts alone, so it is computed afresh from the store at each look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loop.settings import RolloutSettings


@dataclass(frozen=True)
class Thumbs:
    """Votes on an adapter's answers; one for each conversation, for votes of one person are not independent."""

    up: int
    down: int

    @property
    def total(self) -> int:
        return self.up + self.down

    @property
    def share(self) -> float:
        """Thumbs up of all thumbs; NaN without any."""
        return self.up / self.total if self.total else math.nan


@dataclass(frozen=True)
class Decision:
    """What to do with an adapter that is being watched, and why."""

    action: Literal["hold", "advance", "roll_back"]
    reason: str
    e_value: float


def e_value(new: Thumbs, old: Thumbs, min_drop: float = 0.0) -> float:
    """Evidence against "the new share of thumbs up is at least the old one minus `min_drop`", as an e-value."""
    mixture = _log_beta(new.up + 1, new.down + 1) + _log_beta(old.up + 1, old.down + 1)
    return math.exp(min(mixture - _null_log_likelihood(new, old, min_drop), 700.0))


def decide(
    settings: RolloutSettings, *, new: Thumbs, old: Thumbs, elapsed_s: float, step_s: float, min_votes: int
) -> Decision:
    """Roll back once the evidence reaches 1 / alpha; advance once time and votes of the step are there; else hold."""
    evidence = e_value(new, old, settings.min_drop)
    seen = f"{_percent(new)} of {new.total} thumbs up against {_percent(old)} of {old.total}, e-value {evidence:.3g}"
    if evidence >= 1 / settings.alpha:
        return Decision("roll_back", f"live thumbs got worse: {seen} >= {1 / settings.alpha:g}", evidence)
    if elapsed_s < step_s:
        return Decision("hold", f"{elapsed_s:.0f} of {step_s:.0f} s; {seen}", evidence)
    if new.total < min_votes:
        return Decision("hold", f"{new.total} of {min_votes} votes; {seen}", evidence)
    return Decision("advance", seen, evidence)


def _null_log_likelihood(new: Thumbs, old: Thumbs, min_drop: float) -> float:
    """The highest log-likelihood of both counts over {(p_new, p_old): p_new >= p_old - min_drop}."""
    if not new.total or not old.total or new.share >= old.share - min_drop:  # the null holds the maximum itself
        return _log_likelihood(new, new.share) + _log_likelihood(old, old.share)
    # On the border p_old = p_new + min_drop the log-likelihood is concave in p_new: ternary search.
    low, high = 0.0, 1.0 - min_drop
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _border(new, old, min_drop, left) < _border(new, old, min_drop, right):
            low = left
        else:
            high = right
    return _border(new, old, min_drop, (low + high) / 2)


def _border(new: Thumbs, old: Thumbs, min_drop: float, p_new: float) -> float:
    return _log_likelihood(new, p_new) + _log_likelihood(old, p_new + min_drop)


def _log_likelihood(thumbs: Thumbs, p: float) -> float:
    value = 0.0
    for count, share in ((thumbs.up, p), (thumbs.down, 1 - p)):
        if count:
            value += count * math.log(share) if share > 0 else -math.inf
    return value


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _percent(thumbs: Thumbs) -> str:
    return f"{100 * thumbs.share:.0f} %" if thumbs.total else "none"
