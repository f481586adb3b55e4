"""Existing logs of answers and labels, sent through the same event log as live traffic.

The file is in the ecosystem's KTO form, as JSONL, JSON (a list) or Parquet: `prompt` (text, or a list of messages),
`completion` (text, or a list with one assistant message), `label` (true: desirable). Used where they are there: `id`,
`tree` or `conversation_id`, `rater`. Other columns are kept in `ResponseLogged.extra`.

Ids are made from the content, so a file imported twice is as once. All rows are checked before the first is sent: of a
file with a bad row, nothing is imported.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.progress import track

from loop.events import Choice, FeedbackGiven, HybridClock, ResponseLogged, encode, hash_rater, key_of_message_id
from loop.log import NewRecord
from loop.log.open import open_log
from loop.settings import Settings

BATCH_ROWS = 500
_NAMED = {"id", "prompt", "completion", "label", "tree", "conversation_id", "rater"}


@dataclass(frozen=True)
class ImportedRow:
    """One row of the file, checked."""

    id: str | None
    messages: list[dict[str, Any]] | None
    prompt: str | None
    answer: dict[str, Any]
    label: bool
    conversation_id: str
    rater: str
    extra: dict[str, Any]


def import_rows(settings: Settings, file: Path, *, now_ms: int | None = None) -> dict[str, Any]:
    """Append every row's response and its thumb to the event log; returns {file, rows, desirable, undesirable}.

    Raises ValueError naming file, line, value and what was expected; FileNotFoundError; LogUnavailableError, after
    which the import can simply be done again.
    """
    console = Console(stderr=True)
    at_ms = int(time.time() * 1000) if now_ms is None else now_ms
    salt = settings.gateway.rater_salt.get_secret_value().encode()
    rows = [_check(row, f"{file}:{line}", salt) for line, row in read_rows(file)]
    clock = HybridClock()
    log = open_log(settings.log)
    try:
        starts = range(0, len(rows), BATCH_ROWS)
        for start in track(starts, f"importing {file.name}", console=console, disable=not console.is_terminal):
            records = [
                record
                for row in rows[start : start + BATCH_ROWS]
                for record in to_records(row, settings, clock.tick(at_ms), at_ms)
            ]
            log.append(records)
    finally:
        log.close()
    desirable = sum(row.label for row in rows)
    return {"file": str(file), "rows": len(rows), "desirable": desirable, "undesirable": len(rows) - desirable}


def to_records(row: ImportedRow, settings: Settings, hlc: int, at_ms: int) -> tuple[NewRecord, NewRecord]:
    """The row's response and feedback. Two rows are one response if they agree on all but `rater` and `label`; rows
    without a rater on the label too, for nothing says that two opposite labels are one rater's.
    """
    content = [row.id, row.messages, row.prompt, row.answer, row.conversation_id]
    digest = _digest(content if row.rater else [*content, row.label])
    message_id = row.id
    key = key_of_message_id(message_id) if message_id is not None else digest[:16]
    response_id = f"chatcmpl-{key}-{UUID(digest[-32:])}"
    response = ResponseLogged(
        response_id=response_id,
        choices=[Choice(row.answer)],
        messages=row.messages,
        prompt=row.prompt,
        endpoint="chat" if row.messages is not None else "completions",
        alias=settings.engine.alias,
        conversation_id=row.conversation_id,
        message_id=message_id,
        started_at_ms=at_ms,
        imported=True,
        extra=row.extra,
    )
    feedback_id = f"import-{_digest([response_id, row.rater, row.label])[:32]}"
    feedback = FeedbackGiven(
        feedback_id=feedback_id,
        value="up" if row.label else "down",
        hlc=hlc,
        response_id=response_id,
        rater=row.rater,
        source="import",
    )
    return (
        NewRecord(
            settings.log.responses_topic,
            key,
            encode(response, event_id=f"import-{digest[:32]}", key=key, source="/import", now_ms=at_ms),
        ),
        NewRecord(
            settings.log.feedback_topic,
            key,
            encode(feedback, event_id=feedback_id, key=key, source="/import", now_ms=at_ms),
        ),
    )


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The file's rows with their numbers, from 1. Raises ValueError, FileNotFoundError."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        number = 0
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
        return
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_bytes())
        except ValueError as exc:
            raise ValueError(f"{file}: {exc}; expected a JSON list of rows") from exc
        if not isinstance(rows, list):
            raise ValueError(f"{file}: found {type(rows).__name__}, expected a JSON list of rows")
        yield from enumerate(rows, 1)
        return
    if file.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"{file}: ends with {file.suffix!r}, expected .jsonl, .json or .parquet")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as exc:
                raise ValueError(
                    f"{file}:{number}: {_short(line)} is no JSON ({exc}); expected one row a line"
                ) from exc


def _check(row: Any, where: str, salt: bytes) -> ImportedRow:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {_short(row)}; expected an object with prompt, completion and label")
    messages, prompt = _prompt(row.get("prompt"), where)
    label = row.get("label")
    if not isinstance(label, bool):
        raise ValueError(f"{where}: label is {_short(label)}, expected true or false")
    conversation_id = _text(row, "conversation_id", where, 256) or _text(row, "tree", where, 256)
    rater = _text(row, "rater", where, 4096)
    return ImportedRow(
        id=_text(row, "id", where, 256),
        messages=messages,
        prompt=prompt,
        answer=_answer(row.get("completion"), where),
        label=label,
        # Turns of one conversation share its beginning.
        conversation_id=conversation_id or _digest(_first_turn(messages) if messages else prompt)[:32],
        rater=hash_rater(salt, rater or ""),
        extra={name: value for name, value in row.items() if name not in _NAMED},
    )


def _prompt(value: Any, where: str) -> tuple[list[dict[str, Any]] | None, str | None]:
    if isinstance(value, str) and value:
        return None, value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value, None
    raise ValueError(
        f"{where}: prompt is {_short(value)}, expected text or a list of messages with role and content, not empty"
    )


def _answer(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    if isinstance(value, list) and len(value) == 1 and _is_message(value[0]) and value[0]["role"] == "assistant":
        found: dict[str, Any] = value[0]
        return found
    raise ValueError(f"{where}: completion is {_short(value)}, expected text or a list with one assistant message")


def _text(row: dict[str, Any], name: str, where: str, max_chars: int) -> str | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or len(value) > max_chars or "\x00" in value:
        raise ValueError(f"{where}: {name} is {_short(value)}, expected text of at most {max_chars} characters")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _first_turn(messages: list[dict[str, Any]]) -> Any:
    return next((message for message in messages if message["role"] == "user"), messages[0])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
