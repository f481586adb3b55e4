"""Reads the window's examples into spools: in this process, or a large window in some that share the work.

Their examples are other ones, and what becomes of them does not depend on who read them. A process of its own is
`python -m loop.child loop.snapshot.collect JOB`, with JOB a file of what `_Job` has; it ends with its parent.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from loop.store.examples import Block, stream_examples

UNCACHE_ROWS = 20_000  # some 50 MB
SHARES = 8  # of the blocks, for each process: so that all have about the same to do


class Collected(msgspec.Struct):
    """What was read: rows, corrections among them, and how many each step dropped."""

    read: int
    steps: dict[str, int]


class _Share(msgspec.Struct):
    blocks: Sequence[Block]
    spool: Path


class _Job(msgspec.Struct):
    url: str
    settings: dict[str, Any]
    shares: Sequence[_Share]


def collect(
    engine: Engine, settings: SnapshotSettings, blocks: Sequence[Block], folder: Path, processes: int
) -> tuple[Collected, list[Path]]:
    """Put the examples of the blocks that pass the steps which look at one alone into spools in `folder`; returns what
    was read and the spools, in the blocks' order. Each of more than one process is one of its own.

    Raises StoreUnavailableError, and RuntimeError where such a process fails.
    """
    count = 1 if processes == 1 else SHARES * processes
    bounds = [len(blocks) * n // count for n in range(count + 1)]
    shares = [_Share(blocks[bounds[n] : bounds[n + 1]], folder / f"{n}") for n in range(count)]
    if processes == 1:
        done = _collect(engine, settings, shares)
    else:
        url, plain = engine.url.render_as_string(hide_password=False), settings.model_dump(mode="json")
        with ExitStack() as stack:
            files = [folder / f"{n}.job" for n in range(processes)]
            jobs = [_Job(url, plain, shares[n::processes]) for n in range(processes)]
            children = [stack.enter_context(_child(file, job)) for file, job in zip(files, jobs, strict=True)]
            parts = [_result(file, child) for file, child in zip(files, children, strict=True)]
        steps = {step: sum(part.steps[step] for part in parts) for step in STEPS}
        done = Collected(sum(part.read for part in parts), steps)
    return done, [share.spool for share in shares]


def _collect(
    engine: Engine, settings: SnapshotSettings, shares: Sequence[_Share], uncache: Callable[[], None] = lambda: None
) -> Collected:
    read, steps = 0, dict.fromkeys(STEPS, 0)
    for share in shares:
        with Spool(share.spool, settings.salt, settings.near_duplicate_similarity) as spool:
            for example in stream_examples(engine, share.blocks):
                for row in to_rows(example, settings):
                    if read % UNCACHE_ROWS == 0:
                        uncache()
                    read += 1
                    if isinstance(row, str):
                        steps[row] += 1
                    else:
                        spool.add(row, settle(row.votes, settings.disagreement))
    return Collected(read, steps)


def _uncaching(engine: Engine) -> Callable[[], None]:
    """Takes the store's file out of the system's cache, as `uncache` does with ours: a third of the time to read it.

    For a process of its own. The file stays open until that ends, for to close it would undo SQLite's locks on it.
    """
    if engine.dialect.name != "sqlite":
        return lambda: None
    file = os.open(str(engine.url.database), os.O_RDONLY)
    return lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _child(file: Path, job: _Job) -> Iterator[subprocess.Popen[bytes]]:
    """The process that does the job, ended with the block."""
    file.touch(mode=0o600)  # it may hold the store's password; the child removes it
    file.write_bytes(msgspec.json.encode(job, enc_hook=str))
    with file.with_suffix(".log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "loop.child", "loop.snapshot.collect", str(file)],
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


def _result(file: Path, child: subprocess.Popen[bytes]) -> Collected:
    status = child.wait()
    if status == 0:
        return msgspec.json.decode(file.with_suffix(".json").read_bytes(), type=Collected)
    log = file.with_suffix(".log").read_text(errors="replace").strip() or "it printed nothing"
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
        done = _collect(engine, SnapshotSettings(**job.settings), job.shares, _uncaching(engine))
    except StoreUnavailableError as exc:
        print(exc, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    file.with_suffix(".json").write_bytes(msgspec.json.encode(done))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
