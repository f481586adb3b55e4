"""Sends the joiner's dead letters, beside the join: a `.dlt` that cannot be written holds up nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait

from sqlalchemy import Engine

from loop.log import EventLog, LogUnavailableError
from loop.store.dead_letters import Chosen, places_to_send, send_dead_letters
from loop.store.engine import StoreUnavailableError, reaching
from services.waiting import RETRY_S

CLOSE_S = 5.0

log = logging.getLogger("thumbwheel.joiner")


class Letters:
    """The outbox's way to the log: a thread, which has something to do once in a long while."""

    def __init__(self, store: Engine, events: EventLog) -> None:
        self._store, self._events = store, events
        self._thread = ThreadPoolExecutor(1, "letters")
        self._sending: Future[bool] | None = None
        self._closing = threading.Event()
        self._again_at = 0.0
        self._said = ""
        self.has_some = True  # an earlier process may have left some

    def send(self, partitions: Collection[int]) -> None:
        """Begin to send what waits of these partitions, where it is time; returns at once."""
        if self._sending is not None and self._sending.done():
            sending, self._sending = self._sending, None
            if not sending.result():
                self.has_some, self._again_at = True, time.monotonic() + RETRY_S
        if self.has_some and self._sending is None and time.monotonic() >= self._again_at:
            self.has_some = False
            self._sending = self._thread.submit(self._send, set(partitions))

    def close(self) -> None:
        """Leave what is not sent within CLOSE_S to the next process."""
        if self._sending is not None:
            wait([self._sending], CLOSE_S)
        self._closing.set()
        self._thread.shutdown()

    def _send(self, partitions: set[int]) -> bool:
        """Whether all of it was sent. What one partition cannot take stops no other."""
        failed = ""
        try:
            with reaching(self._store):
                for topic, partition in places_to_send(self._store, partitions):
                    if self._closing.is_set():
                        return False
                    try:
                        send_dead_letters(self._store, self._events, Chosen([topic], partition))
                    except LogUnavailableError as exc:
                        failed = f"{topic} {partition}: {exc}"
        except StoreUnavailableError as exc:
            failed = str(exc)
        if failed and failed != self._said:
            log.warning("dead letters wait in the store: %s", failed, extra={"action": "dead_letters_wait"})
        self._said = failed
        return not failed
