"""Make a night's snapshot: read, curate, split, weigh, write. Reads downward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine

from loop.settings import SnapshotSettings
from loop.snapshot.balance import class_weights
from loop.snapshot.curate import STEPS, Label, newest_within, settle, to_rows
from loop.snapshot.split import Known, decide, decide_clusters, keep, load_known
from loop.snapshot.spool import Columns, Spool
from loop.snapshot.write import FORMAT, HELD_OUT, MANIFEST, TRAIN, identify, publish, record, write_rows
from loop.store.examples import Example, stream_examples

DAY_MS = 86_400_000
_BATCH = 2_048
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Snapshot:
    """A finished snapshot. Counts are rows; `path` is its folder."""

    path: Path
    snapshot_id: str
    train_path: Path
    held_out_path: Path
    read: int
    train_desirable: int
    train_undesirable: int
    held_out_desirable: int
    held_out_undesirable: int
    desirable_weight: float
    undesirable_weight: float
    steps: dict[str, int]
    """Rows that each step of the curation dropped, in order."""

    def summary(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Split:
    """Tonight's decisions: held_out [rows]; units of held-out raters and conversations; every prompt's flag."""

    held_out: Flags
    raters: npt.NDArray[np.uint64]
    conversations: npt.NDArray[np.uint64]
    prompts_held: Flags
    clusters: int
    """How many prompt clusters there are."""


def make_snapshot(engine: Engine, settings: SnapshotSettings, *, out: Path, now_ms: int) -> Snapshot:
    """Make the snapshot of the window before `now_ms` in the folder `out`; where `out` is whole already, that one.

    The same examples and the same `split_units` give the same `snapshot_id` and the same bytes, in whatever order the
    examples arrived. Raises ValueError where `out` is something else than a snapshot.
    """
    if out.exists():
        return load_snapshot(out)
    since = datetime.fromtimestamp((now_ms - settings.window_days * DAY_MS) / 1000, UTC).date()
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with Spool(made / "spool", settings.salt) as spool:
            steps = dict.fromkeys(STEPS, 0)
            read = _collect(stream_examples(engine, since), spool, settings, steps)
            rows = spool.columns()
            known = load_known(engine)
            split = _split(rows, spool, known, settings)
            # Kept before anything is published: a snapshot whose split nobody remembers must not exist.
            keep(engine, known, split.raters, split.conversations, spool.prompts.units, split.prompts_held)
            chosen, ascribed = _curate(rows, split.held_out, spool, settings, steps)
            manifest = _write(made, rows, split.held_out, chosen, ascribed, spool, settings)
        (made / "spool").unlink()
        content = {"format": FORMAT, "settings": _that_matter(settings), **manifest}
        extra = {
            "snapshot_id": identify(content),
            "created_at": datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(),
            "window": {"since": since.isoformat(), "days": settings.window_days},
            "read": read,
            "steps": [{"step": step, "dropped": steps[step], "why": why} for step, why in STEPS.items()],
            "clusters": split.clusters,
        }
        publish(made, out, content | extra)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return load_snapshot(out)


def load_snapshot(path: Path) -> Snapshot:
    """The snapshot in the folder `path`. Raises ValueError where there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, weights = manifest["files"], manifest["weights"]
        return Snapshot(
            path=path,
            snapshot_id=manifest["snapshot_id"],
            train_path=path / TRAIN,
            held_out_path=path / HELD_OUT,
            read=manifest["read"],
            train_desirable=files[TRAIN]["desirable"],
            train_undesirable=files[TRAIN]["undesirable"],
            held_out_desirable=files[HELD_OUT]["desirable"],
            held_out_undesirable=files[HELD_OUT]["undesirable"],
            desirable_weight=weights["desirable"],
            undesirable_weight=weights["undesirable"],
            steps={step["step"]: step["dropped"] for step in manifest["steps"]},
        )
    except (OSError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"{path} is not a whole snapshot ({exc!r}); remove it or give another folder") from exc


def _that_matter(settings: SnapshotSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"dir", "min_labels"})


def _collect(examples: Iterable[Example], spool: Spool, settings: SnapshotSettings, steps: dict[str, int]) -> int:
    """Spool what passes the steps that look at one row; returns how many there were, corrections among them."""
    read = 0
    for example in examples:
        for row in to_rows(example, settings):
            read += 1
            if isinstance(row, str):
                steps[row] += 1
            else:
                spool.add(row, settle(row.votes, settings.disagreement), example.day.toordinal())
    return read


def _split(rows: Columns, spool: Spool, known: Known, settings: SnapshotSettings) -> Split:
    share = settings.held_out_share
    raters, rater_of = np.unique(rows.voters, return_inverse=True)
    conversations, conversation_of = np.unique(rows.conversation, return_inverse=True)
    cluster_of = spool.prompts.clusters(settings.near_duplicate_similarity)
    raters_held = decide(raters, known.held_raters, share)
    conversations_held = decide(conversations, known.held_conversations, share)
    prompts_held = decide_clusters(spool.prompts.units, cluster_of, known, share)
    held_out = conversations_held[conversation_of] | prompts_held[rows.prompt]
    held_out[rows.voter_row[raters_held[rater_of]]] = True
    clusters = len(np.unique(cluster_of))
    return Split(held_out, raters[raters_held], conversations[conversations_held], prompts_held, clusters)


def _curate(
    rows: Columns, held_out: Flags, spool: Spool, settings: SnapshotSettings, steps: dict[str, int]
) -> tuple[Indices, dict[int, Label]]:
    """The rows that stay, in the snapshot's order, and the labels that were pooled from several rows' votes.

    In training, the same answer to the same prompt is one row, whoever voted. Held out, it is one for each rater (else
    for each conversation): the gate's intervals come from resampling raters, who must keep their own votes.
    """
    chosen: Indices = np.lexsort(rows.order)
    voter = np.where(rows.rater > 0, rows.rater, rows.conversation)
    same = np.where(held_out, rows.pair ^ voter, rows.pair)
    chosen, pooled = _merge(chosen, same, held_out, rows, spool, settings)
    steps["exact_duplicates"] = len(rows.label) - len(chosen)

    agreed = chosen[rows.label[chosen] >= 0]
    steps["disagreement"] = len(chosen) - len(agreed)

    training = ~held_out[agreed]
    by_rater = np.where(training, rows.rater[agreed], 0).astype(np.uint64)
    capped = agreed[newest_within(by_rater, rows.hlc[agreed], settings.max_per_rater)]
    steps["max_per_rater"] = len(agreed) - len(capped)

    by_prompt = np.where(held_out[capped], 0, rows.exact_prompt[capped]).astype(np.uint64)
    left = capped[newest_within(by_prompt, rows.hlc[capped], settings.max_per_prompt)]
    steps["max_per_prompt"] = len(capped) - len(left)
    return left, pooled


def _merge(
    order: Indices,
    same: npt.NDArray[np.uint64],
    held_out: Flags,
    rows: Columns,
    spool: Spool,
    settings: SnapshotSettings,
) -> tuple[Indices, dict[int, Label]]:
    """One row, the last in order, of those that are the `same` on one side of the split; its columns take the pooled
    votes' label. Only rows that have a duplicate are read back."""
    key = np.stack([same[order], held_out[order].astype(np.uint64)], axis=1)
    _, group, sizes = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    pooled: dict[int, Label] = {}
    keeps = np.ones(len(order), bool)
    places = np.nonzero(sizes[group] > 1)[0]
    places = places[np.argsort(group[places], kind="stable")]
    for members in np.split(places, np.nonzero(np.diff(group[places]))[0] + 1) if len(places) else ():
        keeps[members[:-1]] = False
        last = int(order[members[-1]])
        votes = [vote for row in spool.read(rows.offset[order[members]]) for vote in row.votes]
        label = settle(votes, settings.disagreement)
        rows.label[last] = -1 if label is None else int(label.desirable)
        if label is not None:
            pooled[last] = label
            rows.weight[last], rows.hlc[last] = label.weight, label.hlc
            rows.rater[last] = 0 if label.rater is None else spool.unit("rater", label.rater)
    return order[keeps], pooled


def _write(
    made: Path,
    rows: Columns,
    held_out: Flags,
    chosen: Indices,
    pooled: dict[int, Label],
    spool: Spool,
    settings: SnapshotSettings,
) -> dict[str, Any]:
    """Write both Parquet files; returns the manifest's part on them. Held-out rows keep their votes' weight alone."""
    train, held = chosen[~held_out[chosen]], chosen[held_out[chosen]]
    up, down = (float(rows.weight[train[rows.label[train] == label]].sum()) for label in (1, 0))
    lambdas = class_weights(up, down, settings.desirable_weight, settings.undesirable_weight)

    def batches(part: Indices, lambda_d: float, lambda_u: float) -> Iterator[list[dict[str, Any]]]:
        for begin in range(0, len(part), _BATCH):
            indices = part[begin : begin + _BATCH]
            batch = []
            for index, row in zip(indices.tolist(), spool.read(rows.offset[indices]), strict=True):
                label = pooled.get(index) or settle(row.votes, settings.disagreement)
                assert label is not None, "rows without a label were dropped by `disagreement`"
                weight = label.weight * (lambda_d if label.desirable else lambda_u)
                batch.append(record(row, label, weight))
            yield batch

    files: dict[str, Any] = {}
    for name, part, weights in ((TRAIN, train, lambdas), (HELD_OUT, held, (1.0, 1.0))):
        digest = write_rows(made / name, batches(part, *weights))
        desirable = int((rows.label[part] == 1).sum())
        files[name] = {"sha256": digest, "desirable": desirable, "undesirable": len(part) - desirable}
    return {"files": files, "weights": {"desirable": lambdas[0], "undesirable": lambdas[1]}}
