"""Held-out rows as the gate scores them: token ids, who voted, and what each answer is mismatched with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from loop.gate.preference import HeldOut
from loop.kto.groups import mismatch
from loop.kto.rows import Row, fit, read_records, row_of
from loop.settings import TrainSettings


@dataclass(frozen=True)
class Inputs:
    """Held-out rows as they are scored, with who voted, and for each the answer that it is mismatched with."""

    rows: list[Row]
    held_out: HeldOut
    mismatched: list[list[int] | None]

    @property
    def prompted(self) -> list[tuple[list[int], list[int], list[int] | None]]:
        return [(r.prompt_ids, r.completion_ids, other) for r, other in zip(self.rows, self.mismatched, strict=True)]


def read_inputs(
    path: Path, tokenizer: Any, chat_template: str | None, train: TrainSettings
) -> tuple[Inputs, dict[str, Any]]:
    """The rows of a held-out file, and how many were left out for their length."""
    is_empty = path.suffix == ".parquet" and pq.read_metadata(path).num_rows == 0
    records = [] if is_empty else read_records(path)
    rows, raters = [], {}
    for place, record in records:
        row = row_of(record, place, tokenizer, chat_template, (1.0, 1.0))
        rows.append(row)
        raters[row.row_id] = record.get("rater") or f"conversation {row.conversation}"
    rows, dropped = fit(rows, train.max_length, train.truncation)
    partners = mismatch([row.conversation for row in rows])
    others = [None if p is None else rows[p].completion_ids for p in partners]
    held_out = HeldOut(
        desirable=np.asarray([row.desirable for row in rows], dtype=bool),
        weight=np.asarray([row.weight for row in rows], dtype=np.float64),
        clusters=[raters[row.row_id] for row in rows],
        prompts=[tuple(row.prompt_ids) for row in rows],
    )
    counts = {
        "rows": len(rows),
        "desirable": int(held_out.desirable.sum()),
        "undesirable": int((~held_out.desirable).sum()),
        "clusters": len(set(held_out.clusters)),
        **dropped,
    }
    return Inputs(rows, held_out, others), counts


def choose_probes(rows: Sequence[Row], count: int) -> list[list[int]]:
    """`count` different prompts of the rows, by a hash: the same ones for every candidate on the same rows."""
    prompts = {tuple(row.prompt_ids): None for row in rows}
    ordered = sorted(prompts, key=lambda ids: hashlib.sha256(repr(ids).encode()).digest())
    return [list(ids) for ids in ordered[:count]]
