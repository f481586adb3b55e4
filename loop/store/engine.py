"""Opens the store: one SQLAlchemy engine over SQLite or Postgres, with its schema made. Knows no table's meaning.

How to use the engine:

- read: `with engine.connect() as connection:`. On SQLite this is one snapshot that blocks nobody; never write in it,
  for a reader that turns writer fails at once when somebody wrote in between (SQLITE_BUSY_SNAPSHOT).
- write: `with write(engine) as connection:`. Commits at the end, rolls back on an exception. On SQLite it takes the
  write lock first (waiting up to BUSY_TIMEOUT_S), so keep it short: read and compute before, aim at 50 ms.

Engines may be shared by threads, never across a fork.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError

from loop.settings import StoreSettings
from loop.store.schema import REVISION, metadata

APPLICATION = "thumbwheel"  # our connections' name to Postgres
BUSY_TIMEOUT_S = 30.0
# Below Kafka's session time-out (10 s at the least that clients use): a writer that was stopped in its last transaction
# loses its locks before anybody else is given its partitions.
IDLE_IN_TRANSACTION_S = 5.0
# Bodies are over the size that Postgres compresses, and lz4 takes a tenth of the time of its default.
_LOCAL_SETTINGS = text(
    f"SELECT set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_S * 1000:.0f}', true),"
    " set_config('default_toast_compression', 'lz4', true)"
)
# `state_change` is when the server last began with a message; who reads no answer is waited for too.
_END_STOPPED = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    f" AND application_name = '{APPLICATION}' AND pid <> pg_backend_pid() AND state = 'active'"
    f" AND wait_event IN ('ClientRead', 'ClientWrite') AND state_change < now() - interval '{IDLE_IN_TRANSACTION_S} s'"
    " AND pid IN (SELECT pid FROM pg_locks WHERE granted AND relation = 'positions'::regclass)"
)
_NO_PARTITION = "23514"  # a day's, which retention dropped behind `ensure_days`; nothing else of ours is checked
_SCHEMA_LOCK = 0x7468756D62  # any constant will do; "thumb"
_WRITES = "thumbwheel_writes"


class StoreUnavailableError(ConnectionError):
    """The store cannot be reached now, or ended the transaction; it was rolled back, to be tried again."""


def open_store(settings: StoreSettings) -> Engine:
    """The engine of the settings' URL, its schema made where it is not there; several processes may do so at once.

    Raises ValueError for a URL of another kind, StoreUnavailableError.
    """
    url = make_url(settings.url.get_secret_value())
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        expected = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DB"
        raise ValueError(f"store.url is {url.render_as_string()!r}; expected {expected}")
    try:
        return _open_sqlite(url) if backend == "sqlite" else _open_postgres(url, settings.pool_size)
    except (OperationalError, sqlite3.OperationalError) as exc:
        raise StoreUnavailableError(f"{_in_words(url, exc)}; is it running, and is store.url right?") from exc


def is_passing(exc: Exception) -> bool:
    """Whether SQLAlchemy's error passes by itself: the server is away, the connection cut, a lock not had."""
    is_cut = isinstance(exc, DBAPIError) and exc.connection_invalidated
    return is_cut or isinstance(exc, OperationalError | InternalError)


@contextmanager
def reaching(engine: Engine) -> Iterator[None]:
    """Errors that pass by themselves, SQLAlchemy's and the driver's, as StoreUnavailableError."""
    driver = engine.dialect.loaded_dbapi
    try:
        yield
    except DBAPIError as exc:
        if not is_passing(exc):
            raise
        raise StoreUnavailableError(_in_words(engine.url, exc)) from exc
    except (driver.OperationalError, driver.InternalError) as exc:
        raise StoreUnavailableError(_in_words(engine.url, exc)) from exc
    except driver.IntegrityError as exc:
        if getattr(exc, "sqlstate", None) != _NO_PARTITION:
            raise
        raise StoreUnavailableError(_in_words(engine.url, exc)) from exc


def _in_words(url: URL, exc: Exception) -> str:
    reason = exc.orig if isinstance(exc, DBAPIError) else exc
    return f"store at {url.render_as_string()}: {' '.join(str(reason).split())}"


@contextmanager
def write(engine: Engine) -> Iterator[Connection]:
    """A writing transaction: commits at the end, rolls back on an exception."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection = connection.execution_options(**{_WRITES: True})
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(_LOCAL_SETTINGS)
            yield connection


def end_stopped(engine: Engine) -> int:
    """End the transactions that hold positions and whose process was not heard of for IDLE_IN_TRANSACTION_S in the
    middle of a statement, of its answer, or between two of a pipeline: Postgres' own limit does not count there.
    Returns how many.
    """
    if engine.dialect.name == "sqlite":
        return 0  # its locks are the file's, and who waits for one gets an error
    with engine.connect() as connection:
        return len(connection.execute(_END_STOPPED).all())


def checkpoint(engine: Engine) -> None:
    """Move what was committed from SQLite's journal into its file. It holds up nobody, and what it cannot do now, a
    later commit or checkpoint does.
    """
    with suppress(OperationalError, sqlite3.OperationalError), closing(engine.raw_connection()) as connection:
        connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def _open_sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ValueError("store.url names no file; expected sqlite:///FILE, for several processes share the store")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves: the driver would only do it before the first write
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        connection.execute("PRAGMA wal_autocheckpoint = 2000")
        connection.execute("PRAGMA cache_size = -65536")  # KiB: the joiner's index pages are hit at random
        connection.execute("PRAGMA synchronous = NORMAL")  # positions and what they cover are lost together, or not
        connection.execute("PRAGMA foreign_keys = OFF")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            _make_sqlite_schema(engine)
            return engine
        except BaseException as exc:
            # Changing to WAL does not wait for the busy time-out while another process does the same.
            is_locked = isinstance(exc, OperationalError | sqlite3.OperationalError) and "locked" in str(exc)
            if not is_locked or time.monotonic() > deadline:
                engine.dispose()
                raise
            time.sleep(0.02)


def _make_sqlite_schema(engine: Engine) -> None:
    # Outside of SQLAlchemy's transaction, in which the journal's mode cannot be changed.
    connection = sqlite3.connect(str(engine.url.database), timeout=BUSY_TIMEOUT_S)
    try:
        # Of 4 KiB pages, each would hold one body of 2 KiB and be half empty.
        connection.execute("PRAGMA page_size = 16384")
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()
    with write(engine) as transaction:
        _make_schema(transaction)


def _open_postgres(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=0,  # the pool is the bound: callers wait for a connection
        pool_pre_ping=True,  # a restarted server costs a new connection, not an error
        connect_args={"application_name": APPLICATION, "connect_timeout": 10},
    )
    try:
        with write(engine) as connection:
            lock_schema(connection)
            _make_schema(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _make_schema(connection: Connection) -> None:
    """All tables in an empty store; what is missing in an older one. Raises ValueError for a newer one."""
    if not inspect(connection).has_table("alembic_version"):
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": REVISION})
        metadata.create_all(connection)
    elif connection.execute(text("SELECT version_num FROM alembic_version")).scalar() != REVISION:
        from loop.store.migrate import upgrade  # Alembic takes 0.2 s to load, and is needed once a release

        upgrade(connection)


def lock_schema(connection: Connection) -> None:
    """Be the only one who changes Postgres' schema, until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SCHEMA_LOCK})
