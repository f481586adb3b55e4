"""Prompts as the snapshot compares them, and their clusters, without a store."""

from __future__ import annotations

from typing import Any

import numpy as np

from loop.content import asked_words
from loop.minhash import SKETCH, shingle_sets, sketches
from loop.snapshot.near import band_keys, clusters, signatures
from loop.snapshot.split import units_of


def asked_of(messages: list[dict[str, Any]]) -> str:
    return asked_words([(message["role"], message["content"]) for message in messages]).decode()


def clusters_of(texts: list[str], similarity: float, salt: str = "salt") -> list[int]:
    """A number for each text; those of one cluster have the same."""
    if not texts:
        return []
    units = units_of(salt, "cluster", [text.encode() for text in texts])
    _, first, text_of = np.unique(units, return_index=True, return_inverse=True)
    asked = [texts[n].encode() for n in first]
    sketch = np.frombuffer(b"".join(sketches(asked)), SKETCH)
    keys = band_keys(sketch["least"], similarity)

    def sets_of(prompts: Any) -> Any:
        return shingle_sets([asked[n] for n in prompts])[0]

    found = clusters(
        len(first),
        len(keys),
        keys.__getitem__,
        sketch["size"].astype(np.int32),
        signatures(sketch["least"]),
        sets_of,
        similarity,
    )
    return [int(n) for n in found[text_of]]
