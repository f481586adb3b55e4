"""POST /v1/feedback: one thumb, or up to 1,000 of them. `202` means that it is on disk.

A vote names its response by `response_id`, by the app's own `message_id`, or by the signed token alone; its key is in
each of them, so nothing is looked up and a thumb may be here before its response. A vote without `feedback_id` gets a
random one: the rater's last vote wins anyway, so sending it twice changes nothing, while an id made from the vote's
content would take the second `up` of up, down, up for a copy of the first.

`{"items": [vote, …]}` is answered 207 with `{"items": [result, …]}`: for each vote, in order, what it would have been
answered alone, its `status` inside. Those with 202 went to disk with one fsync; where that fails, all of it is a 503.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

import msgspec
from aiohttp import web
from msgspec import Meta, Raw
from msgspec.structs import replace

from loop import metrics
from loop.events import (
    IMPLICIT_SOURCES,
    MAX_ID_CHARS,
    FeedbackGiven,
    FeedbackValue,
    encode,
    fitting_id,
    has_several_choices,
    hash_rater,
    key_of_message_id,
    key_of_response_id,
    uuid7,
)
from loop.log import NewRecord
from services.gateway.errors import UNREADABLE, Refusal, read_body
from services.gateway.identity import FEEDBACK_TOKEN
from services.gateway.parts import HOLD, PARTS, Parts
from services.gateway.redactor import RedactionError, Redactor

MAX_BYTES = 64 * 1024
MAX_ITEMS = 1_000
MAX_BATCH_BYTES = 8 * 1024 * 1024
WRITE_TIMEOUT_S = 5.0
REDACTION_TIMEOUT_S = 10.0  # of one vote
VALUES = ("up", "down", "retract")
_ITEMS_AT_ONCE = 50

T = TypeVar("T")

ONE_LINE = r"^[^\x00-\x1f\x7f]+$(?!\n)"  # for Python takes $ for the place before a last line break, too
Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS, pattern=ONE_LINE)]
OwnId = Annotated[str, Meta(min_length=1, max_length=128, pattern=ONE_LINE)]
Comment = Annotated[str, Meta(max_length=10_000, pattern=r"^[^\x00]*$")]
_Correction = Annotated[str, Meta(min_length=1, max_length=32_768, pattern=r"^[^\x00]*$")]
_Word = Annotated[str, Meta(min_length=1, max_length=64, pattern=ONE_LINE)]
_Source = Annotated[str, Meta(pattern=r"^[A-Za-z][\w.-]{0,63}$(?!\n)")]  # a name, which nobody redacts


class Vote(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body, as the app sends it."""

    value: str
    response_id: Id | None = None
    message_id: Annotated[str, Meta(min_length=1)] | None = None  # whatever a chat's request took
    choice_index: Annotated[float, Meta(ge=0, le=1023, multiple_of=1)] | None = None  # in JSON 1.0 is an integer
    rater: Id | None = None
    comment: Comment | None = None
    reasons: Annotated[list[_Word], Meta(max_length=32)] = []
    correction: _Correction | None = None
    weight: Annotated[float, Meta(gt=0, le=100)] | None = None
    source: _Source | None = None
    feedback_id: OwnId | None = None
    token: str | None = None


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    items: Annotated[list[Raw], Meta(min_length=1, max_length=MAX_ITEMS)]


@dataclass(frozen=True)
class Voter:
    """Who votes: with an API key that permits it (`has_key`), or with a response's token."""

    has_key: bool
    token: str | None = None
    idempotency_key: str | None = None
    key_id: str = ""
    """Of the API key, which may permit other things only."""


_fields = msgspec.json.Decoder(dict[str, Raw])
_batch = msgspec.json.Decoder(_Batch)
_vote = msgspec.json.Decoder(Vote)


async def feedback(request: web.Request) -> web.Response:
    """POST /v1/feedback"""
    parts = request.app[PARTS]
    try:
        holder = await parts.voter(request)
        voter = Voter(
            has_key=holder is not None and "feedback" in holder.scopes,
            token=request.headers.get(FEEDBACK_TOKEN),
            idempotency_key=request.headers.get("Idempotency-Key"),
            key_id="" if holder is None else holder.key_id,
        )
        body = await read_body(request, MAX_BATCH_BYTES if voter.has_key else MAX_BYTES, request[HOLD])
        items, is_batch = read_items(body)
    except Refusal as exc:
        count_refused(exc)
        raise
    results: list[FeedbackGiven | Refusal] = []
    async for number, item in in_turns(items):
        feedback_id = f"{voter.idempotency_key}/{number}" if is_batch and voter.idempotency_key else None
        results.append(_take(item, feedback_id or voter.idempotency_key, voter, parts))
    textless = await write_feedback([given for given in results if isinstance(given, FeedbackGiven)], parts)
    if is_batch:
        return answer(207, {"items": [_result(result, textless) for result in results]})
    (result,) = results
    if isinstance(result, Refusal):
        raise result
    return answer(202, _result(result, textless) | {"status": "accepted"})


async def in_turns(items: Iterable[T]) -> AsyncIterator[tuple[int, T]]:
    """The items with their numbers; now and then the chat's requests get their turn on the event loop."""
    for number, item in enumerate(items, 1):
        yield number - 1, item
        if number % _ITEMS_AT_ONCE == 0:
            await asyncio.sleep(0)


def read_items(body: bytes) -> tuple[Sequence[bytes | Raw], bool]:
    """The votes, each to be read by itself, and whether the body was a batch. Raises Refusal 400, 413 or 422."""
    try:
        if "items" in _fields.decode(body):
            return _batch.decode(body).items, True
    except msgspec.ValidationError as exc:
        raise Refusal(422, f"the votes are not valid: {exc}", code="invalid_feedback") from exc
    except UNREADABLE as exc:
        raise Refusal(400, f"the body is not JSON: {exc}", code="invalid_json") from exc
    if len(body) > MAX_BYTES:
        raise Refusal(413, f"the vote is larger than {MAX_BYTES} bytes, which is the most that is taken here")
    return [body], False


def _take(item: bytes | Raw, feedback_id: str | None, voter: Voter, parts: Parts) -> FeedbackGiven | Refusal:
    """One vote of the call, or why it is none; counted where it is none."""
    try:
        return authorize(read_vote(item, feedback_id), voter, parts)
    except Refusal as exc:
        count_refused(exc)
        return exc


def read_vote(body: bytes | Raw, feedback_id: str | None) -> Vote:
    """The vote; `feedback_id` is for one that brings none. Raises Refusal 400 for what is no JSON, 422 for no vote."""
    try:
        vote = _vote.decode(body)
        if vote.feedback_id is None and feedback_id:
            if not feedback_id.isprintable():  # a header may have bytes that are no text
                raise Refusal(422, f"Idempotency-Key is {feedback_id[:80]!r}; expected printable characters")
            vote.feedback_id = msgspec.convert(feedback_id, OwnId)
    except msgspec.ValidationError as exc:
        raise Refusal(422, f"the vote is not valid: {exc}", code="invalid_feedback") from exc
    except UNREADABLE as exc:
        raise Refusal(400, f"the body is not JSON: {exc}", code="invalid_json") from exc
    if vote.value not in VALUES:
        expected = ", ".join(VALUES)
        raise Refusal(422, f"value is {vote.value[:80]!r}; expected one of {expected}", param="value")
    return vote


def authorize(vote: Vote, voter: Voter, parts: Parts) -> FeedbackGiven:
    """The vote as its caller may give it: anything with an API key, one's own thumb with a token.

    Raises Refusal 401, 403, 422 or 429.
    """
    token = vote.token or voter.token
    if token is None:
        if not voter.has_key and voter.key_id:
            message = f"API key {voter.key_id} has not the scope 'feedback', and there is no feedback token"
            raise Refusal(403, message, code="missing_scope")
        if not voter.has_key:
            raise Refusal(401, f"no API key and no feedback token; send one of them ({FEEDBACK_TOKEN})")
        return _given(vote, vote.response_id, hash_rater(parts.rater_salt, vote.rater or ""), parts)
    try:
        claim = parts.signer.verify(token, time.time())
    except ValueError as exc:
        raise Refusal(401, str(exc), param="token", code="invalid_token") from exc
    _check_bound(vote, claim.response_id)
    if not voter.has_key:
        for name in ("rater", "weight", "source", "correction"):
            if getattr(vote, name) is not None:
                message = f"a feedback token does not permit {name!r}; an API key with the scope feedback does"
                raise Refusal(403, message, param=name, code="missing_scope")
        if vote.feedback_id is not None:  # a browser's ids are its own: they never take another caller's
            vote.feedback_id = f"{claim.response_id}/{claim.rater}/{vote.feedback_id}"
    rater = claim.rater if vote.rater is None else hash_rater(parts.rater_salt, vote.rater)
    return _given(vote, claim.response_id, rater, parts)


def _check_bound(vote: Vote, response_id: str) -> None:
    """Raises Refusal 403 for a vote on another response than the token's."""
    if vote.response_id not in (None, response_id):
        raise Refusal(403, f"the token is for {response_id!r}, not for {vote.response_id!r}", param="response_id")
    if vote.message_id is not None and key_of_message_id(vote.message_id) != key_of_response_id(response_id):
        raise Refusal(403, f"the token is not for a response to message {vote.message_id[:120]!r}", param="message_id")


def _given(vote: Vote, response_id: str | None, rater: str, parts: Parts) -> FeedbackGiven:
    """The event's data, stamped. Raises Refusal 422 where the vote names no response that can be, or no choice of
    several, or a source that is off, and 429 where its rater votes too fast.
    """
    message_id = None
    if response_id is not None:
        try:
            key_of_response_id(response_id)
        except ValueError as exc:
            raise Refusal(422, str(exc), param="response_id") from exc
        has_several = has_several_choices(response_id)
    elif vote.message_id is not None:
        message_id = fitting_id(vote.message_id)
        has_several = (parts.recent.get("choices", key_of_message_id(message_id)) or "1") != "1"
    else:
        raise Refusal(422, "the vote names no response; give response_id, message_id or token", param="response_id")
    if vote.choice_index is None and has_several:
        raise Refusal(422, "the response has several choices; say which one: choice_index", param="choice_index")
    source = vote.source or "explicit"
    weight = parts.implicit_weights.get(source, 0.0) if source in IMPLICIT_SOURCES else 1.0
    if not weight:
        raise Refusal(
            422,
            f"votes of the source {source!r} are not taken; the setting gateway.{source}_weight switches them on",
            param="source",
            code="source_off",
        )
    parts.limit_rater(rater or response_id or "")
    return FeedbackGiven(
        feedback_id=vote.feedback_id or uuid7(int(time.time() * 1000)),
        value=cast(FeedbackValue, vote.value),
        hlc=parts.stamp(),
        response_id=response_id,
        message_id=message_id,
        choice_index=int(vote.choice_index or 0),
        # Another machine may have answered, so that only the joiner sees how many there are.
        names_choice=response_id is not None or vote.choice_index is not None,
        rater=rater,
        weight=weight if vote.weight is None else vote.weight,
        source=source,
        comment=vote.comment,
        reasons=vote.reasons,
        correction=vote.correction,
    )


async def write_feedback(given: Sequence[FeedbackGiven], parts: Parts) -> set[str]:
    """Write votes, in the order of their stamps, and count them; returns the ids of those whose texts could not be
    redacted, and were left out. Raises Refusal 503 where they may not be on disk.
    """
    textless: set[str] = set()
    if not given:
        return textless
    status = 499
    try:
        records = [feedback_record(vote, parts) for vote in given]
        if parts.redactor is not None:
            records = await _redacted(given, records, textless, parts.redactor, parts)
        written = parts.spool.put_feedback(records, given[-1].hlc)
        try:
            is_on_disk = await asyncio.wait_for(written, WRITE_TIMEOUT_S)
        except TimeoutError:
            is_on_disk = False
        status = 202 if is_on_disk else 503
    finally:
        for vote in given:
            metrics.gateway_feedback.labels(vote.value, str(status)).inc()
    if status == 503:
        raise Refusal(503, "the feedback could not be written; send it again", code="not_written", retry_after_s=1)
    return textless


def feedback_record(given: FeedbackGiven, parts: Parts) -> NewRecord:
    """The record of a vote."""
    now_ms = int(time.time() * 1000)
    key = (
        key_of_message_id(given.message_id or "")
        if given.response_id is None
        else key_of_response_id(given.response_id)
    )
    value = encode(given, event_id=uuid7(now_ms), key=key, source=parts.source, now_ms=now_ms)
    return NewRecord(parts.feedback_topic, key, value)


async def _redacted(
    given: Sequence[FeedbackGiven],
    records: Sequence[NewRecord],
    textless: set[str],
    redactor: Redactor,
    parts: Parts,
) -> list[NewRecord]:
    """The records without what is private; without any text where that fails, for the votes count all the same, and
    then `textless` gets their ids. Once one had to wait too long, the others of the call do not.
    """
    clean: list[NewRecord] = []
    limit_s = REDACTION_TIMEOUT_S
    for vote, record in zip(given, records, strict=True):
        if vote.comment or vote.reasons or vote.correction:
            try:
                async with asyncio.timeout(limit_s):
                    record = record._replace(value=await redactor.redact(record.value, is_feedback=True))
            except (TimeoutError, RedactionError) as exc:
                limit_s = 0 if isinstance(exc, TimeoutError) else limit_s
                textless.add(vote.feedback_id)
                record = feedback_record(replace(vote, comment=None, reasons=[], correction=None), parts)
        clean.append(record)
    return clean


def count_refused(exc: Refusal) -> None:
    """Count what was no vote."""
    metrics.gateway_feedback.labels("invalid", str(exc.status)).inc()


def _result(result: FeedbackGiven | Refusal, textless: set[str]) -> dict[str, Any]:
    if isinstance(result, Refusal):
        return {"status": result.status, "error": result.error}
    target = {"response_id": result.response_id} if result.response_id else {"message_id": result.message_id}
    withheld = {"text": "withheld"} if result.feedback_id in textless else {}
    return {"status": 202, "feedback_id": result.feedback_id, **target, **withheld}


def answer(status: int, body: dict[str, Any]) -> web.Response:
    """The body as JSON."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
