"""Carries the spool's records to the broker, where the log is not the spool itself.

A record leaves the spool once the broker has acknowledged it, so a partition's first record in the spool is always the
next one to send: after any failure, a kill -9 included, it goes on from there. What is sent twice counts once, as every
event does. Of each partition one batch at most is on its way: so its order is kept, and a partition that cannot be
written (its broker is away, it has too few replicas) holds up no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loop import metrics
from loop.events import EventError, without_content
from loop.log import LogUnavailableError, NewRecord, Record, RecordTooLargeError
from loop.log.embedded import EmbeddedLog
from loop.settings import LogSettings

if TYPE_CHECKING:
    from loop.log.kafka import KafkaLog

BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024  # about, of values: there may be a batch of each partition on its way
POLL_S = 0.1
RETRY_S = 1.0
GIVE_UP_S = 30.0  # a batch that was not acknowledged by then goes another way: through a new producer
LAST_S = 10.0  # for what is still in the spool when the gateway ends
_CONTENT_TYPE = {"content-type": "application/cloudevents+json; charset=UTF-8"}

_log = logging.getLogger(__name__)
_Place = tuple[str, int]


@contextmanager
def forwarding(spool: EmbeddedLog, settings: LogSettings) -> Iterator[None]:
    """Forward in a thread for as long as the block runs, and what is left at its end."""
    if settings.kind == "embedded":
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(spool, settings, stop), name="forward", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Batch:
    records: list[Record]
    acknowledged: Future[None]
    give_up_at: float
    is_bare: bool = False
    """Whether a record that is too large was sent without its content."""


class Forwarder:
    """What is on its way, and which partitions cannot be written. For one thread, that calls `step` again and again."""

    def __init__(self, spool: EmbeddedLog, log: KafkaLog, topics: tuple[str, ...]) -> None:
        self._spool = spool
        self._log = log
        self._places = [(topic, partition) for topic in topics for partition in spool.end_offsets(topic)]
        self._sent: dict[_Place, _Batch] = {}
        self._retry_at: dict[_Place, float] = {}
        self._one_by_one: dict[_Place, int] = {}  # below this offset is a record that the broker refuses
        self.failing: dict[_Place, str] = {}

    @property
    def waits_for(self) -> list[Future[None]]:
        """The batches on their way; none: all that the spool holds is of partitions that fail."""
        return [batch.acknowledged for batch in self._sent.values()]

    def step(self) -> None:
        """Settle what was acknowledged or has failed, and send on. Raises LogUnavailableError where no broker answers
        or the spool fails.
        """
        for place in self._places:
            if place in self._sent and self._sent[place].acknowledged.done():
                self._settle(place, self._sent.pop(place))
            if place not in self._sent and time.monotonic() >= self._retry_at.get(place, 0.0):
                self._send(place)
        waiting = {place: batch for place, batch in self._sent.items() if not batch.acknowledged.done()}
        late = [place for place, batch in waiting.items() if time.monotonic() >= batch.give_up_at]
        if late:
            self.failing |= dict.fromkeys(late, f"not acknowledged within {GIVE_UP_S:.0f} s")
            for place in waiting:  # the others too: the producer is theirs as well
                del self._sent[place]
            self._log.give_up()

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def _send(self, place: _Place) -> None:
        records = self._spool.read(*place, 0, BATCH, BATCH_BYTES)
        if not records:
            return
        if records[0].offset < self._one_by_one.get(place, 0):
            records = records[:1]
        new = [NewRecord(place[0], record.key, record.value, _CONTENT_TYPE) for record in records]
        self._sent[place] = _Batch(records, self._log.send(new), time.monotonic() + GIVE_UP_S)

    def _send_bare(self, place: _Place, record: Record) -> None:
        """Instead of a response or a vote that the broker does not take, one without its texts. Raises EventError."""
        new = NewRecord(place[0], record.key, without_content(record.value), _CONTENT_TYPE)
        self._sent[place] = _Batch([record], self._log.send([new]), time.monotonic() + GIVE_UP_S, is_bare=True)

    def _settle(self, place: _Place, batch: _Batch) -> None:
        end = batch.records[-1].offset + 1
        try:
            batch.acknowledged.result()
        except LogUnavailableError as exc:
            self.failing[place] = str(exc)
            self._retry_at[place] = time.monotonic() + RETRY_S
            return
        except RecordTooLargeError as exc:  # one that the broker will never take must not hold up those behind it
            if len(batch.records) > 1:
                self._one_by_one[place] = end
                return
            if not batch.is_bare:
                metrics.gateway_responses_lost.labels("too_large").inc()
                _log.error(
                    "record left out or logged without its content: %s", exc, extra={"action": "forward_too_large"}
                )
                with suppress(EventError):
                    self._send_bare(place, batch.records[0])
                    return
        self._spool.drop_before(*place, end)
        self.failing.pop(place, None)


def _run(spool: EmbeddedLog, settings: LogSettings, stop: threading.Event) -> None:
    from loop.log.kafka import KafkaLog

    topics = (settings.responses_topic, settings.feedback_topic)
    forwarder: Forwarder | None = None
    was_failing = False
    look_at = 0.0
    end_at: float | None = None
    while True:
        if end_at is None and stop.is_set():
            end_at = time.monotonic() + LAST_S
        waits_for: list[Future[None]] = []
        pause_s = POLL_S
        try:
            forwarder = forwarder or Forwarder(spool, KafkaLog(settings), topics)
            forwarder.step()
            waits_for = forwarder.waits_for
            trouble = _trouble(forwarder.failing)
        except Exception as exc:  # supervisor: brokers away, topics not as they should be: the spool keeps everything
            trouble, pause_s = str(exc), RETRY_S
        _tell(trouble, was_failing)
        was_failing = bool(trouble)
        if time.monotonic() >= look_at:
            look_at = time.monotonic() + RETRY_S
            with suppress(LogUnavailableError):
                metrics.gateway_spool_records.set(_waiting(spool, topics) if waits_for or trouble else 0)
        if end_at is not None and (not waits_for or time.monotonic() >= end_at):
            break
        if waits_for:
            wait(waits_for, POLL_S, FIRST_COMPLETED)
        else:
            stop.wait(pause_s)
    if forwarder is not None:
        forwarder.close()


def _trouble(failing: dict[_Place, str]) -> str:
    """The partitions that cannot be written, in words."""
    for (topic, partition), reason in failing.items():
        return f"{len(failing)} partitions cannot be written, {topic} {partition} among them: {reason}"
    return ""


def _tell(trouble: str, was_failing: bool) -> None:
    """Say when it begins and when it is over, not at every try."""
    if trouble and not was_failing:
        _log.warning("log not reached: %s", trouble, extra={"action": "forward_failed"})
    elif was_failing and not trouble:
        _log.info("log reached again", extra={"action": "forward_resumed"})


def _waiting(spool: EmbeddedLog, topics: tuple[str, ...]) -> int:
    """Records that are still to be sent."""
    waiting = 0
    for topic in topics:
        for partition, end in spool.end_offsets(topic).items():
            if first := spool.read(topic, partition, 0, 1):
                waiting += end - first[0].offset
    return waiting
