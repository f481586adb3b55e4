"""Thumbs: what is taken, what is refused, and what stands in the log then."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.events import hash_rater, key_of_message_id
from services.gateway.identity import Claim, TokenSigner
from tests.gateway.conftest import Gateway, StartGateway

RESPONSE_ID = "chatcmpl-0123456789abcdef-01890000-0000-7000-8000-000000000000"
KEY = {"Authorization": "Bearer k1"}


async def vote(gateway: Gateway, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
    status, body, _ = await gateway.post("/v1/feedback", fields, headers)
    return status, body


async def test_a_thumb_is_taken_before_its_response_is_known(gateway: Gateway) -> None:
    status, body = await vote(
        gateway, response_id=RESPONSE_ID, value="down", comment="no", reasons=["wrong"], rater="ann"
    )
    assert (status, body["status"], body["response_id"]) == (202, "accepted", RESPONSE_ID)
    (found,) = gateway.feedback()
    assert (found.feedback_id, found.value, found.response_id) == (body["feedback_id"], "down", RESPONSE_ID)
    assert (found.comment, found.reasons, found.source, found.weight) == ("no", ["wrong"], "explicit", 1.0)
    assert found.rater == hash_rater(b"thumbwheel", "ann")


async def test_a_thumb_by_message_id_goes_to_the_partition_of_its_response(gateway: Gateway) -> None:
    assert (await vote(gateway, message_id="m1", value="up", choice_index=1, weight=0.5, source="copy"))[0] == 202
    log = gateway.parts.spool._log
    topic = gateway.parts.feedback_topic
    (record,) = [r for p in range(log.partitions) for r in log.read(topic, p, 0, 10)]
    assert record.key == key_of_message_id("m1")
    (found,) = gateway.feedback()
    assert (found.response_id, found.message_id, found.choice_index) == (None, "m1", 1)
    assert (found.weight, found.source) == (0.5, "copy")


async def test_the_callers_id_is_kept_and_votes_without_one_are_told_apart(gateway: Gateway) -> None:
    for _ in range(2):
        assert (await vote(gateway, {"Idempotency-Key": "i1"}, message_id="m", value="up"))[1]["feedback_id"] == "i1"
    assert (await vote(gateway, {"Idempotency-Key": "i1"}, message_id="m", value="up", feedback_id="f1"))[0] == 202
    for value in ("up", "down", "up"):
        await vote(gateway, message_id="m", value=value)
    found = gateway.feedback()
    assert [given.feedback_id for given in found[:3]] == ["i1", "i1", "f1"]
    assert len({given.feedback_id for given in found[3:]}) == 3
    assert [given.value for given in found[3:]] == ["up", "down", "up"]
    assert len({given.hlc for given in found}) == 6


async def test_the_clock_goes_on_over_a_restart_though_the_wall_clock_goes_back(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await vote(await start(), message_id="m", value="up")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    await vote(await start(), message_id="m", value="down")
    first, second = (await start()).feedback()
    assert (first.value, second.value) == ("up", "down")
    assert second.hlc == first.hlc + 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b'{"value": "up", "message_id": "\xff"}', 400, "not JSON"),
        (b'{"value": "sideways", "message_id": "m"}', 422, "'sideways'; expected one of up, down, retract"),
        (b'{"message_id": "m"}', 422, "required field `value`"),
        (b'{"value": "up"}', 422, "give response_id, message_id or token"),
        (b'{"value": "up", "response_id": "chatcmpl-123"}', 422, "'chatcmpl-123' was not minted"),
        (b'{"value": "up", "response_id": "x\'; DROP TABLE votes; --"}', 422, "was not minted"),
        (b'{"value": "up", "message_id": "a\\r\\nSet-Cookie: b"}', 422, "$.message_id"),
        (b'{"value": "up", "message_id": ""}', 422, "$.message_id"),
        (b'{"value": "up", "message_id": "m", "choice_index": -1}', 422, ">= 0"),
        (b'{"value": "up", "message_id": "m", "weight": 0}', 422, "> 0"),
        (b'{"value": "up", "message_id": "m", "wieght": 1}', 422, "wieght"),
        (b'{"value": "up", "message_id": "m", "comment": "a\\u0000"}', 422, "$.comment"),
        (b'{"value": "up", "message_id": "m", "comment": "' + b"x" * 70_000 + b'"}', 413, "larger than 65536"),
    ],
)
async def test_bad_votes_get_a_clear_error(gateway: Gateway, body: bytes, status: int, said: str) -> None:
    found, answer, _ = await gateway.post("/v1/feedback", body)
    assert found == status
    assert said in answer["error"]["message"]
    assert gateway.feedback() == []


# --- tokens ----------------------------------------------------------------------------------------------------------


async def test_a_browser_votes_with_the_responses_token_and_no_key(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    asked = {
        "model": "assistant",
        "messages": [{"role": "user", "content": "hi"}],
        "user": "ann",
        "metadata": {"message_id": "m"},
    }
    _, body, response = await gateway.post("/v1/chat/completions", asked, KEY)
    token = response.headers["X-Thumbwheel-Feedback-Token"]
    assert (await vote(gateway, {"X-Thumbwheel-Feedback-Token": token}, response_id=body["id"], value="up"))[0] == 202
    assert (await vote(gateway, token=token, value="down", comment="no", feedback_id="f"))[0] == 202
    assert (await vote(gateway, token=token, message_id="m", value="retract"))[0] == 202
    found = gateway.feedback()
    assert {given.response_id for given in found} == {body["id"]}
    assert {given.rater for given in found} == {hash_rater(b"thumbwheel", "ann")}
    assert found[1].feedback_id == f"{body['id']}/f"  # cannot be another caller's


async def test_a_token_permits_nothing_else(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    other = RESPONSE_ID.replace("0123", "4567")
    expiry_s = int(time.time()) + 60
    token = gateway.parts.signer.sign(Claim(RESPONSE_ID, ""), expiry_s)
    expired = gateway.parts.signer.sign(Claim(RESPONSE_ID, ""), int(time.time()))
    forged = TokenSigner(b"another").sign(Claim(RESPONSE_ID, ""), expiry_s)
    payload, _, signature = token.partition(".")
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"token": token, "response_id": other}, 403, "not for"),
        ({"token": token, "message_id": "m"}, 403, "message"),
        ({"token": token, "weight": 5}, 403, "'weight'"),
        ({"token": token, "rater": "bob"}, 403, "'rater'"),
        ({"token": token, "source": "copy"}, 403, "'source'"),
        ({"token": expired}, 401, "expired"),
        ({"token": forged}, 401, "signature"),
        ({"token": payload + "." + signature[:-4] + "AAAA"}, 401, "signature"),
        ({"token": "nonsense"}, 401, "malformed"),
        ({"token": "ä.ö"}, 401, "malformed"),
        ({"response_id": RESPONSE_ID}, 401, "no API key and no feedback token"),
    ]
    for fields, status, said in cases:
        found, body = await vote(gateway, value="up", **fields)
        assert (found, said in body["error"]["message"]) == (status, True), (fields, body)
    assert gateway.feedback() == []
    for path in ("/v1/chat/completions", "/tokenize"):
        assert (await gateway.post(path, {"model": "assistant"}, {"X-Thumbwheel-Feedback-Token": token}))[0] == 401
    assert (await vote(gateway, KEY, token=token, value="up", weight=2.0, rater="bob"))[0] == 202


@given(st.text(max_size=200))
def test_no_text_but_a_token_is_taken(text: str) -> None:
    with pytest.raises(ValueError, match="token"):
        TokenSigner(b"secret").verify(text, 0)


@given(rater=st.from_regex(r"[0-9a-f]{0,32}", fullmatch=True), expiry_s=st.integers(1, 2**40))
def test_a_token_says_what_was_signed(rater: str, expiry_s: int) -> None:
    signer = TokenSigner(b"secret")
    assert signer.verify(signer.sign(Claim(RESPONSE_ID, rater), expiry_s), expiry_s - 1) == (RESPONSE_ID, rater)


async def test_a_burst_of_votes_is_all_on_disk(gateway: Gateway) -> None:
    async def one(number: int) -> int:
        return (await vote(gateway, message_id=f"m{number}", value="up", feedback_id=f"f{number}"))[0]

    assert set(await asyncio.gather(*map(one, range(1000)))) == {202}
    assert len({given.feedback_id for given in gateway.feedback()}) == 1000
