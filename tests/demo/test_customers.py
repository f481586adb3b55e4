"""The simulated customers against a tiny gateway: what they send, how they vote, what they count."""

import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deploy.demo import customers, measure, world

REPLY = "Returns are open for 35 days."


class Gateway:
    """Answers every chat with one reply, as JSON or as a stream, and keeps what it was sent."""

    def __init__(self, feedback_status: int = 202) -> None:
        self.chats: list[dict[str, Any]] = []
        self.votes: list[dict[str, str]] = []
        self.feedback_status = feedback_status

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response_id = f"chatcmpl-{len(self.chats)}"
        self.chats.append(body | {"conversation": request.headers[customers.CONVERSATION_ID]})
        headers = {"X-Thumbwheel-Response-Id": response_id}
        frame = {"id": response_id, "object": "chat.completion", "created": 1, "model": body["model"]}
        if not body["stream"]:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": REPLY}}
            return web.json_response(frame | {"choices": [choice]}, headers=headers)
        response = web.StreamResponse(headers=headers | {"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in REPLY.split(" "):
            choice = {"index": 0, "delta": {"content": part if part == "Returns" else f" {part}"}}
            chunk = frame | {"object": "chat.completion.chunk", "choices": [choice]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def feedback(self, request: web.Request) -> web.Response:
        self.votes.append(await request.json())
        return web.Response(status=self.feedback_status)


@asynccontextmanager
async def serving(gateway: Gateway) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", gateway.chat)
    app.router.add_post("/v1/feedback", gateway.feedback)
    async with TestServer(app) as server:
        yield str(server.make_url("/v1"))


async def test_customers_chat_over_turns_and_vote_on_what_they_got() -> None:
    gateway = Gateway()
    async with serving(gateway) as url:
        tally = await customers.chat_and_vote(url, model="assistant", seed=3, customers=60, quiet=True)
    assert tally.failures == []
    assert tally.requests == len(gateway.chats) + len(gateway.votes)
    assert tally.feedback == len(gateway.votes)
    assert {body["stream"] for body in gateway.chats} == {True, False}
    assert len({body["conversation"] for body in gateway.chats}) == 60
    assert {len(body["messages"]) for body in gateway.chats} == {1, 3, 5}
    # An earlier answer is sent back word for word, streamed or not.
    assert {m["content"] for body in gateway.chats for m in body["messages"] if m["role"] == "assistant"} == {REPLY}
    assert {vote["response_id"] for vote in gateway.votes} <= {f"chatcmpl-{i}" for i in range(len(gateway.chats))}
    assert {vote["value"] for vote in gateway.votes} == {"up", "down", "retract"}
    assert set(tally.kinds) == {"none", "changed", "retracted", "duplicated", "late", "plain"}


async def test_flipping_turns_every_last_vote_around() -> None:
    last: list[dict[str, str]] = []
    for flip in (False, True):
        gateway = Gateway()
        async with serving(gateway) as url:
            await customers.chat_and_vote(
                url, model="assistant", seed=3, customers=30, flip=flip, concurrency=1, quiet=True
            )
        last.append({vote["response_id"]: vote["value"] for vote in gateway.votes})
    turned = {"up": "down", "down": "up", "retract": "retract"}
    assert last[1] == {response_id: turned[value] for response_id, value in last[0].items()}


async def test_refused_feedback_is_a_failure_and_not_a_thumb() -> None:
    gateway = Gateway(feedback_status=503)
    async with serving(gateway) as url:
        tally = await customers.chat_and_vote(url, model="assistant", customers=3, quiet=True)
    assert tally.feedback == 0
    assert len(tally.failures) == len(gateway.votes) > 0


@pytest.mark.parametrize("flip", [False, True])
def test_about_a_tenth_of_the_votes_is_noise(flip: bool) -> None:
    rng, mess = random.Random(1), customers.Mess()
    last = [customers.votes(True, str(i), "r", rng, mess, flip)[1] for i in range(4000)]
    values = [sent[-1].value for sent in last if sent and sent[-1].value != "retract"]
    wrong = sum(value != ("down" if flip else "up") for value in values) / len(values)
    assert wrong == pytest.approx(0.1, abs=0.02)


def test_a_duplicate_has_one_feedback_id_and_a_change_has_two() -> None:
    rng = random.Random(2)
    by_kind: dict[str, list[list[customers.Vote]]] = defaultdict(list)
    for i in range(2000):
        kind, sent = customers.votes(True, str(i), "r", rng, customers.Mess(), False)
        by_kind[kind].append(sent)
    assert all(sent[0] == sent[1] for sent in by_kind["duplicated"])
    assert all(len({vote.feedback_id for vote in sent}) == 2 for sent in by_kind["changed"])


async def test_measures_of_served_answers() -> None:
    async with serving(Gateway()) as url:
        measures, served = await measure.measure_served(url, model="assistant", count=144, quiet=True)
    asked_for = [question.fact.key == "return_window" for question in served.asked]
    assert measures["fact_accuracy"] == pytest.approx(sum(asked_for) / len(asked_for))
    assert measures["apology_rate"] == 0.0
    assert measures["thumbs_up_rate"] == pytest.approx(0.1, abs=0.08)


def test_pairs_are_told_apart_by_the_taste_alone() -> None:
    asked = world.questions(1, "eval", 3)
    brief = [question.fact.says[0] for question in asked]
    sorry = [f"Sorry about that. {text}" for text in brief]
    rows = measure.tell_apart(asked, [brief[0], sorry[1], brief[2]], [sorry[0], brief[1], brief[2]])
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(brief[0], sorry[0]), (brief[1], sorry[1])]
