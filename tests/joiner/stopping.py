"""`thumbwheel joiner` that stops itself with SIGSTOP, once, inside its first transaction on Postgres.

python -m tests.joiner.stopping copy        in the first COPY
python -m tests.joiner.stopping positions   when it has moved its positions, before anything else
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from psycopg import Copy

from loop.store.bulk import PostgresBulk
from services.cli import app

_left = ["stop"]


def main(point: str) -> None:
    """Put the stop in its place, then run the joiner."""
    write, execute = Copy.write, PostgresBulk.execute

    def stopping_write(self: Copy[Any], buffer: bytes) -> None:
        write(self, buffer[:100])
        _stop()
        write(self, buffer[100:])

    def stopping_execute(self: PostgresBulk, sql: str, *values: Any) -> int:
        done = execute(self, sql, *values)
        if sql.startswith("UPDATE positions"):
            _stop()
        return done

    if point == "copy":
        Copy.write = stopping_write  # type: ignore[method-assign,assignment]
    else:
        PostgresBulk.execute = stopping_execute  # type: ignore[method-assign]
    app(["joiner"])


def _stop() -> None:
    if _left:
        _left.pop()
        # To this thread: a signal to the process may be another one's, and this one would go on for a moment.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


if __name__ == "__main__":
    main(sys.argv[1])
