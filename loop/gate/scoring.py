"""Log-probs and KL of held-out answers under the base and its adapters: the gate's own use of torch.

Log-probs come from `loop.kto.logps`, the same code that trains; this module turns them into numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loop.gate.bootstrap import F64
from loop.kto.attention import Layout
from loop.kto.logps import (
    LOGITS_AT_A_TIME,
    SCORED_TOKENS_AT_A_TIME,
    causal_model,
    output_head,
    score_all,
    sequence_sums,
)
from loop.kto.model import scoring
from loop.kto.pack import Pack, Prompted, Tokens, pack, packs_of

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
    items = [Prompted(prompt, (own,) if other is None else (own, other)) for prompt, own, other in prompted]
    with scoring(model, adapter):
        found = score_all(model, items, step)
    tokens = [row[0].double().numpy() for row in found]
    mismatched = np.asarray([float(row[1].double().sum()) if len(row) > 1 else np.nan for row in found])
    broken = [index for index, row in enumerate(tokens) if not np.isfinite(row).all()]
    if broken:
        raise FloatingPointError(f"log-probs under {adapter or 'the base'} are not finite at rows {broken[:10]}")
    return Scores(tokens, mismatched)


@torch.no_grad()
def kl_to_base(model: Any, adapter: str, prompted: Sequence[tuple[Tokens, Tokens]], step: Step | None = None) -> F64:
    """KL(π_adapter ‖ π_base) along each answer, in nats a sequence: [n].

    The sum over the answer's positions of the exact divergence of the two next-token distributions. An estimate from
    the sampled tokens alone would presume that the candidate wrote the answers; the base or an earlier adapter did.
    """
    items = [Prompted(prompt, (answer,)) for prompt, answer in prompted]
    sums: list[float] = []
    for run in packs_of(items, SCORED_TOKENS_AT_A_TIME):
        batch = pack([items[index] for index in run])
        with scoring(model, adapter):
            mine = _hidden(model, batch)
        with scoring(model, None):
            other = _hidden(model, batch)
        sums += sequence_sums(_divergence(model, adapter, mine, other), batch.lengths).tolist()
        if step is not None:
            step(len(sums))
    return np.asarray(sums)


def _hidden(model: Any, batch: Pack) -> torch.Tensor:
    """[N, H] hidden states that predict the scored tokens."""
    causal = causal_model(model)
    output = getattr(causal, causal.base_model_prefix)(
        input_ids=batch.input_ids[None].to(causal.device),
        position_ids=batch.position_ids[None].to(causal.device),
        use_cache=False,
        layout=Layout(batch.segments),
    )
    hidden: torch.Tensor = output.last_hidden_state[0].index_select(0, batch.scored.to(causal.device))
    return hidden


def _divergence(model: Any, adapter: str, mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[N, H] twice -> [N] float64 KL of the next-token distributions, the vocabulary in chunks of positions."""
    causal = causal_model(model)
    head = output_head(causal)
    chunk = max(1, LOGITS_AT_A_TIME // causal.config.get_text_config().vocab_size)
    parts = []
    for start in range(0, len(mine), chunk):
        part = slice(start, start + chunk)
        with scoring(model, adapter):
            p = head(mine[part]).float().log_softmax(-1)  # [C, V]
        with scoring(model, None):
            q = head(other[part]).float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1).double().clamp(min=0))
    return torch.cat(parts).cpu()
