"""Tensors and packs of the rows that a run trains on: by row, so that a group is a selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loop.kto.groups import Group
from loop.kto.logps import score_all, sequence_sums, token_logps, token_logps_and_prefixes
from loop.kto.pack import Prompted, Tokens, branch, pack
from loop.kto.rows import Row


@dataclass(frozen=True)
class Reference:
    """log π_ref of each row's completion, and of its mismatched one (NaN where it has none): both [rows] float32."""

    matched: Tensor
    mismatched: Tensor


def mismatched_completions(rows: Sequence[Row], groups: Sequence[Group], max_length: int) -> list[Tokens | None]:
    """By row, y′ as it is scored after the row's prompt: cut where the two together would exceed `max_length`."""
    found: list[Tokens | None] = [None] * len(rows)
    for group in groups:
        for row, other in zip(group.rows, group.mismatched, strict=True):
            if other is not None:
                found[row] = rows[other].completion_ids[: max_length - len(rows[row].prompt_ids)]
    return found


def reference_logps(
    model: nn.Module,
    rows: Sequence[Row],
    mismatched: Sequence[Tokens | None],
    on_progress: Callable[[int], None] | None = None,
) -> Reference:
    """Both log-probs of every row in one pass that computes each prompt once; the adapter must be off.

    Raises FloatingPointError with the ids of rows whose log-prob is not finite.
    """
    scores = score_all(
        model,
        [
            Prompted(row.prompt_ids, (row.completion_ids,) if other is None else (row.completion_ids, other))
            for row, other in zip(rows, mismatched, strict=True)
        ],
        on_progress,
    )
    matched = torch.stack([score[0].sum() for score in scores])
    other = torch.stack([score[1].sum() if len(score) > 1 else torch.tensor(torch.nan) for score in scores])
    has_other = torch.tensor([completion is not None for completion in mismatched])
    check_finite(matched, rows, "the reference's log-prob")
    check_finite(other.where(has_other, 0.0), rows, "the reference's log-prob of a mismatched completion")
    return Reference(matched, other)


def save_reference(reference: Reference, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({"matched": reference.matched, "mismatched": reference.mismatched}, temporary)
    temporary.replace(path)


def load_reference(path: Path) -> Reference:
    return Reference(**load_file(path))


def policy_logps(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """log π_θ(y|x) of each row, [rows], with gradient."""
    batch = pack([Prompted(row.prompt_ids, (row.completion_ids,)) for row in rows])
    return sequence_sums(token_logps(model, batch), batch.lengths)


def policy_and_mismatched_logps(
    model: nn.Module, rows: Sequence[Row], mismatched: Sequence[Tokens | None]
) -> tuple[Tensor, Tensor]:
    """`policy_logps`, and log π_θ(y′|x) of the rows that have a y′, [M], without gradient.

    The mismatched pass starts from the prompts' keys and values, so it computes completions only.
    """
    trunk = pack([Prompted(row.prompt_ids, (row.completion_ids,)) for row in rows])
    tokens, prefixes = token_logps_and_prefixes(model, trunk)
    with torch.no_grad():
        branches = branch(trunk, [(index, other) for index, other in enumerate(mismatched) if other is not None])
        mismatched_tokens = token_logps(model, branches, prefixes)
        others = sequence_sums(mismatched_tokens, branches.lengths)
    return sequence_sums(tokens, trunk.lengths), others


def mismatched_logps(model: nn.Module, rows: Sequence[Row], mismatched: Sequence[Tokens | None]) -> Tensor:
    """log π_θ(y′|x) of the rows that have a y′, [M], in passes of their own, without gradient."""
    pairs = zip(rows, mismatched, strict=True)
    scores = score_all(model, [Prompted(row.prompt_ids, (other,)) for row, other in pairs if other is not None])
    return torch.stack([score[0].sum() for score in scores]) if scores else torch.zeros(0)


def check_finite(logps: Tensor, rows: Sequence[Row], what: str) -> None:
    """Raises FloatingPointError naming the rows whose value is NaN or infinite."""
    bad = [row.row_id for row, is_finite in zip(rows, logps.isfinite().tolist(), strict=True) if not is_finite]
    if bad:
        raise FloatingPointError(f"{what} is not finite for rows {bad[:20]}: look at these rows and the base's weights")
