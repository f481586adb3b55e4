"""Rewriting and reading answers: pure, and the same wherever the network cuts them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.answers import EventStream, Rename, Transcript
from tests.stub_engine import _chunks

DONE = b"data: [DONE]\n\n"


def stream_of(**ask: Any) -> bytes:
    return b"".join(_chunks(json.dumps({"model": "assistant@v000001"} | ask), True)) + DONE


WITH_IDS = stream_of(return_token_ids=True, n=2, stub={"chunks": 12})
AS_ASKED = stream_of(n=2, stub={"chunks": 12}).replace(b"assistant@v000001", b"assistant")
RENAME = Rename("assistant@v000001", "assistant", strip_token_ids=True)


def feed(blocks: list[bytes]) -> tuple[bytes, Transcript]:
    stream = EventStream(RENAME, Transcript())
    sent = b"".join(stream.feed(block) for block in blocks)
    assert stream.is_done
    assert not sent.endswith(DONE)  # held back until the response is written
    return sent + stream.rest(), stream.finish()


@given(st.lists(st.integers(0, len(WITH_IDS)), max_size=40))
@example([1])
@example(list(range(0, len(WITH_IDS), 7)))
def test_a_stream_is_the_same_wherever_it_is_cut(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(WITH_IDS)]
    sent, transcript = feed([WITH_IDS[start:end] for start, end in pairwise(at)])
    assert sent == AS_ASKED
    one, other = transcript.choices()
    assert one.message["content"] == other.message["content"] == "".join(f" word{n}" for n in range(12))
    assert (one.token_ids, other.token_ids) == (list(range(14)), list(range(10, 24)))
    assert transcript.prompt_token_ids == [2, 277, 3]
    assert transcript.has_finished


@given(st.text(max_size=50))
@example('"model":"assistant@v000001"')
@example('","token_ids":[1,2],"model":"assistant@v000001')
@example('{"delta":{},"logprobs":null,"finish_reason":null,"token_ids":[1]}\n\ndata: [DONE]\n\n')
def test_what_is_said_is_never_rewritten(text: str) -> None:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": "stop", "token_ids": [1]}
    for as_ascii in (True, False):
        chunk = {"model": "assistant@v000001", "choices": [choice]}
        event = "data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=as_ascii) + "\n\n"
        sent, transcript = feed([event.encode(errors="replace"), DONE])
        read = json.loads(sent.split(b"\n\n")[0][6:])
        expected = {"model": "assistant", "choices": [choice | {"token_ids": None}]}
        if not any("\ud800" <= letter <= "\udfff" for letter in text):
            assert read == expected
            assert transcript.choices()[0].message == {"content": text}


def test_ids_that_the_engine_keeps_back_in_part_are_not_taken_for_all() -> None:
    events = [{"index": 0, "delta": {"content": "a"}, "token_ids": ids} for ids in ([1], None, [3])]
    transcript = Transcript()
    transcript.read_events(b"".join(b"data: " + json.dumps({"choices": [e]}).encode() + b"\n\n" for e in events))
    (choice,) = transcript.choices()
    assert choice.token_ids is None
    assert choice.message == {"content": "aaa"}
    assert not transcript.has_finished


def test_reasoning_and_tool_calls_come_together() -> None:
    deltas = [
        {"role": "assistant", "content": ""},
        {"reasoning": "let me "},
        {"reasoning": "see"},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "two", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "one", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
    ]
    transcript = Transcript()
    for delta in deltas:
        chunk = {"choices": [{"index": 0, "delta": delta}]}
        transcript.read_events(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert transcript.choices()[0].message == {
        "role": "assistant",
        "content": None,
        "reasoning": "let me see",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "one", "arguments": "{}"}},
            {"id": "b", "type": "function", "function": {"name": "two", "arguments": ""}},
        ],
    }
