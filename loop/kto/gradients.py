"""One optimiser step's gradients: its reference point, the losses of its micro-batches, their backward passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loop.kto import batch as passes
from loop.kto.loss import kto_losses, reference_point
from loop.kto.model import scoring
from loop.kto.pack import Tokens
from loop.kto.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """An effective batch: N rows, M of which have a mismatched completion, and the reference's log-probs of both."""

    rows: Sequence[Row]
    others: Sequence[Tokens | None]
    matched: Tensor  # [N]
    mismatched: Tensor  # [M]
    desirable: Tensor  # [N] bool
    weight: Tensor  # [N]


def backward(policy: Any, batch: Batch, *, beta: float, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch's mean loss to the policy's parameters; `micro_batch` rows at a time.

    Returns log π_θ of each row, [N] without gradient, and z0. Raises FloatingPointError with the ids of rows whose
    log-prob is not finite.
    """
    size = len(batch.rows)
    # z0 spans the whole effective batch. Where that is one micro-batch and the passes do not differ by dropout, its
    # pass goes on from the prompts that the policy's pass computes anyway; else it comes first, without gradient.
    shares_prompts = micro_batch >= size and not _has_dropout(policy)
    if not shares_prompts:
        with scoring(policy, "default"):
            others = passes.mismatched_logps(policy, batch.rows, batch.others).to(batch.matched.device)
        z0 = reference_point(others, batch.mismatched)
    found = []
    for start in range(0, size, micro_batch):
        part = slice(start, start + micro_batch)
        if shares_prompts:
            logps, others = passes.policy_and_mismatched_logps(policy, batch.rows, batch.others)
            z0 = reference_point(others, batch.mismatched)
        else:
            logps = passes.policy_logps(policy, batch.rows[part])  # [micro-batch]
        passes.check_finite(logps, batch.rows[part], "the policy's log-prob")
        losses = kto_losses(logps, batch.matched[part], batch.desirable[part], batch.weight[part], z0, beta)
        (losses.sum() / size).backward()  # type: ignore[no-untyped-call]
        found.append(logps.detach())
    return torch.cat(found), z0


def backward_within_memory(policy: Any, batch: Batch, *, beta: float, micro_batch: int) -> tuple[Tensor, Tensor, int]:
    """`backward`, with half the micro-batch as often as memory runs out: the effective batch stays what it was.

    Returns the micro-batch that fitted too. Where one row alone does not fit, the error goes on.
    """
    while True:
        try:
            return *backward(policy, batch, beta=beta, micro_batch=micro_batch), micro_batch
        except RuntimeError as exc:
            if micro_batch == 1 or not _is_out_of_memory(exc):
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


def _is_out_of_memory(exc: RuntimeError) -> bool:
    return isinstance(exc, torch.OutOfMemoryError) or "can't allocate memory" in str(exc)  # the CPU's allocator


def _has_dropout(policy: Any) -> bool:
    return any(config.lora_dropout > 0 for config in policy.peft_config.values())
