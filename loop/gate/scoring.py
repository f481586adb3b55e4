"""Log-probs of held-out answers under the base and its adapters, by the same code that trains, as numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loop.gate.bootstrap import F64
from loop.kto import pack
from loop.kto.logps import score_all
from loop.kto.model import scoring
from loop.kto.pack import Tokens

Step = Callable[[int], None]


@dataclass(frozen=True)
class Scores:
    """Log-probs in nats of n rows: each answer's tokens, and the sum of its mismatched one ([n], NaN without one)."""

    tokens: list[F64]
    mismatched: F64

    @property
    def sums(self) -> F64:
        return np.asarray([row.sum() for row in self.tokens])


def score(
    model: Any, adapter: str | None, prompted: Sequence[tuple[Tokens, Tokens, Tokens | None]], step: Step | None = None
) -> Scores:
    """Log-probs of (prompt, answer, mismatched answer or None) under the named adapter; None: the base.

    Raises FloatingPointError where one is not finite.
    """
    items = [pack.prompted(*item) for item in prompted]
    with scoring(model, adapter):
        found = score_all(model, items, step)
    tokens = [row[0].double().numpy() for row in found]
    mismatched = np.asarray([float(row[1].double().sum()) if len(row) > 1 else np.nan for row in found])
    broken = [index for index, row in enumerate(tokens) if not np.isfinite(row).all()]
    if broken:
        raise FloatingPointError(f"log-probs under {adapter or 'the base'} are not finite at rows {broken[:10]}")
    return Scores(tokens, mismatched)
