"""Near-duplicate prompts: which texts are compared, and the clusters that they form. Pure.

Two prompts are near-duplicates where the Jaccard similarity of their word bigrams reaches a threshold; a cluster is
what such pairs connect. Pairs are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", ch. 3) and then checked exactly, so that what is one cluster really is similar;
a pair at the threshold is missed with a probability below MISSED. In a bucket a prompt is held against its neighbours
only, so the time stays within a constant times the number of distinct prompts, whatever they look like.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

PERMUTATIONS = 64
MISSED = 1e-3
NEIGHBOURS = 8
MIN_WORDS = 4
_WORD = re.compile(r"\w+")
_IDENTIFIER = re.compile(r"\d{4,}")
_MIX = np.uint64(0x9E3779B97F4A7C15)


def message_text(content: Any) -> str | None:
    """A message's text: its content, or the text parts of a multimodal one; None where it has other parts."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return None


def asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a prompt is clustered on: its last user turn, with the turns before it while that is under MIN_WORDS words.

    Not the whole prompt: a later turn's prompt contains earlier answers, and every prompt of an app the same system
    message, which would make prompts alike, or unlike, that ask the same. And not "yes" or "thanks" alone, which would
    tie conversations together that have nothing in common. That earlier turns of a held-out conversation do not reach
    training is what the conversation, a unit of its own, is for.
    """
    turns: list[str] = []
    for message in reversed(messages):
        if message.get("role") == "user":
            turns.append(message_text(message.get("content")) or "")
            if sum(len(_WORD.findall(turn)) for turn in turns) >= MIN_WORDS:
                break
    return "\n".join(reversed(turns))


def normal_words(text: str) -> list[str]:
    """Words without case and punctuation. Numbers of four digits and more count as one: an order number or a date does
    not make another question of it, while in "12 times 7" the numbers are what is asked."""
    return _WORD.findall(_IDENTIFIER.sub("0000", text.casefold()))


class _Hashes(dict[str, int]):
    """The 64-bit hash of every word that was looked up."""

    def __missing__(self, word: str) -> int:
        self[word] = hashed = int.from_bytes(blake2b(word.encode(), digest_size=8).digest())
        return hashed


class DistinctPrompts:
    """The distinct normalised prompts that were seen: 8 bytes a word and one set entry each, not their text."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._words = _Hashes()
        self._units = array("Q")
        self._flat = array("Q")
        self._starts = array("q", [0])

    def add(self, words: Sequence[str], unit: int) -> int:
        """The index of this prompt among the distinct ones; `unit` is its 64-bit hash."""
        index = self._index.setdefault(unit, len(self._index))
        if index == len(self._units):
            self._units.append(unit)
            # The marks make a bigram of a single word, and of no word at all.
            self._flat.extend(map(self._words.__getitem__, ("^", *words, "$")))
            self._starts.append(len(self._flat))
        return index

    @property
    def units(self) -> U64:
        return np.frombuffer(self._units, dtype=np.uint64) if self._units else np.zeros(0, np.uint64)

    def clusters(self, similarity: float) -> I64:
        """The cluster of each distinct prompt: the smallest index in it. Which prompts share one does not depend on
        the order in which they were added."""
        count = len(self._units)
        if count == 0:
            return np.zeros(0, np.int64)
        # Neighbours in a bucket depend on the order: a canonical one makes the clusters a function of the set.
        order = np.argsort(self.units, kind="stable")
        words = np.frombuffer(self._flat, dtype=np.uint64)
        starts = np.frombuffer(self._starts, dtype=np.int64)
        found = _clusters(words, starts[:-1][order], starts[1:][order], similarity)  # in canonical order
        member_of = np.empty(count, np.int64)
        member_of[order] = found
        smallest = np.full(count, count, np.int64)
        np.minimum.at(smallest, member_of, np.arange(count))
        return smallest[member_of]


def _clusters(words: U64, starts: I64, ends: I64, similarity: float) -> I64:
    """words: flat hashes of all prompts; starts, ends: [n] -> root: [n]."""
    shingles, offsets = _bigrams(words, starts, ends)
    bands = _bands(shingles, offsets, similarity)  # [bands, n]
    sets, set_offsets = _unique_sets(shingles, offsets)
    sizes = np.diff(set_offsets)
    parent = np.arange(len(starts), dtype=np.int64)
    for index, band in enumerate(bands):
        # Within a bucket, prompts that agree on the next band too come to lie side by side.
        order = np.lexsort((bands[(index + 1) % len(bands)], band))
        left, right = _candidates(band[order])
        left, right = order[left], order[right]
        # Sets whose sizes differ by more than the threshold cannot be similar enough: most pairs end here.
        apart = (parent[left] != parent[right]) & (
            np.minimum(sizes[left], sizes[right]) >= similarity * np.maximum(sizes[left], sizes[right])
        )
        packed = np.unique(left[apart] << 32 | right[apart])
        pairs = np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)
        similar = _jaccard(sets, set_offsets, pairs) >= similarity
        parent = _unite(parent, pairs[similar])
    return parent


def _bigrams(words: U64, starts: I64, ends: I64) -> tuple[U64, I64]:
    """Hashes of each prompt's word bigrams, flat, and where each prompt's begin: [total], [n + 1]."""
    lengths = ends - starts - 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    at = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    mixed: U64 = (words[at] * _MIX) ^ words[at + 1]
    return mixed, offsets


def _bands(shingles: U64, offsets: I64, similarity: float) -> list[U64]:
    """One bucket key a prompt and band. The rows of a band are as many as leave a miss at the threshold unlikely."""
    rows = next((r for r in (16, 8, 4, 2) if (1 - min(similarity, 0.999) ** r) ** (PERMUTATIONS // r) <= MISSED), 1)
    random = np.random.default_rng(0)
    bands = []
    for _ in range(PERMUTATIONS // rows):
        key = np.zeros(len(offsets) - 1, np.uint64)
        for _ in range(rows):
            # Multiply-shift; the multiplier is odd, and the upper half of the product is the value.
            a, b = random.integers(0, 1 << 63, 2, dtype=np.uint64)
            least = np.minimum.reduceat((shingles * (a | np.uint64(1)) + b) >> np.uint64(32), offsets[:-1])
            key = (key ^ least) * _MIX
            key ^= key >> np.uint64(29)
        bands.append(key)
    return bands


def _unique_sets(shingles: U64, offsets: I64) -> tuple[U64, I64]:
    """Each prompt's shingles once, as keys (prompt << 32 | shingle number), sorted; and where each prompt's begin."""
    count = len(offsets) - 1
    _, number = np.unique(shingles, return_inverse=True)
    owner = np.repeat(np.arange(count, dtype=np.uint64), np.diff(offsets))
    keys = np.unique(owner << np.uint64(32) | number.astype(np.uint64))
    return keys, np.searchsorted(keys, np.arange(count + 1, dtype=np.uint64) << np.uint64(32)).astype(np.int64)


def _candidates(buckets: U64) -> tuple[I64, I64]:
    """Positions of pairs in the sorted bucket keys: each entry with the bucket's first and its NEIGHBOURS before it."""
    at = np.arange(len(buckets))
    new = np.concatenate([[True], buckets[1:] != buckets[:-1]])
    first = np.maximum.accumulate(np.where(new, at, 0))
    lefts, rights = [first], [at]
    for back in range(1, NEIGHBOURS + 1):
        same = at[back:][at[back:] - back > first[back:]]
        lefts.append(same - back)
        rights.append(same)
    left, right = np.concatenate(lefts), np.concatenate(rights)
    return left[left != right], right[left != right]


def _jaccard(keys: U64, offsets: I64, pairs: I64, chunk: int = 200_000) -> npt.NDArray[np.float64]:
    """Exact similarity of each pair: [p, 2] -> [p]."""
    sizes = np.diff(offsets)
    parts = []
    for begin in range(0, len(pairs), chunk):
        left, right = pairs[begin : begin + chunk].T
        lengths = sizes[left]
        ends = np.cumsum(lengths)
        at = np.repeat(offsets[left] - (ends - lengths), lengths) + np.arange(ends[-1])
        wanted = (keys[at] & np.uint64(0xFFFFFFFF)) | np.repeat(right, lengths).astype(np.uint64) << np.uint64(32)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        shared = np.add.reduceat(keys[place] == wanted, ends - lengths, dtype=np.int64)
        parts.append(shared / (sizes[left] + sizes[right] - shared))
    return np.concatenate(parts) if parts else np.zeros(0)


def _unite(parent: I64, pairs: Iterable[Sequence[int]] | I64) -> I64:
    """Union-find over `pairs` on top of `parent` (a root for each entry); returns a root for each entry again."""
    roots = parent.tolist()

    def find(item: int) -> int:
        while roots[item] != item:
            roots[item] = roots[roots[item]]
            item = roots[item]
        return int(item)

    for left, right in pairs:
        a, b = find(int(left)), find(int(right))
        roots[max(a, b)] = min(a, b)
    flat = np.asarray(roots, dtype=np.int64)
    while not np.array_equal(flat, flat[flat]):
        flat = flat[flat]
    return flat
