"""What the join must come to, written the other way round: all events are read at once; no state, no batches."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from loop.events import EventError, decode_feedback, decode_response, key_of_response_id
from loop.log import NewRecord

Examples = dict[tuple[str, int], dict[str, Any]]


def examples_of(records: Iterable[NewRecord], responses_topic: str) -> Examples:
    """(response_id, choice_index) → what its example must be, from the whole input in any order."""
    versions: dict[str, list[Any]] = defaultdict(list)
    copies: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for record in records:
        try:
            if record.topic == responses_topic:
                event: Any = decode_response(record.value)
                if key_of_response_id(event.data.response_id) == event.partitionkey:
                    versions[event.data.response_id].append((event.data.started_at_ms, event.id, event, record.value))
            else:
                event = decode_feedback(record.value)
                if event.partitionkey == _key(event.data):
                    copies[event.partitionkey, event.data.feedback_id].append((event.data.hlc, event.id, event))
        except EventError:
            continue
    responses = {id: min(found, key=lambda v: v[:2]) for id, found in versions.items()}
    votes = [min(found, key=lambda v: v[:2]) for found in copies.values()]
    last: dict[str, tuple[int, str]] = {}
    for id, (started_at_ms, _, event, _) in responses.items():
        message = event.data.message_id
        if message is not None and _digest(message)[:16] == event.partitionkey:
            last[_digest(message)] = max(last.get(_digest(message), (-1, "")), (started_at_ms, id))
    by_choice: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for hlc, event_id, event in votes:
        data = event.data
        target = data.response_id or last.get(_digest(data.message_id), (0, None))[1]
        if target in responses:
            is_said = data.source not in ("regenerate", "copy", "edit")
            served = [choice.index for choice in responses[target][2].data.choices]
            if not data.names_choice and len(served) > 1:
                continue
            index = data.choice_index if data.names_choice else (*served, 0)[0]
            by_choice[target, index].append((is_said, hlc, event_id, data.feedback_id, data))
    found: Examples = {}
    for (id, choice_index), on in by_choice.items():
        _, _, event, value = responses[id]
        if event.data.aborted or choice_index not in {choice.index for choice in event.data.choices}:
            continue
        raters = {data.rater for *_, data in on}
        ends = {rater: max(v for v in on if v[4].rater == rater)[4] for rater in raters}
        standing = {rater: vote for rater, vote in ends.items() if vote.value != "retract"}
        if standing:
            thumbs = [v.value for v in standing.values() if v.source not in ("regenerate", "copy", "edit")]
            found[id, choice_index] = {
                "votes": {rater: (v.value, v.weight, v.hlc, v.correction) for rater, v in standing.items()},
                "up": thumbs.count("up"),
                "down": thumbs.count("down"),
                "event": value,
            }
    return found


def _key(data: Any) -> str:
    return key_of_response_id(data.response_id) if data.response_id else _digest(data.message_id)[:16]


def _digest(message_id: str) -> str:
    """The message, known by its id or by what the id hashes to."""
    if message_id.startswith("sha256:"):
        return message_id.removeprefix("sha256:")
    return hashlib.sha256(message_id.encode()).hexdigest()[:32]
