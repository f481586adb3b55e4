"""Many rows at a time, in one transaction, by the raw drivers: SQLite's executemany and Postgres' COPY.

SQLAlchemy's cost for each row is about that of the whole join, so the joiner's tables are written by plain SQL, made
once from the schema. Rows are tuples in the order of a table's columns, as the drivers take them: days as YYYY-MM-DD,
JSON as text.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import date
from functools import cache, lru_cache
from typing import Any, Protocol

from sqlalchemy import Connection, Date, LargeBinary, Table
from sqlalchemy.dialects import postgresql

Row = tuple[Any, ...]
_NULL = struct.pack("!i", -1)
_POSTGRES = postgresql.dialect()  # type: ignore[no-untyped-call]


class Bulk(Protocol):
    """One transaction. In `sql`, `?` stands for a value and `COLUMN IN ??` for a whole list of them."""

    def stage(self, table: Table, rows: Sequence[Row]) -> None:
        """Bring new rows near, before any lock is taken."""

    def insert_staged(self, table: Table, without: Collection[str] = ()) -> int:
        """Insert the staged rows whose primary key is not there yet, but for these turned ids; returns how many."""

    def upsert(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows, or overwrite those of the same primary key."""

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert the rows whose primary key is not there yet."""

    def execute(self, sql: str, *values: Any) -> int:
        """Run one statement; returns how many rows it changed."""

    def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        """Run one statement for each row of values."""

    def select(self, sql: str, *values: Any) -> list[Row]:
        """The rows of one query; where the only value is an empty collection, none."""


def open_bulk(connection: Connection) -> Bulk:
    """The bulk form of a transaction that was begun on `connection`."""
    cursor = connection.connection.cursor()
    if connection.dialect.name == "sqlite":
        return SqliteBulk(cursor)
    # Positions and what they cover are lost together in a crash of the server, or not: the log has it all.
    cursor.execute("SET LOCAL synchronous_commit = off")
    return PostgresBulk(cursor)


class SqliteBulk:
    """Rows go in by executemany; lists go in as one JSON value."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._staged: dict[str, Sequence[Row]] = {}

    def stage(self, table: Table, rows: Sequence[Row]) -> None:
        self._staged[table.name] = rows  # the write lock is held from the beginning on: nothing to win

    def insert_staged(self, table: Table, without: Collection[str] = ()) -> int:
        rows = self._staged.pop(table.name)
        if without:
            n = table.columns.keys().index("turned_id")
            rows = [row for row in rows if row[n] not in without]
        return int(self._cursor.executemany(insert_sql(table), rows).rowcount) if rows else 0

    def upsert(self, table: Table, rows: Sequence[Row]) -> None:
        self.execute_many(upsert_sql(table), rows)

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        self.execute_many(insert_sql(table), rows)

    def execute(self, sql: str, *values: Any) -> int:
        return int(self._cursor.execute(*_for_sqlite(sql, values)).rowcount)

    def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        self._cursor.executemany(sql, rows)

    def select(self, sql: str, *values: Any) -> list[Row]:
        if _is_nothing(values):
            return []
        rows: list[Row] = self._cursor.execute(*_for_sqlite(sql, values)).fetchall()
        return rows


class PostgresBulk:
    """New rows go into temporary tables by COPY and from there into their own by one statement."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def stage(self, table: Table, rows: Sequence[Row]) -> None:
        # Not LIKE: it locks the table until the transaction ends, and who is stopped in COPY would hold up all others.
        columns = ", ".join(f'"{column.name}" {column.type.compile(_POSTGRES)}' for column in table.columns)
        self._cursor.execute(
            f"CREATE TEMPORARY TABLE IF NOT EXISTS staged_{table.name} ({columns}) ON COMMIT DELETE ROWS"
        )
        with self._cursor.copy(f"COPY staged_{table.name} FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(b"".join(_copy_form(table, rows)))

    def insert_staged(self, table: Table, without: Collection[str] = ()) -> int:
        if without:
            self.execute(f"DELETE FROM staged_{table.name} WHERE turned_id IN ??", set(without))
        return self.execute(f"INSERT INTO {table.name} SELECT * FROM staged_{table.name} ON CONFLICT DO NOTHING")

    def upsert(self, table: Table, rows: Sequence[Row]) -> None:
        self.execute_many(upsert_sql(table), rows)

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        self.execute_many(insert_sql(table), rows)

    def execute(self, sql: str, *values: Any) -> int:
        self._cursor.execute(*_for_postgres(sql, values))
        return int(self._cursor.rowcount)

    def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        if rows:
            self._cursor.executemany(sql.replace("?", "%s"), rows)

    def select(self, sql: str, *values: Any) -> list[Row]:
        if _is_nothing(values):
            return []
        rows: list[Row] = self._cursor.execute(*_for_postgres(sql, values)).fetchall()
        return rows


@cache
def insert_sql(table: Table) -> str:
    """INSERT that leaves rows that are there as they are."""
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    marks = ", ".join("?" * len(table.columns))
    return f"INSERT INTO {table.name} ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING"


@cache
def upsert_sql(table: Table) -> str:
    """INSERT that overwrites rows that are there."""
    keys = ", ".join(f'"{column.name}"' for column in table.primary_key)
    changes = ", ".join(f'"{c.name}" = excluded."{c.name}"' for c in table.columns if not c.primary_key)
    return insert_sql(table).replace("DO NOTHING", f"({keys}) DO UPDATE SET {changes}")


def _is_nothing(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Collection) and not isinstance(value, (str, bytes)) and not value for value in values)


def _for_sqlite(sql: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    return sql.replace("??", "(SELECT value FROM json_each(?))"), [
        json.dumps(list(value)) if isinstance(value, (set, frozenset, list, dict)) else value for value in values
    ]


def _for_postgres(sql: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    return sql.replace("IN ??", "= ANY(%s)").replace("?", "%s"), [
        list(value) if isinstance(value, (set, frozenset, list, dict)) else value for value in values
    ]


def _copy_form(table: Table, rows: Iterable[Row]) -> Iterator[bytes]:
    """In COPY's binary format (PostgreSQL's documentation, COPY, "Binary Format"); psycopg's own writer is slower."""
    writers = [_writer(column) for column in table.columns]
    columns = struct.pack("!h", len(writers))
    yield b"PGCOPY\n\xff\r\n\0" + bytes(8)
    for row in rows:
        yield columns
        for write, value in zip(writers, row, strict=True):
            yield _NULL if value is None else write(value)
    yield struct.pack("!h", -1)


def _writer(column: Any) -> Callable[[Any], bytes]:
    if isinstance(column.type, Date):
        return _write_day
    if isinstance(column.type, LargeBinary):
        return _write_bytes
    return _write_int if column.type.python_type is int else _write_text


@lru_cache(maxsize=64)
def _write_day(day: str) -> bytes:
    return struct.pack("!ii", 4, (date.fromisoformat(day) - date(2000, 1, 1)).days)


def _write_bytes(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def _write_int(value: int) -> bytes:
    return struct.pack("!iq", 8, value)


def _write_text(value: str) -> bytes:
    return _write_bytes(value.encode())
