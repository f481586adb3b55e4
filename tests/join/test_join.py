"""The join rule, case by case."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loop.events import (
    EventError,
    FeedbackGiven,
    ResponseLogged,
    decode_feedback,
    decode_response,
    encode,
    key_of_message_id,
    message_digest,
)
from loop.join import Response, Vote, join, last_response, read_batch, read_response, read_vote
from loop.log import NewRecord, Record
from tests.join.traffic import FEEDBACK, RESPONSES, START_MS, feedback, response, response_id

ID = response_id("a" * 16, 1)


def examples(record: NewRecord, *votes: NewRecord) -> dict[int, dict[str, str]]:
    """Choice → rater → value of what the votes come to on the response."""
    read = read_response(decode_response(record.value))
    joined = join(read, [read_vote(decode_feedback(vote.value)) for vote in votes], record.value)
    return {example.choice_index: {vote["rater"]: vote["value"] for vote in example.votes} for example in joined}


CASES: dict[str, tuple[list[tuple[str, int, dict[str, Any]]], dict[int, dict[str, str]]]] = {
    "no vote, no example": ([], {}),
    "one vote": ([("up", 1, {})], {0: {"": "up"}}),
    "the last one of a rater counts": ([("down", 2, {}), ("up", 1, {})], {0: {"": "down"}}),
    "raters are apart": ([("up", 1, {"rater": "a"}), ("down", 2, {"rater": "b"})], {0: {"a": "up", "b": "down"}}),
    "retract takes the vote away": ([("up", 1, {}), ("retract", 2, {})], {}),
    "a vote after a retraction stands": ([("retract", 1, {}), ("down", 2, {})], {0: {"": "down"}}),
    "choices are apart": ([("up", 1, {"choice_index": 1}), ("down", 2, {})], {0: {"": "down"}, 1: {"": "up"}}),
    "a choice that was not served makes none": ([("up", 1, {"choice_index": 7})], {}),
    "what a rater says outweighs what was concluded later": (
        [("up", 1, {}), ("down", 2, {"source": "regenerate"})],
        {0: {"": "up"}},
    ),
    "and so does taking it back": ([("up", 1, {}), ("retract", 2, {}), ("up", 3, {"source": "copy"})], {}),
    "the last conclusion counts": (
        [("up", 1, {"source": "copy"}), ("down", 2, {"source": "regenerate"})],
        {0: {"": "down"}},
    ),
}


@pytest.mark.parametrize(("votes", "expected"), CASES.values(), ids=CASES.keys())
def test_which_votes_stand(votes: list[tuple[str, int, dict[str, Any]]], expected: dict[int, dict[str, str]]) -> None:
    given = [feedback(f"f{n}", v, hlc, response_id=ID, **more) for n, (v, hlc, more) in enumerate(votes)]
    assert examples(response(ID, n=2), *given) == expected
    assert examples(response(ID, n=2), *reversed(given)) == expected


def test_equal_stamps_are_ordered_by_event_id() -> None:
    votes = [feedback(f"f{n}", v, 5, event_id=n, response_id=ID) for n, v in (("b", "up"), ("a", "down"))]
    assert examples(response(ID), *votes) == {0: {"": "up"}}


def test_an_aborted_response_makes_no_example() -> None:
    assert examples(response(ID, aborted=True), feedback("f", "up", 1, response_id=ID)) == {}


def test_the_last_response_of_a_message_began_last() -> None:
    early, late = Response(response_id("b" * 16, 9), "m", 1, "z"), Response(response_id("b" * 16, 1), "m", 2, "a")
    assert last_response([late, early]) == late


def test_copies_count_at_their_earliest_stamp() -> None:
    copies = [feedback("same", value, hlc, response_id=ID) for value, hlc in (("down", 9), ("up", 3), ("down", 7))]
    batch = read_batch([Record(FEEDBACK, 0, n, c.key, c.value, 0) for n, c in enumerate(copies)], RESPONSES)
    ((vote),) = batch.votes.values()
    assert (vote.value, vote.hlc) == ("up", 3)


def test_a_message_id_under_another_key_is_nobodys_target() -> None:
    read = read_response(decode_response(response(ID, message_id="m").value))
    assert read.message_id is None
    own = response_id(key_of_message_id("m"), 1)
    assert read_response(decode_response(response(own, message_id="m").value)).message_id == message_digest("m")


@pytest.mark.parametrize("named", ["m", f"sha256:{message_digest('m')}"])
def test_a_message_is_known_by_its_id_or_by_what_that_hashes_to(named: str) -> None:
    own = response_id(key_of_message_id("m"), 1)
    read = read_vote(decode_feedback(feedback("f", "up", 1, message_id=named).value))
    assert read.message_id == read_response(decode_response(response(own, message_id="m").value)).message_id
    assert (read.key, read.response_id) == (key_of_message_id("m"), None)


def test_what_was_concluded_is_weighed_but_is_no_thumb() -> None:
    votes = [feedback("f", "up", 1, response_id=ID, rater="a"), feedback("g", "down", 2, response_id=ID, source="copy")]
    read = read_response(decode_response(response(ID).value))
    (example,) = join(read, [read_vote(decode_feedback(vote.value)) for vote in votes], response(ID).value)
    assert (len(example.votes), example.up, example.down) == (2, 1, 0)


def test_the_correction_is_that_of_the_standing_vote() -> None:
    def corrections(*votes: tuple[str, str | None]) -> list[str | None]:
        given = [
            read_vote(decode_feedback(feedback(f"f{n}", value, n, response_id=ID, correction=text).value))
            for n, (value, text) in enumerate(votes)
        ]
        read = read_response(decode_response(response(ID).value))
        return [vote.get("correction") for e in join(read, given, response(ID).value) for vote in e.votes]

    assert corrections(("down", "One."), ("down", "Two.")) == ["Two."]
    assert corrections(("down", "One."), ("up", None)) == [None]
    assert corrections(("down", "One."), ("retract", None)) == []


BROKEN = {
    "no JSON": (RESPONSES, b"{", "truncated"),
    "another type on the topic": (RESPONSES, feedback("f", "up", 1, response_id=ID).value, "Object missing|type is"),
    "an unknown value": (FEEDBACK, feedback("f", "sideways", 1, response_id=ID).value, "sideways"),
    "a stamp below zero": (FEEDBACK, feedback("f", "up", -1, response_id=ID).value, r"data\.hlc"),
    "an id that no column holds": (FEEDBACK, feedback("f" * 300, "up", 1, response_id=ID).value, r"length <= 256"),
    "a character that Postgres does not hold": (
        FEEDBACK, feedback("\0", "up", 1, response_id=ID).value, "NUL.*data.feedback_id"
    ),
    "a correction that Postgres does not hold": (
        FEEDBACK, feedback("f", "up", 1, response_id=ID, correction="a\0").value, r"data\.correction"
    ),
    "a newline behind an id": (
        RESPONSES,
        encode(ResponseLogged(response_id=ID + "\n", choices=[]), event_id="e", key="a" * 16, source="t", now_ms=1),
        "regex",
    ),
    "a target of nobody's minting": (
        FEEDBACK,
        encode(FeedbackGiven(feedback_id="f", value="up", hlc=1, response_id="r-1"), event_id="e", key="a" * 16,
               source="t", now_ms=1),
        "response_id",
    ),
    "a vote in a foreign partition": (
        FEEDBACK,
        encode(FeedbackGiven(feedback_id="f", value="up", hlc=1, response_id=ID), event_id="e", key="b" * 16,
               source="t", now_ms=1),
        "partitionkey is 'bbb",
    ),
    "a response in a foreign partition": (
        RESPONSES,
        encode(ResponseLogged(response_id=ID, choices=[]), event_id="e", key="b" * 16, source="t", now_ms=1),
        "partitionkey is 'bbb",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("topic", "value", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_contract_becomes_a_dead_letter_and_the_rest_goes_on(
    topic: str, value: bytes, reason: str
) -> None:
    good = response(ID)
    records = [Record(topic, 3, 8, "k", value, 0), Record(RESPONSES, 0, 1, good.key, good.value, 0)]
    batch = read_batch(records, RESPONSES)
    (letter,) = batch.dead_letters
    assert (letter.topic, letter.partition, letter.offset, letter.value) == (topic, 3, 8, value)
    with pytest.raises(EventError, match=reason):
        raise EventError(letter.reason)
    assert list(batch.responses) == [ID]


def test_events_of_other_producers_are_read() -> None:
    value = response(ID).value.replace(b'"specversion"', b'"tenant":"x","specversion"')
    value = value.replace(b'"choices"', b'"colour":"blue","choices"')
    read = read_response(decode_response(value))
    assert (read.response_id, read.day) == (ID, "2025-10-09")
    assert read.started_at_ms == START_MS


def timed(time: str) -> Any:
    value = msgspec.json.decode(response(ID, at_ms=0).value) | {"time": time}
    return read_batch([Record(RESPONSES, 0, 0, "k", msgspec.json.encode(value), 0)], RESPONSES)


@pytest.mark.parametrize("time", ["2025-10-09T08:53:20Z", "2025-10-09T10:53:20.000+02:00"])
def test_a_response_that_does_not_say_when_it_began_did_when_its_event_was_written(time: str) -> None:
    ((kept, _),) = timed(time).responses.values()
    assert (kept.started_at_ms, kept.day) == (START_MS, "2025-10-09")


@pytest.mark.parametrize(
    "time", ["", "yesterday", "2025-10-09T08:53:20", "0001-01-01T00:00:00Z", "2100-01-01T00:00:00Z"]
)
def test_one_that_says_no_time_at_all_is_a_dead_letter(time: str) -> None:
    (letter,) = timed(time).dead_letters
    assert f"started_at_ms is not given, and time is {time!r}" in letter.reason


def test_votes_are_compared_by_value_only() -> None:
    read = read_vote(decode_feedback(feedback("f", "up", 1, response_id=ID, reasons=["kind"]).value))
    assert read == Vote("a" * 16, "f", ID, None, 0, "", "up", 1.0, "explicit", 1, "f", None, None, ("kind",))
