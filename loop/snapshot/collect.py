"""Reads the window's examples into spools: in this process, or a large window in some that share the work.

Their examples are other ones, and what becomes of them does not depend on who read them. A process of its own is
`python -m loop.child loop.snapshot.collect JOB`, with JOB a file of what `_Job` has; it ends with its parent.
"""

from __future__ import annotations

import gc
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from pydantic import SecretStr
from sqlalchemy import Engine

from loop.memory import keep_freed_memory
from loop.settings import SnapshotSettings, StoreSettings
from loop.snapshot.curate import STEPS, settle, to_rows
from loop.snapshot.spool import Spool
from loop.store import open_store
from loop.store.engine import StoreUnavailableError
from loop.store.examples import stream_examples


class Collected(msgspec.Struct):
    """What was read: rows, corrections among them, and how many each step dropped."""

    read: int
    steps: dict[str, int]


class _Job(msgspec.Struct):
    url: str
    settings: dict[str, Any]
    since_day: date
    spool: Path
    ranges: int
    part: int
    parts: int


def collect(
    engine: Engine, settings: SnapshotSettings, since_day: date, spools: Sequence[Path], ranges: int
) -> Collected:
    """Put the examples since this day that pass the steps which look at one alone into new spools, in shares; each but
    an only one by a process of its own.

    Raises StoreUnavailableError, and RuntimeError where such a process fails.
    """
    if len(spools) == 1:
        return _collect(engine, settings, since_day, spools[0], ranges, 0, 1)
    url = engine.url.render_as_string(hide_password=False)
    jobs = [
        _Job(url, settings.model_dump(mode="json"), since_day, spool, ranges, part, len(spools))
        for part, spool in enumerate(spools)
    ]
    hash_seed = secrets.randbelow(1 << 32)
    with ExitStack() as stack:
        children = [stack.enter_context(_child(job, hash_seed)) for job in jobs]
        done = [_result(job, child) for job, child in zip(jobs, children, strict=True)]
    steps = {step: sum(one.steps[step] for one in done) for step in STEPS}
    return Collected(sum(one.read for one in done), steps)


def _collect(
    engine: Engine, settings: SnapshotSettings, since_day: date, spool: Path, ranges: int, part: int, parts: int
) -> Collected:
    read, steps = 0, dict.fromkeys(STEPS, 0)
    with Spool(spool, settings.salt, settings.near_duplicate_similarity, ranges) as spooled:
        for example in stream_examples(engine, since_day, part=part, parts=parts):
            for row in to_rows(example, settings):
                read += 1
                if isinstance(row, str):
                    steps[row] += 1
                else:
                    label = settle(row.votes, settings.disagreement)
                    spooled.add(row, label, example.day.toordinal(), len(example.event))
    return Collected(read, steps)


@contextmanager
def _child(job: _Job, hash_seed: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process that does the job, ended with the block. Those of one seed have the same `hash`."""
    file = job.spool.with_suffix(".job")
    file.touch(mode=0o600)  # it may hold the store's password; the child removes it
    file.write_bytes(msgspec.json.encode(job, enc_hook=str))
    python = ["env", f"PYTHONHASHSEED={hash_seed}", sys.executable]
    with job.spool.with_suffix(".log").open("wb") as log:
        child = subprocess.Popen(
            [*python, "-m", "loop.child", "loop.snapshot.collect", str(file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()


def _result(job: _Job, child: subprocess.Popen[bytes]) -> Collected:
    status = child.wait()
    if status == 0:
        return msgspec.json.decode(job.spool.with_suffix(".json").read_bytes(), type=Collected)
    log = job.spool.with_suffix(".log").read_text(errors="replace").strip() or "it printed nothing"
    if status == os.EX_TEMPFAIL:
        raise StoreUnavailableError(log)
    raise RuntimeError(f"reading examples ended with status {status}: {log[-2_000:]}")


def _main(file: Path) -> None:
    job = msgspec.json.decode(file.read_bytes(), type=_Job, dec_hook=lambda _, path: Path(path))
    file.unlink()
    gc.disable()  # what is made for a row is gone with it: nothing to look for
    keep_freed_memory()
    pa.set_memory_pool(pa.system_memory_pool())  # which gives back what it does not need: half of the process's memory
    try:
        engine = open_store(StoreSettings(url=SecretStr(job.url)))
        settings = SnapshotSettings(**job.settings)
        done = _collect(engine, settings, job.since_day, job.spool, job.ranges, job.part, job.parts)
    except StoreUnavailableError as exc:
        print(exc, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    job.spool.with_suffix(".json").write_bytes(msgspec.json.encode(done))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
