from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from loop.gate.bootstrap import Interval, cluster_bootstrap, means
from loop.gate.preference import HeldOut, Ratios, auc, balanced_accuracy, preference_checks, reference_point, true_pairs
from loop.gate.probe import Probe
from loop.gate.serving import length_check, manner, skew_check
from loop.gate.verdict import Check, CheckVerdict, decide, must_be_above, must_be_at_most
from loop.settings import GateSettings

SETTINGS = GateSettings(bootstrap_samples=400)

# Ties are frequent on purpose: scores are drawn from a few values.
scored = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.5]), st.booleans(), st.sampled_from([0.5, 1.0, 3.0])),
    min_size=2,
    max_size=40,
)


# --- figures against scikit-learn -------------------------------------------------------------------------------------


@given(scored)
def test_auc_is_scikit_learns(rows: list[tuple[float, bool, float]]) -> None:
    scores, labels, weights = (np.asarray(column) for column in zip(*rows, strict=True))
    assume(0 < labels.sum() < len(labels))
    ours = auc(scores, labels, weights[None].astype(float))[0]
    assert ours == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))


@given(scored, st.lists(st.floats(-1, 1), min_size=1, max_size=10))
def test_balanced_accuracy_is_scikit_learns(rows: list[tuple[float, bool, float]], others: list[float]) -> None:
    scores, labels, weights = (np.asarray(column) for column in zip(*rows, strict=True))
    assume(0 < labels.sum() < len(labels))
    mismatched = np.full(len(scores), np.nan)
    mismatched[: len(others)] = others[: len(scores)]
    ratios = Ratios(scores, mismatched)
    z0 = reference_point(ratios, weights[None].astype(float))[0]
    assume(not np.isclose(scores, z0).any())  # scikit-learn knows no ties
    ours = balanced_accuracy(ratios, labels, weights[None].astype(float))[0]
    assert ours == pytest.approx(balanced_accuracy_score(labels, scores > z0, sample_weight=weights))


def test_the_base_as_live_is_at_chance_exactly() -> None:
    labels, base = np.asarray([True, False, False]), Ratios.of_base(3)
    assert balanced_accuracy(base, labels, np.ones((2, 3))).tolist() == [0.5, 0.5]
    assert auc(base.matched, labels, np.ones((2, 3))).tolist() == [0.5, 0.5]


def test_z0_is_the_mean_of_mismatched_ratios_and_never_negative() -> None:
    ratios = Ratios(np.zeros(3), np.asarray([1.0, 3.0, np.nan]))
    assert reference_point(ratios, np.asarray([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])).tolist() == [2.0, 1.5]
    assert reference_point(Ratios(np.zeros(2), np.asarray([-1.0, -3.0])), np.ones((1, 2))).tolist() == [0.0]
    assert reference_point(Ratios(np.zeros(1), np.asarray([np.nan])), np.ones((1, 1))).tolist() == [0.0]


def test_true_pairs_are_of_one_prompt_and_both_signs() -> None:
    ups, downs = true_pairs(np.asarray([True, False, False, True, True]), ["p", "p", "p", "q", "p"])
    assert list(zip(ups.tolist(), downs.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 1), (4, 2)]


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def test_one_row_a_cluster_gives_the_textbook_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    (found,) = cluster_bootstrap(
        [str(n) for n in range(400)], means(values[:, None], np.ones(400)), samples=4000, confidence=0.95
    )
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_intervals_cover_the_truth_as_often_as_they_say_with_correlated_rows() -> None:
    """40 raters of 10 rows who differ among themselves: rows as if independent would cover about half of the time."""
    rng = np.random.default_rng(3)
    clusters = [str(n) for n in range(40) for _ in range(10)]
    covered = {"clusters": 0, "rows": 0}
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 10) + rng.normal(0, 1, 400)
        for name, groups in (("clusters", clusters), ("rows", [str(n) for n in range(400)])):
            (found,) = cluster_bootstrap(groups, means(values[:, None], np.ones(400)), samples=300, confidence=0.9)
            assert found.low is not None
            assert found.high is not None
            covered[name] += found.low <= 0 <= found.high
    assert 0.83 <= covered["clusters"] / 200 <= 0.96
    assert covered["rows"] / 200 < 0.7


def test_figures_of_one_call_are_paired() -> None:
    noise = np.random.default_rng(0).normal(0, 10, 100)
    columns = np.stack([noise + 1, noise, np.ones(100)], axis=1)  # the last is the difference of the others
    found = cluster_bootstrap([str(n) for n in range(100)], means(columns, np.ones(100)), samples=200, confidence=0.95)
    assert [found[2].low, found[2].high] == pytest.approx([1.0, 1.0])


def test_a_figure_that_is_often_undefined_has_no_interval() -> None:
    def only_of_the_first(weights: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return weights[:, :1] / weights[:, :1]

    (found,) = cluster_bootstrap(["a", "b", "c"], only_of_the_first, samples=200, confidence=0.9)
    assert found == Interval(1.0)


# --- checks and the verdict -------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["pass", "fail", "insufficient", "not_asked", "not_counted"])))
def test_only_passed_checks_make_a_pass(verdicts: list[CheckVerdict]) -> None:
    verdict = decide([Check(str(n), "", v) for n, v in enumerate(verdicts)])
    if verdict == "pass":
        assert "pass" in verdicts
        assert not {"fail", "insufficient"} & set(verdicts)
    assert (verdict == "fail") == ("fail" in verdicts)


@pytest.mark.parametrize(
    ("interval", "above", "at_most"),
    [
        (Interval(0.3, 0.1, 0.5), "pass", "fail"),
        (Interval(0.3, -0.1, 0.5), "fail", "fail"),  # straddles: neither is shown
        (Interval(-0.3, -0.5, -0.1), "fail", "pass"),
        (Interval(0.0, 0.0, 0.0), "fail", "pass"),  # no gain is no gain
        (Interval(0.3), "insufficient", "insufficient"),
        (Interval(None), "insufficient", "insufficient"),
    ],
)
def test_bounds_decide(interval: Interval, above: str, at_most: str) -> None:
    assert must_be_above("n", "t", interval, 0.0).verdict == above
    assert must_be_at_most("n", "t", interval, 0.0).verdict == at_most


def held_out(rows: int, clusters: int, rarer: int) -> HeldOut:
    desirable = np.arange(rows) >= rarer
    rng = np.random.default_rng(0)
    # Every cluster has rows, and labels are spread over them.
    names = [str(n) for n in rng.permutation(np.arange(rows) % clusters)]
    return HeldOut(desirable, np.ones(rows), names, [str(n) for n in range(rows)])


@pytest.mark.parametrize(
    ("rows", "clusters", "rarer", "verdict"),
    [
        (300, 30, 50, "pass"),
        (300, 29, 50, "insufficient"),
        (300, 30, 49, "insufficient"),
        (300, 1, 100, "insufficient"),
        (300, 30, 0, "insufficient"),
        (0, 1, 0, "insufficient"),
    ],
)
def test_a_perfect_candidate_passes_only_with_enough_evidence(
    rows: int, clusters: int, rarer: int, verdict: str
) -> None:
    seen = held_out(rows, clusters, rarer)
    perfect = Ratios(np.where(seen.desirable, 1.0, -1.0), np.zeros(rows))
    checks = preference_checks(perfect, Ratios.of_base(rows), seen, SETTINGS)
    assert decide(checks) == verdict


def test_flipped_votes_fail() -> None:
    seen = held_out(300, 40, 100)
    wrong = Ratios(np.where(seen.desirable, -1.0, 1.0), np.zeros(300))
    assert decide(preference_checks(wrong, Ratios.of_base(300), seen, SETTINGS)) == "fail"
    assert decide(preference_checks(wrong, wrong, seen, SETTINGS)) == "fail"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_a_candidate_that_guesses_does_not_pass(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = held_out(300, 40, 140)
    live = Ratios(np.where(seen.desirable, 1.0, -1.0) + rng.normal(0, 1, 300), np.zeros(300))
    guess = Ratios(rng.normal(0, 1, 300), np.zeros(300))
    assert decide(preference_checks(guess, live, seen, SETTINGS)) == "fail"


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "live", "verdict"),
    [(10, 10, "pass"), (10, 19, "pass"), (10, 21, "fail"), (21, 10, "fail"), (1, 0, "pass"), (3, 0, "fail")],
)
def test_replies_may_be_neither_much_longer_nor_much_shorter(candidate: int, live: int, verdict: str) -> None:
    mine, other = ([Probe([5] * length, [-1.0] * length, False)] * 9 for length in (candidate, live))
    check = length_check(mine, other, SETTINGS)
    assert (check.verdict, check.value) == (verdict, candidate / max(1, live))


def test_skew_is_a_mean_over_tokens() -> None:
    probes = [Probe([1, 2], [-1.0, -2.0], False), Probe([1], [-3.0], True)]
    check, gaps = skew_check(probes, [np.asarray([-1.0, -2.0]), np.asarray([-3.3])], SETTINGS)
    assert gaps == pytest.approx([0.0, 0.0, 0.3])
    assert check.value == pytest.approx(0.1)
    assert check.verdict == "fail"


def test_manner_reads_the_answers() -> None:
    texts = [
        "I'm sorry, I can't help with that.",
        "The fee is 5.",
        "one two three four five one two three four six",
        "",
    ]
    found = manner(texts, [Probe([1] * n, [-1.0] * n, n == 3) for n in (1, 2, 3, 4)])
    assert found == {
        "answers": 4,
        "median_tokens": 2.5,
        "apology_share": 0.25,
        "refusal_share": 0.25,
        "repetition_share": 0.25,
        "cut_share": 0.25,
    }
