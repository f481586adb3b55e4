"""Near-duplicate prompts: their shingles, and the clusters that they form. Pure, and arrays throughout.

Two prompts are near-duplicates where the Jaccard similarity of their word bigrams reaches a threshold; a cluster is
what such pairs connect. Pairs are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", ch. 3) and then checked exactly, so that what is one cluster really is similar;
a pair at the threshold is missed with a probability below MISSED. In a bucket a prompt is held against its neighbours
only, so the time stays within a constant times the number of distinct prompts, whatever they look like.

A bigram is a number of 32 bits: that two of one pair of prompts meet by chance has a probability of 1 in a million.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from loop.snapshot.sorted_arrays import is_first, run_sizes, run_starts

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

PERMUTATIONS = 64
MISSED = 1e-3
NEIGHBOURS = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)
_BASE = 0xD6E8FEB86659FD93
_TEXTS_AT_ONCE = 512
_BYTES_AT_ONCE = 1 << 18
"""So that what is worked on, 40 bytes for each of a text's, stays in a core's cache."""
_SHINGLES_AT_ONCE = 128
_PAIRS_AT_ONCE = 100_000
_ENTRIES_AT_ONCE = 500_000


# --- of one text ------------------------------------------------------------------------------------------------------


def shingle_sets(texts: Sequence[bytes]) -> tuple[U32, I64]:
    """The set of word bigrams of each text, flat and each sorted, and the sets' sizes: [total], [n].

    Texts are UTF-8, words what single spaces part. A mark before the first word and one behind the last make a bigram
    of a single one.
    """
    flat, sizes = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    for part in _parts(texts):
        owners, bigrams = _bigrams(b"".join([b"^ %b $\n" % text for text in part]))
        keys = owners << _SHIFT | bigrams
        keys.sort()
        keys = keys[is_first(keys)]
        flat.append(keys.astype(np.uint32))
        sizes.append(np.bincount((keys >> _SHIFT).astype(np.int64), minlength=len(part)))
    return np.concatenate(flat), np.concatenate(sizes)


def _parts(texts: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    begin = size = 0
    for end, text in enumerate(texts):
        if end - begin == _TEXTS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield texts[begin:end]
            begin, size = end, 0
        size += len(text)
    if begin < len(texts):
        yield texts[begin:]


def _bigrams(lines: bytes) -> tuple[U64, U64]:
    """(line, hash of two words that follow each other) of every line's words: [total], [total]."""
    raw = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(raw <= ord(" "))
    starts = np.concatenate([[0], ends[:-1] + 1])
    # A word's hash is a polynomial of its bytes, taken from sums over all bytes: Σ byte·base^place, moved to place 0.
    powers, inverse = _powers((len(raw) + 1).bit_length())
    sums = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum(raw * powers[: len(raw)], out=sums[1:])
    words = _mixed((sums[ends] - sums[starts]) * inverse[starts])
    is_last = raw[ends] == ord("\n")
    line = np.cumsum(is_last) - is_last
    inside = ~is_last[:-1]
    bigrams = _mixed((words[:-1] * _MIX) ^ words[1:])[inside]
    return line[:-1][inside].astype(np.uint64), bigrams >> _SHIFT


@lru_cache(maxsize=4)
def _powers(bits: int) -> tuple[U64, U64]:
    """The first 2^bits powers of _BASE, and of its inverse modulo 2^64."""
    powers = np.ones((2, 1 << bits), np.uint64)
    powers[:, 1:] = np.array([[_BASE], [pow(_BASE, -1, 1 << 64)]], np.uint64)
    return tuple(np.cumprod(powers, axis=1))


def _mixed(values: U64) -> U64:
    values = (values ^ values >> _SHIFT) * _MIX
    mixed: U64 = (values ^ values >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed


def band_keys(shingles: U32, sizes: I64, similarity: float) -> U64:
    """One bucket key for each band and set: [bands, n]. Rows of a band are as many as leave a miss at the threshold
    unlikely.
    """
    rows = next((r for r in (16, 8, 4, 2) if (1 - min(similarity, 0.999) ** r) ** (PERMUTATIONS // r) <= MISSED), 1)
    order = np.argsort(-sizes, kind="stable")
    starts, sizes = (np.cumsum(sizes) - sizes)[order], sizes[order]
    keys = np.zeros((PERMUTATIONS // rows, len(sizes)), np.uint64)
    for begin in range(0, len(sizes), _TEXTS_AT_ONCE):
        part = slice(begin, begin + _TEXTS_AT_ONCE)
        least = _min_hashes(shingles, starts[part], sizes[part]).reshape(PERMUTATIONS // rows, rows, -1)
        for row in range(rows):
            keys[:, part] = (keys[:, part] ^ least[:, row]) * _MIX
            keys[:, part] ^= keys[:, part] >> np.uint64(29)
    return keys.take(np.argsort(order), axis=1)


def count_bands(similarity: float) -> int:
    """How many bands `band_keys` makes."""
    return int(band_keys(np.zeros(0, np.uint32), np.zeros(0, np.int64), similarity).shape[0])


def _min_hashes(shingles: U32, starts: I64, sizes: I64) -> U32:
    """The least of each set's shingles under each permutation: [PERMUTATIONS, n]. No set is empty, nor larger than the
    one before it.

    A permutation is x·a + b modulo 2^32, with odd a. First all sets' first shingles, then all their second ones, and so
    on: so the arrays are as wide as there are sets, whatever their sizes.
    """
    a, b = np.random.default_rng(0).integers(0, 1 << 32, (2, PERMUTATIONS, 1), dtype=np.uint32)
    a |= np.uint32(1)
    least = np.full((PERMUTATIONS, len(sizes)), np.iinfo(np.uint32).max, np.uint32)
    hashed = np.empty_like(least)
    for nth in range(min(int(sizes[0]), _SHINGLES_AT_ONCE)):
        wide = int(np.searchsorted(-sizes, -nth, side="left"))  # how many have more than nth
        np.multiply(a, shingles[starts[:wide] + nth], out=hashed[:, :wide])
        hashed[:, :wide] += b
        np.minimum(least[:, :wide], hashed[:, :wide], out=least[:, :wide])
    for n in range(int(np.searchsorted(-sizes, -_SHINGLES_AT_ONCE, side="left"))):  # the few long ones, each by itself
        for begin in range(int(starts[n]) + _SHINGLES_AT_ONCE, int(starts[n] + sizes[n]), 8 * _SHINGLES_AT_ONCE):
            end = min(begin + 8 * _SHINGLES_AT_ONCE, int(starts[n] + sizes[n]))
            least[:, n] = np.minimum(least[:, n], (a * shingles[begin:end] + b).min(axis=1))
    return least


# --- of all -----------------------------------------------------------------------------------------------------------


def clusters(
    count: int,
    bands: int,
    keys_of: Callable[[int], U64],
    sizes: I32,
    sets_of: Callable[[I64], U32],
    similarity: float,
) -> I32:
    """The cluster of each of `count` prompts: the smallest index in it.

    `keys_of(band)` are the prompts' bucket keys [count], `sizes` those of their sets, `sets_of(prompts)` the sets
    themselves, flat. Which prompts share a cluster depends on the order that they are in: neighbours in a bucket do.
    """
    parent = np.arange(count, dtype=np.int32)
    following = keys_of(0)
    for band in range(bands):
        keys, following = following, keys_of((band + 1) % bands)
        entries, start = _shared_buckets(keys, following)
        for left, right in _candidates(entries, start):
            # Sets whose sizes differ by more than the threshold cannot be similar enough: most pairs end here.
            apart = (parent[left] != parent[right]) & (
                np.minimum(sizes[left], sizes[right]) >= similarity * np.maximum(sizes[left], sizes[right])
            )
            packed = np.unique(left[apart].astype(np.int64) << 32 | right[apart])
            for begin in range(0, len(packed), _PAIRS_AT_ONCE):
                pairs = packed[begin : begin + _PAIRS_AT_ONCE]
                one, other = pairs >> 32, pairs & 0xFFFFFFFF
                similar = _jaccard(one, other, sizes, sets_of) >= similarity
                parent = _unite(parent, one[similar], other[similar])
    return parent


def _shared_buckets(keys: U64, following: U64) -> tuple[I32, I32]:
    """Prompts that share their bucket with another one, bucket by bucket, and the place where each one's bucket begins:
    [m], [m]. Within a bucket, prompts that agree on the following band too lie side by side.
    """
    order = np.argsort(keys)
    ordered = keys[order]
    is_shared = run_sizes(ordered) > 1
    order, ordered = order[is_shared], ordered[is_shared]
    entries = order[np.lexsort((order, following[order], ordered))]
    return entries.astype(np.int32), run_starts(ordered).astype(np.int32)


def _candidates(entries: I32, start: I32) -> Iterator[tuple[I32, I32]]:
    """Pairs of prompts to look at: each with its bucket's first and its NEIGHBOURS before it."""
    for begin in range(0, len(entries), _ENTRIES_AT_ONCE):
        place = np.arange(begin, min(begin + _ENTRIES_AT_ONCE, len(entries)))
        lefts, rights = [start[place]], [place]
        for back in range(1, NEIGHBOURS + 1):
            inside = place[place - back > start[place]]
            lefts.append(inside - back)
            rights.append(inside)
        left, right = np.concatenate(lefts), np.concatenate(rights)
        yield entries[left[left != right]], entries[right[left != right]]


def _jaccard(left: I64, right: I64, sizes: I32, sets_of: Callable[[I64], U32]) -> npt.NDArray[np.float64]:
    """Exact similarity of each pair: [p], [p] -> [p]."""
    pair = np.arange(len(left), dtype=np.uint64)
    keys = np.concatenate(
        [np.repeat(pair, sizes[side]) << _SHIFT | sets_of(side).astype(np.uint64) for side in (left, right)]
    )
    keys.sort()
    in_both = keys[1:][~is_first(keys)[1:]] >> _SHIFT
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
