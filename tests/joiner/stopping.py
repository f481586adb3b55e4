"""`thumbwheel joiner` that stops itself with SIGSTOP, once, inside its first transaction on Postgres.

python -m tests.joiner.stopping copy        in the first COPY
python -m tests.joiner.stopping positions   when it has moved its positions, before anything else
python -m tests.joiner.stopping votes       behind them, between two rows of votes in a pipeline
python -m tests.joiner.stopping answer      behind them, while the server sends what was asked of it
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from psycopg import Copy

from loop.store.bulk import PostgresBulk, Row
from services.cli import app

_left = ["stop"]


def main(point: str) -> None:
    """Put the stop in its place, then run the joiner."""
    write, execute, execute_many = Copy.write, PostgresBulk.execute, PostgresBulk.execute_many

    def stopping_write(self: Copy[Any], buffer: bytes) -> None:
        write(self, buffer[:100])
        _stop()
        write(self, buffer[100:])

    def stopping_execute(self: PostgresBulk, sql: str, *values: Any) -> int:
        done = execute(self, sql, *values)
        if sql.startswith("UPDATE positions") and point == "answer" and _left:
            self._cursor.connection.pgconn.send_query(b"SELECT repeat('x', 100000000)")
        if sql.startswith("UPDATE positions"):
            _stop()
        return done

    def stopping_between(rows: Iterable[Row]) -> Iterator[Row]:
        for n, row in enumerate(rows):
            if n:
                _stop()
            yield row

    def stopping_execute_many(self: PostgresBulk, sql: str, rows: Sequence[Row]) -> None:
        if len(rows) > 1 and sql.startswith("INSERT INTO votes"):
            self._cursor.executemany(sql.replace("?", "%s"), stopping_between(rows))
        else:
            execute_many(self, sql, rows)

    if point == "copy":
        Copy.write = stopping_write  # type: ignore[method-assign,assignment]
    elif point == "votes":
        PostgresBulk.execute_many = stopping_execute_many  # type: ignore[method-assign]
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
