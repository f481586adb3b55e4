"""Carries the spool's records to the broker, where the log is not the spool itself.

A record leaves the spool once the broker has acknowledged it, so the spool's first record is always the next one to
send: after any failure, a kill -9 included, it goes on from there. What is sent twice counts once, as every event does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loop import metrics
from loop.log import EventLog, NewRecord, RecordTooLargeError
from loop.log.embedded import EmbeddedLog
from loop.settings import LogSettings

BATCH = 500
POLL_S = 0.1
RETRY_S = 1.0
_CONTENT_TYPE = {"content-type": "application/cloudevents+json; charset=UTF-8"}

_log = logging.getLogger(__name__)


@contextmanager
def forwarding(spool: EmbeddedLog, settings: LogSettings) -> Iterator[None]:
    """Forward in a thread for as long as the block runs, and once more at its end."""
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


def forward_once(spool: EmbeddedLog, log: EventLog, topics: tuple[str, ...]) -> int:
    """Send one batch of each partition; returns how many records. Raises LogUnavailableError."""
    sent = 0
    for topic in topics:
        for partition in spool.end_offsets(topic):
            records = spool.read(topic, partition, 0, BATCH)
            if records:
                _send(log, [NewRecord(topic, record.key, record.value, _CONTENT_TYPE) for record in records])
                spool.drop_before(topic, partition, records[-1].offset + 1)
                sent += len(records)
    return sent


def _send(log: EventLog, records: Sequence[NewRecord]) -> None:
    """Append the records; one that the broker will never take must not hold up those behind it: it is left out."""
    try:
        log.append(records)
    except RecordTooLargeError as exc:
        if len(records) > 1:
            for record in records:
                _send(log, [record])
        else:
            metrics.gateway_responses_lost.labels("too_large").inc()
            _log.error("record left out: %s", exc, extra={"action": "forward_too_large"})


def _run(spool: EmbeddedLog, settings: LogSettings, stop: threading.Event) -> None:
    from loop.log.open import open_log

    topics = (settings.responses_topic, settings.feedback_topic)
    log: EventLog | None = None
    is_last = False
    while not is_last:
        is_last = stop.is_set()
        try:
            log = log or open_log(settings)
            while forward_once(spool, log, topics):
                pass
            metrics.gateway_spool_records.set(0)
            wait_s = POLL_S
        except Exception as exc:  # supervisor: broker down, topics not as they should be: the spool keeps everything
            _log.warning("log not reached: %s", exc, extra={"action": "forward_failed"})
            metrics.gateway_spool_records.set(_waiting(spool, topics))
            wait_s = RETRY_S
        stop.wait(wait_s)
    if log is not None:
        log.close()


def _waiting(spool: EmbeddedLog, topics: tuple[str, ...]) -> int:
    """Records that are still to be sent."""
    waiting = 0
    for topic in topics:
        for partition, end in spool.end_offsets(topic).items():
            if first := spool.read(topic, partition, 0, 1):
                waiting += end - first[0].offset
    return waiting
