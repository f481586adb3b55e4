"""Who is held out: salted hashes decide, and the decision is kept across nights in the store's `split_units`.

A row is held out if one of its raters, its conversation or its prompt's near-duplicate cluster is. A unit is the 64-bit
hash of salt, kind and name; as a number it is the decision too (held out below the share), so that raters and
conversations need to be kept only where they are held out. A cluster is known by its prompts: it grows and merges from
night to night, so every prompt is kept with what became of it. A cluster with a held-out prompt is held out, one whose
known prompts were all in training stays there, and a new one is decided by its smallest unit. A new salt makes other
units, so a new split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, insert, select
from xxhash import xxh3_64_intdigest

from loop.sorted_arrays import contains, distinct
from loop.store.engine import write
from loop.store.schema import split_units

U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

RATER, CONVERSATION, CLUSTER = "rater", "conversation", "cluster"
_NOTHING: U64 = np.zeros(0, np.uint64)
_STORED = np.dtype("<u8")
# SQLite's write lock is shared with the joiner: a transaction, of half a megabyte, stays in the tens of milliseconds.
UNITS_A_ROW = 65_536


def units_of(salt: str, kind: str, names: Sequence[bytes]) -> U64:
    """The units of these names: XXH3, 64 bits, seeded with salt and kind; never 0, which stands for none."""
    seed = int.from_bytes(blake2b(kind.encode(), key=blake2b(salt.encode()).digest(), digest_size=8).digest())
    return np.maximum(np.array([xxh3_64_intdigest(name, seed) for name in names], np.uint64), np.uint64(1))


@dataclass(frozen=True)
class Known:
    """What earlier nights decided: sorted units."""

    held_raters: U64 = field(default_factory=lambda: _NOTHING)
    held_conversations: U64 = field(default_factory=lambda: _NOTHING)
    held_prompts: U64 = field(default_factory=lambda: _NOTHING)
    train_prompts: U64 = field(default_factory=lambda: _NOTHING)


def decide(units: U64, held: U64, share: float) -> Flags:
    """Which units are held out: those known to be, and those whose hash says so. [n] -> [n]"""
    # Compared as float64: exact enough for a share, and no overflow at 2^64.
    return contains(held, units) | (units.astype(np.float64) < share * 2.0**64)


def decide_clusters(prompts: U64, cluster_of: I32, known: Known, share: float) -> Flags:
    """Which prompts' clusters are held out: sorted units [p], the first prompt in each one's cluster [p] -> [p]."""
    has_held, has_train = np.zeros(len(prompts), bool), np.zeros(len(prompts), bool)
    has_held[cluster_of[contains(known.held_prompts, prompts)]] = True
    has_train[cluster_of[contains(known.train_prompts, prompts)]] = True
    new = decide(prompts, _NOTHING, share)  # by the first prompt: its unit is the cluster's smallest
    held: Flags = np.where(has_held, True, np.where(has_train, False, new))[cluster_of]
    return held


def load_known(engine: Engine) -> Known:
    """What `split_units` holds, 8 bytes a unit."""
    found: dict[tuple[str, bool], list[U64]] = {}
    with engine.connect() as connection:
        query = select(split_units.c.kind, split_units.c.held_out, split_units.c.units)
        for kind, held_out, units in connection.execution_options(yield_per=100).execute(query):
            found.setdefault((kind, held_out), []).append(np.frombuffer(units, _STORED))

    def units_of_kind(kind: str, held_out: bool) -> U64:
        return distinct(np.concatenate([_NOTHING, *found.pop((kind, held_out), [])]))

    held_prompts, train_prompts = units_of_kind(CLUSTER, True), units_of_kind(CLUSTER, False)
    return Known(
        held_raters=units_of_kind(RATER, True),
        held_conversations=units_of_kind(CONVERSATION, True),
        held_prompts=held_prompts,
        # A prompt that moved to held out later stands in both.
        train_prompts=train_prompts[~contains(held_prompts, train_prompts)],
    )


def keep(engine: Engine, known: Known, raters: U64, conversations: U64, prompts: U64, prompts_held: Flags) -> None:
    """Add tonight's decisions: held-out raters and conversations, and every prompt with its flag; all sorted.

    A prompt that was in training moves to held out where its cluster does, never the other way. In short transactions:
    what a crash leaves is part of the same decisions, and the next call completes it.
    """
    held, trained = prompts[prompts_held], prompts[~prompts_held]
    fresh = (
        (RATER, True, raters[~contains(known.held_raters, raters)]),
        (CONVERSATION, True, conversations[~contains(known.held_conversations, conversations)]),
        (CLUSTER, True, held[~contains(known.held_prompts, held)]),
        (CLUSTER, False, trained[~contains(known.train_prompts, trained)]),
    )
    for kind, held_out, units in fresh:
        for begin in range(0, len(units), UNITS_A_ROW):
            stored = units[begin : begin + UNITS_A_ROW].astype(_STORED).tobytes()
            with write(engine) as connection:
                connection.execute(insert(split_units).values(kind=kind, held_out=held_out, units=stored))
