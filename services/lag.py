"""How far a joiner is behind, and what waits, for those who watch it. Asked beside the join, so that it is shown above
all while log or store hold that up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import product

from sqlalchemy import Engine

from loop import metrics
from loop.log import EventLog, LogUnavailableError
from loop.store.dead_letters import count_unsent
from loop.store.engine import StoreUnavailableError, reaching
from loop.store.joining import pending_votes

LOOK_EVERY_S = 5.0
Place = tuple[str, int]
"""A topic's partition."""

log = logging.getLogger("thumbwheel.joiner")


class Lag:
    """Shows it, every LOOK_EVERY_S. Use as a context manager: inside, a thread looks."""

    def __init__(
        self, topics: tuple[str, str], store: Engine, events: EventLog, positions: Callable[[], Mapping[Place, int]]
    ) -> None:
        """`positions` is asked for the next offset of each of our partitions, as joined."""
        self._topics, self._store, self._events, self._positions = topics, store, events, positions
        self.log_id: str | None = None
        """The log's identity, as of the last look: the join need not wait for who is asked."""
        self._lock = threading.Lock()
        self._owned: set[int] = set()
        self._current_at: dict[Place, float] = {}  # what came before this (Unix seconds) is joined
        self._unseen: set[Place] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lag")

    def __enter__(self) -> Lag:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def own(self, partitions: set[int]) -> None:
        """These are ours now; what went to somebody else is no longer ours to show."""
        with self._lock:
            lost, self._owned = self._owned - partitions, partitions
            for topic, partition in product(self._topics, lost):
                self._current_at.pop((topic, partition), None)
                for gauge in (metrics.joiner_lag_records, metrics.joiner_lag_seconds):
                    gauge.remove(topic, str(partition))

    def joined(self, places: Iterable[tuple[Place, int]]) -> None:
        """What came to these before these times (Unix ms) is joined."""
        with self._lock:
            for place, timestamp_ms in places:
                self._current_at[place] = max(self._current_at.get(place, 0.0), timestamp_ms / 1000)

    def _look(self) -> None:
        while True:
            for show in (self._show_lag, self._show_waiting):
                with suppress(LogUnavailableError, StoreUnavailableError):  # the join says so
                    show()
            if self._stop.wait(LOOK_EVERY_S):
                return

    def _show_waiting(self) -> None:
        pending, oldest_ms = pending_votes(self._store)
        metrics.joiner_pending_votes.set(pending)
        metrics.joiner_pending_oldest_seconds.set(0 if oldest_ms is None else time.time() - oldest_ms / 1000)
        with reaching(self._store):
            metrics.joiner_unsent_dead_letters.set(count_unsent(self._store))

    def _show_lag(self) -> None:
        self.log_id = self._events.identity()
        now = time.time()
        ends = {(topic, n): end for topic in self._topics for n, end in self._events.end_offsets(topic).items()}
        with self._lock:
            positions = {place: next_ for place, next_ in self._positions().items() if place[1] in self._owned}
            for place in positions.keys() & ends.keys():
                lag = max(0, ends[place] - positions[place])
                metrics.joiner_lag_records.labels(place[0], str(place[1])).set(lag)
                if lag == 0:
                    self._current_at[place] = now
                if place in self._current_at:
                    metrics.joiner_lag_seconds.labels(place[0], str(place[1])).set(now - self._current_at[place])
        self._show_unseen(positions.keys() - ends.keys())

    def _show_unseen(self, unseen: set[Place]) -> None:
        """Partitions without a leader: the others are joined meanwhile."""
        for topic in self._topics:
            metrics.joiner_unseen_partitions.labels(topic).set(sum(place[0] == topic for place in unseen))
        if unseen != self._unseen:
            self._unseen = unseen
            places = [f"{topic} {partition}" for topic, partition in sorted(unseen)]
            log.warning("no broker leads: %s", ", ".join(places) or "none", extra={"action": "joiner_unseen"})
