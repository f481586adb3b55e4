"""Scores as Langfuse's clients send them, and as LibreChat does: which of them are votes, and on what."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Any

import langfuse
import pytest

from loop.events import FeedbackGiven, decode_feedback, decode_response, encode, message_digest
from loop.join import join, read_response, read_vote
from loop.settings import LangfuseSettings
from services.gateway.errors import Refusal
from services.gateway.langfuse import Score, value_of, vote_on
from tests.gateway.conftest import Gateway, StartGateway

RESPONSE_ID = "chatcmpl-0123456789abcdef-01890000-0000-7000-8000-000000000000"
STARS = LangfuseSettings(score_names=["stars"], up_from=4, down_below=3)


def basic(secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"pk-lf-1:{secret}".encode()).decode()}


def trace_of(message_id: str) -> str:
    """What LibreChat makes of a message's id."""
    return hashlib.sha256(message_id.encode()).hexdigest()[:32]


def librechat(message_id: str, rating: str) -> dict[str, Any]:
    """What LibreChat sends for a thumb, under one score id however often it changes: the payload of its
    `packages/api/src/langfuse`, `buildScorePayload`.
    """
    trace_id = trace_of(message_id)
    return {
        "id": f"feedback-{trace_id}",
        "traceId": trace_id,
        "name": "user-feedback",
        "value": int(rating == "thumbsUp"),
        "dataType": "BOOLEAN",
        "comment": "not_helpful — too long",
        "metadata": {"rating": rating, "tag": "not_helpful"},
        "observationId": "0123456789abcdef",
        "environment": "production",
    }


async def delete(gateway: Gateway, score_id: str, headers: dict[str, str] | None = None) -> int:
    async with gateway.http.delete(f"{gateway.url}/api/public/scores/{score_id}", headers=headers) as response:
        return response.status


async def test_librechats_thumbs_meet_their_response_by_the_hash_of_its_message(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    headers = basic("k1")
    _, asked, _ = await gateway.post(
        "/v1/chat/completions",
        {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]},
        {"Authorization": "Bearer k1", "X-Thumbwheel-Message-Id": "msg-1"},
    )
    for rating in ("thumbsUp", "thumbsDown"):
        status, body, _ = await gateway.post("/api/public/scores", librechat("msg-1", rating), headers)
        assert (status, body) == (200, {"id": f"feedback-{trace_of('msg-1')}"})
    (logged,) = gateway.responses()
    assert logged.response_id == asked["id"]
    assert standing(gateway) == [("down", "langfuse")]
    assert await delete(gateway, f"feedback-{trace_of('msg-1')}", headers) == 202
    assert standing(gateway) == []
    assert [given.comment for given in gateway.feedback()] == ["not_helpful — too long"] * 2 + [None]


def standing(gateway: Gateway) -> list[tuple[str, str]]:
    """The votes that the join leaves on the only response, of all that were given."""

    def event(data: Any, key: str) -> bytes:
        return encode(data, event_id="e", key=key, source="test", now_ms=0)

    (logged,) = gateway.responses()
    key = message_digest(logged.message_id or "")[:16]
    value = event(logged, key)
    votes = [read_vote(decode_feedback(event(given, key))) for given in gateway.feedback()]
    examples = join(read_response(decode_response(value)), votes, value)
    return [(vote["value"], vote["source"]) for example in examples for vote in example.votes]


@pytest.mark.parametrize(
    ("settings", "fields", "expected"),
    [
        (LangfuseSettings(), {"value": 1.0, "data_type": "BOOLEAN"}, "up"),
        (LangfuseSettings(), {"value": 0.0, "data_type": "BOOLEAN"}, "down"),
        (LangfuseSettings(), {"value": True}, "up"),
        (LangfuseSettings(), {"value": 0.5}, "up"),
        (LangfuseSettings(), {"value": -1.0, "data_type": "NUMERIC"}, "down"),
        (LangfuseSettings(), {"value": "Thumbs_Up", "data_type": "CATEGORICAL"}, "up"),
        (LangfuseSettings(), {"value": "bad"}, "down"),
        (LangfuseSettings(), {"value": "Well, …", "data_type": "TEXT"}, None),
        (LangfuseSettings(), {"value": 1.0, "name": "toxicity"}, None),
        (STARS, {"value": 5.0, "name": "stars"}, "up"),
        (STARS, {"value": 3.0, "name": "stars"}, "retract"),  # neither
        (STARS, {"value": 2.0, "name": "stars"}, "down"),
        (STARS, {"value": 1.0, "name": "stars", "data_type": "BOOLEAN"}, "up"),  # is what it is
    ],
)
def test_which_way_a_score_points(settings: LangfuseSettings, fields: dict[str, Any], expected: str | None) -> None:
    assert value_of(Score(**({"name": "user-feedback"} | fields)), settings) == expected


def test_an_unknown_category_is_refused_with_what_is_known() -> None:
    with pytest.raises(Refusal) as caught:
        value_of(Score(name="user-feedback", value="meh"), LangfuseSettings())
    assert "'meh'; expected one of up, thumbs_up" in caught.value.error["message"]


def test_bounds_that_would_make_a_score_both_are_refused() -> None:
    with pytest.raises(ValueError, match=r"down_below is 2\.0, above langfuse\.up_from = 1\.0"):
        LangfuseSettings(up_from=1, down_below=2)


@pytest.mark.parametrize(
    ("trace_id", "response_id", "message_id"),
    [
        (RESPONSE_ID, RESPONSE_ID, None),
        (trace_of("m"), None, f"sha256:{trace_of('m')}"),
        ("my-own-id", None, "my-own-id"),
    ],
)
def test_what_a_trace_id_means(trace_id: str, response_id: str | None, message_id: str | None) -> None:
    vote = vote_on(trace_id, "up")
    assert (vote.response_id, vote.message_id) == (response_id, message_id)


async def test_a_score_is_deleted_by_what_its_id_says_or_by_what_is_remembered(gateway: Gateway) -> None:
    score = {"traceId": RESPONSE_ID, "name": "user-feedback", "value": 1}
    _, made, _ = await gateway.post("/api/public/scores", score)
    await gateway.post("/api/public/scores", score | {"id": "of-the-app"})
    _, own, _ = await gateway.post("/api/public/scores", score | {"traceId": "my-own-id"})
    ids = made["id"], "of-the-app", own["id"], "never-seen", trace_of("m")
    assert [await delete(gateway, id) for id in ids] == [202, 202, 202, 404, 404]
    on = [RESPONSE_ID, RESPONSE_ID, "my-own-id"]
    assert votes_of(gateway) == [*(("up", id) for id in on), *(("retract", id) for id in on)]


async def test_a_score_that_was_no_thumb_is_deleted_without_a_vote(gateway: Gateway) -> None:
    thumb = {"traceId": RESPONSE_ID, "name": "user-feedback", "value": 1}
    await gateway.post("/api/public/scores", thumb)
    id = f"toxicity-{RESPONSE_ID}"
    assert (await gateway.post("/api/public/scores", thumb | {"name": "toxicity", "id": id}))[0] == 200
    assert await delete(gateway, id) == 202
    assert votes_of(gateway) == [("up", RESPONSE_ID)]


def votes_of(gateway: Gateway) -> list[tuple[str, str | None]]:
    def target(given: FeedbackGiven) -> str | None:
        return given.response_id or given.message_id

    return [(given.value, target(given)) for given in gateway.feedback()]


async def test_scores_are_ingested_and_everything_else_is_let_pass(gateway: Gateway) -> None:
    def event(id: str, type: str, body: Any) -> dict[str, Any]:
        return {"id": id, "type": type, "timestamp": "2026-01-01T00:00:00Z", "body": body}

    others = {"observationId": "o", "environment": "test", "queueId": "q", "configId": "c", "metadata": {"by": "ann"}}
    good = {"id": "s", "traceId": RESPONSE_ID, "name": "user-feedback", "value": 0, **others}
    batch = [
        event("e1", "trace-create", {"id": "t", "name": "chat"}),
        event("e2", "score-create", good),
        event("e3", "score-create", good | {"value": "meh"}),
        event("e4", "score-create", {"name": "user-feedback"}),
        event("e5", "score-create", good | {"name": "toxicity"}),
        event("e6", "score-create", {"sessionId": "s", "name": "user-feedback", "value": 1}),
        {"no": "event"},
        event("e7", "sdk-log", {"log": 1}),
    ]
    for _ in range(2):  # a client that got no answer sends it all again
        status, body, _ = await gateway.post("/api/public/ingestion", {"batch": batch, "metadata": {"sdk": "x"}})
        assert status == 207
        assert body["successes"] == [{"id": id, "status": 201} for id in ("e1", "e2", "e5", "e7")]
        assert [(error["id"], error["status"]) for error in body["errors"]] == [
            ("e3", 400), ("e4", 400), ("e6", 400), ("", 400)
        ]  # fmt: skip
        assert "'meh'" in body["errors"][0]["message"]
    assert votes_of(gateway) == [("down", RESPONSE_ID)] * 2
    assert {given.feedback_id for given in gateway.feedback()} == {"langfuse/e2"}


async def test_more_events_than_a_call_may_have_are_refused(gateway: Gateway) -> None:
    status, answer, _ = await gateway.post("/api/public/ingestion", {"batch": [0] * 1_001})
    assert status == 400
    assert "length <= 1000" in answer["error"]["message"]


async def test_spans_are_taken_and_dropped(gateway: Gateway) -> None:
    for content_type, answer in (("application/x-protobuf", b""), ("application/json", b"{}")):
        async with gateway.http.post(
            gateway.url + "/api/public/otel/v1/traces", data=b"\x0a\x00", headers={"Content-Type": content_type}
        ) as response:
            assert (response.status, response.content_type, await response.read()) == (200, content_type, answer)


async def test_only_who_has_a_key_may_score(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    score = librechat("m", "thumbsUp")
    for headers in ({}, basic("wrong"), basic("k1\n"), {"Authorization": "Basic k1"}, {"Authorization": "Basic ä"}):
        assert (await gateway.post("/api/public/scores", score, headers))[0] == 401
        assert (await gateway.post("/api/public/ingestion", {"batch": []}, headers))[0] == 401
        async with gateway.http.get(gateway.url + "/api/public/projects", headers=headers) as response:
            assert response.status == 401
        assert (await gateway.post("/api/public/otel/v1/traces", b"", headers))[0] == 401
        assert await delete(gateway, score["id"], headers) == 401
    assert gateway.feedback() == []
    assert (await gateway.post("/api/public/scores", score, basic("k1")))[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid"),
        (b'{"name": "user-feedback", "traceId": "t"}', "value"),
        (b'{"name": "user-feedback", "value": 1}', "no traceId"),
        (b'{"name": "user-feedback", "value": 1, "traceId": "a\\r\\nb"}', "traceId"),
        (b'{"name": "user-feedback", "value": 1, "traceId": "t", "comment": "a\\u0000"}', "comment"),
        (json.dumps([0] * 1_001).encode(), "length <= 1000"),
    ],
)
async def test_bad_scores_get_a_clear_error(gateway: Gateway, body: bytes, said: str) -> None:
    status, answer, _ = await gateway.post("/api/public/scores", body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert gateway.feedback() == []


async def test_langfuses_own_client_scores_and_takes_it_back(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(api_keys=["k1"])
    for name in ("LANGFUSE_PUBLIC_KEY", "LANGFUSE_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)

    def use_it() -> None:
        client = langfuse.Langfuse(public_key="pk-lf-1", secret_key="k1", base_url=gateway.url, timeout=120)
        assert client.auth_check()
        client.create_score(
            name="user-feedback", value=True, data_type="BOOLEAN", trace_id=trace_of("m"), comment="yes"
        )
        client.create_score(name="user-feedback", value=0.1, trace_id=RESPONSE_ID, score_id="of-the-app")
        client.create_score(name="user-feedback", value="thumbs_up", data_type="CATEGORICAL", trace_id="my-own-id")
        client.create_score(name="toxicity", value=0.9, trace_id=trace_of("m"))
        client.create_score(name="user-feedback", value="meh", trace_id=trace_of("m"))
        with client.start_as_current_observation(name="chat"):
            pass  # its spans go to the same address
        client.flush()
        client.api.scores.delete("of-the-app")
        client.shutdown()

    await asyncio.to_thread(use_it)
    assert votes_of(gateway) == [
        ("up", f"sha256:{trace_of('m')}"),
        ("down", RESPONSE_ID),
        ("up", "my-own-id"),
        ("retract", RESPONSE_ID),
    ]
    assert gateway.feedback()[0].comment == "yes"


async def test_a_list_of_scores_says_how_many_were_taken(gateway: Gateway) -> None:
    good = {"traceId": RESPONSE_ID, "name": "user-feedback", "value": 1}
    assert (await gateway.post("/api/public/scores", [good, good | {"name": "toxicity"}]))[:2] == (
        202,
        {"message": "Accepted"},
    )
    status, body, _ = await gateway.post("/api/public/scores", [good | {"value": "meh"}, good, 1])
    assert (status, body["accepted"], body["rejected"]) == (207, 1, 2)
    assert "'meh'; expected one of" in body["errors"][0]["message"]
    assert votes_of(gateway) == [("up", RESPONSE_ID)] * 2
