"""The consumer loop that joins responses with feedback. It wires log, join rule and store together and decides nothing.

One round, and why in this order:

1. Poll. The log only proposes: where to read on is what the store says, so a newly assigned partition is first sought
   to the store's position, and what was polled from it before that is thrown away.
2. Decode, pure. What breaks the contract becomes a dead letter and the rest goes on.
3. Apply in one transaction of the store, positions included, by compare and set. After this, and only after this, the
   events are joined; a crash before it leaves nothing, a crash after it is not repeated, and a zombie's is refused. A
   thread does it, one batch at a time, while the next one is polled and decoded: Postgres' time costs none of ours.
   SQLite's is Python's own, and two threads that wait for its lock take longer than one after the other.
4. Have dead letters sent from the store's outbox to `<topic>.dlt`, then marked: sent twice at worst, lost never.
5. Commit the offsets to the log last: only lag tools read them, so they must never run ahead of the store.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

from prometheus_client import start_http_server
from sqlalchemy import Engine

from loop import metrics
from loop.join import Batch, read_batch
from loop.log import Consumer, EventLog, LogUnavailableError, Record
from loop.log.open import open_log
from loop.memory import keep_freed_memory
from loop.settings import Settings
from loop.store import open_store
from loop.store.engine import StoreUnavailableError, checkpoint
from loop.store.joining import (
    Applied,
    Offsets,
    PositionMovedError,
    Reader,
    Span,
    apply,
    prepare,
    read_positions,
    start_positions,
)
from services.lag import LOOK_EVERY_S, Lag
from services.letters import Letters
from services.waiting import RETRY_S, when_there

COMMIT_EVERY_S = 1.0
# The store's and the log's threads come back from many short calls, and while a batch is decoded they wait each time as
# long as this for Python's lock (its default: 5 ms).
SWITCH_S = 0.0005
# A batch's objects, tens of thousands, go with the batch: by Python's default (700) they were looked through again and
# again while they live, for an eighth of the joiner's time.
COLLECT_EVERY = 100_000
# What is nested so deep that those who read the store, with Python's limit of 1000, could not, is a dead letter.
RECURSION_LIMIT = 850
SQLITE_TRANSACTION_S = 0.05  # other writers of the file wait for ours
CHECKPOINT_EVENTS = 2_000  # some megabytes; SQLite does it by itself after 32
MIN_BATCH_EVENTS = 500  # below, the cost of a transaction outweighs that of its events
T = TypeVar("T")

log = logging.getLogger("thumbwheel.joiner")


def run_joiner(settings: Settings, stop: threading.Event) -> None:
    """Join until `stop` is set, then finish the batch in hand and leave the group. What is away is waited for."""
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(COLLECT_EVERY)
    sys.setrecursionlimit(RECURSION_LIMIT)
    keep_freed_memory()
    server, thread = start_http_server(settings.joiner.metrics_port, addr=settings.gateway.host)
    try:
        store = when_there(lambda: open_store(settings.store), stop, _say)
        events = when_there(lambda: open_log(settings.log), stop, _say)
        if store is not None and events is not None:
            Joiner(settings, store, events).run(stop)
            events.close()
            store.dispose()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    log.info("stopped", extra={"action": "joiner_stopped"})


def _timed(do: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return do(), time.monotonic() - began


def _say(exc: Exception) -> None:
    """Say what is away."""
    part = "log" if isinstance(exc, LogUnavailableError) else "store"
    metrics.joiner_up.labels(part).set(0)
    log.warning("waiting for the %s: %s", part, exc, extra={"action": "joiner_waits", "part": part})


@dataclass(frozen=True)
class InHand:
    """A batch on its way into the store."""

    records: list[Record]
    batch: Batch
    ends: dict[int, Offsets]
    read_s: float
    joining: Future[tuple[Applied, float]]


class Joiner:
    """One member of the consumer group, and how far it has read each partition that it owns."""

    def __init__(self, settings: Settings, store: Engine, events: EventLog) -> None:
        self._topics = (settings.log.responses_topic, settings.log.feedback_topic)
        self._settings = settings.joiner
        self._store = store
        self._events = events
        self._reader = Reader(settings.joiner.group, "")
        self._next: dict[int, Offsets] = {}  # where we read on
        self._joined: dict[int, Offsets] = {}  # what the store has; behind `_next` by the batch in hand
        self._read_to: dict[tuple[str, int], int] = {}
        self._in_hand: InHand | None = None
        self._owned: set[int] = set()
        self._lag = Lag(self._topics, store, events, lambda: self.positions)
        self._max_events = settings.joiner.batch_events
        self._letters = Letters(store, events)
        self._commit_at = self._look_at = 0.0
        self._since_checkpoint = 0
        self._thread = ThreadPoolExecutor(1, "joining")

    @property
    def positions(self) -> dict[tuple[str, int], int]:
        """The next offset of each topic's partition that is ours, as joined and committed."""
        joined = list(self._joined.items())
        places = {(topic, n): next_ for n, offsets in joined for topic, next_ in self._by_topic(offsets)}
        return {place: max(next_, self._read_to.get(place, 0)) for place, next_ in places.items()}

    def _see_read(self, consumer: Consumer) -> None:
        """Where all that was read is joined, see how far that is: behind the last record there may be offsets that no
        record has (a transaction's end), or none any more (by retention). They would count as lag for ever.
        """
        self._read_to = {
            (topic, n): consumer.position(topic, n)
            for n, offsets in self._joined.items()
            if self._next.get(n) == offsets
            for topic in self._topics
        }

    def _by_topic(self, offsets: Offsets) -> Iterable[tuple[str, int]]:
        return zip(self._topics, offsets, strict=True)

    def run(self, stop: threading.Event) -> None:
        """Rounds until `stop` is set."""
        consumer = when_there(lambda: self._events.consumer(self._settings.group, self._topics), stop, _say)
        if consumer is None:
            return
        log.info("joining %s", ", ".join(self._topics), extra={"action": "joiner_started"})
        try:
            with self._lag:
                self._rounds(consumer, stop)
        finally:
            offsets = partial(self._commit, consumer)
            letters = partial(self._letters.send, self._owned)
            closing = consumer.close, letters, self._letters.close, self._thread.shutdown
            for leave in (self._finish, offsets, *closing):
                try:
                    leave()
                except (PositionMovedError, StoreUnavailableError, LogUnavailableError) as exc:
                    log.warning("left without a word: %s", exc, extra={"action": "joiner_leave_failed"})

    def _rounds(self, consumer: Consumer, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._round(consumer)
                continue
            except PositionMovedError as exc:
                result = "moved"
                log.warning("%s: reading on where the store is", exc, extra={"action": "joiner_moved"})
            except (StoreUnavailableError, LogUnavailableError) as exc:
                result = "unavailable"
                _say(exc)
                stop.wait(RETRY_S)
                self._look_at = 0.0  # it is said when they are back
            metrics.joiner_batches.labels(result).inc()
            self._next.clear()  # what was polled is not joined: every partition is sought anew

    def _round(self, consumer: Consumer) -> None:
        owned = consumer.assigned()
        self._own(owned)
        self._seek(consumer, owned)
        records, spans = self._place(consumer.poll(self._max_events, self._settings.poll_timeout_s))
        began = time.monotonic()
        batch = read_batch(records, self._topics[0])
        prepared = prepare(self._store, batch)
        read_s = time.monotonic() - began
        self._finish()
        self._letters.send(self._owned)
        if records:
            ends = {partition: end for partition, (_, end) in spans.items()}
            joining = self._thread.submit(_timed, lambda: apply(self._store, self._reader, prepared, spans))
            self._in_hand = InHand(records, batch, ends, read_s, joining)
            self._next |= ends
            if self._store.dialect.name == "sqlite":
                self._finish()
                self._checkpoint(len(records))
        if time.monotonic() > self._commit_at:
            self._commit_at = time.monotonic() + COMMIT_EVERY_S
            self._commit(consumer)
        if time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + LOOK_EVERY_S
            self._check_store()
            self._see_read(consumer)
            for part in ("log", "store"):
                metrics.joiner_up.labels(part).set(1)
            if self._next and self._lag.log_id not in (None, self._reader.log_id):
                raise PositionMovedError("the log's topics were made anew")

    def _checkpoint(self, joined: int) -> None:
        """Have SQLite's journal moved into its file while the next batch is read: in the transaction, it took a quarter
        of its time.
        """
        self._since_checkpoint += joined
        if self._since_checkpoint >= CHECKPOINT_EVENTS:
            self._since_checkpoint = 0
            self._thread.submit(checkpoint, self._store)

    def _finish(self) -> None:
        """Wait for the batch in hand. Raises what its transaction raised; it is out of hand either way."""
        if self._in_hand is None:
            return
        batch, self._in_hand = self._in_hand, None
        applied, seconds = batch.joining.result()
        self._joined |= {partition: end for partition, end in batch.ends.items() if partition in self._next}
        self._resize(len(batch.records), seconds)
        self._letters.has_some |= bool(batch.batch.dead_letters)
        metrics.joiner_batch_seconds.observe(batch.read_s + seconds)
        metrics.joiner_transaction_seconds.observe(seconds)
        self._count(batch.records, batch.batch, applied)

    def _own(self, owned: set[int]) -> None:
        """Count a rebalance."""
        if owned != self._owned:
            metrics.joiner_rebalances.inc()
            self._lag.own(owned)
            self._owned = owned

    def _seek(self, consumer: Consumer, owned: set[int]) -> None:
        """Forget partitions that went to somebody else; start new ones where the store is."""
        for read in (self._next, self._joined):
            for partition in read.keys() - owned:
                del read[partition]
        new = owned - self._next.keys()
        if not new:
            return
        self._finish()
        self._reader, self._lag.log_id = Reader(self._settings.group, self._events.identity()), None
        for partition, offsets in start_positions(self._store, self._reader, new).items():
            for topic, offset in self._by_topic(offsets):
                consumer.seek(topic, partition, offset)
            self._next[partition] = self._joined[partition] = offsets
        self._letters.has_some = True  # its last owner may have left some
        numbers = sorted(new)
        log.info("partitions %s are ours", numbers, extra={"action": "joiner_assigned", "partitions": numbers})

    def _place(self, polled: list[Record]) -> tuple[list[Record], dict[int, Span]]:
        """The records of partitions that we have sought, and the span of offsets that they move each over; the others
        came to us within the poll, and are left for after the seek.

        Offsets may have gaps (retention, a broker's own records), so the span begins at our position, not at the first
        record. It ends before it began where the log goes back: brokers have lost what we joined, and others have its
        offsets now, or the partition had left us for a moment. We do not ask which, as to join again is harmless, and
        the log's end does not tell once it has grown past us.
        """
        records: list[Record] = []
        ends: dict[int, list[int]] = {}
        for (topic, partition), grouped in groupby(polled, key=attrgetter("topic", "partition")):
            if (start := self._next.get(partition)) is None:
                continue
            run, n = list(grouped), self._topics.index(topic)
            if (first := run[0].offset) < start[n]:
                message = "%s %d: joining again from %d, after %d"
                log.warning(message, topic, partition, first, start[n], extra={"action": "joiner_back"})
            records += run
            ends.setdefault(partition, list(start))[n] = run[-1].offset + 1
        return records, {partition: (self._next[partition], Offsets(*end)) for partition, end in ends.items()}

    def _check_store(self) -> None:
        """Whether the store still has what we joined: Postgres may lose its last moments, and where no event follows,
        no compare and set would tell. Raises PositionMovedError, StoreUnavailableError.
        """
        moving = self._in_hand.ends if self._in_hand else {}
        still = {partition: offsets for partition, offsets in self._joined.items() if partition not in moving}
        if still.items() - read_positions(self._store, self._reader).items():
            raise PositionMovedError("the store is not where it was")

    def _resize(self, events: int, seconds: float) -> None:
        """On SQLite, where writers take turns, find the batch that is joined in SQLITE_TRANSACTION_S."""
        if self._store.dialect.name == "sqlite" and events >= self._max_events // 2:
            fitting = int(events * min(2.0, max(0.5, SQLITE_TRANSACTION_S / seconds)))
            self._max_events = min(self._settings.batch_events, max(MIN_BATCH_EVENTS, fitting))

    def _commit(self, consumer: Consumer) -> None:
        if self._joined:
            consumer.commit(self.positions)

    def _count(self, records: list[Record], batch: Batch, applied: Applied) -> None:
        metrics.joiner_batches.labels("committed").inc()
        self._lag.joined({(r.topic, r.partition): r.timestamp_ms for r in records}.items())
        counts = Counter(record.topic for record in records)
        dead = Counter(letter.topic for letter in batch.dead_letters)
        new = dict(zip(self._topics, (applied.responses, len(applied.votes)), strict=True))
        for topic, number in counts.items():
            metrics.joiner_events.labels(topic).inc(number)
            metrics.joiner_duplicates.labels(topic).inc(number - dead[topic] - new[topic])
            metrics.joiner_dead_letters.labels(topic).inc(dead[topic])
        metrics.joiner_stale_versions.inc(applied.stale)
        for vote in applied.votes:
            metrics.joiner_votes.labels(vote.value).inc()
        metrics.joiner_unstored_votes.inc(applied.unstored)
        metrics.joiner_unclear_votes.inc(applied.unclear)
        for letter in batch.dead_letters:
            where = {"topic": letter.topic, "partition": letter.partition, "offset": letter.offset}
            log.warning("dead letter: %s", letter.reason, extra={"action": "joiner_dead_letter", **where})
