"""Near-duplicate prompts: the clusters that they form. Pure, and arrays throughout.

Two prompts are near-duplicates where the Jaccard similarity of their word bigrams reaches a threshold; a cluster is
what such pairs connect. Pairs are found by MinHash with locality-sensitive hashing (Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", ch. 3) and then checked exactly, so that what is one cluster really is similar; a pair at
the threshold is missed with a probability below MISSED. In a bucket a prompt is held against its neighbours only, so
the time stays within a constant times the number of distinct prompts, whatever they look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from loop.minhash import PERMUTATIONS
from loop.snapshot.ahead import ahead
from loop.sorted_arrays import distinct, find_frequent, is_first, run_starts

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

MISSED = 1e-3
NEIGHBOURS = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)
_PAIRS_AT_ONCE = 100_000
_ENTRIES_AT_ONCE = 500_000


def band_keys(least: U32, similarity: float) -> U32:
    """One bucket key for each band and set, of the sets' `SKETCH["least"]`: [n, PERMUTATIONS] -> [bands, n]. Rows of a
    band are as many as leave a miss at the threshold unlikely. Sets that share a key by chance are told apart exactly.
    """
    rows = next((r for r in (16, 8, 4, 2) if (1 - min(similarity, 0.999) ** r) ** (PERMUTATIONS // r) <= MISSED), 1)
    by_row = np.ascontiguousarray(least.T).reshape(PERMUTATIONS // rows, rows, -1)
    keys = np.zeros((PERMUTATIONS // rows, len(least)), np.uint64)
    for row in range(rows):
        keys = (keys ^ by_row[:, row]) * _MIX
        keys ^= keys >> np.uint64(29)
    return (keys >> _SHIFT).astype(np.uint32)


def signatures(least: U32) -> U64:
    """The last bit of each of a set's `SKETCH["least"]`: [n, PERMUTATIONS] -> [n]. Two sets have each bit in common
    with a probability of (1 + their similarity) / 2 (Li, König, "b-Bit Minwise Hashing", 2010).
    """
    return np.packbits(least & 1, axis=1).view(np.uint64).ravel()


def _fewest_in_common(similarity: float) -> int:
    """How many bits of their signatures sets of this similarity have in common but for a chance of some 1 in 10,000."""
    share = (1 + similarity) / 2
    return int(PERMUTATIONS * share - 4 * (PERMUTATIONS * share * (1 - share)) ** 0.5)


def count_bands(similarity: float) -> int:
    """How many bands `band_keys` makes."""
    return len(band_keys(np.zeros((0, PERMUTATIONS), np.uint32), similarity))


def clusters(
    count: int,
    bands: int,
    keys_of: Callable[[int], U32],
    sizes: I32,
    signatures: U64,
    sets_of: Callable[[I64], U32],
    similarity: float,
) -> I32:
    """The cluster of each of `count` prompts: the smallest index in it.

    `keys_of(band)` are the prompts' bucket keys [count], `sizes` and `signatures` those of their sets [count], and
    `sets_of(prompts)` the sets themselves, flat. Which prompts share a cluster depends on the order that they are in:
    neighbours in a bucket do.
    """
    parent, fewest = np.arange(count, dtype=np.int32), _fewest_in_common(similarity)
    for entries, start in ahead(_shared_buckets_of(bands, keys_of)):
        for left, right in _candidates(entries, start):
            # Sets that share a bucket by chance end here: their sizes differ too much, or their signatures.
            apart = (parent[left] != parent[right]) & (
                np.minimum(sizes[left], sizes[right]) >= similarity * np.maximum(sizes[left], sizes[right])
            )
            left, right = left[apart], right[apart]
            alike = PERMUTATIONS - np.bitwise_count(signatures[left] ^ signatures[right]) >= fewest
            packed = distinct(left[alike].astype(np.int64) << 32 | right[alike])
            for begin in range(0, len(packed), _PAIRS_AT_ONCE):
                pairs = packed[begin : begin + _PAIRS_AT_ONCE]
                one, other = pairs >> 32, pairs & 0xFFFFFFFF
                similar = _jaccard(one, other, sizes, sets_of) >= similarity
                parent = _unite(parent, one[similar], other[similar])
    return parent


def _shared_buckets_of(bands: int, keys_of: Callable[[int], U32]) -> Iterator[tuple[I32, I32]]:
    following = keys_of(0)
    for band in range(bands):
        keys, following = following, keys_of((band + 1) % bands)
        yield _shared_buckets(keys, following)


def _shared_buckets(keys: U32, following: U32) -> tuple[I32, I32]:
    """Prompts that share their bucket with another one, bucket by bucket, and the place where each one's bucket begins:
    [m], [m]. Within a bucket, prompts that agree on the following band too lie side by side.
    """
    entries = find_frequent(keys, 1)
    entries = entries[np.argsort(keys[entries].astype(np.uint64) << _SHIFT | following[entries], kind="stable")]
    return entries.astype(np.int32), run_starts(keys[entries]).astype(np.int32)


def _candidates(entries: I32, start: I32) -> Iterator[tuple[I32, I32]]:
    """Pairs of prompts to look at: each with its bucket's first, and then with its NEIGHBOURS before it."""
    for begin in range(0, len(entries), _ENTRIES_AT_ONCE):
        place = np.arange(begin, min(begin + _ENTRIES_AT_ONCE, len(entries)))
        later = place[place > start[place]]
        yield entries[start[later]], entries[later]
        inside = [place[place - back > start[place]] for back in range(1, NEIGHBOURS + 1)]
        right = np.concatenate(inside)
        yield entries[right - np.repeat(np.arange(1, NEIGHBOURS + 1), list(map(len, inside)))], entries[right]


def _jaccard(left: I64, right: I64, sizes: I32, sets_of: Callable[[I64], U32]) -> npt.NDArray[np.float64]:
    """Exact similarity of each pair: [p], [p] -> [p]."""
    prompts, at = np.unique(np.concatenate([left, right]), return_inverse=True)
    flat, ends = sets_of(prompts), np.cumsum(sizes[prompts], dtype=np.int64)
    pair = np.arange(len(left), dtype=np.uint64)
    keys = []
    for side, places in ((left, at[: len(left)]), (right, at[len(left) :])):
        size = sizes[side].astype(np.int64)
        inside = np.arange(size.sum()) - np.repeat(np.cumsum(size) - ends[places], size)
        keys.append(np.repeat(pair, size) << _SHIFT | flat[inside].astype(np.uint64))
    together = np.concatenate(keys)
    together.sort()
    in_both = together[1:][~is_first(together)[1:]] >> _SHIFT
    shared = np.bincount(in_both.astype(np.int64), minlength=len(left))
    return shared / (sizes[left].astype(np.int64) + sizes[right] - shared)


def _unite(parent: I32, left: I64, right: I64) -> I32:
    """`parent` (a root for each prompt, the smallest of its cluster) with these pairs' clusters made one."""
    roots, ends = np.unique(np.concatenate([parent[left], parent[right]]), return_inverse=True)
    a, b = ends[: len(left)], ends[len(left) :]
    root = np.arange(len(roots))
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, root[root]):
            root = root[root]
        a, b = root[a], root[b]
        a, b = a[a != b], b[a != b]
    parent[roots] = roots[root]
    return parent[parent]
