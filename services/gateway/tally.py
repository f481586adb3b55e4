"""What is counted of requests, kept for a moment and then counted in a row: one metric alone, between other code, takes
several times as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

COUNT_EVERY_S = 0.25
MAX_WAITING = 100  # counted at once: some 0.1 ms


class Tally:
    """Calls of metrics that wait to be made; all its methods are called on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Callable[[float], object], float]] = []

    def add(self, count: Callable[[float], object], value: float = 1.0) -> None:
        """Call a metric's method with the value, soon."""
        waiting = self._waiting
        waiting.append((count, value))
        if len(waiting) == 1:
            self._loop.call_later(COUNT_EVERY_S, self.count)
        elif len(waiting) >= MAX_WAITING:
            self.count()

    def count(self) -> None:
        """Call them all."""
        waiting, self._waiting = self._waiting, []
        for count, value in waiting:
            count(value)
