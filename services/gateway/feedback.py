"""POST /v1/feedback: one thumb. `202` means that it is on disk.

A vote names its response by `response_id`, by the app's own `message_id`, or by the signed token alone; its key is in
each of them, so nothing is looked up and a thumb may be here before its response. A vote without `feedback_id` gets a
random one: the rater's last vote wins anyway, so sending it twice changes nothing, while an id made from the vote's
content would take the second `up` of up, down, up for a copy of the first.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, cast

import msgspec
from aiohttp import web
from msgspec import Meta

from loop import metrics
from loop.events import FeedbackGiven, FeedbackValue, encode, hash_rater, key_of_message_id, key_of_response_id, uuid7
from loop.log import NewRecord
from services.gateway.asks import MAX_ID_CHARS
from services.gateway.errors import Refusal, read_body
from services.gateway.parts import PARTS, Parts
from services.gateway.relay import FEEDBACK_TOKEN

MAX_BYTES = 64 * 1024
WRITE_TIMEOUT_S = 5.0
VALUES = ("up", "down", "retract")

_Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")]
_OwnId = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Text = Annotated[str, Meta(max_length=10_000, pattern=r"^[^\x00]*$")]
_Word = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Vote(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body, as the app sends it."""

    value: str
    response_id: _Id | None = None
    message_id: _Id | None = None
    choice_index: Annotated[int, Meta(ge=0, le=1023)] = 0
    rater: _Id | None = None
    comment: _Text | None = None
    reasons: Annotated[list[_Word], Meta(max_length=32)] = []
    weight: Annotated[float, Meta(gt=0, le=100)] | None = None
    source: _Word | None = None
    feedback_id: _OwnId | None = None
    token: str | None = None


_vote = msgspec.json.Decoder(Vote)


async def feedback(request: web.Request) -> web.Response:
    """POST /v1/feedback"""
    parts = request.app[PARTS]
    value = "invalid"
    status = 499
    try:
        vote = read_vote(await read_body(request, MAX_BYTES), request.headers.get("Idempotency-Key"))
        value = vote.value
        given = authorize(vote, request.headers.get(FEEDBACK_TOKEN), parts.has_key(request), parts)
        await _write(given, parts)
        status = 202
    except web.HTTPException as exc:
        status = exc.status
        raise
    finally:
        metrics.gateway_feedback.labels(value, str(status)).inc()
    body = {"feedback_id": given.feedback_id, "status": "accepted"}
    body["response_id" if given.response_id else "message_id"] = given.response_id or given.message_id or ""
    return web.Response(body=msgspec.json.encode(body), status=202, content_type="application/json")


def read_vote(body: bytes, idempotency_key: str | None) -> Vote:
    """The vote. Raises Refusal 400 for what is no JSON, 422 for what is no vote."""
    try:
        vote = _vote.decode(body)
        if vote.feedback_id is None and idempotency_key:
            vote.feedback_id = msgspec.convert(idempotency_key, _OwnId)
    except msgspec.ValidationError as exc:
        raise Refusal(422, f"the vote is not valid: {exc}", code="invalid_feedback") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Refusal(400, f"the body is not JSON: {exc}", code="invalid_json") from exc
    if vote.value not in VALUES:
        expected = ", ".join(VALUES)
        raise Refusal(422, f"value is {vote.value[:80]!r}; expected one of {expected}", param="value")
    return vote


def authorize(vote: Vote, header_token: str | None, has_key: bool, parts: Parts) -> FeedbackGiven:
    """The vote as its caller may give it: anything with an API key, one's own thumb with a token.

    Raises Refusal 401, 403 or 422.
    """
    token = vote.token or header_token
    if token is None:
        if not has_key:
            raise Refusal(401, f"no API key and no feedback token; send one of them ({FEEDBACK_TOKEN})")
        return _given(vote, vote.response_id, hash_rater(parts.rater_salt, vote.rater or ""), parts)
    try:
        claim = parts.signer.verify(token, time.time())
    except ValueError as exc:
        raise Refusal(401, str(exc), param="token", code="invalid_token") from exc
    _check_bound(vote, claim.response_id)
    if not has_key:
        for name in ("rater", "weight", "source"):
            if getattr(vote, name) is not None:
                raise Refusal(403, f"a feedback token does not permit {name!r}; an API key does", param=name)
        if vote.feedback_id is not None:  # a browser's ids are its own: they never take another caller's
            vote.feedback_id = f"{claim.response_id}/{vote.feedback_id}"
    rater = claim.rater if vote.rater is None else hash_rater(parts.rater_salt, vote.rater)
    return _given(vote, claim.response_id, rater, parts)


def _check_bound(vote: Vote, response_id: str) -> None:
    """Raises Refusal 403 for a vote on another response than the token's."""
    if vote.response_id not in (None, response_id):
        raise Refusal(403, f"the token is for {response_id!r}, not for {vote.response_id!r}", param="response_id")
    if vote.message_id is not None and key_of_message_id(vote.message_id) != key_of_response_id(response_id):
        raise Refusal(403, f"the token is not for a response to message {vote.message_id!r}", param="message_id")


def _given(vote: Vote, response_id: str | None, rater: str, parts: Parts) -> FeedbackGiven:
    """The event's data, stamped. Raises Refusal 422 where the vote names no response that can be."""
    if response_id is None and vote.message_id is None:
        raise Refusal(422, "the vote names no response; give response_id, message_id or token", param="response_id")
    if response_id is not None:
        try:
            key_of_response_id(response_id)
        except ValueError as exc:
            raise Refusal(422, str(exc), param="response_id") from exc
    return FeedbackGiven(
        feedback_id=vote.feedback_id or uuid7(int(time.time() * 1000)),
        value=cast(FeedbackValue, vote.value),
        hlc=parts.stamp(),
        response_id=response_id,
        message_id=vote.message_id if response_id is None else None,
        choice_index=vote.choice_index,
        rater=rater,
        weight=1.0 if vote.weight is None else vote.weight,
        source=vote.source or "explicit",
        comment=vote.comment,
        reasons=vote.reasons,
    )


async def _write(given: FeedbackGiven, parts: Parts) -> None:
    """Raises Refusal 503 where the vote is not known to be on disk."""
    now_ms = int(time.time() * 1000)
    key = (
        key_of_message_id(given.message_id or "")
        if given.response_id is None
        else key_of_response_id(given.response_id)
    )
    value = encode(given, event_id=uuid7(now_ms), key=key, source=parts.source, now_ms=now_ms)
    written = parts.spool.put_feedback(NewRecord(parts.feedback_topic, key, value), given.hlc)
    try:
        is_on_disk = await asyncio.wait_for(written, WRITE_TIMEOUT_S)
    except TimeoutError:
        is_on_disk = False
    if not is_on_disk:
        raise Refusal(503, "the feedback could not be written; send it again", code="not_written", retry_after_s=1)
