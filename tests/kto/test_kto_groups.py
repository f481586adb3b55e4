import itertools
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loop.kto.groups import Group, epoch_order, make_batches, make_groups, mismatch, number_groups

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


def fresh_groups(names: Sequence[int], size: int, seed: int = 0) -> list[Group]:
    return make_groups(names, number_groups(names, size, seed))


@given(conversations, st.integers(1, 9), st.integers(0, 3))
def test_groups_hold_every_row_once_and_are_the_same_for_the_same_seed(names: list[int], size: int, seed: int) -> None:
    groups = fresh_groups(names, size, seed)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(names)))
    assert all(len(group.rows) <= size for group in groups)
    assert groups == fresh_groups(names, size, seed)
    for group in groups:
        assert all(other is None or other in group.rows for other in group.mismatched)


@given(st.integers(2, 60), st.integers(3, 9))  # in pairs, an odd number of rows leaves one over
def test_no_row_is_left_alone_in_a_group(rows: int, size: int) -> None:
    assert all(len(group.rows) > 1 for group in fresh_groups(range(rows), size))


@given(conversations, st.integers(2, 9))
def test_a_conversation_of_at_most_half_a_group_is_in_one_group(names: list[int], size: int) -> None:
    numbers = number_groups(names, size, seed=0)
    for name, rows in Counter(names).items():
        if rows <= size // 2:
            assert len({number for number, other in zip(numbers, names, strict=True) if other == name}) == 1


@given(conversations, conversations, st.integers(1, 9), st.sets(st.integers(0, 39)))
def test_the_next_night_keeps_every_group_but_those_that_rows_have_left(
    old: list[int], new: list[int], size: int, gone: set[int]
) -> None:
    numbers = number_groups(old, size, seed=0)
    tonight = [*enumerate(old), *((row, 10 + name) for row, name in enumerate(new, len(old)))]
    tonight = [(row, name) for row, name in tonight if row not in gone]  # a row's index here is its identity
    names = [name for _, name in tonight]
    known = [numbers[row] if row < len(old) else None for row, _ in tonight]
    groups = make_groups(names, number_groups(names, size, 0, known))
    paired = [pair for group in groups for pair in zip(group.rows, group.mismatched, strict=True)]
    pairs = {tonight[row][0]: None if other is None else tonight[other][0] for row, other in paired}
    for group in make_groups(old, numbers):
        if not gone & set(group.rows):
            for row, other in zip(group.rows, group.mismatched, strict=True):
                assert pairs[row] == other
    for group in groups:  # what is new stands apart
        assert len({tonight[row][0] < len(old) for row in group.rows}) == 1


@given(conversations, st.integers(1, 9), st.sets(st.integers(0, 39)))
def test_batches_are_whole_groups_and_small_ones_stand_together(names: list[int], size: int, gone: set[int]) -> None:
    numbers = number_groups(names, size, seed=0)
    left = [row for row in range(len(names)) if row not in gone]
    groups = make_groups([names[row] for row in left], [numbers[row] for row in left])
    batches = make_batches(groups, size, seed=1)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(left)))
    assert all(len(batch.rows) <= size for batch in batches)
    assert all(len(a.rows) + len(b.rows) > size for a, b in itertools.pairwise(batches))
    for group in groups:
        assert sum(set(group.rows) <= set(batch.rows) for batch in batches) == 1


def test_of_conversations_with_equally_many_turns_it_is_the_turn_before_in_another_one() -> None:
    assert mismatch(["a", "a", "b", "b", "c", "c"]) == [5, 4, 0, 1, 2, 3]


def test_a_later_epoch_has_the_same_groups_in_another_order() -> None:
    assert epoch_order(20, 0, seed=1) == list(range(20))
    assert sorted(epoch_order(20, 1, seed=1)) == list(range(20))
    assert epoch_order(20, 1, seed=1) != epoch_order(20, 2, seed=1)
    assert epoch_order(20, 1, seed=1) == epoch_order(20, 1, seed=1)
