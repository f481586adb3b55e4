"""Rows to train on or to score: a snapshot's Parquet file, or any JSONL or Parquet file of the ecosystem's KTO form.

`prompt` (text or messages), `completion` (text or one assistant message) and `label` (true: desirable), or for pairs
`prompt`, `chosen` and `rejected`. Served token ids, where a row brings them, are used exactly as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from loop.kto.template import Message, encode

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """An example as the trainer sees it; neither list of ids is empty."""

    row_id: str
    prompt_ids: list[int]
    completion_ids: list[int]
    desirable: bool
    weight: float
    conversation: str
    """Rows of one conversation are never mismatched with each other."""
    rater: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def data_file(data: Path) -> Path:
    """The file itself, or a snapshot folder's `train.parquet`. Raises ValueError where there is none."""
    file = data / "train.parquet" if data.is_dir() else data
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected rows as JSONL or Parquet")
    return file


def read_records(data: Path) -> list[tuple[str, Record]]:
    """`(place, record)` of a `.jsonl`, `.json` (lines) or `.parquet` file, or of a snapshot's folder (`train.parquet`).

    Raises ValueError for a file that is missing, empty or not readable as that.
    """
    data = data_file(data)
    records = list(_parquet(data) if data.suffix == ".parquet" else _json_lines(data))
    if not records:
        raise ValueError(f"{data}: no rows")
    return records


def row_of(record: Record, place: str, tokenizer: Any, chat_template: str | None, weights: tuple[float, float]) -> Row:
    """One row; `weights` are (λ_D, λ_U) for records without a `weight`. Raises ValueError with place and value."""
    label = record.get("label")
    if not isinstance(label, bool):
        _refuse(place, "label", label, "true (desirable) or false")
    weight = record.get("weight")
    if weight is None:
        weight = weights[0] if label else weights[1]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        _refuse(place, "weight", weight, "a finite number, 0 or more")
    prompt_ids, completion_ids = _served_ids(record, place)
    if prompt_ids is None or completion_ids is None:
        prompt_ids, completion_ids = _encode(record, "completion", place, tokenizer, chat_template)
    return Row(
        row_id=str(_first(record, "id", "example_id", "response_id") or place),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        desirable=label,
        weight=float(weight),
        conversation=_conversation(record, prompt_ids),
        rater=None if record.get("rater") is None else str(record["rater"]),
    )


def pair_of(record: Record, place: str, tokenizer: Any, chat_template: str | None) -> Pair:
    """One pair; raises ValueError with place and value."""
    prompt_ids, chosen_ids = _encode(record, "chosen", place, tokenizer, chat_template)
    _, rejected_ids = _encode(record, "rejected", place, tokenizer, chat_template)
    return Pair(prompt_ids, chosen_ids, rejected_ids)


def is_pairs(records: Iterable[tuple[str, Record]]) -> bool:
    """Whether the records are pairs rather than rows, by the first one's keys."""
    _, first = next(iter(records))
    return "chosen" in first and "rejected" in first


def fit(
    rows: list[Row], max_length: int, truncation: Literal["drop", "keep_end", "keep_start"]
) -> tuple[list[Row], dict[str, int]]:
    """The rows that are at most `max_length` tokens, and how many were left out or cut on the way.

    `keep_end` cuts the prompt's beginning, `keep_start` the completion's end; a row of which no token would be left of
    what is cut is left out, as `drop` leaves out all of them.
    """
    fitting = []
    counts = {"rows_too_long": 0, "rows_truncated": 0}
    for row in rows:
        excess = row.tokens - max_length
        if excess > 0:
            cut = row.prompt_ids if truncation == "keep_end" else row.completion_ids
            if truncation == "drop" or excess >= len(cut):
                counts["rows_too_long"] += 1
                continue
            counts["rows_truncated"] += 1
            if truncation == "keep_end":
                row = replace(row, prompt_ids=cut[excess:])
            else:
                row = replace(row, completion_ids=cut[:-excess])
        fitting.append(row)
    return fitting, counts


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as exc:
        raise ValueError(f"{path}: not readable as Parquet: {exc}") from exc
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{path.name}, row {number}", record


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as exc:
                raise ValueError(f"{place}: not JSON: {exc}") from exc
            if not isinstance(record, dict):
                raise ValueError(f"{place}: {_short(record)}: expected an object")
            yield place, record


def _served_ids(record: Record, place: str) -> tuple[list[int] | None, list[int] | None]:
    found = []
    for key in ("prompt_ids", "completion_ids"):
        ids = record.get(key)
        if ids is not None and (not ids or any(type(i) is not int or i < 0 for i in ids)):
            _refuse(place, key, ids, "a list of token ids that is not empty")
        found.append(None if ids is None else list(ids))
    return found[0], found[1]


def _encode(
    record: Record, answer: str, place: str, tokenizer: Any, chat_template: str | None
) -> tuple[list[int], list[int]]:
    prompt, completion = record.get("prompt"), record.get(answer)
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        message = completion[0]
        completion = message.get("content") if message.get("role") == "assistant" else completion
    if not isinstance(completion, str):
        _refuse(place, answer, completion, "text, or a list with one assistant message")
    if not isinstance(prompt, str) and not _is_messages(prompt):
        _refuse(place, "prompt", prompt, "text, or a list of messages with role and content")
    try:
        return encode(tokenizer, prompt, completion, chat_template)  # type: ignore[arg-type]
    except ValueError as exc:
        raise ValueError(f"{place}: {exc}") from exc


def _is_messages(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _conversation(record: Record, prompt_ids: list[int]) -> str:
    """The conversation that the record names, else one by its beginning: the messages up to the first user turn."""
    named = _first(record, "conversation_id", "tree")
    if named is not None:
        return str(named)
    prompt = record.get("prompt")
    beginning: object = prompt if isinstance(prompt, str) else prompt_ids
    if _is_messages(prompt):
        messages: list[Message] = prompt  # type: ignore[assignment]
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        beginning = messages[: users[0] + 1] if users else messages
    return hashlib.sha256(json.dumps(beginning, sort_keys=True, default=str).encode()).hexdigest()


def _first(record: Record, *keys: str) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _refuse(place: str, key: str, value: object, expected: str) -> NoReturn:
    raise ValueError(f"{place}: {key} = {_short(value)}: expected {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
