"""Scoring without training: rows and pairs under adapters on one base in memory; for the gate and `thumbwheel score`.

base = load_base(model_dir, "none", "float32")
model = load_adapters(base, {"live": live_dir, "candidate": candidate_dir})
live = score_rows(model, rows, "live")
candidate = score_rows(model, rows, "candidate", reference=live)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loop.kto.groups import mismatch
from loop.kto.logps import score_all
from loop.kto.model import Quantization, load_adapters, load_base, load_tokenizer, scoring
from loop.kto.pack import Prompted, prompted
from loop.kto.rows import Pair, Row, is_pairs, pair_of, read_records, row_of
from loop.kto.template import read_chat_template

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowScores:
    """Log-probs in nats of N rows' completions, under one adapter (the policy) and with every adapter off."""

    policy: Floats  # [N] sums over a completion's tokens
    reference: Floats  # [N]
    tokens: NDArray[np.int64]  # [N] tokens of each completion
    policy_tokens: tuple[Floats, ...]  # N arrays, by token
    reference_tokens: tuple[Floats, ...]
    policy_mismatched: Floats  # [M] of the rows' prompts with completions of other conversations
    reference_mismatched: Floats  # [M]

    @property
    def reward(self) -> Floats:
        """The implicit reward log π_θ(y|x) − log π_ref(y|x), [N]; β would only scale it."""
        return self.policy - self.reference

    @property
    def z0(self) -> float:
        """The reference point, on mismatched pairs of these same rows; 0 where there are none."""
        if not len(self.policy_mismatched):
            return 0.0
        return max(0.0, float(np.mean(self.policy_mismatched - self.reference_mismatched)))


def score_rows(
    model: Any, rows: Sequence[Row], adapter: str | None, *, reference: RowScores | None = None
) -> RowScores:
    """Scores under `adapter` (None: the base). `reference`, to save time: scores of the same rows on the same base."""
    others = mismatch([row.conversation for row in rows])
    items = [
        prompted(row.prompt_ids, row.completion_ids, None if o is None else rows[o].completion_ids)
        for row, o in zip(rows, others, strict=True)
    ]
    with scoring(model, adapter):
        policy, policy_mismatched = _split(score_all(model, items))
    if reference is not None:
        base, base_mismatched = reference.reference_tokens, reference.reference_mismatched
    elif adapter is None:
        base, base_mismatched = policy, policy_mismatched
    else:
        with scoring(model, None):
            base, base_mismatched = _split(score_all(model, items))
    return RowScores(
        policy=_sums(policy),
        reference=_sums(base),
        tokens=np.array([len(tokens) for tokens in policy], dtype=np.int64),
        policy_tokens=policy,
        reference_tokens=base,
        policy_mismatched=policy_mismatched,
        reference_mismatched=base_mismatched,
    )


def score_pairs(model: Any, pairs: Sequence[Pair], adapter: str | None) -> dict[str, float]:
    """Shares of pairs whose chosen answer scores higher, ties counting half.

    By the answer's log-prob (`accuracy_sum`), by its log-prob a token (`accuracy_mean`) and, with an adapter, by the
    implicit reward (`accuracy_reward`).
    """
    # One answer given twice is one sequence: it must tie with itself whatever the last bit says.
    items = [Prompted(p.prompt_ids, tuple(dict.fromkeys((tuple(p.chosen_ids), tuple(p.rejected_ids))))) for p in pairs]
    with scoring(model, adapter):
        policy = score_all(model, items)
    sums = np.array([[float(score[0].double().sum()), float(score[-1].double().sum())] for score in policy])  # [N, 2]
    lengths = np.array([[len(score[0]), len(score[-1])] for score in policy])
    result = {
        "pairs": len(pairs),
        "accuracy_sum": _wins(sums[:, 0], sums[:, 1]),
        "accuracy_mean": _wins(sums[:, 0] / lengths[:, 0], sums[:, 1] / lengths[:, 1]),
    }
    if adapter is not None:
        with scoring(model, None):
            base = score_all(model, items)
        rewards = sums - [[float(score[0].double().sum()), float(score[-1].double().sum())] for score in base]
        result["accuracy_reward"] = _wins(rewards[:, 0], rewards[:, 1])
    return result


def auc(reward: Floats, desirable: NDArray[np.bool_]) -> float | None:
    """Share of (desirable, undesirable) couples that the reward orders rightly, ties half; None without both labels."""
    up, down = reward[desirable], np.sort(reward[~desirable])
    if not len(up) or not len(down):
        return None
    below, not_above = np.searchsorted(down, up, "left"), np.searchsorted(down, up, "right")
    return float(np.mean((below + not_above) / 2) / len(down))


def balanced_accuracy(reward: Floats, desirable: NDArray[np.bool_], z0: float) -> float | None:
    """Mean over both labels of the share of rows on the right side of z0, ties half; None without both labels."""
    if desirable.all() or not desirable.any():
        return None
    point = np.full(len(reward), z0)
    up, down = desirable, ~desirable
    return (_wins(reward[up], point[up]) + _wins(point[down], reward[down])) / 2


def score_file(
    model_dir: Path,
    data: Path,
    adapter_dir: Path | None = None,
    *,
    chat_template: str | None = None,
    quantization: Quantization = "none",
    dtype: str = "float32",
) -> dict[str, Any]:
    """What `thumbwheel score` prints: the figures of a file of rows or of pairs. Raises ValueError for bad input."""
    records = read_records(data)
    tokenizer = load_tokenizer(model_dir)
    template = read_chat_template(chat_template)
    is_paired = is_pairs(records)
    if is_paired:
        pairs = [pair_of(record, place, tokenizer, template) for place, record in records]
    else:
        rows = [row_of(record, place, tokenizer, template, (1.0, 1.0)) for place, record in records]
    adapter = None if adapter_dir is None else "scored"
    base = load_base(model_dir, quantization, dtype)
    model = base if adapter_dir is None else load_adapters(base, {"scored": adapter_dir})
    return score_pairs(model, pairs, adapter) if is_paired else rows_figures(rows, score_rows(model, rows, adapter))


def rows_figures(rows: Sequence[Row], scores: RowScores) -> dict[str, Any]:
    """AUC and balanced accuracy of the implicit reward, and what they rest on."""
    desirable = np.array([row.desirable for row in rows])
    figures: dict[str, Any] = {
        "rows": len(rows),
        "auc": auc(scores.reward, desirable),
        "balanced_accuracy": balanced_accuracy(scores.reward, desirable, scores.z0),
        "z0": scores.z0,
        "mismatched_pairs": len(scores.policy_mismatched),
    }
    for name, of_label in (("chosen", desirable), ("rejected", ~desirable)):
        if of_label.any():
            figures[f"rows_{name}"] = int(of_label.sum())
            figures[f"logps/{name}"] = float(scores.policy[of_label].mean())
    return figures


def _split(scores: Sequence[tuple[Any, ...]]) -> tuple[tuple[Floats, ...], Floats]:
    """Matched token log-probs by row, and sums of the mismatched ones of the rows that have one."""
    mismatched = [float(score[1].double().sum()) for score in scores if len(score) > 1]
    return tuple(score[0].double().numpy() for score in scores), np.array(mismatched)


def _sums(tokens: Sequence[Floats]) -> Floats:
    return np.array([float(of_row.sum()) for of_row in tokens])


def _wins(better: Floats, worse: Floats) -> float:
    return float(np.mean((better > worse) + 0.5 * (better == worse)))
