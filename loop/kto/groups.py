"""Groups: which rows stand together in an optimiser step, and which other row's completion each is mismatched with.

Groups are made once from the seed and kept through all epochs and, where the cache knows them, across nights, so that
mismatched pairs, and with them their reference log-probs, stay the same; only the order of the groups changes. Pure.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Indices of rows, and for each the row whose completion is its y′, or None."""

    rows: tuple[int, ...]
    mismatched: tuple[int | None, ...]


def number_groups(
    conversations: Sequence[Hashable], size: int, seed: int, known: Sequence[int | None] | None = None
) -> list[int]:
    """The number of each row's group: of at most `size` rows, filled evenly, shuffled by the seed.

    `conversations[i]` is row i's. Rows of a conversation stay together, so that their common beginning is computed
    once; one with more than half a group's rows is divided, so that others have room to be mismatched with. Rows whose
    number is `known` from an earlier night keep it; new ones are grouped among themselves.
    """
    numbers = list(known or [None] * len(conversations))
    new = [row for row, number in enumerate(numbers) if number is None]
    most = max(1, size // 2)
    parts = [
        [new[place] for place in members[start : start + most]]
        for members in _by_conversation([conversations[row] for row in new])
        for start in range(0, len(members), most)
    ]
    random.Random(seed).shuffle(parts)
    bins: list[list[int]] = [[] for _ in range(math.ceil(len(new) / size))]
    for part in sorted(parts, key=len, reverse=True):
        emptiest = min(bins, key=len)
        if len(emptiest) + len(part) > size:
            bins.append(emptiest := [])
        emptiest += part
    first = max((number for number in numbers if number is not None), default=-1) + 1
    for number, rows in enumerate(bins, first):
        for row in rows:
            numbers[row] = number
    return [number for number in numbers if number is not None]


def make_groups(conversations: Sequence[Hashable], numbers: Sequence[int]) -> list[Group]:
    """The groups with their mismatched pairs, in the order of their numbers; a row that is gone re-pairs its group."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(numbers):
        members[number].append(row)
    groups = []
    for _, in_order in sorted(members.items()):
        by_conversation = _by_conversation([conversations[row] for row in in_order])
        rows = [in_order[place] for places in by_conversation for place in places]
        partners = mismatch([conversations[row] for row in rows])
        groups.append(Group(tuple(rows), tuple(None if p is None else rows[p] for p in partners)))
    return groups


def make_batches(groups: Sequence[Group], size: int, seed: int) -> list[Group]:
    """Effective batches of at most `size` rows (or of one larger group): shuffled groups, of which small ones, which
    rows have left since they were made, stand together.
    """
    order = list(groups)
    random.Random(seed).shuffle(order)
    batches: list[Group] = []
    for group in order:
        if batches and len(batches[-1].rows) + len(group.rows) <= size:
            last = batches.pop()
            group = Group(last.rows + group.rows, last.mismatched + group.mismatched)
        batches.append(group)
    return batches


def mismatch(conversations: Sequence[Hashable]) -> list[int | None]:
    """For each row the index of a row of another conversation, or None where there is only one conversation.

    Rows are set out by turns, each conversation's first, then each one's second, and each takes the completion that is
    before it: next to it where that serves all rows (as in TRL), else by the smallest distance that does. So every
    completion is used once, as the paper asks, unless one conversation has more than half of the rows.
    """
    by_conversation = _by_conversation(conversations)
    if len(by_conversation) < 2:
        return [None] * len(conversations)
    turns = [row for rows in itertools.zip_longest(*by_conversation) for row in rows if row is not None]
    for distance in range(1, len(turns)):
        others = turns[-distance:] + turns[:-distance]
        if all(conversations[row] != conversations[other] for row, other in zip(turns, others, strict=True)):
            return [other for _, other in sorted(zip(turns, others, strict=True))]
    # No one distance serves: conversation by conversation, the distance of the largest, and on from there.
    line = [row for rows in by_conversation for row in rows]
    distance = max(map(len, by_conversation))
    partners: list[int | None] = [None] * len(line)
    for place, row in enumerate(line):
        candidates = (line[(place - distance - step) % len(line)] for step in range(len(line)))
        partners[row] = next(other for other in candidates if conversations[other] != conversations[row])
    return partners


def _by_conversation(conversations: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, conversation in enumerate(conversations):
        members[conversation].append(row)
    return list(members.values())


def epoch_order(batches: int, epoch: int, seed: int) -> list[int]:
    """The order in which an epoch takes its batches; the first takes them as they were shuffled."""
    order = list(range(batches))
    if epoch:
        random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
