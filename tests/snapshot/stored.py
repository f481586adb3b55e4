"""Examples as the joiner leaves them, put straight into the store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, insert

from loop.events import Choice, ResponseLogged
from loop.store import write
from loop.store.schema import examples, turn
from tests.contents import content_columns

NOW_MS = 1_790_000_000_000
TODAY = datetime.fromtimestamp(NOW_MS / 1000, UTC).date()


def example(number: int, **changes: Any) -> dict[str, Any]:
    """An example's fields; the defaults are a served, up-voted answer of its own rater, conversation and prompt."""
    fields: dict[str, Any] = {
        "number": number,
        "messages": [{"role": "user", "content": f"What does article {number} cost with postage today?"}],
        "answer": f"It costs {number} crowns.",
        "prompt_ids": [1, 2, 3, number % 50],
        "completion_ids": [4, 5, number % 50],
        "finish_reason": "stop",
        "aborted": False,
        "imported": False,
        "conversation": f"conversation {number}",
        "days_ago": number % 7,
        "votes": [(f"rater {number}", "up", 1.0, number)],
    }
    return fields | changes


def put(engine: Engine, rows: Iterable[dict[str, Any]]) -> None:
    """Insert examples, in this order."""
    with write(engine) as connection:
        for fields in rows:
            connection.execute(insert(examples).values(**_stored(fields)))


def _stored(fields: dict[str, Any]) -> dict[str, Any]:
    response_id = f"chatcmpl-{fields['number']:016x}-00000000-0000-7000-8000-000000000000"
    body = ResponseLogged(
        response_id=response_id,
        messages=fields["messages"],
        choices=[
            Choice(
                message={"role": "assistant", "content": fields["answer"]},
                token_ids=fields["completion_ids"],
                finish_reason=fields["finish_reason"],
            )
        ],
        prompt_token_ids=fields["prompt_ids"],
        aborted=fields["aborted"],
        imported=fields["imported"],
    )
    votes = [
        {"rater": rater, "value": value, "weight": weight, "source": "explicit", "hlc": hlc}
        | ({"correction": correction[0]} if correction else {})
        for rater, value, weight, hlc, *correction in fields["votes"]
    ]
    return {
        "turned_id": turn(response_id),
        "choice_index": 0,
        "key": f"{fields['number']:016x}",
        "day": TODAY - timedelta(days=fields["days_ago"]),
        "adapter": "assistant@v000001",
        "arm": "live",
        "conversation_id": fields["conversation"],
        "up": sum(vote["value"] == "up" for vote in votes),
        "down": sum(vote["value"] == "down" for vote in votes),
        "votes": json.loads(json.dumps(votes)),
        "voted_at_ms": NOW_MS,
    } | content_columns(body)
