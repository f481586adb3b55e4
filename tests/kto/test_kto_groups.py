from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from loop.kto.groups import epoch_order, make_groups, mismatch

conversations = st.lists(st.integers(0, 6), max_size=40)


@given(conversations)
def test_a_mismatched_completion_is_never_of_the_same_conversation(names: list[int]) -> None:
    for row, other in enumerate(mismatch(names)):
        if other is not None:
            assert names[other] != names[row]


@given(conversations)
def test_a_row_goes_without_only_where_there_is_a_single_conversation(names: list[int]) -> None:
    assert (None in mismatch(names)) == (len(set(names)) == 1)


@given(conversations)
def test_every_completion_is_used_once_unless_one_conversation_has_over_half_of_the_rows(names: list[int]) -> None:
    if names and 2 * max(Counter(names).values()) <= len(names):
        assert sorted(other for other in mismatch(names) if other is not None) == list(range(len(names)))


def test_where_all_conversations_differ_it_is_the_row_before_as_in_trl() -> None:
    assert mismatch(["a", "b", "c", "d"]) == [3, 0, 1, 2]


@given(conversations, st.integers(1, 9), st.integers(0, 3))
def test_groups_hold_every_row_once_and_are_the_same_for_the_same_seed(names: list[int], size: int, seed: int) -> None:
    groups = make_groups(names, size, seed)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(names)))
    assert all(len(group.rows) <= size for group in groups)
    assert groups == make_groups(names, size, seed)
    for group in groups:
        assert all(other is None or other in group.rows for other in group.mismatched)


@given(st.integers(2, 60), st.integers(3, 9))  # in pairs, an odd number of rows leaves one over
def test_no_row_is_left_alone_in_a_last_group(rows: int, size: int) -> None:
    assert all(len(group.rows) > 1 for group in make_groups(range(rows), size, seed=0))


def test_a_later_epoch_has_the_same_groups_in_another_order() -> None:
    assert epoch_order(20, 0, seed=1) == list(range(20))
    assert sorted(epoch_order(20, 1, seed=1)) == list(range(20))
    assert epoch_order(20, 1, seed=1) != epoch_order(20, 2, seed=1)
    assert epoch_order(20, 1, seed=1) == epoch_order(20, 1, seed=1)
