"""Thumbs: what is taken, what is refused, and what stands in the log then."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.events import FeedbackEvent, hash_rater, key_of_message_id
from loop.join import Batch, read_vote
from loop.log import LogUnavailableError
from services.gateway.identity import Claim, TokenSigner
from services.gateway.recent import RECENT, Recent
from tests.gateway.conftest import Gateway, StartGateway, until

RESPONSE_ID = "chatcmpl-0123456789abcdef-01890000-0000-7000-8000-000000000000"
KEY_OF_RESPONSE = "0123456789abcdef"
KEY = {"Authorization": "Bearer k1"}


async def vote(gateway: Gateway, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
    status, body, _ = await gateway.post("/v1/feedback", fields, headers)
    return status, body


async def test_a_thumb_is_taken_before_its_response_is_known(gateway: Gateway) -> None:
    status, body = await vote(
        gateway, response_id=RESPONSE_ID, value="down", comment="no", reasons=["wrong"], rater="ann",
        correction="Five days.",
    )  # fmt: skip
    assert (status, body["status"], body["response_id"]) == (202, "accepted", RESPONSE_ID)
    (found,) = gateway.feedback()
    assert (found.feedback_id, found.value, found.response_id) == (body["feedback_id"], "down", RESPONSE_ID)
    assert (found.comment, found.reasons, found.source, found.weight) == ("no", ["wrong"], "explicit", 1.0)
    assert found.correction == "Five days."
    assert found.rater == hash_rater(b"thumbwheel", "ann")


async def test_a_thumb_by_message_id_goes_to_the_partition_of_its_response(gateway: Gateway) -> None:
    assert (await vote(gateway, message_id="m1", value="up", choice_index=1, weight=0.5, source="survey"))[0] == 202
    log = gateway.parts.spool._log
    topic = gateway.parts.feedback_topic
    (record,) = [r for p in range(log.partitions) for r in log.read(topic, p, 0, 10)]
    assert record.key == key_of_message_id("m1")
    (found,) = gateway.feedback()
    assert (found.response_id, found.message_id, found.choice_index) == (None, "m1", 1)
    assert (found.weight, found.source) == (0.5, "survey")


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


async def test_a_restart_goes_on_above_every_process_that_shared_the_log(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, behind = await start(gateway_id="gateway-1-0"), await start(gateway_id="gateway-1-1")
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 3600)
        await vote(ahead, message_id="m", value="up")
    await vote(behind, message_id="other", value="up")
    await vote(await start(gateway_id="gateway-1-0"), message_id="m", value="down")
    *_, first, second = ahead.feedback()
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
        (b'{"value": "up", "message_id": ""}', 422, "$.message_id"),
        (b'{"value": "up", "message_id": "m", "choice_index": -1}', 422, ">= 0"),
        (b'{"value": "up", "message_id": "m", "weight": 0}', 422, "> 0"),
        (b'{"value": "up", "message_id": "m", "wieght": 1}', 422, "wieght"),
        (b'{"value": "up", "message_id": "m", "comment": "a\\u0000"}', 422, "$.comment"),
        (b'{"value": "up", "message_id": "m", "correction": ""}', 422, "$.correction"),
        (b'{"value": "up", "message_id": "m", "source": "copy"}', 422, "gateway.copy_weight switches them on"),
        (b'{"items": []}', 422, "length >= 1"),
        (b'{"items": [{}], "value": "up"}', 422, "unknown field `value`"),
        (b'{"items": [' + b"1, " * 1000 + b"1]}", 422, "length <= 1000"),
        (b'{"items": [" ' + b"x" * 8_500_000 + b'"]}', 413, "larger than 8388608"),
        (b'{"value": "up", "message_id": "m", "comment": "' + b"x" * 70_000 + b'"}', 413, "larger than 65536 bytes"),
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
    assert found[1].feedback_id == f"{body['id']}/{found[1].rater}/f"  # cannot be another caller's


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
        ({"token": token, "correction": "Yes."}, 403, "'correction'"),
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


async def test_one_raters_feedback_id_takes_nobody_elses_vote(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    for rater, value in (("bob", "down"), ("ann", "up")):
        _, made, _ = await gateway.post("/v1/feedback/tokens", {"response_id": RESPONSE_ID, "rater": rater}, KEY)
        assert (await vote(gateway, token=made["token"], value=value, feedback_id="1"))[0] == 202
    batch = Batch()
    for data in gateway.feedback():
        batch.add_vote(read_vote(FeedbackEvent(id="e", type="", partitionkey=KEY_OF_RESPONSE, time="", data=data)))
    assert sorted(vote.value for vote in batch.votes.values()) == ["down", "up"]


async def test_an_apps_server_makes_tokens_for_one_rater_and_one_response(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"], token_ttl_s=600)
    ask = {"response_id": RESPONSE_ID, "rater": "ann"}
    before = int(time.time())
    status, made, _ = await gateway.post("/v1/feedback/tokens", ask, KEY)
    assert (status, made["response_id"]) == (200, RESPONSE_ID)
    assert before + 600 <= made["expires_at"] <= time.time() + 600
    for value in ("up", "down", "retract"):
        assert (await vote(gateway, token=made["token"], value=value, comment="so", reasons=["because"]))[0] == 202
    assert {given.rater for given in gateway.feedback()} == {hash_rater(b"thumbwheel", "ann")}
    _, other, _ = await gateway.post("/v1/feedback/tokens", ask | {"rater": "bob"}, KEY)
    assert (await vote(gateway, token=other["token"], value="up"))[0] == 202
    assert gateway.feedback()[-1].rater == hash_rater(b"thumbwheel", "bob")  # his own vote, and nobody else's
    cases: list[tuple[dict[str, Any], dict[str, str], int]] = [
        (ask, {}, 401),  # a browser cannot make itself one
        (ask, {"X-Thumbwheel-Feedback-Token": made["token"]}, 401),
        ({"response_id": "chatcmpl-123"}, KEY, 422),
        (ask | {"ttl_s": 0}, KEY, 422),
        (ask | {"scope": "admin"}, KEY, 422),
    ]
    for body, headers, expected in cases:
        assert (await gateway.post("/v1/feedback/tokens", body, headers))[0] == expected, body
    for ttl_s, expected_s in ((60, 60), (6000, 600)):  # shorter on request, never longer
        _, made, _ = await gateway.post("/v1/feedback/tokens", ask | {"ttl_s": ttl_s}, KEY)
        assert abs(made["expires_at"] - time.time() - expected_s) < 30


async def test_a_vote_that_is_sent_again_by_somebody_who_overheard_it_changes_nothing(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    token = gateway.parts.signer.sign(Claim(RESPONSE_ID, "ann"), int(time.time()) + 60)
    for value, feedback_id in (("up", "f1"), ("down", "f2"), ("up", "f1"), ("up", "f1")):
        assert (await vote(gateway, token=token, value=value, feedback_id=feedback_id))[0] == 202
    votes = [
        read_vote(FeedbackEvent(id=str(n), type="", partitionkey=KEY_OF_RESPONSE, time="", data=given))
        for n, given in enumerate(gateway.feedback())
    ]
    batch = Batch()
    for one in votes:
        batch.add_vote(one)
    assert len(votes) == 4
    assert max(batch.votes.values(), key=lambda one: one.hlc).value == "down"


async def test_a_new_secret_signs_and_the_old_one_is_still_good(start: StartGateway) -> None:
    before = await start(api_keys=["k1"], token_secret="old")
    token = before.parts.signer.sign(Claim(RESPONSE_ID, ""), int(time.time()) + 60)
    during = await start(api_keys=["k1"], token_secret="new", previous_token_secrets=["older", "old"])
    assert (await vote(during, token=token, value="up"))[0] == 202
    signed = during.parts.signer.sign(Claim(RESPONSE_ID, ""), int(time.time()) + 60)
    after = await start(api_keys=["k1"], token_secret="new")
    assert (await vote(after, token=signed, value="up"))[0] == 202
    status, body = await vote(after, token=token, value="up")
    assert (status, body["error"]["code"]) == (401, "invalid_token")


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

    assert set(await asyncio.gather(*map(one, range(10_000)))) == {202}
    assert len({given.feedback_id for given in gateway.feedback()}) == 10_000


# --- batches ---------------------------------------------------------------------------------------------------------


async def test_each_vote_of_a_batch_has_its_own_result(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    sync = gateway.parts.spool._log.sync
    monkeypatch.setattr(gateway.parts.spool._log, "sync", lambda: syncs.append(sync()))
    items: list[dict[str, Any]] = [{"message_id": f"m{n}", "value": "up", "correction": "Yes."} for n in range(997)]
    items[1:1] = [{"message_id": "m", "value": "sideways"}, {"value": "up"}, {"value": "up", "response_id": "x"}]
    status, body = await vote(gateway, {"Idempotency-Key": "i"}, items=items)
    assert status == 207
    results = body["items"]
    assert [result["status"] for result in results] == [202, 422, 422, 422, *[202] * 996]
    assert [result["error"]["param"] for result in results[1:4]] == ["value", "response_id", "response_id"]
    assert (results[4]["feedback_id"], results[4]["message_id"]) == ("i/4", "m1")
    found = gateway.feedback()
    assert [given.message_id for given in found] == [f"m{n}" for n in range(997)]  # in the order of the batch
    assert len(syncs) == 1
    again, _ = await vote(gateway, {"Idempotency-Key": "i"}, items=items)
    assert again == 207
    assert len({given.feedback_id for given in gateway.feedback()}) == 997


async def test_a_batch_that_cannot_be_written_is_refused_as_a_whole(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise LogUnavailableError("disk full")

    monkeypatch.setattr(gateway.parts.spool._log, "write", fail)
    items = [{"message_id": "m", "value": "up"}, {"message_id": "m", "value": "sideways"}]
    status, body = await vote(gateway, items=items)
    assert (status, body["error"]["code"]) == (503, "not_written")
    assert gateway.feedback() == []


async def test_without_a_key_a_batch_is_as_small_as_a_vote_and_needs_tokens(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    token = gateway.parts.signer.sign(Claim(RESPONSE_ID, ""), int(time.time()) + 60)
    status, body = await vote(gateway, items=[{"value": "up", "token": token}, {"value": "up", "message_id": "m"}])
    assert (status, [result["status"] for result in body["items"]]) == (207, [202, 401])
    large = [{"value": "up", "token": token, "comment": "x" * 9_000}] * 8
    assert (await vote(gateway, items=large))[0] == 413
    assert (await vote(gateway, KEY, items=large))[0] == 207


# --- choices and what is concluded -----------------------------------------------------------------------------------


async def test_of_several_choices_a_vote_names_one(gateway: Gateway) -> None:
    _, body, response = await gateway.chat(n=2, metadata={"message_id": "m"})
    token = response.headers["X-Thumbwheel-Feedback-Token"]
    for target in ({"response_id": body["id"]}, {"message_id": "m"}, {"token": token}):
        status, refusal = await vote(gateway, value="up", **target)
        assert (status, refusal["error"]["param"]) == (422, "choice_index")
        assert (await vote(gateway, value="up", choice_index=1, **target))[0] == 202
    assert [given.choice_index for given in gateway.feedback()] == [1, 1, 1]
    _, body, _ = await gateway.chat()
    assert (await vote(gateway, value="up", response_id=body["id"]))[0] == 202


async def test_another_process_knows_of_the_choices_too(start: StartGateway) -> None:
    one, other = await start(), await start()
    _, body, _ = await one.chat(n=2)
    assert (await vote(other, value="up", response_id=body["id"]))[0] == 422
    assert (await vote(other, value="up", response_id=body["id"], choice_index=1))[0] == 202


async def test_of_a_message_id_alone_the_joiner_is_told_whether_a_choice_was_named(gateway: Gateway) -> None:
    for named in ({}, {"choice_index": 0}):
        assert (await vote(gateway, value="up", message_id="of another process", **named))[0] == 202
    assert [given.names_choice for given in gateway.feedback()] == [False, True]


async def test_what_an_app_concludes_weighs_what_the_settings_say(start: StartGateway) -> None:
    gateway = await start(copy_weight=0.25, edit_weight=0.125)
    assert (await vote(gateway, message_id="m", value="up", source="copy"))[0] == 202
    assert (await vote(gateway, message_id="m", value="up", source="copy", weight=0.5))[0] == 202
    assert (await vote(gateway, message_id="m", value="up", source="edit"))[0] == 202
    weights = [("copy", 0.25), ("copy", 0.5), ("edit", 0.125)]
    assert [(given.source, given.weight) for given in gateway.feedback()] == weights
    for source in ("copy", "edit"):
        status, body = await vote(await start(), message_id="m", value="up", source=source)
        assert (status, body["error"]["code"]) == (422, "source_off")


async def test_a_vote_is_later_than_what_another_gateway_took_before_the_clock_was_set_back(gateway: Gateway) -> None:
    other = Recent(gateway.spool_path.with_name(RECENT))
    other.stamp = an_hour_ahead = int(time.time() + 3600) * 1000 << 16
    assert (await vote(gateway, message_id="m", value="down"))[0] == 202
    (given,) = gateway.feedback()
    assert given.hlc == other.stamp == an_hour_ahead + 1
    other.close()


async def test_a_message_answered_anew_with_one_choice_needs_none_named(gateway: Gateway) -> None:
    for n, status in ((2, 422), (1, 202), ("2", 422), (1.0, 202)):
        assert (await gateway.chat(metadata={"message_id": "m"}, n=n))[0] == 200
        assert (await vote(gateway, message_id="m", value="up"))[0] == status


async def test_an_answer_that_is_asked_for_again_gets_a_weak_vote_down(start: StartGateway) -> None:
    gateway = await start(regenerate_weight=0.2)
    asked = {"user": "ann", "metadata": {"conversation_id": "c"}}
    ids = [
        (await gateway.chat(**asked, **more))[2].headers["X-Thumbwheel-Response-Id"]
        for more in ({}, {"stream": True}, {"temperature": 0.5})
    ]
    others: list[dict[str, Any]] = [
        {"metadata": {"conversation_id": "another"}},
        {"metadata": {}},  # whose conversation it is, nobody knows: `user` alone does not tell
        {"n": 2},  # there is more than one answer to choose from
        {"messages": [{"role": "user", "content": "hello again"}]},
        {"metadata": {"conversation_id": "c", "task": "title_generation"}},
    ]
    for other in others:
        assert (await gateway.chat(**(asked | other)))[0] == 200
    await until(lambda: len(gateway.feedback()) >= 2)  # no answer waits for them
    found = gateway.feedback()
    assert [(given.response_id, given.value, given.source, given.weight) for given in found] == [
        (ids[0], "down", "regenerate", 0.2),
        (ids[1], "down", "regenerate", 0.2),
    ]
    assert {given.rater for given in found} == {hash_rater(b"thumbwheel", "ann")}


async def test_a_failed_answer_is_no_answer_and_nothing_is_concluded_unless_asked_for(
    gateway: Gateway, start: StartGateway
) -> None:
    again = await start(regenerate_weight=0.2)
    asked: dict[str, Any] = {"metadata": {"conversation_id": "c"}}
    assert (await again.chat(**asked, stub={"fault": "500"}))[0] == 500
    assert (await again.chat(**asked))[0] == 200
    assert (await again.chat(**asked, stub={"fault": "500"}))[0] == 500  # the answer before still stands
    assert (await again.chat(**asked, model="unknown"))[0] == 404
    for _ in range(2):
        assert (await gateway.chat(**asked))[0] == 200
    assert gateway.feedback() == []
