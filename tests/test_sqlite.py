"""The journal is emptied once nobody is in the way; SQLite alone gives up where a checkpoint or a reader is."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from loop.sqlite import empty_journal


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """To a file with a secret in its journal; it does not wait for others by itself."""
    with closing(sqlite3.connect(tmp_path / "file.db", isolation_level=None, timeout=0)) as made:
        made.execute("PRAGMA journal_mode = WAL")
        made.execute("PRAGMA secure_delete = ON")
        made.execute("CREATE TABLE kept (text)")
        made.execute("INSERT INTO kept VALUES ('a secret')")
        made.execute("DELETE FROM kept")
        yield made


@pytest.fixture
def reader(connection: sqlite3.Connection, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """In the way: another connection in a transaction that has read."""
    path = tmp_path / "file.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as made:
        made.execute("BEGIN")
        made.execute("SELECT * FROM kept").fetchall()
        yield made


def test_it_waits_for_who_is_in_the_way(
    connection: sqlite3.Connection, reader: sqlite3.Connection, tmp_path: Path
) -> None:
    journal = tmp_path / "file.db-wal"
    assert b"a secret" in journal.read_bytes()
    leaves = threading.Timer(0.2, reader.execute, ["COMMIT"])
    leaves.start()
    empty_journal(connection, 30.0)
    leaves.join()
    assert journal.read_bytes() == b""


def test_it_says_so_where_they_stay(connection: sqlite3.Connection, reader: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.OperationalError, match=r"busy for 0\.1 s.*erase it again"):
        empty_journal(connection, 0.1)
