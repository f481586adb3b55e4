"""What a run settles before its first step: its rows, its batches, and what the reference says of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loop.kto import batch, groups, model, rows, template
from loop.kto.cache import ReferenceCache
from loop.kto.gradients import Batch
from loop.kto.groups import Group
from loop.kto.progress import Watch
from loop.kto.ranks import Ranks
from loop.kto.rows import Row
from loop.settings import TrainSettings
from loop.snapshot.balance import class_weights

logger = logging.getLogger(__name__)


def load_rows(settings: TrainSettings, data: Path, model_dir: Path) -> tuple[list[Row], dict[str, float]]:
    """The rows that fit, weighted by class, and the figures of what became of the others. Raises ValueError."""
    tokenizer = model.load_tokenizer(model_dir)
    chat_template = template.read_chat_template(settings.chat_template)
    records = rows.read_records(data)
    labels = [record.get("label") for _, record in records if record.get("weight") is None]
    weights = class_weights(
        labels.count(True), labels.count(False), settings.desirable_weight, settings.undesirable_weight
    )
    every_row = [rows.row_of(record, place, tokenizer, chat_template, weights) for place, record in records]
    fitting, counts = rows.fit(every_row, settings.max_length, settings.truncation)
    if not fitting:
        raise ValueError(f"{data}: none of {len(every_row)} rows is within max_length = {settings.max_length} tokens")
    if any(counts.values()):
        logger.warning(
            "of %d rows, %d longer than max_length = %d were left out and %d cut (truncation = %r)",
            len(every_row),
            counts["rows_too_long"],
            settings.max_length,
            counts["rows_truncated"],
            settings.truncation,
        )
    desirable, undesirable = (sum(row.weight for row in fitting if row.desirable is label) for label in (True, False))
    logger.info(
        "%d rows; λ_D = %.4g, λ_U = %.4g where a row brings no weight; in all %.6g of desirable, %.6g of undesirable",
        len(fitting),
        *weights,
        desirable,
        undesirable,
    )
    return fitting, {**counts, "weight_desirable": desirable, "weight_undesirable": undesirable}


@dataclass(frozen=True)
class Plan:
    """All rows with the reference's log-probs, and the effective batches that they are trained in."""

    rows: Batch
    batches: Sequence[Group]
    computed: int
    """Log-probs that were not in the cache."""

    def batch(self, step: int, seed: int) -> Batch:
        """The rows of a step. Each epoch takes the same batches, in an order of its own."""
        epoch, place = divmod(step, len(self.batches))
        return self.rows.select(self.batches[groups.epoch_order(len(self.batches), epoch, seed)[place]].rows)


def make_plan(
    settings: TrainSettings,
    policy: torch.nn.Module,
    train_rows: Sequence[Row],
    cache: ReferenceCache,
    work: Path,
    ranks: Ranks,
    watch: Watch,
) -> Plan:
    """Group the rows, and compute the reference's log-probs that the cache does not have.

    A resumed run finds its groups and log-probs in its work folder, whatever has become of the cache.
    """
    file = work / "reference.safetensors"
    conversations = [row.conversation for row in train_rows]
    size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * ranks.count
    known = batch.load_reference(file) if file.exists() else None
    ranks.wait()  # all have looked before the first one writes
    if known is None:
        name = f"{size} rows, seed {settings.seed}"
        numbers = groups.number_groups(conversations, size, settings.seed, cache.groups(name, train_rows))
        if ranks.is_first:
            cache.keep_groups(name, train_rows, numbers)
    else:
        numbers = known.groups.tolist()
    made = groups.make_groups(conversations, numbers)
    if settings.objective == "kto":
        others = batch.mismatched_completions(train_rows, made, settings.max_length)
        _warn_of_rows_without_mismatch(sum(other is None for other in others), len(train_rows))
    else:  # without mismatched pairs z0 is 0, which is all that tells APO-zero from KTO
        others = [None] * len(train_rows)
    computed = 0
    if known is None:
        task = watch.task("reference", len(train_rows))
        with model.scoring(policy, None):
            matched, mismatched, computed = batch.reference_logps(
                policy, train_rows, others, cache, ranks, lambda done: watch.advance(task, done)
            )
        known = batch.Reference(matched, mismatched, torch.tensor(numbers))
        if ranks.is_first:
            batch.save_reference(known, file)
    whole = Batch.of(train_rows, others, known.matched, known.mismatched, next(policy.parameters()).device)
    return Plan(whole, groups.make_batches(made, size, settings.seed), computed)


def _warn_of_rows_without_mismatch(without: int, rows: int) -> None:
    if without:
        logger.warning(
            "%d of %d rows leave z0's mean: their group has no other conversation; a group without any has z0 = 0",
            without,
            rows,
            extra={"action": "rows_without_mismatch"},
        )
