"""Events as gateways make them, for tests and benchmarks: small worlds in which ids, raters and messages collide."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

from loop.events import (
    Choice,
    FeedbackGiven,
    ResponseLogged,
    encode,
    key_of_message_id,
    key_of_response_id,
    message_digest,
)
from loop.log import NewRecord

RESPONSES, FEEDBACK = "thumbwheel.responses", "thumbwheel.feedback"
START_MS = 1_760_000_000_000
# What SQL, COPY and formats read as their own, in ids that an app may choose.
HOSTILE = '\'; DROP TABLE votes; --\t\\N\\.\n{"a",NULL} %s %(id)s $1 ? :id \u00fc\U0001f44d'
DAY_MS = 86_400_000


def response_id(key: str, n: int) -> str:
    """The response_id of the n-th response under a key."""
    return f"chatcmpl-{key}-{UUID(int=n, version=4)}"


def response(id: str, *, at_ms: int = START_MS, event_id: str = "r", text: str = "Yes.", **fields: Any) -> NewRecord:
    """A ResponseLogged on its topic."""
    key = key_of_response_id(id)
    choices = [Choice({"role": "assistant", "content": text}, index=n) for n in range(fields.pop("n", 1))]
    prompt = [{"role": "user", "content": "Is it?"}]
    data = ResponseLogged(response_id=id, choices=choices, messages=prompt, started_at_ms=at_ms, **fields)
    return NewRecord(RESPONSES, key, encode(data, event_id=event_id, key=key, source="test", now_ms=at_ms))


def feedback(feedback_id: str, value: Any, hlc: int, *, event_id: str = "f", **fields: Any) -> NewRecord:
    """A FeedbackGiven on its topic."""
    data = FeedbackGiven(feedback_id=feedback_id, value=value, hlc=hlc, **fields)
    key = key_of_response_id(data.response_id) if data.response_id else key_of_message_id(data.message_id or "")
    return NewRecord(FEEDBACK, key, encode(data, event_id=event_id, key=key, source="test", now_ms=START_MS))


def colliding_events(seed: int, size: int) -> list[NewRecord]:
    """`size` events over few keys, messages, raters and stamps, so that every rule of the join is met often."""
    random_ = random.Random(seed)
    messages = [f"message-{n}{HOSTILE if n % 2 else ''}" for n in range(max(2, size // 12))]
    ids = [response_id(key_of_message_id(message), n) for message in messages for n in range(3)]
    ids += [response_id(f"{n:016x}", n) for n in range(max(2, size // 6))]
    events = []
    for n in range(size):
        if random_.random() < 0.45:
            id = random_.choice(ids)
            owner = next((m for m in messages if key_of_message_id(m) == key_of_response_id(id)), None)
            events.append(
                response(
                    id,
                    at_ms=START_MS + random_.choice([0, 1, DAY_MS, 2 * DAY_MS]),
                    event_id=f"{random_.random()}-{n}",
                    text=random_.choice(["Yes.", "No."]),
                    message_id=random_.choice([owner, owner, None, "somebody else's"]),
                    conversation_id=HOSTILE,
                    aborted=random_.random() < 0.15,
                    n=random_.choice([1, 1, 2]),
                    adapter=random_.choice(["base", "assistant@v000001"]),
                )
            )
        else:
            fields: dict[str, Any] = {"rater": random_.choice(["", "ann", "bob", HOSTILE[:64]])}
            if random_.random() < 0.4:
                message = random_.choice(messages)
                fields["message_id"] = random_.choice([message, f"sha256:{message_digest(message)}"])
            else:
                fields["response_id"] = random_.choice(ids)
            if random_.random() < 0.3:
                fields["choice_index"] = random_.randrange(3)
            elif random_.random() < 0.5:
                fields["names_choice"] = False
            if random_.random() < 0.3:
                fields |= {"source": "copy", "weight": 0.2}
            if random_.random() < 0.2:
                fields["correction"] = random_.choice(["Maybe.", "No, never."])
            events.append(
                feedback(
                    f"f{HOSTILE}{random_.randrange(size)}",
                    random_.choice(["up", "up", "down", "down", "retract"]),
                    (START_MS << 16) + random_.randrange(8),
                    event_id=f"{random_.random()}-{n}",
                    **fields,
                )
            )
    return events
