"""`thumbwheel forget`: erases a person, or one response, wherever this machine keeps something of them.

The tombstone in the store comes first; it blocks every replay. What follows looks for all tombstones, not only for
this one, so that it may be killed and called again, and called on each machine that has a part of it: gateways have
spools and journals, the scheduler has snapshots and the reference cache.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import Engine

from loop.erasure import Erased, Kind
from loop.log import LogUnavailableError, NewRecord
from loop.log.embedded import EmbeddedLog
from loop.registry import mark_erased
from loop.settings import LogSettings, Settings
from loop.snapshot.write import HELD_OUT, TRAIN
from loop.store.dead_letters import count_dead_letters
from loop.store.erasures import erase, read_erased
from loop.store.runs import is_leased
from services.gateway.journal import erase as erase_in_journal
from services.gateway.journal import recover
from services.gateway.recent import RECENT, forget_recent

JOURNAL_PATIENCE_S = 5.0


def forget(settings: Settings, store: Engine, kind: Kind, subject: str) -> dict[str, Any]:
    """Erase; returns what was found where, and what is left to time. Raises LogUnavailableError, and what the store
    raises, after which it is to be called again.
    """
    now_ms = int(time.time() * 1000)
    found: dict[str, Any] = {"erased": kind, "subject": subject, **erase(store, kind, subject, now_ms)}
    erased = read_erased(store)
    is_at_work = is_leased(store, "run", now_ms)
    if not is_at_work:
        _remove_unfinished(settings.snapshot.dir)
    found["snapshots"], found["adapters"] = _erase_snapshots(settings.snapshot.dir, store, erased, now_ms)
    found["reference_cache"] = _erase_cache(settings.train.cache)
    found["log_records"], busy = _erase_files(settings.log, erased)
    found["gateways_memory"] = forget_recent(settings.log.path.with_name(RECENT))
    later = [f"journal {path} is being written: call this again" for path in busy]
    if is_at_work:
        later.append("a run is at work, maybe with what was erased: call this again when it has ended")
    if left := sum(map(sum, count_dead_letters(store).values())):
        gone_by = _day_after(now_ms / 1000 + settings.store.retention_s)
        later.append(f"{left} dead letters do not say whom they are of: they are gone by {gone_by} (store.retention_s)")
    if settings.log.kind == "kafka":
        topics = f"{settings.log.responses_topic}, {settings.log.feedback_topic} and their .dlt"
        later.append(f"Kafka's topics {topics} {_until_when(settings.log, now_ms / 1000)}")
    return found | {"later": later}


def _day_after(unix_s: float) -> date:
    """The first day on which that time is over."""
    return datetime.fromtimestamp(unix_s, UTC).date() + timedelta(1)


def _until_when(settings: LogSettings, now_s: float) -> str:
    """What Kafka says of how long it keeps what is in it."""
    from loop.log.kafka import KafkaLog

    try:
        with closing(KafkaLog(settings)) as log:
            keeps_s = log.keeps_s()
    except LogUnavailableError as exc:
        return f"did not say how long they keep it: call this again ({exc})"
    if keeps_s is None:
        return "keep it, one of them at least, without a limit that we may see: set their retention.ms"
    return f"have let go of it by {_day_after(now_s + keeps_s)} (their retention.ms and segment.ms)"


def _remove_unfinished(folder: Path) -> None:
    """Of snapshots that were being made when their run was killed; a new one is begun from nothing."""
    for unfinished in folder.glob(".*-*"):
        shutil.rmtree(unfinished)


def _erase_snapshots(folder: Path, store: Engine, erased: Erased, now_ms: int) -> tuple[list[str], list[str]]:
    """Delete the rows of the snapshots that have something of it and mark the adapters trained on them.

    The manifests stay, for they say what an adapter came from and have nobody's words.
    """
    snapshots, adapters = [], []
    for run in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        files = [file for file in (run / TRAIN, run / HELD_OUT) if file.exists()]
        if not any(_has_rows(file, erased) for file in files):
            continue
        # Marked first: when the files are gone, nothing else says that the adapter has seen them.
        adapters += mark_erased(store, run.name, now_ms)
        for file in files:
            file.unlink()
        snapshots.append(run.name)
    return snapshots, adapters


def _has_rows(file: Path, erased: Erased) -> bool:
    rows = pq.ParquetFile(file)
    if "raters" not in rows.schema_arrow.names:  # of an older version: nothing in it tells whose it is
        return True
    for batch in rows.iter_batches(columns=["example_id", "raters"]):
        for row in batch.to_pylist():
            response_id = row["example_id"].partition("/")[0]
            if response_id in erased.responses or any(map(erased.has_voter, row["raters"] or ())):
                return True
    return False


def _erase_cache(folder: Path | None) -> bool:
    """Begin the reference cache anew: its entries are hashes of what was said, and nothing tells whose."""
    files = list(folder.glob("reference.d*")) if folder is not None else []
    for file in files:
        file.unlink()
    return bool(files)


def _erase_files(settings: LogSettings, erased: Erased) -> tuple[int, list[Path]]:
    """Erase what this machine's journals, spools and log have; returns how many records, and the journals that have
    some still.
    """
    folder = settings.path.parent
    for stem in sorted({path.with_suffix("") for path in folder.glob("journal-*.*")}):
        spool = folder / f"spool-{stem.name.removeprefix('journal-')}.db"
        _take_up(stem, settings.path if settings.kind == "embedded" else spool, erased)
    busy = [path for path in sorted(folder.glob("journal-*.*")) if not _is_clean(path, erased)]
    count = 0
    for path in filter(Path.exists, sorted({settings.path, *folder.glob("spool-*.db")})):
        with closing(EmbeddedLog(path)) as log:
            count += log.erase(erased.has_event)
    return count, busy


def _take_up(stem: Path, spool: Path, erased: Erased) -> None:
    """Do for a killed gateway's journal what its next start would do, but for what is erased."""

    def keep(records: Sequence[NewRecord]) -> None:
        with closing(EmbeddedLog(spool)) as log:
            log.append([record for record in records if not erased.has_event(record.value)])

    recover(stem, keep)


def _is_clean(journal: Path, erased: Erased) -> bool:
    """Overwrite what a running gateway has done with; it moves on within milliseconds, where its log takes records."""
    deadline = time.monotonic() + JOURNAL_PATIENCE_S
    while not (is_clean := erase_in_journal(journal, erased.has_event)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return is_clean
