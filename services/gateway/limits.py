"""How much one caller may ask for: a token bucket for each key and for each rater, in memory and bounded; and how much
all may hold together. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_SUBJECTS = 65_536


class RateLimit:
    """Token buckets of `burst` tokens, `per_s` of which come back in a second.

    Of a bucket only the moment is kept at which it is full again: the generic cell rate algorithm (ITU-T I.371), which
    lets through what a token bucket does.
    """

    def __init__(self, per_s: float, burst: float, max_subjects: int = MAX_SUBJECTS) -> None:
        self._interval_s = 1 / per_s
        self._depth_s = max(burst, 1.0) / per_s
        self._max_subjects = max_subjects
        self._full_at: dict[str, float] = {}  # the longest untouched first, which is the one to be forgotten

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_s(self, subject: str, now_s: float) -> float:
        """Take a token; returns 0, or the seconds until there is one, and then none was taken."""
        full_at = max(self._full_at.get(subject, now_s), now_s) + self._interval_s
        wait_s = full_at - now_s - self._depth_s
        if wait_s > 1e-6:  # below is rounding
            return wait_s
        self._full_at.pop(subject, None)
        self._full_at[subject] = full_at
        if len(self._full_at) > self._max_subjects:
            del self._full_at[next(iter(self._full_at))]
        return 0.0


class Room:
    """The bytes that requests hold until they are answered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    @contextmanager
    def share(self, refuse: Callable[[str], object]) -> Iterator[Callable[[int], None]]:
        """One request's; what it gives is told of the bytes as they come. Where those of all are too many, `refuse` is
        called, which has to raise: but not for a request that is alone, however large it is.
        """
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            if mine < self.held and self.held + size > self._most:
                refuse(f"open requests have {self.held} bytes, which is about the most")
            mine += size
            self.held += size

        try:
            yield hold
        finally:
            self.held -= mine
