"""Chats and thumbs as apps send them: ids that collide, retries under one feedback_id, votes without an answer."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiohttp

PAUSE_S = 0.03
TIMEOUT_S = 1.0
TRIES = 4
MESSAGES = 300
AWAY = (aiohttp.ClientError, TimeoutError, OSError)  # killed, or stopped, meanwhile
_CHAT: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Promised:
    """What the gateways have promised to keep."""

    responses: set[str] = field(default_factory=set)
    """Ids of responses that a client has got to the last byte."""
    feedback: set[str] = field(default_factory=set)
    """Ids of feedback that got a 202."""
    refused: list[str] = field(default_factory=list)
    """Chats and votes that got no good answer within TIMEOUT_S, in words."""


async def put_load(urls: list[str], users: int, seed: int, promised: Promised, stop: asyncio.Event) -> None:
    """Let users chat and vote through any of the gateways until `stop` is set."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http, asyncio.TaskGroup() as group:
        for n in range(users):
            group.create_task(_use(http, urls, random.Random(f"{seed} {n}"), promised, stop))


async def _use(
    http: aiohttp.ClientSession, urls: list[str], random_: random.Random, promised: Promised, stop: asyncio.Event
) -> None:
    known: deque[str] = deque(maxlen=50)
    while not stop.is_set():
        try:
            await _chat(http, random_.choice(urls), random_, known, promised)
        except AWAY as exc:  # what a gateway has not promised it may forget
            promised.refused.append(f"chat: {exc!r}")
        for _ in range(random_.choice([0, 1, 1, 2])):
            await _vote(http, urls, random_, known, promised)
        await asyncio.sleep(PAUSE_S)


async def _chat(
    http: aiohttp.ClientSession, url: str, random_: random.Random, known: deque[str], promised: Promised
) -> None:
    headers = {}
    if random_.random() < 0.5:
        headers["X-Thumbwheel-Message-Id"] = f"message-{random_.randrange(MESSAGES)}"
    body = _CHAT | {"stream": random_.random() < 0.3, "n": random_.choice([1, 1, 1, 2])}
    async with http.post(url + "/v1/chat/completions", json=body, headers=headers) as answer:
        await answer.read()
        if answer.status != 200:
            promised.refused.append(f"chat: {answer.status}")
        else:
            id = answer.headers["X-Thumbwheel-Response-Id"]
            known.append(id)
            promised.responses.add(id)


async def _vote(
    http: aiohttp.ClientSession, urls: list[str], random_: random.Random, known: deque[str], promised: Promised
) -> None:
    """One vote, sent until a gateway has taken it, as an app does; now and then once more after that."""
    vote: dict[str, Any] = {
        "value": random_.choice(["up", "up", "down", "down", "retract"]),
        "rater": random_.choice(["ann", "bob", "cleo"]),
        "feedback_id": str(uuid4()),
        "choice_index": random_.choice([0, 0, 0, 1]),
    }
    if known and random_.random() < 0.7:
        vote["response_id"] = random_.choice(known)
    else:
        vote["message_id"] = f"message-{random_.randrange(MESSAGES)}"
    for _ in range(TRIES):
        try:
            async with http.post(random_.choice(urls) + "/v1/feedback", json=vote) as answer:
                if answer.status == 202:
                    promised.feedback.add(vote["feedback_id"])
                    if random_.random() < 0.95:
                        return
                else:
                    promised.refused.append(f"vote: {answer.status}")
        except AWAY as exc:
            promised.refused.append(f"vote: {exc!r}")
            await asyncio.sleep(PAUSE_S)
