"""The join rule, pure: which votes stand on which response, and what example that makes. Values in, decision out.

The rule, whatever the order of arrival:

- A response counts once, however often it is delivered; of several events under one response_id the earliest counts
  (started_at_ms, then event id).
- Copies of one feedback_id (under one key) count once, at their earliest stamp (hlc, then event id).
- A vote by message_id means the last response under that message id (started_at_ms, then response_id). Message ids are
  compared by their digest, which is all that some voters know.
- Of one rater's votes on one choice of a response the last one counts (hlc, event id, feedback_id); `retract` takes
  the rater's vote away. Votes that name no rater are those of one anonymous rater.
- A vote that names no choice is on the only one that the response has; where there are several, on none.
- What a rater says goes before what is concluded from what he does: a vote of an implicit source counts only where the
  rater has given no other, not even a retraction. It is weighed, but it is no thumb: `up` and `down` leave it out.
- A choice with at least one standing vote is an example; an aborted response makes none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from loop.content import Content, content_of
from loop.events import (
    IMPLICIT_SOURCES,
    KEY,
    EventError,
    FeedbackEvent,
    ResponseEvent,
    decode_feedback,
    decode_response,
    key_of_response_id,
    message_digest,
)
from loop.log import Record

ONLY_CHOICE = -1  # a vote's `choice_index` where it names none


class Response(NamedTuple):
    """What the join keeps of a response. `message_id` is the digest of the app's."""

    response_id: str
    message_id: str | None
    started_at_ms: int
    event_id: str

    @property
    def key(self) -> str:
        """What it is partitioned by."""
        return self.response_id[KEY]

    @property
    def day(self) -> str:
        """The UTC day on which it began, YYYY-MM-DD."""
        return _day(self.started_at_ms // 86_400_000)


@lru_cache(maxsize=64)
def _day(days_since_1970: int) -> str:
    return (date(1970, 1, 1) + timedelta(days_since_1970)).isoformat()


class Vote(NamedTuple):
    """What the join keeps of feedback. It names a response_id or a message_id (its digest), never both."""

    key: str
    feedback_id: str
    response_id: str | None
    message_id: str | None
    choice_index: int
    rater: str
    value: str
    weight: float
    source: str
    hlc: int
    event_id: str
    correction: str | None = None
    comment: str | None = None
    reasons: tuple[str, ...] = ()

    @property
    def is_thumb(self) -> bool:
        """Whether the rater said it himself."""
        return self.source not in IMPLICIT_SOURCES


class Joined(NamedTuple):
    """One example: a choice of a response with the votes that stand on it, sorted by rater."""

    response_id: str
    choice_index: int
    key: str
    day: str
    adapter: str
    arm: str
    conversation_id: str | None
    votes: list[dict[str, Any]]
    up: int
    down: int
    voted_at_ms: int
    content: Content


class DeadLetter(NamedTuple):
    """A record that breaks the contract, its bytes untouched, and how it does."""

    topic: str
    partition: int
    offset: int
    reason: str
    key: str
    value: bytes


@dataclass
class Batch:
    """Records of both topics, read: each response and each feedback_id once, at what counts."""

    responses: dict[str, tuple[Response, bytes]] = field(default_factory=dict)
    votes: dict[tuple[str, str], Vote] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    raters: dict[str, str] = field(default_factory=dict)
    """Who asked for a response, where that is known; not a part of the join, but of what is to be erased."""

    def add_response(self, response: Response, event: bytes, rater: str | None) -> None:
        """Keep the earliest of its response_id."""
        other = self.responses.get(response.response_id)
        if other is None or is_earlier_response(response, other[0]):
            self.responses[response.response_id] = response, event
        if rater:  # of any event under this id: who may have asked for it
            self.raters[response.response_id] = rater

    def add_vote(self, vote: Vote) -> None:
        """Keep the earliest copy of its feedback_id."""
        other = self.votes.get((vote.key, vote.feedback_id))
        if other is None or is_earlier_copy(vote, other):
            self.votes[vote.key, vote.feedback_id] = vote


def read_batch(records: Iterable[Record], responses_topic: str) -> Batch:
    """Decode the records of both topics; what breaks the contract becomes a dead letter, and the rest goes on."""
    batch = Batch()
    for record in records:
        try:
            if record.topic == responses_topic:
                event = decode_response(record.value)
                batch.add_response(read_response(event), record.value, event.data.rater)
            else:
                batch.add_vote(read_vote(decode_feedback(record.value)))
        except EventError as exc:
            letter = DeadLetter(record.topic, record.partition, record.offset, str(exc), record.key, record.value)
            batch.dead_letters.append(letter)
    return batch


def read_response(event: ResponseEvent) -> Response:
    """The event as the join keeps it. Raises EventError where its keys do not agree."""
    data = event.data
    response = Response(data.response_id, None, data.started_at_ms or _written_at_ms(event.time), event.id)
    # Only what agrees on its key is in one partition, and so in one joiner's hands.
    if response.key != event.partitionkey:
        raise EventError(f"partitionkey is {event.partitionkey!r}, expected the key in {data.response_id!r}")
    # A message id under another key can be no vote's target: those votes are in the partition of the id's own key.
    if data.message_id is None or not (digest := message_digest(data.message_id)).startswith(event.partitionkey):
        return response
    return response._replace(message_id=digest)


def _written_at_ms(time: str) -> int:
    """An event's own time (RFC 3339), which stands for a start that its producer does not say. Raises EventError."""
    try:
        at = datetime.fromisoformat(time)
        if at.tzinfo is None or not datetime(1970, 1, 1, tzinfo=UTC) <= at < datetime(2100, 1, 1, tzinfo=UTC):
            raise ValueError("expected a time zone, and a year from 1970 to 2099")
    except ValueError as exc:
        raise EventError(f"started_at_ms is not given, and time is {time[:40]!r}: {exc}") from exc
    return int(at.timestamp() * 1000)


def read_vote(event: FeedbackEvent) -> Vote:
    """The event as the join keeps it. Raises EventError where its keys do not agree."""
    data = event.data
    message_id = None if data.response_id else message_digest(data.message_id or "")
    key = key_of_response_id(data.response_id) if data.response_id else (message_id or "")[:16]
    if key != event.partitionkey:
        raise EventError(f"partitionkey is {event.partitionkey!r}, expected {key!r}, the key of what the vote is on")
    return Vote(
        key=key,
        feedback_id=data.feedback_id,
        response_id=data.response_id,
        message_id=message_id,
        choice_index=data.choice_index if data.names_choice else ONLY_CHOICE,
        rater=data.rater,
        value=data.value,
        weight=data.weight,
        source=data.source,
        hlc=data.hlc,
        event_id=event.id,
        correction=data.correction,
        comment=data.comment,
        reasons=tuple(data.reasons),
    )


def is_earlier_response(one: Response, other: Response) -> bool:
    """Whether `one` counts rather than `other`, both under one response_id."""
    return (one.started_at_ms, one.event_id) < (other.started_at_ms, other.event_id)


def is_earlier_copy(one: Vote, other: Vote) -> bool:
    """Whether `one` counts rather than `other`, both copies of one feedback_id."""
    return (one.hlc, one.event_id) < (other.hlc, other.event_id)


def last_response(responses: Iterable[Response]) -> Response:
    """Of the responses under one message id, the one that votes by that id mean."""
    return max(responses, key=lambda response: (response.started_at_ms, response.response_id))


def join(response: Response, votes: Iterable[Vote], event: bytes) -> list[Joined]:
    """The examples of a response, given all votes that mean it. `event` is the response's own event."""
    data = decode_response(event).data
    if data.aborted:
        return []
    served = {choice.index: choice for choice in data.choices}
    only = min(served) if len(served) == 1 else ONLY_CHOICE
    last: dict[tuple[int, str], Vote] = {}
    for vote in sorted(votes, key=lambda vote: (vote.is_thumb, vote.hlc, vote.event_id, vote.feedback_id)):
        last[only if vote.choice_index == ONLY_CHOICE else vote.choice_index, vote.rater] = vote
    standing: dict[int, list[Vote]] = {}
    for (choice_index, _), vote in sorted(last.items()):
        if vote.value != "retract":
            standing.setdefault(choice_index, []).append(vote)
    return [
        Joined(
            response_id=response.response_id,
            choice_index=choice_index,
            key=response.key,
            day=response.day,
            adapter=data.adapter,
            arm=data.arm,
            conversation_id=data.conversation_id,
            votes=[_standing(vote) for vote in on],
            up=sum(vote.is_thumb and vote.value == "up" for vote in on),
            down=sum(vote.is_thumb and vote.value == "down" for vote in on),
            voted_at_ms=max(vote.hlc for vote in on) >> 16,
            content=content_of(data, served[choice_index]),
        )
        for choice_index, on in standing.items()
        if choice_index in served
    ]


def _standing(vote: Vote) -> dict[str, Any]:
    """A vote as its example holds it."""
    kept = {"rater": vote.rater, "value": vote.value, "weight": vote.weight, "source": vote.source, "hlc": vote.hlc}
    return kept if vote.correction is None else kept | {"correction": vote.correction}
