"""`thumbwheel joiner` that stops itself with SIGSTOP, once, inside its first transaction on Postgres.

python -m tests.joiner.stopping copy        in the first COPY
python -m tests.joiner.stopping positions   when it has moved its positions, before anything else
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Column

from loop.store.bulk import PostgresBulk, Row
from services.cli import app

_left = ["stop"]


def main(point: str) -> None:
    """Put the stop in its place, then run the joiner."""
    stage, execute = PostgresBulk.stage, PostgresBulk.execute

    def stopping_stage(self: PostgresBulk, columns: Sequence[Column[Any]], rows: Sequence[Row]) -> None:
        stage(self, columns, _Stopping(rows))

    def stopping_execute(self: PostgresBulk, sql: str, *values: Any) -> int:
        done = execute(self, sql, *values)
        if sql.startswith("UPDATE positions"):
            _stop()
        return done

    if point == "copy":
        PostgresBulk.stage = stopping_stage  # type: ignore[method-assign]
    else:
        PostgresBulk.execute = stopping_execute  # type: ignore[method-assign]
    app(["joiner"])


class _Stopping(list[Row]):
    def __iter__(self) -> Iterator[Row]:
        _stop()
        return super().__iter__()


def _stop() -> None:
    if _left:
        _left.pop()
        # To this thread: a signal to the process may be another one's, and this one would go on for a moment.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


if __name__ == "__main__":
    main(sys.argv[1])
