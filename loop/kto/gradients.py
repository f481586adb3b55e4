"""One optimiser step's gradients: its reference point, the losses of its micro-batches, their backward passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loop.kto import batch as passes
from loop.kto.logps import is_packed
from loop.kto.loss import kto_losses, reference_point
from loop.kto.model import scoring
from loop.kto.pack import Tokens
from loop.kto.ranks import OutOfMemory, Ranks
from loop.kto.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """An effective batch of N rows: mismatched completions of those that have one, and the reference's log-probs."""

    rows: Sequence[Row]
    others: Sequence[Tokens | None]
    matched: Tensor  # [N]
    mismatched: Tensor  # [N], NaN where a row has no mismatched completion
    desirable: Tensor  # [N] bool
    weight: Tensor  # [N]

    @classmethod
    def of(
        cls, rows: Sequence[Row], others: Sequence[Tokens | None], matched: Tensor, mismatched: Tensor, device: Any
    ) -> Batch:
        """With labels and weights from the rows, on the device."""
        desirable = torch.tensor([row.desirable for row in rows], device=device)
        weight = torch.tensor([row.weight for row in rows], device=device)
        return cls(rows, others, matched.to(device), mismatched.to(device), desirable, weight)

    def select(self, chosen: Sequence[int]) -> Batch:
        """Some of the rows, in the order of `chosen`."""
        indices = torch.tensor(chosen, device=self.matched.device)
        rows, others = [self.rows[row] for row in chosen], [self.others[row] for row in chosen]
        tensors = (tensor[indices] for tensor in (self.matched, self.mismatched, self.desirable, self.weight))
        return Batch(rows, others, *tensors)


def backward(policy: Any, batch: Batch, *, beta: float, micro_batch: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch's mean loss to the policy's parameters; `micro_batch` rows at a time.

    Each process computes its part of the rows; gradients, and what is returned, are of all of them: log π_θ of each
    row, [N] without gradient, and z0. Raises FloatingPointError with the ids of rows whose log-prob is not finite, and
    OutOfMemory, with gradients left behind.
    """
    size, device = len(batch.rows), batch.matched.device
    mine = ranks.part(size)
    rows, others = batch.rows[mine], batch.others[mine]
    # z0 spans the whole effective batch. Where a process' part is one micro-batch and the passes do not differ by
    # dropout, its pass goes on from the prompts that the policy's pass computes anyway; else it comes first.
    shares_prompts = micro_batch >= len(rows) and is_packed(policy) and not _has_dropout(policy)
    logps = torch.zeros(0)
    with ranks.failing_together(device):
        if shares_prompts and rows:
            logps, of_others = passes.policy_and_mismatched_logps(policy, rows, others)
        else:
            with scoring(policy, "default"):
                of_others = passes.mismatched_logps(policy, rows, others)
    has_other = ~batch.mismatched.isnan()
    mismatched = torch.zeros(size, dtype=torch.float64, device=device)
    mismatched[mine][has_other[mine]] = of_others.to(device)
    z0 = reference_point(ranks.sum(mismatched)[has_other], batch.mismatched[has_other])

    found = torch.zeros(size, dtype=torch.float64, device=device)
    with ranks.failing_together(device):
        for start in range(mine.start, mine.stop, micro_batch):
            part = slice(start, min(start + micro_batch, mine.stop))
            if not shares_prompts:
                logps = passes.policy_logps(policy, batch.rows[part])  # [micro-batch]
            passes.check_finite(logps, batch.rows[part], "the policy's log-prob")
            losses = kto_losses(logps, batch.matched[part], batch.desirable[part], batch.weight[part], z0, beta)
            (losses.sum() / size).backward()  # type: ignore[no-untyped-call]
            found[part] = logps.detach()
    ranks.sum_gradients(parameter for parameter in policy.parameters() if parameter.requires_grad)
    return ranks.sum(found), z0


def backward_within_memory(
    policy: Any, batch: Batch, *, beta: float, micro_batch: int, ranks: Ranks
) -> tuple[Tensor, Tensor, int]:
    """`backward`, with half the micro-batch as often as memory runs out: the effective batch stays what it was.

    Returns the micro-batch that fitted too. Where one row alone does not fit, OutOfMemory goes on.
    """
    while True:
        try:
            return *backward(policy, batch, beta=beta, micro_batch=micro_batch, ranks=ranks), micro_batch
        except OutOfMemory:
            if micro_batch == 1:
                raise
        policy.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        micro_batch = -(-min(micro_batch, len(batch.rows)) // 2)
        logger.warning(
            "out of memory: %d rows at a time from here on, %d in a step as before",
            micro_batch,
            len(batch.rows),
            extra={"action": "micro_batch_halved"},
        )


def _has_dropout(policy: Any) -> bool:
    return any(config.lora_dropout > 0 for config in policy.peft_config.values())
