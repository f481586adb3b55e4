"""The gateway's disk spool: a journal that responses go to first, and a thread that writes to the log, many at a time.

With the embedded log the spool is the log itself; else `forward.py` carries its records to the broker. Feedback goes to
the thread, and is done when it is on disk. A response is done when it is in the journal (see there). Where the disk has
turned slow, or the quota is used up, responses go to the thread as well for a while, and no stream waits for a write.

With redaction on, a response is redacted before any of this: until then it is in memory only.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loop import metrics
from loop.log import LogUnavailableError, NewRecord
from loop.log.embedded import EmbeddedLog
from services.gateway.journal import Journal, Place, recover
from services.gateway.redactor import RedactionError, Redactor

SYNC_WITHIN_S = 0.2
ASIDE_BYTES = 256 * 1024  # of a request; the record of a larger one, with an image in it, would hold up the event loop
COLLECT_S = 0.05  # how long responses, which are safe already, wait for others to be committed with
AVOID_SLOW_DISK_S = 10.0
RETRY_S = 0.5
QUOTA_EVERY_S = 0.5
KEPT_FREE_BYTES = 256 * 1024 * 1024  # of the disk, for feedback
MAX_BATCH = 500
REDACT_WITHIN_S = 10.0  # at the end, what waits for that still
MAX_WAITING_BYTES = 128 * 1024 * 1024
VOTES_WAITING_BYTES = 64 * 1024 * 1024  # for which there is room beyond that
CLOCK = "hlc"  # the meta entry with the highest stamp of all the processes that share the log

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """What is written together. The feedback of one call has a `stamp` and is done when it is on disk; a response when
    it is in the WAL, or was done before, where it has a `place` in the journal.
    """

    size: int
    done: asyncio.Future[bool]
    build: Callable[[], NewRecord] | None = None
    stamp: int | None = None
    records: Sequence[NewRecord] = ()
    place: Place | None = None


class Spool:
    """Writes to `log` from a thread of its own; all its methods are called on the event loop."""

    def __init__(
        self,
        log: EmbeddedLog,
        waiting_bytes: Callable[[], int],
        quota_bytes: int,
        journal: Path,
        slow_s: float,
        redactor: Redactor | None = None,
    ) -> None:
        """`waiting_bytes` is held against the quota; `journal`: the stem of its files; an append of over `slow_s` shows
        a slow disk. Raises LogUnavailableError and OSError where what an earlier process has left cannot be taken up.
        """
        if count := recover(journal, log.append):
            _log.warning("%d responses taken up from the journal", count, extra={"action": "journal_recovered"})
        self._journal = Journal(journal)
        self._slow_s = slow_s
        self._slow_until = 0.0
        self._log = log
        self._waiting_bytes = waiting_bytes
        self._redactor = redactor
        self._preparing: set[asyncio.Task[None]] = set()
        self._preparing_bytes = 0
        self._quota_bytes = quota_bytes
        self._loop = asyncio.get_running_loop()
        self._collected: list[_Job] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._put_bytes = 0  # each counter has one writing thread, so that their difference needs no lock
        self._settled_bytes = 0
        self._is_full = False
        self._next_quota_check = 0.0
        self._unsynced_since: float | None = None
        self.is_failing = False
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def put_response(self, build: Callable[[], NewRecord], size: int) -> asyncio.Future[bool]:
        """Write a response: True once it would survive kill -9, False where it is lost (which is counted)."""
        job = _Job(size, self._loop.create_future(), build)
        if self._backlog() > MAX_WAITING_BYTES:
            self._lose(job, "backlog")
        elif self._redactor is not None or size > ASIDE_BYTES:
            task = asyncio.create_task(self._prepare(job))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)
        else:
            self._take(job)
        return job.done

    def put_feedback(self, records: Sequence[NewRecord], stamp: int) -> asyncio.Future[bool]:
        """Write feedback and the clock's `stamp` with it, in one transaction: True once all of it is on disk, False
        where it may not be, or too much waits for a disk that hangs.
        """
        size = sum(len(record.value) for record in records)
        job = _Job(size, self._loop.create_future(), stamp=stamp, records=records)
        if self._backlog() > MAX_WAITING_BYTES + VOTES_WAITING_BYTES:
            _settle([job.done], False)
        else:
            self._put(job)
        return job.done

    async def close(self) -> None:
        """Write what was handed over, sync, end the thread."""
        if self._preparing:
            await asyncio.wait(self._preparing, timeout=REDACT_WITHIN_S)
        if self._redactor is not None:
            await self._redactor.close()
        if self._preparing:
            await asyncio.wait(self._preparing)
        self._hand_over()
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _backlog(self) -> int:
        return self._put_bytes - self._settled_bytes + self._preparing_bytes

    async def _prepare(self, job: _Job) -> None:
        self._preparing_bytes += job.size
        try:
            if not (await asyncio.to_thread(self._build, job) if job.size > ASIDE_BYTES else self._build(job)):
                return
            (clean,) = job.records
            if self._redactor is not None:
                clean = clean._replace(value=await self._redactor.redact(clean.value, is_feedback=False))
        except RedactionError:
            self._lose(job, "redaction")
        else:
            job.build = lambda: clean
            self._take(job)
        finally:
            self._preparing_bytes -= job.size

    def _take(self, job: _Job) -> None:
        if self._is_full or time.monotonic() < self._slow_until:
            self._put(job)
        elif self._build(job) and self._write_ahead(job):
            _settle([job.done], True)
            self._put(job)

    def _put(self, job: _Job) -> None:
        self._put_bytes += job.size
        self._collected.append(job)
        if job.place is None:
            self._hand_over()
        elif len(self._collected) == 1:
            # Waking the thread takes the interpreter from the event loop, which has an answer to finish just now.
            self._loop.call_later(COLLECT_S, self._hand_over)

    def _hand_over(self) -> None:
        for job in self._collected:
            self._jobs.put(job)
        self._collected.clear()

    def _write_ahead(self, job: _Job) -> bool:
        (record,) = job.records
        started_s = time.monotonic()
        try:
            job.place = self._journal.append(record)
        except OSError as exc:
            self._fail(exc)
            self._lose(job, "failed")
            return False
        ended_s = time.monotonic()
        if ended_s - started_s > self._slow_s:
            metrics.gateway_responses_lost.labels("late").inc()
            self._slow_until = ended_s + AVOID_SLOW_DISK_S
        return True

    def _lose(self, job: _Job, reason: str) -> None:
        metrics.gateway_responses_lost.labels(reason).inc()
        _settle([job.done], False)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_open = True
        kept: list[_Job] = []  # of the journal, which the log has not taken so far
        while is_open:
            batch, is_open = self._next_batch(is_waiting=not kept)
            batch = [*kept, *batch]
            if batch:
                try:
                    kept = self._write(batch)
                except Exception:  # the thread must live: without it every feedback would fail
                    _log.exception("spool batch failed", extra={"action": "spool_failed"})
                    self._give_up(batch, "failed")
                    kept = []
                self._settled_bytes += sum(job.size for job in batch) - sum(job.size for job in kept)
            if self._unsynced_since is not None and (
                not is_open or time.monotonic() >= self._unsynced_since + SYNC_WITHIN_S
            ):
                self._sync()
        if not kept:
            self._journal.close()

    def _next_batch(self, *, is_waiting: bool) -> tuple[list[_Job], bool]:
        """Everything that waits, up to MAX_BATCH; empty when a sync or another try is due. False: the last one."""
        timeout_s = None if is_waiting else RETRY_S
        if self._unsynced_since is not None:
            timeout_s = max(0.0, self._unsynced_since + SYNC_WITHIN_S - time.monotonic())
        batch: list[_Job] = []
        try:
            job = self._jobs.get(timeout=timeout_s)
            while job is not None:
                batch.append(job)
                if len(batch) == MAX_BATCH:
                    return batch, True
                job = self._jobs.get_nowait()
        except queue.Empty:
            return batch, True
        return batch, False

    def _write(self, batch: list[_Job]) -> list[_Job]:
        """Commit the batch; returns those of the journal that are to be tried again."""
        journaled = [job for job in batch if job.place is not None]
        responses = [job for job in batch if job.place is None and job.stamp is None]
        feedback = [job for job in batch if job.stamp is not None]
        if self._is_over_quota() and responses:
            self._give_up(responses, "quota")
            responses = []
        responses = [job for job in responses if self._build(job)]
        kept: list[_Job] = []
        if not self._commit([*journaled, *responses, *feedback]):
            # What made the whole batch fail may be the size of its responses; feedback gets a try of its own.
            kept, journaled = journaled, []
            self._give_up(responses, "failed")
            responses = []
            if not feedback or not self._commit(feedback):
                self._settle(feedback, False)
                return kept
        if journaled and (place := journaled[-1].place) is not None:
            self._journal.done(place)
        self._settle(responses, True)
        if feedback:
            self._settle(feedback, self._sync())
        return kept

    def _build(self, job: _Job) -> bool:
        """On the event loop for the journal, in the thread where that is avoided."""
        try:
            assert job.build is not None
            job.records = (job.build(),)
        except Exception:  # a capture that fails costs its event, never more
            _log.exception("response not logged", extra={"action": "capture_failed"})
            self._give_up([job], "capture")
            return False
        return True

    def _commit(self, jobs: Sequence[_Job]) -> bool:
        records = [record for job in jobs for record in job.records]
        stamps = [job.stamp for job in jobs if job.stamp is not None]
        if not records:
            return True
        try:
            self._log.write(records, None, {CLOCK: max(stamps)} if stamps else None)
        except LogUnavailableError as exc:
            self._fail(exc)
            return False
        self.is_failing = False
        self._unsynced_since = self._unsynced_since or time.monotonic()
        return True

    def _sync(self) -> bool:
        self._unsynced_since = None
        try:
            self._log.sync()
        except LogUnavailableError as exc:
            self._fail(exc)
            return False
        return True

    def _fail(self, exc: Exception) -> None:
        if not self.is_failing:
            _log.error("%s; feedback gets a 503 and responses are lost", exc, extra={"action": "spool_failed"})
        self.is_failing = True

    def _is_over_quota(self) -> bool:
        now = time.monotonic()
        if now >= self._next_quota_check:
            self._next_quota_check = now + QUOTA_EVERY_S
            with suppress(LogUnavailableError, OSError):  # the commit that follows says so
                free_bytes = shutil.disk_usage(self._log.path.parent).free
                self._is_full = free_bytes < KEPT_FREE_BYTES or self._waiting_bytes() >= self._quota_bytes
        return self._is_full

    def _give_up(self, jobs: Sequence[_Job], reason: str) -> None:
        lost = sum(job.stamp is None for job in jobs)
        metrics.gateway_responses_lost.labels(reason).inc(lost)
        self._settle(jobs, False)

    def _settle(self, jobs: Sequence[_Job], result: bool) -> None:
        if jobs:
            self._loop.call_soon_threadsafe(_settle, [job.done for job in jobs], result)


def _settle(futures: Sequence[asyncio.Future[bool]], result: bool) -> None:
    for future in futures:
        if not future.done():
            future.set_result(result)
