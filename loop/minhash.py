"""What a prompt's nearness to others is told by: its word bigrams, and their MinHash sketch. Pure, arrays throughout.

MinHash: Broder, "On the resemblance and containment of documents", 1997. A bigram is a number of 32 bits: that two of
one pair of prompts meet by chance has a probability of 1 in a million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from loop.sorted_arrays import is_first

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

PERMUTATIONS = 64
SKETCH = np.dtype([("size", "<u4"), ("least", "<u4", PERMUTATIONS)])
"""How many bigrams there are, and the least of them under each permutation."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)
_BASE = 0xD6E8FEB86659FD93
_TEXTS_AT_ONCE = 512
_BYTES_AT_ONCE = 1 << 18
"""So that what is worked on, 40 bytes for each of a text's, stays in a core's cache."""
_SHINGLES_AT_ONCE = 128


def sketches(texts: Sequence[bytes]) -> list[bytes]:
    """The sketch of each text, as the bytes of one SKETCH. Texts as `shingle_sets` takes them."""
    made = []
    for part in _parts(texts):
        shingles, sizes = shingle_sets(part)
        order = np.argsort(-sizes, kind="stable")
        sketch = np.empty(len(part), SKETCH)
        sketch["size"] = sizes
        sketch["least"][order] = _min_hashes(shingles, (np.cumsum(sizes) - sizes)[order], sizes[order]).T
        raw = sketch.tobytes()
        made += [raw[begin : begin + SKETCH.itemsize] for begin in range(0, len(raw), SKETCH.itemsize)]
    return made


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


def _min_hashes(shingles: U32, starts: I64, sizes: I64) -> U32:
    """The least of each set's shingles under each permutation: [PERMUTATIONS, n]. No set is empty, nor larger than the
    one before it.

    A permutation is x·a + b modulo 2^32, with odd a. First all sets' first shingles, then all their second ones, and so
    on: so the arrays are as wide as there are sets, whatever their sizes.
    """
    # Not of numpy's generator: sketches are kept, and its numbers may be others in another version.
    a, b = (_mixed(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64)) >> _SHIFT).astype(np.uint32).reshape(2, -1, 1)
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
