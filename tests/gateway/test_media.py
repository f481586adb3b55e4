"""What is inline in messages and no text stands in the log as its hash."""

from __future__ import annotations

import base64
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.media import without_media

SOUND = base64.b64encode(bytes(range(256)) * 4).decode()
LINK = "https://pictures.example/" + "a" * 2000 + ".png"
DEEP = b'[{"content": [' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"]}]"
texts = st.one_of(st.text(), st.just(SOUND), st.just("data:image/png;base64,AAAA"))
parts = st.dictionaries(st.sampled_from(["text", "x", "name"]), texts)


def hashed(messages: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(without_media(msgspec.Raw(msgspec.json.encode(messages)))))


def said(text: str) -> str:
    return sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("part", "logged"),
    [
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}},
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;sha256,{said('iVBORw0KGgo=')}", "detail": "low"},
            },
        ),
        (
            {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
            {"type": "input_audio", "input_audio": {"data": f"sha256:{said(SOUND)}", "format": "wav"}},
        ),
        (
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}},
            {
                "type": "file",
                "file": {"file_data": f"data:application/pdf;sha256,{said('JVBERi0=')}", "filename": "a.pdf"},
            },
        ),
        (  # as lenient as vLLM
            {"image_url": "DATA:image/png; a=b;base64,AAAA"},
            {"image_url": f"DATA:image/png; a=b;sha256,{said('AAAA')}"},
        ),
        (
            {"type": "image_embeds", "image_embeds": {"pixels": [SOUND, "grid"]}},
            {"type": "image_embeds", "image_embeds": {"pixels": [f"sha256:{said(SOUND)}", "grid"]}},
        ),
    ],
)
def test_media_is_a_hash_and_the_rest_stays(part: dict[str, Any], logged: dict[str, Any]) -> None:
    text = {"type": "text", "text": "what is this?"}
    messages = [{"role": "system", "content": "look"}, {"role": "user", "content": [text, part], "name": "ann"}]
    assert hashed(messages) == [messages[0], {"role": "user", "content": [text, logged], "name": "ann"}]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": SOUND},  # said, not shown: the redactor's to judge
        {"role": "user", "content": [{"type": "text", "text": "data:image/png;base64,AAAA"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": LINK}}, "a", 5, None]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No. " * 1000}], "tool_calls": []},
        {"role": "tool", "tool_call_id": "1", "type": "x"},
        {"role": "user", "content": [{"type": "input_text", "text": SOUND}]},
        {"role": "user", "content": [{"type": "of_tomorrow", "text": "a" * 2000 + " and more"}]},
    ],
)
def test_text_links_and_what_nobody_knows_stay_as_they_came(message: dict[str, Any]) -> None:
    raw = msgspec.Raw(msgspec.json.encode([message]))
    assert without_media(raw) is raw


@pytest.mark.parametrize("raw", [b'{"type": 1}', b'[1, "type"]', b'["\\ud800", {"type": 1}]', DEEP])
def test_what_is_no_list_of_messages_stays(raw: bytes) -> None:
    assert without_media(msgspec.Raw(raw)) == msgspec.Raw(raw)


@given(st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "file"]), "inner": parts})))
def test_no_media_is_left_in_any_part_but_text(content: list[dict[str, Any]]) -> None:
    (message,) = hashed([{"role": "user", "content": content}])
    assert hashed([message]) == [message]
    for was, is_ in zip(content, message["content"], strict=True):
        kept = {name: text for name, text in was["inner"].items() if text not in (SOUND, "data:image/png;base64,AAAA")}
        assert is_["inner"] == was["inner"] if was["type"] == "text" else kept.items() <= is_["inner"].items()
        assert was["type"] == "text" or not {SOUND, "data:image/png;base64,AAAA"} & set(is_["inner"].values())
