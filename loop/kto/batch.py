"""Tensors and packs of the rows that a run trains on: by row, so that a group is a selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loop.kto.cache import ReferenceCache
from loop.kto.groups import Group
from loop.kto.logps import lay_out, score_all, sequence_sums, token_logps, token_logps_and_prefixes
from loop.kto.pack import Prompted, Tokens, branch, pack
from loop.kto.ranks import Ranks
from loop.kto.rows import Row

ROWS_AT_A_TIME = 256  # of the reference pass: what a killed one loses


@dataclass(frozen=True)
class Reference:
    """log π_ref of each row's completion, and of its mismatched one (NaN where it has none): both [rows] float64."""

    matched: Tensor
    mismatched: Tensor
    groups: Tensor  # [rows] the number of each row's group, which says what it is mismatched with


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
    cache: ReferenceCache,
    ranks: Ranks,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Log-probs of every row's completion and of its mismatched one, [rows] each, and how many the cache did not have.

    What is missing is computed (the adapter must be off) and put there; each prompt, and what prompts have in common,
    once. The processes of a run take turns with the rows. Raises FloatingPointError with the ids of rows whose
    log-prob is not finite.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].prompt_ids)
    found = torch.zeros(2, len(rows), dtype=torch.float64)
    computed = torch.zeros(1)
    parts = [order[start : start + ROWS_AT_A_TIME] for start in range(0, len(order), ROWS_AT_A_TIME)]
    for number, part in enumerate(parts[ranks.index :: ranks.count], 1):
        wanted = {
            (index, place): cache.key(rows[index].prompt_ids, completion)
            for index in part
            for place, completion in enumerate((rows[index].completion_ids, mismatched[index]))
            if completion is not None
        }
        known = cache.get(list(wanted.values()))
        missing = [(index, place) for (index, place), key in wanted.items() if key not in known]
        known |= _compute(model, rows, mismatched, missing, wanted)
        cache.put({wanted[at]: known[wanted[at]] for at in missing})
        for (index, place), key in wanted.items():
            found[place, index] = known[key]
        computed += len(missing)
        if on_progress is not None:
            on_progress(min(len(rows), number * ranks.count * ROWS_AT_A_TIME))
    device = next(model.parameters()).device
    found = ranks.sum(found.to(device))
    found[1, [other is None for other in mismatched]] = torch.nan
    return found[0], found[1], int(ranks.sum(computed.to(device)).item())


def _compute(
    model: nn.Module,
    rows: Sequence[Row],
    mismatched: Sequence[Tokens | None],
    missing: Sequence[tuple[int, int]],
    keys: Mapping[tuple[int, int], bytes],
) -> dict[bytes, float]:
    by_row: dict[int, list[int]] = {}
    for index, place in missing:
        by_row.setdefault(index, []).append(place)
    items = []
    for index, places in by_row.items():
        completions = (rows[index].completion_ids, mismatched[index])
        items.append(Prompted(rows[index].prompt_ids, tuple(completions[place] or () for place in places)))
    sums = [score.double().sum() for scores in score_all(model, items) for score in scores]
    if sums:
        check_finite(torch.stack(sums), [rows[index] for index, _ in missing], "the reference's log-prob")
    return {keys[at]: float(value) for at, value in zip(missing, sums, strict=True)}


def save_reference(reference: Reference, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(vars(reference), temporary)
    temporary.replace(path)


def load_reference(path: Path) -> Reference:
    return Reference(**load_file(path))


def policy_logps(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """log π_θ(y|x) of each row, [rows], with gradient."""
    batch = lay_out(model, [Prompted(row.prompt_ids, (row.completion_ids,)) for row in rows])
    return sequence_sums(token_logps(model, batch), batch.lengths)


def policy_and_mismatched_logps(
    model: nn.Module, rows: Sequence[Row], mismatched: Sequence[Tokens | None]
) -> tuple[Tensor, Tensor]:
    """`policy_logps`, and log π_θ(y′|x) of the rows that have a y′, [M], without gradient.

    The mismatched pass starts from the prompts' keys and values, so it computes completions only. For packed attention.
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
    return torch.tensor([float(score[0].double().sum()) for score in scores], dtype=torch.float64)


def check_finite(logps: Tensor, rows: Sequence[Row], what: str) -> None:
    """Raises FloatingPointError naming the rows whose value is NaN or infinite."""
    bad = [row.row_id for row, is_finite in zip(rows, logps.isfinite().tolist(), strict=True) if not is_finite]
    if bad:
        raise FloatingPointError(f"{what} is not finite for rows {bad[:20]}: look at these rows and the base's weights")
