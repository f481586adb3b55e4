"""The sequential test: valid however often it is looked at, and quick where the new adapter is worse."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.rollout.canary import Thumbs, decide, e_value
from loop.settings import RolloutSettings

counts = st.integers(0, 400)


def test_no_votes_are_no_evidence() -> None:
    assert e_value(Thumbs(0, 0), Thumbs(0, 0)) == pytest.approx(1.0)
    assert e_value(Thumbs(0, 0), Thumbs(100, 3)) <= 1.0


def test_hand_computed_value() -> None:
    # new 0 of 2, old 2 of 2: mixtures B(1, 3) = B(3, 1) = 1/3; under the null both shares are 1/2: (1/2)^4.
    assert e_value(Thumbs(0, 2), Thumbs(2, 0)) == pytest.approx((1 / 3) ** 2 / (1 / 2) ** 4)


@given(counts, counts, counts, counts)
def test_a_new_adapter_that_is_no_worse_so_far_is_never_evidence(a: int, b: int, c: int, d: int) -> None:
    new, old = Thumbs(a, b), Thumbs(c, d)
    if new.total and old.total and new.share >= old.share:
        assert e_value(new, old) <= 1.0 + 1e-9


@given(counts, counts, counts, counts, st.floats(0.001, 0.3))
def test_a_tolerated_drop_only_lowers_the_evidence(a: int, b: int, c: int, d: int, drop: float) -> None:
    new, old = Thumbs(a, b), Thumbs(c, d)
    assert e_value(new, old, drop) <= e_value(new, old) * (1 + 1e-6)


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.2))
def test_the_null_is_maximised_over_its_border(a: int, b: int, c: int, d: int, drop: float) -> None:
    """The closed search agrees with a grid over every pair that the null allows."""
    new, old = Thumbs(a, b), Thumbs(c, d)
    grid = [i / 200 for i in range(1, 200)]
    best = max(
        new.up * math.log(p) + new.down * math.log(1 - p) + old.up * math.log(q) + old.down * math.log(1 - q)
        for p in grid
        for q in grid
        if p >= q - drop
    )
    beta = sum(math.lgamma(t.up + 1) + math.lgamma(t.down + 1) - math.lgamma(t.total + 2) for t in (new, old))
    assert math.log(e_value(new, old, drop)) <= beta - best + 1e-9  # the grid can only miss the maximum


def _ever_rolled_back(rng: random.Random, p_new: float, p_old: float, looks: int, alpha: float) -> int | None:
    new = old = Thumbs(0, 0)
    for look in range(looks):
        new = Thumbs(new.up + (up := rng.random() < p_new), new.down + (not up))
        old = Thumbs(old.up + (up := rng.random() < p_old), old.down + (not up))
        if e_value(new, old) >= 1 / alpha:
            return look
    return None


def test_false_alarms_stay_below_alpha_though_one_looks_after_every_vote() -> None:
    rng = random.Random(1)
    alarms = sum(_ever_rolled_back(rng, 0.7, 0.7, 300, 0.1) is not None for _ in range(100))
    assert alarms <= 100 * 0.1


def test_a_clearly_worse_adapter_is_found_within_a_hundred_votes() -> None:
    rng = random.Random(2)
    found = [_ever_rolled_back(rng, 0.35, 0.75, 150, 0.05) for _ in range(50)]
    assert sum(look is not None and look < 100 for look in found) >= 45


SETTINGS = RolloutSettings(alpha=0.05)


@pytest.mark.parametrize(
    ("new", "elapsed_s", "action"),
    [
        (Thumbs(40, 10), 5.0, "hold"),  # too early
        (Thumbs(4, 1), 20.0, "hold"),  # too few votes
        (Thumbs(40, 10), 20.0, "advance"),
        (Thumbs(5, 45), 5.0, "roll_back"),  # never too early for that
    ],
)
def test_decisions(new: Thumbs, elapsed_s: float, action: str) -> None:
    decision = decide(SETTINGS, new=new, old=Thumbs(80, 20), elapsed_s=elapsed_s, step_s=10, min_votes=50)
    assert decision.action == action
    assert f"of {new.total}" in decision.reason
