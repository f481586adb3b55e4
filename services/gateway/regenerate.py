"""An answer that is asked for again: a weak vote against the earlier one, where `gateway.regenerate_weight` is set.

Known by its conversation, which the app must have named, and by everything that was asked in it.
"""

from __future__ import annotations

import hashlib

from loop.events import FeedbackGiven
from services.gateway.asks import Ask
from services.gateway.feedback import feedback_record
from services.gateway.parts import Parts

SOURCE = "regenerate"


def prompt_key(ask: Ask) -> str | None:
    """What the same prompt in the same conversation has in common; None where that cannot be known, or where there is
    more than one answer to choose from.
    """
    if not ask.is_captured or ask.own_conversation_id is None or ask.choices != 1:
        return None
    asked = hashlib.sha256(ask.own_conversation_id.encode())
    for name in ("messages", "prompt"):
        asked.update(b"\0" + bytes(ask.fields.get(name, b"")))
    return asked.hexdigest()


def judge_earlier(key: str, response_id: str, rater: str | None, parts: Parts) -> None:
    """Where the prompt has got its answer: vote against the one before, if a gateway of this machine gave one. Nothing
    waits for it.
    """
    earlier = parts.recent.get("prompt", key)
    parts.recent.put("prompt", key, response_id)
    if earlier is None:
        return
    given = FeedbackGiven(
        feedback_id=f"{SOURCE}/{response_id}",
        value="down",
        hlc=parts.stamp(),
        response_id=earlier,
        rater=rater or "",
        weight=parts.implicit_weights[SOURCE],
        source=SOURCE,
    )
    parts.spool.put_feedback([feedback_record(given, parts)], given.hlc)
