"""How services wait for a log or a store that is away when they start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

RETRY_S = 1.0
T = TypeVar("T")


def when_there(make: Callable[[], T], stop: threading.Event, say: Callable[[Exception], None]) -> T | None:
    """What `make` gives once it raises no ConnectionError; None where `stop` is set before. `say` is told every new
    reason, not every try.
    """
    said = ""
    while not stop.is_set():
        try:
            return make()
        except ConnectionError as exc:  # LogUnavailableError, StoreUnavailableError
            if str(exc) != said:
                said = str(exc)
                say(exc)
            stop.wait(RETRY_S)
    return None
