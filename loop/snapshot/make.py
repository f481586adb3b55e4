"""Make a night's snapshot: read, curate, split, weigh, write. Reads downward."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from glob import escape
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sqlalchemy import Engine

from loop.settings import SnapshotSettings
from loop.snapshot.ahead import ahead
from loop.snapshot.balance import class_weights
from loop.snapshot.collect import collect
from loop.snapshot.curate import STEPS, newest_within, settle
from loop.snapshot.labels import Labels
from loop.snapshot.near import clusters
from loop.snapshot.split import decide, decide_clusters, keep, load_known
from loop.snapshot.spool import Spooled
from loop.snapshot.write import FORMAT, HELD_OUT, MANIFEST, TRAIN, RowFile, identify, publish
from loop.sorted_arrays import distinct, find_frequent, is_first
from loop.store.examples import find_blocks, has_more_examples

log = logging.getLogger("thumbwheel.snapshot")

DAY_MS = 86_400_000
SMALL_WINDOW = 50_000
"""Up to so many examples, other processes would take longer to start than to read, and all rows fit into memory."""
_BATCHES_AHEAD = 8
Flags = npt.NDArray[np.bool_]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


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
    """Tonight's decisions: which rows are held out [rows]."""

    held_out: Flags
    clusters: int
    """How many prompt clusters there are."""


def make_snapshot(engine: Engine, settings: SnapshotSettings, *, out: Path, now_ms: int) -> Snapshot:
    """Make the snapshot of the window before `now_ms` in the folder `out`; where `out` is whole already, that one.

    The same examples and the same `split_units` give the same `snapshot_id` and the same bytes, in whatever order the
    examples arrived and however many processes read them. Raises ValueError where `out` is something else than a
    snapshot, StoreUnavailableError.
    """
    if out.exists():
        return load_snapshot(out)
    since = datetime.fromtimestamp((now_ms - settings.window_days * DAY_MS) / 1000, UTC).date()
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{escape(out.name)}-*"):  # by a run that was killed in this, with gigabytes in it
        shutil.rmtree(left, ignore_errors=True)
    made = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (made / "spool").mkdir()
        is_large = has_more_examples(engine, since, SMALL_WINDOW)
        processes = settings.processes if is_large else 1
        collected, spools = collect(engine, settings, find_blocks(engine, since), made / "spool", processes)
        _finished("collect")
        with Spooled(spools, settings.near_duplicate_similarity) as rows:
            split = _split(rows, engine, settings)
            _finished("split")
            with Labels(rows, made / "spool" / "labels", settings.salt) as labels:
                chosen = _curate(rows, split.held_out, labels, settings, collected.steps)
                _finished("curate")
                manifest = _write(made, rows, split.held_out, labels, chosen, settings)
                _finished("write")
        shutil.rmtree(made / "spool")
        content = {"format": FORMAT, "settings": _that_matter(settings), **manifest}
        extra = {
            "snapshot_id": identify(content),
            "created_at": datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(),
            "window": {"since": since.isoformat(), "days": settings.window_days},
            "read": collected.read,
            "steps": [{"step": step, "dropped": collected.steps[step], "why": why} for step, why in STEPS.items()],
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
    return settings.model_dump(mode="json", exclude={"dir", "min_labels", "processes"})


def _finished(phase: str) -> None:
    log.info("snapshot phase finished", extra={"action": "snapshot_phase_finished", "phase": phase})


def _split(rows: Spooled, engine: Engine, settings: SnapshotSettings) -> Split:
    """Decide what is held out, and keep it: a snapshot whose split nobody remembers must not be published."""
    known, share = load_known(engine), settings.held_out_share
    prompts, prompt_of, cluster_of = _prompts(rows, settings.near_duplicate_similarity)
    prompts_held = decide_clusters(prompts, cluster_of, known, share)
    held_out = prompts_held[prompt_of]

    conversation = rows.column("conversation")
    is_held = decide(conversation, known.held_conversations, share)
    held_out |= is_held
    conversations = distinct(conversation[is_held])

    voters = rows.column("voters")
    is_held = decide(voters, known.held_raters, share)
    held_out[np.repeat(np.arange(len(held_out), dtype=np.int32), rows.column("voters_size"))[is_held]] = True
    keep(engine, known, distinct(voters[is_held]), conversations, prompts, prompts_held)
    return Split(held_out, int((cluster_of == np.arange(len(prompts))).sum()))


def _prompts(rows: Spooled, similarity: float) -> tuple[U64, I32, I32]:
    """Units of the distinct prompts, sorted [p]; each row's place among them [n]; their clusters [p]."""
    units = rows.column("prompt")
    order = np.argsort(units, kind="stable")
    units = units[order]
    is_new = is_first(units)
    prompt_of = np.empty(len(units), np.int32)
    prompt_of[order] = np.cumsum(is_new, dtype=np.int32) - 1
    units, first = units[is_new], order[is_new].astype(np.int32)
    del order, is_new
    lengths = rows.column("asked_size")
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[first]
    lengths = lengths[first]
    with ThreadPoolExecutor(1, "ahead") as thread:
        thread.submit(rows.read_ahead)  # only to be sooner: what it fails at, `shingles` does by itself
        cluster_of = clusters(
            len(units),
            rows.bands,
            lambda band: rows.column(f"band_{band}")[first],
            rows.column("shingles")[first],
            rows.column("signature")[first],
            lambda prompts: rows.shingles(starts[prompts], lengths[prompts]),
            similarity,
        )
    return units, prompt_of, cluster_of


def _curate(rows: Spooled, held_out: Flags, labels: Labels, settings: SnapshotSettings, steps: dict[str, int]) -> I64:
    """The rows that stay, in order; those that stand for several rows get the label of all their votes.

    In training, the same answer to the same prompt is one row, whoever voted. Held out, it is one for each rater (else
    for each conversation): the gate's intervals come from resampling raters, who must keep their own votes.
    """
    chosen = _merge(held_out, labels, rows, settings)
    steps["exact_duplicates"] = len(held_out) - len(chosen)

    agreed = chosen[labels.desirable[chosen] >= 0]
    steps["disagreement"] = len(chosen) - len(agreed)

    by_rater = np.where(held_out[agreed], 0, labels.rater[agreed])
    capped = agreed[newest_within(by_rater, labels.hlc[agreed], settings.max_per_rater)]
    steps["max_per_rater"] = len(agreed) - len(capped)

    by_prompt = np.where(held_out[capped], 0, rows.column("exact_prompt")[capped])
    left = capped[newest_within(by_prompt, labels.hlc[capped], settings.max_per_prompt)]
    steps["max_per_prompt"] = len(capped) - len(left)
    return left


def _merge(held_out: Flags, labels: Labels, rows: Spooled, settings: SnapshotSettings) -> I64:
    """One row, the latest, of those that are the same on one side of the split. Only the votes on rows that have a
    duplicate are read back.
    """
    same = rows.column("pair")
    voter = np.where(labels.rater > 0, labels.rater, rows.column("conversation"))
    same = np.where(held_out, ~(same ^ voter), same)
    del voter
    members = find_frequent(same, 1)
    members = members[np.argsort(same[members], kind="stable")]  # in their order, which is that of their days
    group = same[members]

    sizes = rows.column("votes_size")
    votes_on = rows.votes((np.cumsum(sizes, dtype=np.int64) - sizes)[members], sizes[members])
    keeps = np.ones(len(held_out), bool)
    begins = np.flatnonzero(is_first(group))
    for begin, end in pairwise([*begins.tolist(), len(members)]):
        keeps[members[begin : end - 1]] = False
        votes = [vote for _ in range(begin, end) for vote in next(votes_on)]
        labels.set(int(members[end - 1]), settle(votes, settings.disagreement))
    return np.flatnonzero(keeps)


def _write(
    made: Path, rows: Spooled, held_out: Flags, labels: Labels, chosen: I64, settings: SnapshotSettings
) -> dict[str, Any]:
    """Write both Parquet files; returns the manifest's part on them. Held-out rows keep their votes' weight alone."""
    training = chosen[~held_out[chosen]]
    up, down = (float(labels.weight[training[labels.desirable[training] == label]].sum()) for label in (1, 0))
    lambdas = class_weights(up, down, settings.desirable_weight, settings.undesirable_weight)
    with RowFile(made / TRAIN) as train, RowFile(made / HELD_OUT) as held:
        end = 0
        for batch in ahead(rows.batches(), _BATCHES_AHEAD):
            begin, end = end, end + len(batch)
            mine = chosen[slice(*np.searchsorted(chosen, (begin, end)))]
            for file, part, weights in (
                (train, mine[~held_out[mine]], lambdas),
                (held, mine[held_out[mine]], (1.0, 1.0)),
            ):
                desirable = labels.desirable[part] == 1
                weight = labels.weight[part] * np.where(desirable, *weights)
                file.add(labels.ascribe(batch.take(pa.array(part - begin)), part), desirable, weight)
        files = {name: file.finish() for name, file in ((TRAIN, train), (HELD_OUT, held))}
    return {"files": files, "weights": {"desirable": lambdas[0], "undesirable": lambdas[1]}}
