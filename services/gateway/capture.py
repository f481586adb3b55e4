"""The log's event of one response: what was asked, what was answered, by whom, how fast. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from loop.events import ResponseLogged, encode
from loop.log import NewRecord
from loop.rollout.routing import Arm
from services.gateway.answers import Transcript
from services.gateway.asks import Ask
from services.gateway.errors import UNREADABLE
from services.gateway.media import without_media


@dataclass(slots=True)
class Exchange:
    """One request on its way: who asked what, which arm answers, and when."""

    ask: Ask
    response_id: str
    key: str
    shown_model: str
    started_at_ms: int
    started_s: float
    """Of the monotonic clock, as `first_byte_s`."""
    first_byte_s: float | None = None
    prompt_key: str | None = None
    """By which the same prompt is known again, where that is of interest."""
    asked: dict[str, Any] | None = None
    """`asked_of` the request, where that was done ahead."""
    arm: str = ""
    adapter: str = ""
    generation: int = 0

    def serve_by(self, arm: Arm, generation: int) -> None:
        """The arm that answers, which a retry may change."""
        self.arm, self.adapter, self.generation = arm.name, arm.adapter, generation


def build_record(
    exchange: Exchange, transcript: Transcript, *, topic: str, source: str, aborted: bool, ended_s: float
) -> NewRecord:
    """The record of a response; of one that must not be stored it says only that it was there, for votes to find."""
    ask = exchange.ask
    first_byte_s = exchange.first_byte_s
    content: dict[str, Any] = {"choices": [], "stored": False}
    if ask.is_stored:
        asked = asked_of(ask) if exchange.asked is None else exchange.asked
        content = {"choices": transcript.choices(), "prompt_token_ids": transcript.prompt_token_ids, **asked}
    event = ResponseLogged(
        response_id=exchange.response_id,
        endpoint=ask.endpoint,
        alias=exchange.shown_model,
        adapter=exchange.adapter,
        arm=exchange.arm,
        generation=exchange.generation,
        message_id=ask.message_id,
        aborted=aborted,
        started_at_ms=exchange.started_at_ms,
        first_token_s=None if first_byte_s is None else round(first_byte_s - exchange.started_s, 6),
        duration_s=round(ended_s - exchange.started_s, 6),
        trace=ask.trace,
        **content,
    )
    value = encode(event, event_id=exchange.response_id, key=exchange.key, source=source, now_ms=exchange.started_at_ms)
    return NewRecord(topic, exchange.key, value)


def asked_of(ask: Ask) -> dict[str, Any]:
    """What the record has of the request."""
    prompt = ask.fields.get("prompt")
    return {
        # Raw JSON stands where decoded values would: the encoder copies it, as it came.
        "messages": without_media(ask.fields.get("messages")),
        "prompt": None if prompt is None else _prompt_text(prompt),
        "conversation_id": ask.conversation_id,
        "rater": ask.rater,
        "tools": ask.fields.get("tools"),
        "params": ask.params,
    }


def _prompt_text(raw: msgspec.Raw) -> str | None:
    """A completion's prompt; None where it was sent as token ids, which the engine's answer brings, or is no text, of
    which the engine is to judge.
    """
    try:
        prompt = msgspec.json.decode(raw)
    except UNREADABLE:
        return None
    while isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    return prompt if isinstance(prompt, str) else None
