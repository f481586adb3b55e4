"""How far an adapter has moved from its base: the exact KL of their next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loop.kto.logps import causal_model, lay_out, logits_chunk, output_head, runs, scored_hidden, sequence_sums
from loop.kto.model import scoring
from loop.kto.pack import Prompted, Tokens


@torch.no_grad()
def kl_to_base(model: Any, adapter: str, prompted: Sequence[tuple[Tokens, Tokens]]) -> NDArray[np.float64]:
    """KL(π_adapter ‖ π_base) along each answer, in nats a sequence: [n].

    The sum over the answer's positions of the exact divergence of the two next-token distributions. An estimate from
    the sampled tokens alone would presume that the adapter wrote the answers; the base or an earlier one did.
    """
    items = [Prompted(prompt, (answer,)) for prompt, answer in prompted]
    found = np.zeros(len(items))
    for indices in runs(model, items):
        batch = lay_out(model, [items[index] for index in indices])
        with scoring(model, adapter):
            mine = scored_hidden(model, batch)
        with scoring(model, None):
            other = scored_hidden(model, batch)
        found[indices] = sequence_sums(_divergence(model, adapter, mine, other), batch.lengths).numpy()
    return found


def _divergence(model: Any, adapter: str, mine: Tensor, other: Tensor) -> Tensor:
    """[N, H] twice -> [N] float64 KL of the next-token distributions, the vocabulary in chunks of positions."""
    causal = causal_model(model)
    head, chunk = output_head(causal), logits_chunk(causal)
    parts = []
    for start in range(0, len(mine), chunk):
        part = slice(start, start + chunk)
        with scoring(model, adapter):
            p = head(mine[part]).float().log_softmax(-1)  # [C, V]
        with scoring(model, None):
            q = head(other[part]).float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1).double().clamp(min=0))
    return torch.cat(parts).cpu()
