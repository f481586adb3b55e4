"""Langfuse's scores as votes, so that an app which sends thumbs there sends them here by its settings alone:
`POST` and `DELETE /api/public/scores`, `score-create` in `POST /api/public/ingestion`, and `GET /api/public/projects`,
by which they ask whether their keys are good.

A score is on the trace of a response: its trace id is the `response_id`, the SHA-256 of the app's message id (32 hex
digits, as LibreChat makes it), else the message id itself. Which scores are thumbs, and which way they point, the
settings of [langfuse] say; the others, and everything else that those clients send, is accepted and dropped.

A score given again is the rater's next vote; a deleted one is a retraction. What a score was on the gateways of a
machine remember for a while, else its id says it, where that ends with `-` and the trace id (as LibreChat's do, and
those made here).
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Raw

from loop.events import FeedbackGiven, FeedbackValue
from loop.settings import LangfuseSettings
from services.gateway.errors import UNREADABLE, Refusal, read_body
from services.gateway.feedback import (
    MAX_BATCH_BYTES,
    MAX_ITEMS,
    ONE_LINE,
    Comment,
    Id,
    Vote,
    Voter,
    answer,
    authorize,
    count_refused,
    in_turns,
    write_feedback,
)
from services.gateway.parts import HOLD, PARTS, Parts

SOURCE = "langfuse"
_RESPONSE_ID = re.compile(r"(?:chatcmpl|cmpl)-[0-9a-f]{16}-[0-9a-f-]{36}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_TRACE_AT_END = re.compile(rf"-({_RESPONSE_ID.pattern}|{_DIGEST.pattern})\Z")
_NO_THUMB = ""  # in place of the trace id
_NO_VALUES = {"TEXT", "CORRECTION"}  # data types that say nothing of good or bad


_Items = Annotated[list[Raw], Meta(max_length=MAX_ITEMS)]


class Score(msgspec.Struct, rename="camel"):
    """What we read of a score; Langfuse's other fields pass by."""

    name: str
    value: bool | float | str
    trace_id: Id | None = None
    id: Id | None = None
    data_type: str | None = None
    comment: Comment | None = None


class _Event(msgspec.Struct):
    id: Annotated[str, Meta(min_length=1, max_length=100, pattern=ONE_LINE)]
    type: str
    body: Raw = Raw(b"null")


class _Ingestion(msgspec.Struct):
    batch: _Items


_score = msgspec.json.Decoder(Score)
_list = msgspec.json.Decoder(_Items)
_event = msgspec.json.Decoder(_Event)
_ingestion = msgspec.json.Decoder(_Ingestion)


async def create_scores(request: web.Request) -> web.Response:
    """POST /api/public/scores: one, as LibreChat sends it, or a list of them, as Langfuse's own clients do."""
    parts = request.app[PARTS]
    await parts.check_key(request, "feedback")
    body = await read_body(request, MAX_BATCH_BYTES, request[HOLD])
    if not body.lstrip().startswith(b"["):
        score, given = take_score(body, None, parts)
        await write_feedback([] if given is None else [given], parts)
        return answer(200, {"id": _id_of(score)})
    taken: list[FeedbackGiven] = []
    errors: list[dict[str, Any]] = []
    scores = _read(_list, body)
    async for _, raw in in_turns(scores):
        try:
            _, given = take_score(raw, None, parts)
            if given is not None:
                taken.append(given)
        except Refusal as exc:
            errors.append({"message": exc.error["message"]})
    await write_feedback(taken, parts)
    if not errors:
        return answer(202, {"message": "Accepted"})
    return answer(207, {"accepted": len(scores) - len(errors), "rejected": len(errors), "errors": errors})


async def delete_score(request: web.Request) -> web.Response:
    """DELETE /api/public/scores/{id}"""
    parts = request.app[PARTS]
    await parts.check_key(request, "feedback")
    score_id = request.match_info["score_id"]
    trace_id = parts.recent.get("score", score_id)
    if trace_id == _NO_THUMB:
        return answer(202, {"message": "it was no thumb"})
    if trace_id is None and (match := _TRACE_AT_END.search(score_id)):
        trace_id = match.group(1)
    if trace_id is None:
        raise Refusal(
            404, f"it is not known what the score {score_id[:120]!r} was on; expected an id with the trace id"
        )
    given = authorize(vote_on(trace_id, "retract"), Voter(has_key=True), parts)
    await write_feedback([given], parts)
    return answer(202, {"message": "the vote is taken back"})


async def ingest(request: web.Request) -> web.Response:
    """POST /api/public/ingestion: 207 with what was taken and what was not, by the events' ids."""
    parts = request.app[PARTS]
    await parts.check_key(request, "feedback")
    batch = _read(_ingestion, await read_body(request, MAX_BATCH_BYTES, request[HOLD])).batch
    given: list[FeedbackGiven] = []
    successes, errors = [], []
    async for _, raw in in_turns(batch):
        event_id = ""
        try:
            event = _read(_event, raw)
            event_id = event.id
            if event.type == "score-create":
                _, vote = take_score(event.body, event.id, parts)
                if vote is not None:
                    given.append(vote)
            successes.append({"id": event_id, "status": 201})
        except Refusal as exc:
            errors.append({"id": event_id, "status": exc.status, "message": exc.error["message"]})
    await write_feedback(given, parts)
    return answer(207, {"successes": successes, "errors": errors})


async def projects(request: web.Request) -> web.Response:
    """GET /api/public/projects: the one that every key is of. LibreChat keeps its id with each message."""
    await request.app[PARTS].check_key(request, "feedback")
    named = {"id": "thumbwheel", "name": "Thumbwheel"}
    return answer(200, {"data": [{**named, "organization": named, "metadata": {}}]})


async def drop_traces(request: web.Request) -> web.Response:
    """POST /api/public/otel/v1/traces: spans are not of interest; their sender is told that all is well."""
    await request.app[PARTS].check_key(request, "feedback")
    await read_body(request, MAX_BATCH_BYTES, request[HOLD])
    is_json = request.content_type == "application/json"
    return web.Response(body=b"{}" if is_json else b"", content_type=request.content_type)


def take_score(raw: bytes | Raw, event_id: str | None, parts: Parts) -> tuple[Score, FeedbackGiven | None]:
    """The score and its vote; None where it is no thumb. `event_id` tells copies of one event. Raises Refusal 4xx,
    which is counted.
    """
    try:
        score = _read(_score, raw)
        value = value_of(score, parts.langfuse)
        if value is None:
            parts.recent.put("score", _id_of(score), _NO_THUMB)
            return score, None
        if score.trace_id is None:
            raise Refusal(
                400, f"the score {score.name!r} has no traceId; only responses can be voted on", param="traceId"
            )
        feedback_id = None if event_id is None else f"{SOURCE}/{event_id}"
        vote = vote_on(score.trace_id, value, score.comment, feedback_id)
        given = authorize(vote, Voter(has_key=True), parts)
    except Refusal as exc:
        count_refused(exc)
        raise
    parts.recent.put("score", _id_of(score), score.trace_id)
    return score, given


def _id_of(score: Score) -> str:
    """The score's id, made like LibreChat's where it brings none."""
    return score.id or f"feedback-{score.trace_id or score.name}"


def value_of(score: Score, settings: LangfuseSettings) -> FeedbackValue | None:
    """Which way the score points, `retract` where neither; None where it is no thumb. Raises Refusal 400. Pure."""
    if score.name not in settings.score_names or score.data_type in _NO_VALUES:
        return None
    if isinstance(score.value, str):
        word = score.value.casefold()
        if word in settings.up_words:
            return "up"
        if word in settings.down_words:
            return "down"
        known = ", ".join([*settings.up_words, *settings.down_words])
        raise Refusal(400, f"the score {score.name!r} is {score.value[:80]!r}; expected one of {known}", param="value")
    if isinstance(score.value, bool) or score.data_type == "BOOLEAN":
        return "up" if score.value else "down"
    if score.value >= settings.up_from:
        return "up"
    return "down" if score.value < settings.down_below else "retract"


def vote_on(trace_id: str, value: str, comment: str | None = None, feedback_id: str | None = None) -> Vote:
    """A vote on the response that the trace id means."""
    response_id = message_id = None
    if _RESPONSE_ID.fullmatch(trace_id):
        response_id = trace_id
    else:
        message_id = f"sha256:{trace_id}" if _DIGEST.fullmatch(trace_id) else trace_id
    return Vote(
        value=value,
        response_id=response_id,
        message_id=message_id,
        comment=comment,
        source=SOURCE,
        feedback_id=feedback_id,
    )


def _read(decoder: msgspec.json.Decoder[Any], body: bytes | Raw) -> Any:
    try:
        return decoder.decode(body)
    except UNREADABLE as exc:
        raise Refusal(400, f"the body is not valid: {exc}", code="invalid_request") from exc
