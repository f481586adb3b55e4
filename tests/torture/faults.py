"""What goes wrong in a torture run: several things at a time, never two with the same part."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

from loop.log.kafka import SESSION_TIMEOUT_S
from tests.torture.stage import Stage

AT_ONCE = 3
KINDS = (
    *("kill joiner", "kill gateway", "stop joiner", "stop gateway"),
    *("restart kafka", "restart postgres", "add joiner", "remove joiner"),
)


class Faults:
    """Does `most` faults, each kind as often as any other, and begins none after `deadline` (monotonic)."""

    def __init__(self, stage: Stage, seed: int, most: int, deadline: float, show: Callable[[str], None]) -> None:
        self.done = 0
        self._stage = stage
        self._random = random.Random(seed)
        self._kinds = cycle(self._random.sample(KINDS, len(KINDS)))
        self._left, self._deadline = most, deadline
        self._show = show
        self._busy: set[int] = set()

    async def run(self) -> None:
        """Raises AssertionError where a service ended otherwise than it was told to."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._one_after_the_other())

    async def _one_after_the_other(self) -> None:
        while self._left > 0 and time.monotonic() < self._deadline:
            self._left -= 1
            verb, what = next(self._kinds).split()
            if verb == "add":
                self._show(f"add {self._stage.add_joiner().name}")
            else:
                async with self._taken(what) as part:
                    self._show(f"{verb} {getattr(part, 'name', what)}")
                    await self._do(verb, part)
            self.done += 1
            crashed = [service.name for service in self._stage.services if service.has_crashed()]
            assert not crashed, f"ended by themselves: {crashed}"
            await self._pause(1)

    async def _do(self, verb: str, part: Any) -> None:
        if verb == "restart":  # the broker or Postgres; in order, or as by a crash
            how = self._random.choice([{}, part.crash])
            await asyncio.to_thread(part.stop, **how)
            await self._pause(3)
            await asyncio.to_thread(part.start)
        elif verb == "kill":
            part.end(signal.SIGKILL)
            await self._pause(3)
            part.start()
        elif verb == "stop":
            part.send(signal.SIGSTOP)
            await asyncio.sleep(SESSION_TIMEOUT_S + self._random.uniform(1, 4))
            part.send(signal.SIGCONT)
        else:
            self._stage.joiners.remove(part)
            await asyncio.to_thread(part.end)

    @asynccontextmanager
    async def _taken(self, what: str) -> AsyncIterator[Any]:
        """One of these parts to which nothing else happens now, as soon as there is one."""
        while not (idle := [part for part in self._stage.parts(what) if id(part) not in self._busy]):
            await asyncio.sleep(0.1)
        part = self._random.choice(idle)
        self._busy.add(id(part))
        try:
            yield part
        finally:
            self._busy.remove(id(part))

    async def _pause(self, most_s: float) -> None:
        await asyncio.sleep(self._random.uniform(0, most_s))
