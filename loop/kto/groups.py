"""Groups: which rows make one optimiser step, and which other row's completion each is mismatched with.

Groups are made once from the seed and kept through all epochs, so that mismatched pairs, and with them their
reference log-probs, stay the same; only the order of the groups changes. Pure.
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
    """An effective batch: indices of rows, and for each the row whose completion is its y′, or None."""

    rows: tuple[int, ...]
    mismatched: tuple[int | None, ...]


def make_groups(conversations: Sequence[Hashable], size: int, seed: int) -> list[Group]:
    """All rows, shuffled by the seed, in groups of `size` rows; where that leaves a rest, groups are a row smaller.

    `conversations[i]` is row i's. Evenly filled, no group is left with a single row, which could have no y′.
    """
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    count = math.ceil(len(order) / size)
    bounds = [len(order) * index // count for index in range(count + 1)] if count else [0]
    groups = []
    for start, stop in itertools.pairwise(bounds):
        rows = order[start:stop]
        partners = mismatch([conversations[row] for row in rows])
        groups.append(Group(tuple(rows), tuple(None if p is None else rows[p] for p in partners)))
    return groups


def mismatch(conversations: Sequence[Hashable]) -> list[int | None]:
    """For each row the index of a row of another conversation, or None where there is only one conversation.

    Rows are set out conversation by conversation and each takes the completion that lies as many places before it as
    the largest conversation has rows. Unless one conversation has more than half of the rows, that is a permutation:
    every completion is used once, as the paper asks. Where all conversations differ it is the row before (as in TRL).
    """
    by_conversation: dict[Hashable, list[int]] = defaultdict(list)
    for index, conversation in enumerate(conversations):
        by_conversation[conversation].append(index)
    if len(by_conversation) < 2:
        return [None] * len(conversations)
    line = [index for members in by_conversation.values() for index in members]
    shift = max(len(members) for members in by_conversation.values())
    partners: list[int | None] = [None] * len(line)
    for place, index in enumerate(line):
        # A conversation with more than half of the rows meets itself; its rows walk on to the next other one.
        candidates = (line[(place - shift - step) % len(line)] for step in range(len(line)))
        partners[index] = next(other for other in candidates if conversations[other] != conversations[index])
    return partners


def epoch_order(groups: int, epoch: int, seed: int) -> list[int]:
    """The order in which an epoch takes its groups; the first takes them as they were shuffled."""
    order = list(range(groups))
    if epoch:
        random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
