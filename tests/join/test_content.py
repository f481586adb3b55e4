from __future__ import annotations

import json
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.content import Content, content_of, decode_content, encode_content, pair_digest, prompt_digest
from loop.events import Choice, ResponseLogged, decode_response, encode
from loop.minhash import PERMUTATIONS, SKETCH, shingle_sets, sketches

KEY = "0f" * 8
IMAGE = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


def response(message: dict[str, Any] | None = None, *, choice: dict[str, Any] | None = None, **fields: Any) -> Content:
    made = Choice(
        message={"content": "Yes."} if message is None else message, **{"token_ids": [7, 8], **(choice or {})}
    )
    given: dict[str, Any] = {"messages": [{"role": "user", "content": "Is it?"}], "prompt_token_ids": [1, 2, 3]}
    data = ResponseLogged(response_id=f"chatcmpl-{KEY}-{'0' * 36}", choices=[made], **(given | fields))
    event = encode(data, event_id="e", key=KEY, source="test", now_ms=1)
    other = json.dumps(json.loads(event), indent=2, ensure_ascii=True).encode()  # as another producer may write it
    (one, same) = (content_of(body, body.choices[0]) for body in (decode_response(e).data for e in (event, other)))
    assert one == same
    return one


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"))


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), texts.filter(bool))
def test_what_was_served_is_read_back(messages: list[tuple[str, str]], answer: str) -> None:
    made = response({"content": answer}, messages=[{"role": role, "content": text} for role, text in messages])
    served = decode_content(encode_content(made))
    assert (served.messages, served.answer.decode()) == (tuple(messages), answer)
    assert made.prompt_digest == prompt_digest(tuple(messages))
    assert made.pair_digest == pair_digest(tuple(messages), answer)
    assert np.frombuffer(served.prompt_ids or b"", "<i4").tolist() == [1, 2, 3]
    assert np.frombuffer(served.completion_ids or b"", "<i4").tolist() == [7, 8]
    assert made.tokens == 5


def test_a_prompt_of_a_completion_is_one_message() -> None:
    made = response(messages=None, prompt="Is it?")
    assert made.messages == (("user", "Is it?"),)
    assert (made.prompt_is_text, made.asked) == (True, b"is it")


def test_a_prompt_of_which_no_text_is_known_is_none() -> None:
    made = response(messages=None)
    assert (made.prompt_is_text, made.asked, made.messages) == (False, b"", (("user", ""),))
    assert not response(messages=[]).asked


@pytest.mark.parametrize(
    ("fields", "choice", "expected"),
    [
        ({}, {}, None),
        ({}, {"finish_reason": "stop"}, None),
        ({}, {"finish_reason": "length"}, "truncated"),
        ({}, {"finish_reason": "abort"}, "aborted"),
        ({"aborted": True}, {"finish_reason": "length"}, "aborted"),
        ({"messages": [IMAGE]}, {"finish_reason": "stop", "token_ids": [1]}, "media"),
        ({"messages": [CALL]}, {"finish_reason": "tool_calls"}, None),
    ],
)
def test_what_no_votes_make_fit(fields: dict[str, Any], choice: dict[str, Any], expected: str | None) -> None:
    assert response(choice=choice, **fields).unfit == expected


def test_an_answer_without_text_and_tokens_is_empty() -> None:
    assert response({"content": None}).unfit is None
    assert response({"content": ""}, choice={"token_ids": []}).unfit == "empty"


@pytest.mark.parametrize("ids", [None, [], [1, -1], [1, 2**31]])
def test_ids_are_known_of_both_or_of_neither(ids: list[int] | None) -> None:
    for made in (response(choice={"token_ids": ids}), response(prompt_token_ids=ids)):
        served = decode_content(encode_content(made))
        assert (served.prompt_ids, served.completion_ids, made.tokens) == (None, None, None)


def test_images_and_tool_calls_are_no_text() -> None:
    made = response(CALL, messages=[IMAGE])
    assert (made.prompt_is_text, made.answer_is_text) == (False, False)
    assert (response().prompt_is_text, response().answer_is_text) == (True, True)
    assert not response(messages=[CALL]).prompt_is_text


words = st.lists(st.text("ab", min_size=1, max_size=2), max_size=200).map(lambda parts: " ".join(parts).encode())


@given(st.lists(words, min_size=1, max_size=12))
def test_a_sketch_is_of_its_own_texts_bigrams_alone(asked: list[bytes]) -> None:
    together = sketches(asked)
    assert together == [sketches([text])[0] for text in asked]
    for text, made in zip(asked, np.frombuffer(b"".join(together), SKETCH), strict=True):
        bigrams = set(pairwise([b"^", *text.split(b" "), b"$"]))
        assert made["size"] == len(bigrams) == len(shingle_sets([text])[0])


def test_sets_are_as_alike_as_their_sketches() -> None:
    """The share of permutations whose least is the same estimates the Jaccard similarity."""
    common = [f"w{n}" for n in range(300)]
    for own in (0, 60, 300):
        pair = [" ".join([*common, *(f"{name}{n}" for n in range(own))]).encode() for name in "xy"]
        sets = [set(shingle_sets([text])[0].tolist()) for text in pair]
        similarity = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        left, right = np.frombuffer(b"".join(sketches(pair)), SKETCH)["least"]
        assert abs((left == right).mean() - similarity) < 4 * np.sqrt(0.25 / PERMUTATIONS)


def test_kept_sketches_stay_comparable() -> None:
    """They stand in the store: where one comes out otherwise, a migration has to make all of them anew."""
    made = b"".join(sketches([b"where is my order 0000", "où est ma commande".encode(), b""]))
    assert blake2b(made, digest_size=8).hexdigest() == "5a09652550f8a66c"
