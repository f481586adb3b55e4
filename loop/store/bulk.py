"""Many rows at a time, in one transaction, by the raw drivers: SQLite's executemany and Postgres' COPY.

SQLAlchemy's cost for each row is about that of the whole join, so the joiner's tables are written by plain SQL, made
once from the schema. Rows are tuples in the order of a table's columns, as the drivers take them: days as YYYY-MM-DD,
JSON as text.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Sequence
from datetime import date
from functools import cache, lru_cache
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, Protocol

from sqlalchemy import Column, Connection, Date, Engine, LargeBinary, Table
from sqlalchemy.dialects import postgresql

from loop.store.engine import IDLE_IN_TRANSACTION_S

Row = tuple[Any, ...]
Staged = Sequence[Row] | bytes  # rows as they are on SQLite; in COPY's format on Postgres
_LENGTH = struct.Struct("!i")
_INT = struct.Struct("!iq")
_NULL = _LENGTH.pack(-1)
_POSTGRES = postgresql.dialect()  # type: ignore[no-untyped-call]
ROWS_PER_STATEMENT = (500, 50, 5, 1)
STAGED_MB = 64  # of Postgres' memory for what is staged, as far as it is used: of its default, 8, some goes to disk


class Bulk(Protocol):
    """One transaction. In `sql`, `?` stands for a value and `COLUMN IN ??` for a whole list of them."""

    def stage(self, columns: Sequence[Column[Any]], rows: Staged) -> None:
        """Bring new rows near, in their `staged_form`, before any lock is taken; several tables may take of them what
        their columns' names say.
        """

    def insert_staged(self, table: Table, without: Collection[str] = ()) -> int:
        """Insert of the staged rows those whose primary key is not there yet, but for these turned ids; returns how
        many.
        """

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
    # Positions and what they cover are lost together in a crash of the server, or not: the log has it all. A lock that
    # is not had by then somebody holds who was stopped: its waiter tries again, and `start_positions` ends the holder.
    limit = f"SET LOCAL lock_timeout = '{IDLE_IN_TRANSACTION_S} s'"
    cursor.execute(f"SET LOCAL synchronous_commit = off; {limit}")
    return PostgresBulk(cursor)


def staged_form(engine: Engine, columns: Sequence[Column[Any]], rows: Sequence[Row]) -> Staged:
    """Rows as `Bulk.stage` takes them: made without a connection, so while another transaction is under way."""
    return rows if engine.dialect.name == "sqlite" else _copy_form(columns, rows)


class SqliteBulk:
    """Rows go in many to a statement; lists go in as one JSON value."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._staged: Sequence[Row] = ()
        self._places: dict[str, int] = {}

    def stage(self, columns: Sequence[Column[Any]], rows: Staged) -> None:
        assert not isinstance(rows, bytes)
        self._staged = rows  # the write lock is held from the beginning on: nothing to win
        self._places = {column.name: n for n, column in enumerate(columns)}

    def insert_staged(self, table: Table, without: Collection[str] = ()) -> int:
        id = self._places["turned_id"]
        rows = [row for row in self._staged if row[id] not in without] if without else self._staged
        of_table = itemgetter(*(self._places[column.name] for column in table.columns))
        return self._insert(table, list(map(of_table, rows)))

    def upsert(self, table: Table, rows: Sequence[Row]) -> None:
        self.execute_many(upsert_sql(table), rows)

    def insert(self, table: Table, rows: Sequence[Row]) -> None:
        self._insert(table, rows)

    def _insert(self, table: Table, rows: Sequence[Row]) -> int:
        # A statement of many rows is worked off outside of Python's lock, while the next batch is read; by executemany,
        # SQLite would ask for the lock at each row, and wait for it.
        inserted = start = 0
        for size in ROWS_PER_STATEMENT:
            while len(rows) - start >= size:
                values = tuple(chain.from_iterable(rows[start : start + size]))
                inserted += self._cursor.execute(insert_sql(table, size), values).rowcount
                start += size
        return inserted

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
    """New rows go into a temporary table by COPY and from there into their own by one statement each."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def stage(self, columns: Sequence[Column[Any]], rows: Staged) -> None:
        # Not LIKE: it locks the table until the transaction ends, and who is stopped in COPY would hold up all others.
        types = ", ".join(f'"{column.name}" {column.type.compile(_POSTGRES)}' for column in columns)
        self._cursor.execute(
            f"SET LOCAL temp_buffers = '{STAGED_MB} MB';"
            f" CREATE TEMPORARY TABLE IF NOT EXISTS staged ({types}) ON COMMIT DELETE ROWS"
        )
        with self._cursor.copy("COPY staged FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(rows)

    def insert_staged(self, table: Table, without: Collection[str] = ()) -> int:
        if without:
            self.execute("DELETE FROM staged WHERE turned_id IN ??", set(without))
        names = _names(table)
        return self.execute(f"INSERT INTO {table.name} ({names}) SELECT {names} FROM staged ON CONFLICT DO NOTHING")

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


def _names(table: Table) -> str:
    return ", ".join(f'"{column.name}"' for column in table.columns)


@cache
def insert_sql(table: Table, rows: int = 1) -> str:
    """INSERT of so many rows that leaves those that are there as they are."""
    marks = ", ".join([f"({', '.join('?' * len(table.columns))})"] * rows)
    return f"INSERT INTO {table.name} ({_names(table)}) VALUES {marks} ON CONFLICT DO NOTHING"


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
        _array(value) if isinstance(value, (set, frozenset, list, dict)) else value for value in values
    ]


def _array(values: Iterable[Any]) -> str:
    """As Postgres writes an array of any type; psycopg's own writer takes some microseconds a value."""
    texts = "\0".join(map(str, values))  # which no text of Postgres' holds
    quoted = texts.replace("\\", r"\\").replace('"', r"\"").replace("\0", '","')
    return f'{{"{quoted}"}}'


def _copy_form(columns: Sequence[Column[Any]], rows: Sequence[Row]) -> bytes:
    """In COPY's binary format (PostgreSQL's documentation, COPY, "Binary Format"), a column at a time; psycopg's own
    writer is slower.
    """
    written = [_written(column, [row[n] for row in rows]) for n, column in enumerate(columns)]
    fields = zip(repeat(struct.pack("!h", len(columns))), *written)
    return b"".join(chain([b"PGCOPY\n\xff\r\n\0", bytes(8)], chain.from_iterable(fields), [struct.pack("!h", -1)]))


def _written(column: Column[Any], values: Iterable[Any]) -> Iterable[bytes]:
    if isinstance(column.type, Date):
        return map(_write_day, values)
    if column.type.python_type is int:
        return [_NULL if value is None else _INT.pack(8, value) for value in values]
    if not isinstance(column.type, LargeBinary):
        values = [None if value is None else value.encode() for value in values]
    return [_NULL if value is None else _LENGTH.pack(len(value)) + value for value in values]


@lru_cache(maxsize=64)
def _write_day(day: str) -> bytes:
    return struct.pack("!ii", 4, (date.fromisoformat(day) - date(2000, 1, 1)).days)
