from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.content import asked_words, message_text, normal_words
from loop.snapshot.balance import class_weights
from loop.snapshot.curate import Vote, newest_within, settle
from loop.sorted_arrays import find_frequent
from tests.snapshot.clustered import clusters_of

amounts = st.floats(0.01, 1e6)


# --- weights ----------------------------------------------------------------------------------------------------------


@given(amounts, amounts, st.just("balance") | st.floats(0.1, 10), st.just("balance") | st.floats(0.1, 10))
def test_balancing_reaches_the_range(up: float, down: float, weight_d: Any, weight_u: Any) -> None:
    lambda_d, lambda_u = class_weights(up, down, weight_d, weight_u)
    assert weight_d in ("balance", lambda_d)
    assert weight_u in ("balance", lambda_u)
    if "balance" in (weight_d, weight_u):
        assert 1 - 1e-9 <= lambda_d * up / (lambda_u * down) <= 4 / 3 + 1e-9


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ((100, 100), (1, 1)),  # in range: left alone
        ((120, 100), (1, 1)),
        ((50, 100), (2, 1)),  # too few desirable: up to 1
        ((200, 100), (1, 1.5)),  # too many: down to 4/3
        ((10, 0), (1, 1)),  # one class is missing: there is no ratio
        ((0, 10), (1, 1)),
    ],
)
def test_class_weights_by_hand(counts: tuple[int, int], weights: tuple[float, float]) -> None:
    assert class_weights(*counts, "balance", "balance") == pytest.approx(weights)


# --- labels -----------------------------------------------------------------------------------------------------------

votes = st.lists(
    st.builds(
        Vote,
        who=st.sampled_from("abcd"),
        named=st.just(True),
        up=st.booleans(),
        weight=st.sampled_from([0.5, 1.0]),
        hlc=st.integers(0, 6),
        thumb=st.booleans(),
    ),
    max_size=8,
)


@given(votes, st.randoms(use_true_random=False), st.sampled_from(["drop", "majority"]))
def test_the_label_does_not_depend_on_the_order_of_votes(cast: list[Vote], rng: Any, rule: Any) -> None:
    # One rater casts two votes of one stamp only where a clock is broken; then weights may differ too.
    cast = list({(vote.who, vote.hlc, vote.thumb): vote for vote in cast}.values())
    assert settle(cast, rule) == settle(rng.sample(cast, len(cast)), rule)


def test_what_a_rater_says_goes_before_what_was_concluded_later() -> None:
    said = Vote("a", True, True, 1.0, 1)
    concluded = Vote("a", True, False, 0.2, 2, thumb=False)
    label = settle([said, concluded], "drop")
    assert label is not None
    assert (label.desirable, label.weight) == (True, 1.0)
    alone = settle([concluded], "drop")
    assert alone is not None
    assert (alone.desirable, alone.weight) == (False, 0.2)


groups = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=30)


@given(groups, st.none() | st.integers(1, 4))
def test_the_newest_of_each_group_stay(rows: list[tuple[int, int]], limit: int | None) -> None:
    kept = newest_within(
        np.array([group for group, _ in rows], np.uint64), np.array([hlc for _, hlc in rows], np.int64), limit
    )
    for n, (group, hlc) in enumerate(rows):
        newer = sum(1 for m, (g, h) in enumerate(rows) if g == group and (h > hlc or (h == hlc and m < n)))
        assert kept[n] == (limit is None or group == 0 or newer < limit)


# Values that agree in their first bits are looked up, others are not.
@given(st.lists(st.integers(0, 5) | st.integers(2**63, 2**63 + 5), max_size=60), st.integers(1, 4))
def test_frequent_values_are_found_wherever_they_are(values: list[int], limit: int) -> None:
    found = find_frequent(np.array(values, np.uint64), limit)
    assert found.tolist() == [n for n, value in enumerate(values) if values.count(value) > limit]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_its_last_user_turn() -> None:
    system = ("system", "You are the support desk of a very large shop.")
    first = ("user", "Where is my parcel right now?")
    answer = ("assistant", "On its way.")
    second = ("user", "And when will it finally arrive?")
    assert asked_words([system, first, answer, second]) == b"and when will it finally arrive"
    assert asked_words([system, first]) == b"where is my parcel right now"


def test_short_turns_take_earlier_ones_along() -> None:
    turns = [("user", text) for text in ("Is this lost?", "Shall I send the parcel back?", "…?", "Why?", "Yes!")]
    assert asked_words(turns) == b"shall i send the parcel back why yes"
    assert asked_words([]) == b""


def test_a_messages_text_is_its_content_or_its_text_parts() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "in the picture?"}]
    assert (message_text("Yes."), message_text(parts)) == ("Yes.", "What is in the picture?")
    assert message_text([*parts, {"type": "image_url"}]) is None


def test_order_numbers_case_and_punctuation_do_not_tell_prompts_apart() -> None:
    assert normal_words("Where is order A-4711?") == normal_words("where is order a-20260099")
    assert normal_words("What is 12 times 7?") != normal_words("What is 12 times 8?")


def bigrams(words: list[str]) -> set[tuple[str, str]]:
    padded = ["^", *words, "$"]
    return set(itertools.pairwise(padded))


@given(st.text(st.characters(max_codepoint=127)) | st.text("ab19_ -.\n"))
def test_ascii_words_are_those_of_any_text(text: str) -> None:
    # A letter of another alphabet, as a word of its own, takes it out of the short way for ASCII.
    assert normal_words(f"{text} я") == (normal_words(text) + " я".encode()).strip()


def by_definition(texts: list[list[str]], similarity: float) -> list[int]:
    """Connected components by trying all pairs."""
    sets = [bigrams(words) for words in texts]
    label = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= similarity:
                label = [label[j] if x == label[i] else x for x in label]
    return label


def same_partition(a: list[int], b: list[int]) -> bool:
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), max_size=25), st.sampled_from([0.5, 0.8, 1.0]))
def test_clusters_never_join_what_is_not_connected(texts: list[list[str]], similarity: float) -> None:
    expected = by_definition(texts, similarity)
    found = clusters_of([" ".join(words) for words in texts], similarity)
    for cluster in set(found):
        assert len({expected[i] for i, c in enumerate(found) if c == cluster}) == 1


def test_near_duplicates_among_many_prompts_are_found() -> None:
    rng = np.random.default_rng(1)
    vocabulary = [f"w{n}" for n in range(3000)]
    texts: list[list[str]] = []
    for _ in range(600):
        words = [vocabulary[i] for i in rng.zipf(1.3, rng.integers(5, 40)) % len(vocabulary)]
        texts.append(words)
        for _ in range(rng.integers(0, 3)):
            changed = list(words)
            changed[rng.integers(len(words))] = "another"
            texts.append(changed)
    expected, found = by_definition(texts, 0.8), clusters_of([" ".join(words) for words in texts], 0.8)
    pairs = [(i, j) for i in range(len(texts)) for j in range(i) if expected[i] == expected[j]]
    missed = sum(found[i] != found[j] for i, j in pairs)
    assert len(pairs) > 200
    assert missed <= math.ceil(0.01 * len(pairs))


def test_clusters_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(2)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 6, 8)) for _ in range(200)]
    order = rng.permutation(len(texts))
    found = clusters_of(texts, 0.5)
    assert same_partition([found[i] for i in order], clusters_of([texts[i] for i in order], 0.5))
