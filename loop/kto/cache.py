"""What a night can take over from earlier ones: reference log-probs, and which rows are grouped together.

Entries are addressed by content: a hash of everything that a log-prob depends on. So nothing ever goes stale; what
differs is simply not found, and goes once no run has asked for it in KEEP_DAYS. One SQLite file, `reference.db`; it
holds hashes and numbers, no text and no token.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import struct
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

from loop.kto.pack import Tokens
from loop.kto.rows import Row

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS logps (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, used_day INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    plan TEXT, key BLOB, number INTEGER NOT NULL, used_day INTEGER NOT NULL,
    PRIMARY KEY (plan, key)
) WITHOUT ROWID;
"""
KEEP_DAYS = 90
_VALUE = struct.Struct("<dI")  # the log-prob, and a checksum over it and its key
BUSY_TIMEOUT_S = 60.0


class ReferenceCache:
    """A context manager. Without a folder it is in memory: a run then finds only what it has put there itself."""

    def __init__(self, folder: Path | None, depends_on: Mapping[str, str], today: int | None = None) -> None:
        """`depends_on`: what log-probs depend on besides token ids (base, quantisation, dtype, device).

        `today` is in days since 1970.
        """
        self._identity = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).digest()
        self._today = int(time.time() // 86_400) if today is None else today
        if folder is None:
            self._connection = _open(":memory:")
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "reference.db"
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.OperationalError):  # locked, read-only, disk full: the file may be sound
                raise
            damaged = path.replace(path.with_suffix(".damaged"))
            logger.warning("%s cannot be read (%s): kept as %s, begun anew", path, exc, damaged)
            self._connection = _open(path)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with closing(self._connection) as connection, connection:
            for table in ("logps", "groups"):
                connection.execute(f"DELETE FROM {table} WHERE used_day < ?", (self._today - KEEP_DAYS,))

    def key(self, prompt_ids: Tokens, completion_ids: Tokens) -> bytes:
        """The address of log π_ref(completion | prompt); where the prompt ends is part of it."""
        return hashlib.sha256(self._identity + _bytes(prompt_ids, completion_ids)).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The log-probs that are there and undamaged."""
        found = {}
        for key in keys:
            row = self._connection.execute("SELECT value FROM logps WHERE key = ?", (key,)).fetchone()
            if row is not None and (logp := _checked(key, row[0])) is not None:
                found[key] = logp
        with self._connection:
            self._connection.executemany(
                "UPDATE logps SET used_day = ? WHERE key = ? AND used_day < ?",
                [(self._today, key, self._today) for key in found],
            )
        return found

    def put(self, logps: Mapping[bytes, float]) -> None:
        """Keep them, all or none."""
        rows = [(key, _VALUE.pack(logp, _checksum(key, logp)), self._today) for key, logp in logps.items()]
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?)", rows)

    def groups(self, plan: str, rows: Sequence[Row]) -> list[int | None]:
        """The number of the group that each row was in under the same `plan` (size and seed); None for a new row."""
        query = "SELECT number FROM groups WHERE plan = ? AND key = ?"
        found = [self._connection.execute(query, (plan, key)).fetchone() for key in _row_keys(rows)]
        return [None if row is None else int(row[0]) for row in found]

    def keep_groups(self, plan: str, rows: Sequence[Row], numbers: Iterable[int]) -> None:
        """For the nights to come."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?)",
                [(plan, key, number, self._today) for key, number in zip(_row_keys(rows), numbers, strict=True)],
            )


def _open(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
    try:
        connection.executescript("PRAGMA journal_mode = WAL;" + _SCHEMA)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _row_keys(rows: Sequence[Row]) -> list[bytes]:
    """By row; the same row given twice has two keys."""
    seen: Counter[bytes] = Counter()
    keys = []
    for row in rows:
        digest = hashlib.sha256(row.conversation.encode() + b"\0" + _bytes(row.prompt_ids, row.completion_ids))
        content = digest.digest()
        digest.update(str(seen[content]).encode())
        seen[content] += 1
        keys.append(digest.digest())
    return keys


def _bytes(prompt_ids: Tokens, completion_ids: Tokens) -> bytes:
    return array("q", [len(prompt_ids), *prompt_ids, *completion_ids]).tobytes()


def _checksum(key: bytes, logp: float) -> int:
    return zlib.crc32(key + struct.pack("<d", logp))


def _checked(key: bytes, value: bytes) -> float | None:
    if len(value) != _VALUE.size:
        return None
    logp, checksum = _VALUE.unpack(value)
    return float(logp) if checksum == _checksum(key, logp) else None
