"""What the join must come to, written the other way round: all events are read at once; no state, no batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from loop.events import EventError, decode_feedback, decode_response, key_of_message_id, key_of_response_id
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
        if message is not None and key_of_message_id(message) == event.partitionkey:
            last[message] = max(last.get(message, (-1, "")), (started_at_ms, id))
    by_choice: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for hlc, event_id, event in votes:
        data = event.data
        target = data.response_id or last.get(data.message_id, (0, None))[1]
        if target in responses:
            by_choice[target, data.choice_index].append((hlc, event_id, data.feedback_id, data))
    found: Examples = {}
    for (id, choice_index), on in by_choice.items():
        _, _, event, value = responses[id]
        if event.data.aborted or choice_index not in {choice.index for choice in event.data.choices}:
            continue
        raters = {data.rater for *_, data in on}
        ends = {rater: max(v for v in on if v[3].rater == rater)[3] for rater in raters}
        standing = {rater: vote for rater, vote in ends.items() if vote.value != "retract"}
        if standing:
            found[id, choice_index] = {
                "votes": {rater: (vote.value, vote.weight, vote.hlc) for rater, vote in standing.items()},
                "up": sum(vote.value == "up" for vote in standing.values()),
                "down": sum(vote.value == "down" for vote in standing.values()),
                "event": value,
            }
    return found


def _key(data: Any) -> str:
    return key_of_response_id(data.response_id) if data.response_id else key_of_message_id(data.message_id)
