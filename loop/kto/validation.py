"""The rows that a run watches and never learns from: the validation split and its figures.

They are some of the snapshot's *training* raters; the gate's held-out file is never opened here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loop.kto.batch import mismatched_completions, reference_logps
from loop.kto.cache import ReferenceCache
from loop.kto.divergence import kl_to_base
from loop.kto.gradients import Batch
from loop.kto.groups import Group, mismatch
from loop.kto.logps import score_all
from loop.kto.loss import kto_losses, reference_point
from loop.kto.model import scoring
from loop.kto.pack import Tokens, prompted
from loop.kto.ranks import Ranks
from loop.kto.rows import Row
from loop.kto.score import auc, balanced_accuracy
from loop.settings import TrainSettings


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """`(train, validation)`: a rater's rows stand on one side (a conversation's, where no rater is named), as do all
    rows of a conversation; sides are drawn by a hash, so that a rater keeps his from night to night. Pure.
    """
    watched = {row.conversation for row in rows if _draw(row.rater or row.conversation) < share}
    train = [row for row in rows if row.conversation not in watched]
    return train, [row for row in rows if row.conversation in watched]


def _draw(name: str) -> float:
    """Evenly from [0, 1), by the name."""
    return int.from_bytes(hashlib.sha256(f"validation:{name}".encode()).digest()[:8]) / 2**64


@dataclass(frozen=True)
class Validation:
    """V rows with the reference's log-probs."""

    rows: Batch
    beta: float

    def figures(self, policy: Any, ranks: Ranks) -> dict[str, float]:
        """Loss, z0 (`eval_kl`, as TRL names it), mean KL to the base along an answer (nats), accuracy of the implicit
        reward against z0 (balanced over the labels) and AUC; the last two are left out where only one label is there.
        """
        rows, others = self.rows.rows, self.rows.others
        found = torch.zeros(2, len(rows), dtype=torch.float64)
        mine = range(len(rows))[ranks.part(len(rows))]
        with scoring(policy, "default"):
            scored = score_all(policy, [prompted(rows[n].prompt_ids, rows[n].completion_ids, others[n]) for n in mine])
        for index, logps in zip(mine, scored, strict=True):
            for place, of_completion in enumerate(logps):
                found[place, index] = of_completion.double().sum()
        divergence = np.zeros(len(rows))
        divergence[mine] = kl_to_base(policy, "default", [(rows[n].prompt_ids, rows[n].completion_ids) for n in mine])
        matched, mismatched = ranks.sum(found.to(self.rows.matched.device))
        has_other = ~self.rows.mismatched.isnan()
        z0 = reference_point(mismatched[has_other], self.rows.mismatched[has_other])
        desirable = self.rows.desirable
        losses = kto_losses(matched, self.rows.matched, desirable, self.rows.weight, z0, self.beta)
        reward, is_desirable = (matched - self.rows.matched).cpu().numpy(), desirable.cpu().numpy()
        figures = {
            "loss": float(losses.mean()),
            "kl": float(z0),
            "kl_to_base": float(ranks.sum(torch.tensor(divergence.mean(), device=matched.device))),
            "accuracy": balanced_accuracy(reward, is_desirable, float(z0)),
            "auc": auc(reward, is_desirable),
        }
        return {f"eval_{name}": value for name, value in figures.items() if value is not None}


def prepare(
    settings: TrainSettings, policy: Any, rows: Sequence[Row], cache: ReferenceCache, ranks: Ranks
) -> Validation:
    """The split with its reference log-probs, as far as the cache does not have them already computed."""
    whole = Group(tuple(range(len(rows))), tuple(mismatch([row.conversation for row in rows])))
    others: list[Tokens | None] = [None] * len(rows)
    if settings.objective == "kto":
        others = mismatched_completions(rows, [whole], settings.max_length)
    with scoring(policy, None):
        matched, mismatched, _ = reference_logps(policy, rows, others, cache, ranks)
    return Validation(Batch.of(rows, others, matched, mismatched, matched.device), settings.beta)
