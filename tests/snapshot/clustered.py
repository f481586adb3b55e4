"""Prompts as the snapshot compares them, and their clusters, without a store."""

from __future__ import annotations

from typing import Any

import numpy as np

from loop.snapshot.near import band_keys, clusters, shingle_sets
from loop.snapshot.prompts import asked_words
from loop.snapshot.split import units_of


def asked_of(messages: list[dict[str, Any]]) -> str:
    return asked_words([(message["role"], message["content"]) for message in messages]).decode()


def clusters_of(texts: list[str], similarity: float, salt: str = "salt") -> list[int]:
    """A number for each text; those of one cluster have the same."""
    if not texts:
        return []
    units = units_of(salt, "cluster", [text.encode() for text in texts])
    _, first, text_of = np.unique(units, return_index=True, return_inverse=True)
    shingles, sizes = shingle_sets([texts[n].encode() for n in first])
    starts = np.cumsum(sizes) - sizes
    keys = band_keys(shingles, sizes, similarity)

    def sets_of(prompts: Any) -> Any:
        parts = [shingles[starts[n] : starts[n] + sizes[n]] for n in prompts]
        return np.concatenate([np.zeros(0, np.uint32), *parts])

    found = clusters(len(first), len(keys), keys.__getitem__, sizes.astype(np.int32), sets_of, similarity)
    return [int(n) for n in found[text_of]]
