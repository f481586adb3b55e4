"""Who is held out: salted hashes decide, and the decision is kept across nights in the store's `split_units`.

A row is held out if one of its raters, its conversation or its prompt's near-duplicate cluster is. A unit is the 64-bit
hash of salt, kind and name; as a number it is the decision too (held out below the share), so that raters and
conversations need to be kept only where they are held out. A cluster is known by its prompts: it grows and merges from
night to night, so every prompt is kept with what became of it. A cluster with a held-out prompt is held out, one whose
known prompts were all in training stays there, and a new one is decided by its smallest unit. A new salt makes other
units, so a new split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, insert, select, update

from loop.store.engine import write
from loop.store.schema import split_units

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

RATER, CONVERSATION, CLUSTER = "rater", "conversation", "cluster"
_NOTHING: U64 = np.zeros(0, np.uint64)
# SQLite's write lock is shared with the joiner: a transaction stays in the tens of milliseconds.
_ROWS_A_TRANSACTION = 2_000


def unit_of(salt: str, kind: str, name: str) -> int:
    """The 64-bit number of a rater, a conversation or a prompt, never 0 (which stands for none)."""
    hashed = _salted(salt, kind).copy()
    hashed.update(name.encode())
    return int.from_bytes(hashed.digest()) or 1


@cache
def _salted(salt: str, kind: str) -> blake2b:
    """A hash that has taken in salt and kind; copying it is cheaper than beginning anew a few times a row."""
    return blake2b(f"{kind}\0".encode(), key=blake2b(salt.encode()).digest(), digest_size=8)


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
    return np.isin(units, held) | (units.astype(np.float64) < share * 2.0**64)


def decide_clusters(prompts: U64, cluster_of: I64, known: Known, share: float) -> Flags:
    """Which prompts' clusters are held out: units [p], cluster numbers [p] (below p) -> [p]."""
    count = len(prompts)
    has_held, has_train = np.zeros(count, bool), np.zeros(count, bool)
    has_held[cluster_of[np.isin(prompts, known.held_prompts)]] = True
    has_train[cluster_of[np.isin(prompts, known.train_prompts)]] = True
    smallest = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, cluster_of, prompts)
    new = decide(smallest, _NOTHING, share)
    held: Flags = np.where(has_held, True, np.where(has_train, False, new))[cluster_of]
    return held


def load_known(engine: Engine) -> Known:
    """What `split_units` holds, 8 bytes a unit."""
    found: dict[tuple[str, bool], list[int]] = {}
    with engine.connect() as connection:
        query = select(split_units.c.kind, split_units.c.unit, split_units.c.held_out)
        for kind, unit, held_out in connection.execution_options(yield_per=10_000).execute(query):
            found.setdefault((kind, held_out), []).append(int(unit, 16))
    units = {key: np.sort(np.asarray(values, dtype=np.uint64)) for key, values in found.items()}
    return Known(
        held_raters=units.get((RATER, True), _NOTHING),
        held_conversations=units.get((CONVERSATION, True), _NOTHING),
        held_prompts=units.get((CLUSTER, True), _NOTHING),
        train_prompts=units.get((CLUSTER, False), _NOTHING),
    )


def keep(engine: Engine, known: Known, raters: U64, conversations: U64, prompts: U64, prompts_held: Flags) -> None:
    """Add tonight's decisions: held-out raters and conversations, and every prompt with its flag.

    A prompt that was in training moves to held out where its cluster does, never the other way. In short transactions:
    what a crash leaves is part of the same decisions, and the next call completes it.
    """
    changed = np.isin(prompts, known.train_prompts) & prompts_held
    fresh = ~np.isin(prompts, known.train_prompts) & ~np.isin(prompts, known.held_prompts)
    rows = [(RATER, unit, True) for unit in np.setdiff1d(raters, known.held_raters)]
    rows += [(CONVERSATION, unit, True) for unit in np.setdiff1d(conversations, known.held_conversations)]
    rows += [(CLUSTER, unit, bool(held)) for unit, held in zip(prompts[fresh], prompts_held[fresh], strict=True)]
    for begin in range(0, len(rows), _ROWS_A_TRANSACTION):
        batch = rows[begin : begin + _ROWS_A_TRANSACTION]
        with write(engine) as connection:
            connection.execute(
                insert(split_units), [{"kind": k, "unit": f"{u:016x}", "held_out": held} for k, u, held in batch]
            )
    moved = [f"{unit:016x}" for unit in prompts[changed]]
    for begin in range(0, len(moved), 500):
        with write(engine) as connection:
            connection.execute(
                update(split_units)
                .where(split_units.c.kind == CLUSTER, split_units.c.unit.in_(moved[begin : begin + 500]))
                .values(held_out=True)
            )
