"""JSON Schemas of the events, made from `loop.events`, for producers and readers that do not use this code.

The files under `deploy/schemas/` are what those were written against. So a type's schema only ever grows by optional
fields: then new code reads old events, and old code reads new ones, for readers are strict about the types that they
know. A widened bound or another value of an enum is as much a break as a narrowed one; either makes a new type, `….v2`.
`make schemas` writes the files, and refuses what is more than such a growth.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from loop.events import FEEDBACK_TYPE, RESPONSE_TYPE, FeedbackEvent, ResponseEvent

Schema = dict[str, Any]
# Of CloudEvents, what our readers do without.
_ENVELOPE = {
    "specversion": {"const": "1.0"},
    "source": {"type": "string", "minLength": 1},
    "subject": {"type": "string"},
    "datacontenttype": {"type": "string"},
}
_BEYOND = (
    "What a schema cannot say: `partitionkey`, which is the record's key too, is the 16 hex digits in `response_id`, "
    "else the first 16 of the SHA-256 of `message_id` (where that is `sha256:<32 hex>`, of those digits); an integer "
    "is written without a fraction (1, not 1.0)."
)
_SAY_NOTHING = {"title", "description"}
_HOLD_NAMES = {"properties", "$defs"}


def schemas() -> dict[str, Schema]:
    """The schema of each event type, CloudEvents' envelope included: what fits it is read, what we write fits it."""
    feedback = _schema(FEEDBACK_TYPE, FeedbackEvent)
    feedback["$defs"]["FeedbackGiven"]["anyOf"] = [
        {"properties": {name: {"type": "string"}}, "required": [name]} for name in ("response_id", "message_id")
    ]
    return {RESPONSE_TYPE: _schema(RESPONSE_TYPE, ResponseEvent), FEEDBACK_TYPE: feedback}


def breaking_changes(old: Schema, new: Schema, place: str = "") -> list[str]:
    """What in `new` is more than optional fields added to `old`, each with its place; documentation apart."""
    found = []
    for word in sorted((old.keys() | new.keys()) - _SAY_NOTHING):
        at = f"{place}/{word}"
        if word not in old or word not in new:
            found.append(f"{at} is {'new' if word in new else 'gone'}")
        elif word in _HOLD_NAMES:
            for name, schema in old[word].items():
                if name in new[word]:
                    found += breaking_changes(schema, new[word][name], f"{at}/{name}")
                else:
                    found.append(f"{at}/{name} is gone")
        elif old[word] != new[word]:
            found.append(f"{at} was {json.dumps(old[word])}, is {json.dumps(new[word])}")
    return found


def write_schemas(folder: Path) -> None:
    """Write `<type>.json` of each type. Raises ValueError, with nothing written, where one breaks the file there."""
    made = schemas()
    for name, schema in made.items():
        path = folder / f"{name}.json"
        broken = breaking_changes(json.loads(path.read_text()), schema) if path.exists() else []
        if broken:
            raise ValueError(f"{path}: {'; '.join(broken)}; expected new optional fields only: make it a new type")
    for name, schema in made.items():
        (folder / f"{name}.json").write_text(json.dumps(schema, indent=2) + "\n")


def _schema(type_: str, event: type[msgspec.Struct]) -> Schema:
    made = msgspec.json.schema(event)
    envelope = made["$defs"][event.__name__]
    envelope["properties"] = _ENVELOPE | envelope["properties"] | {"type": {"const": type_}}
    envelope["required"] = ["specversion", "source", *envelope["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": type_, "description": _BEYOND, **made}


if __name__ == "__main__":
    try:
        write_schemas(Path("deploy/schemas"))
    except ValueError as exc:
        sys.exit(f"error: {exc}")
