"""What the store and the embedded log, each a file of SQLite's, both need of it."""

from __future__ import annotations

import sqlite3
import time

RETRY_S = 0.01


def empty_journal(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Move the journal into its file and leave it empty, so that it has nothing more of what was erased.

    Raises sqlite3.OperationalError where others are in the way for longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    # SQLite waits for readers and writers here, but gives up at once where another checkpoint is under way.
    while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError(
                f"others kept the journal busy for {timeout_s:g} s: it may still hold what was erased; erase it again"
            )
        time.sleep(RETRY_S)
