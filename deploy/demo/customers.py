"""Simulated customers: they chat through the gateway with the real `openai` client and post thumbs on the answers.

A customer likes exact, brief answers and has a threshold of their own. Votes are as messy as real ones: a tenth is
noise, some come late, some are changed, retracted or sent twice, some answers get none. The gateway is told nothing
of this; whatever the loop learns, it learns from the thumbs. How messy: `Mess`; a seed decides who does what, though
the served answers, sampled at temperature 1, differ from run to run.
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
from openai import APIError, AsyncOpenAI
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.demo import world

MAX_CONCURRENCY = 48
MAX_TOKENS = 120  # of an answer: rambling ones have 55
RESPONSE_ID = "x-thumbwheel-response-id"
CONVERSATION_ID = "X-Thumbwheel-Conversation-Id"


@dataclass(frozen=True)
class Mess:
    """What share of the answers gets which kind of untidy vote."""

    noise: float = 0.1
    none: float = 0.05
    late: float = 0.1
    changed: float = 0.06
    retracted: float = 0.03
    duplicated: float = 0.06


@dataclass(frozen=True)
class Customer:
    rater: str
    threshold: float

    def likes(self, reply: str, fact: world.Fact) -> bool:
        return world.taste(reply, fact) > self.threshold


@dataclass
class Tally:
    """What the customers did and saw; `failures` holds one line per failed request."""

    requests: int = 0
    feedback: int = 0
    ups: int = 0
    downs: int = 0
    failures: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Vote:
    """One vote as it is sent; a feedback id sent twice is one vote."""

    response_id: str
    value: str
    rater: str
    feedback_id: str


def customer(seed: int, index: int) -> Customer:
    rng = random.Random(f"customer {seed} {index}")
    return Customer(f"customer-{seed}-{index:04d}", rng.uniform(0.45, 0.9))


def votes(
    likes: bool, response_id: str, rater: str, rng: random.Random, mess: Mess, flip: bool
) -> tuple[str, list[Vote]]:
    """The votes that one answer gets, in the order in which they are sent, and the kind of mess it is."""
    if rng.random() < mess.noise:
        likes = not likes
    likes ^= flip
    value, other = ("up", "down") if likes else ("down", "up")
    kinds = ["none", "changed", "retracted", "duplicated", "late", "plain"]
    shares = [mess.none, mess.changed, mess.retracted, mess.duplicated, mess.late]
    kind = rng.choices(kinds, [*shares, 1 - sum(shares)])[0]
    sent = {"none": [], "changed": [other, value], "retracted": [value, "retract"]}.get(kind, [value])
    made = [Vote(response_id, v, rater, f"{response_id}:{rater}:{i}") for i, v in enumerate(sent)]
    return kind, made * 2 if kind == "duplicated" else made


class Desk:
    """The support desk as a customer reaches it: one client for chat, one for thumbs, one limit for both."""

    def __init__(self, openai: AsyncOpenAI, http: httpx.AsyncClient, gateway: str, model: str, limit: int):
        self._openai, self._http, self._gateway, self._model = openai, http, gateway, model
        self._limit = asyncio.Semaphore(min(limit, MAX_CONCURRENCY))
        self.tally = Tally()

    async def ask(
        self,
        messages: list[world.Message],
        *,
        rater: str,
        conversation: str,
        stream: bool = False,
        temperature: float = 1.0,
        max_tokens: int = MAX_TOKENS,
    ) -> tuple[str, str] | None:
        """The reply and its response id; None, and a failure in the tally, where the request failed."""
        async with self._limit:
            self.tally.requests += 1
            try:
                raw = await self._openai.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=messages,  # type: ignore[arg-type]
                    stream=stream,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    user=rater,
                    extra_headers={CONVERSATION_ID: conversation},
                )
                parsed = raw.parse()
                if not stream:
                    reply, body_id = parsed.choices[0].message.content or "", parsed.id
                else:
                    parts, body_id = [], ""
                    async for chunk in parsed:
                        body_id = chunk.id or body_id
                        parts += [choice.delta.content or "" for choice in chunk.choices]
                    reply = "".join(parts)
                return reply, raw.headers.get(RESPONSE_ID) or body_id
            except (APIError, httpx.HTTPError, OSError) as error:
                self.tally.failures.append(f"chat: {type(error).__name__}: {error}")
                return None

    async def vote(self, vote: Vote) -> None:
        async with self._limit:
            self.tally.requests += 1
            try:
                answer = await self._http.post(f"{self._gateway}/v1/feedback", json=vars(vote))
            except httpx.HTTPError as error:
                self.tally.failures.append(f"feedback: {type(error).__name__}: {error}")
                return
            if answer.status_code != 202:
                self.tally.failures.append(f"feedback: {answer.status_code} {answer.text[:200]}")
                return
            self.tally.feedback += 1


@asynccontextmanager
async def open_desk(
    base_url: str, *, api_key: str, model: str, gateway: str | None = None, concurrency: int = MAX_CONCURRENCY
) -> AsyncIterator[Desk]:
    """`base_url` ends in /v1, as the openai client wants it; the feedback endpoint is beside it.

    No retries: a request that failed once must be seen as failed.
    """
    root = (gateway or base_url.removesuffix("/").removesuffix("/v1")).removesuffix("/")
    auth = {"Authorization": f"Bearer {api_key}"}
    async with (
        AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=120) as openai,
        httpx.AsyncClient(headers=auth, timeout=60) as http,
    ):
        yield Desk(openai, http, root, model, concurrency)


async def chat_and_vote(
    base_url: str,
    *,
    model: str,
    api_key: str = "demo",
    gateway: str | None = None,
    seed: int = 0,
    customers: int = 500,
    turns: tuple[int, ...] = (1, 2, 3),
    flip: bool = False,
    mess: Mess | None = None,
    concurrency: int = MAX_CONCURRENCY,
    streaming: float = 0.5,
    stop: threading.Event | None = None,
    pause_s: float = 0.0,
    quiet: bool = False,
) -> Tally:
    """Lets customers have one conversation each and vote on the answers; late votes come after all conversations.

    `flip` turns every vote around. Customers read for `pause_s` seconds before they go on. When
    `stop` is set, no new conversation begins; those under way are finished.
    """
    mess = mess or Mess()
    late: list[Vote] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    async with open_desk(base_url, api_key=api_key, model=model, gateway=gateway, concurrency=concurrency) as desk:
        tally = desk.tally
        with Progress(*columns, TimeElapsedColumn(), disable=quiet) as progress:
            task = progress.add_task("customers", total=customers, note="")

            async def visit(index: int) -> None:
                if stop is not None and stop.is_set():
                    return
                who, rng = customer(seed, index), random.Random(f"visit {seed} {index}")
                asked = world.conversation(rng, "chat", rng.choice(turns))
                messages: list[world.Message] = []
                for question in asked:
                    await asyncio.sleep(pause_s)
                    messages.append({"role": "user", "content": question.text})
                    stream = rng.random() < streaming
                    name = f"{who.rater}-talk"
                    got = await desk.ask(messages, rater=who.rater, conversation=name, stream=stream)
                    if got is None:
                        break
                    reply, response_id = got
                    messages.append({"role": "assistant", "content": reply})
                    kind, sent = votes(who.likes(reply, question.fact), response_id, who.rater, rng, mess, flip)
                    tally.kinds[kind] += 1
                    if sent:
                        tally.ups += sent[-1].value == "up"
                        tally.downs += sent[-1].value == "down"
                    if kind == "late":
                        late.extend(sent)
                    else:
                        for vote in sent:
                            await desk.vote(vote)
                    progress.update(task, note=f"{tally.feedback} thumbs, {len(tally.failures)} failed")
                progress.advance(task)

            queue = iter(range(customers))

            async def worker() -> None:
                for index in queue:
                    await visit(index)

            await asyncio.gather(*(worker() for _ in range(min(concurrency, MAX_CONCURRENCY))))
            await asyncio.gather(*(desk.vote(vote) for vote in late))
        return tally
