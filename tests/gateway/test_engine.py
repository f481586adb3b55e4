"""The gateway in front of the real vLLM: what the stub only claims."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from services.gateway.proxy import not_served
from tests.conftest import RealEngine
from tests.gateway.conftest import Gateway, StartGateway

pytestmark = pytest.mark.engine
MESSAGES: Any = [{"role": "user", "content": "Where is my order?"}]


@pytest.fixture
async def through(start: StartGateway, engine: RealEngine) -> Gateway:
    return await start(engine={"urls": [engine.url], "base_name": engine.base_name})


@pytest.fixture
async def clients(through: Gateway, engine: RealEngine) -> AsyncIterator[tuple[openai.AsyncOpenAI, openai.AsyncOpenAI]]:
    async with (
        openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none") as direct,
        openai.AsyncOpenAI(base_url=through.url + "/v1", api_key="none") as proxied,
    ):
        yield direct, proxied


def content_of(answer: dict[str, Any]) -> dict[str, Any]:
    """What must not differ between two calls for the same."""
    return answer | {"id": 0, "created": 0, "model": 0}


@pytest.mark.parametrize(
    "ask", [{}, {"n": 2, "logprobs": True}, {"stop": ["e"], "stream_options": {"include_usage": True}}]
)
async def test_vllm_answers_the_same_through_the_gateway(
    clients: tuple[openai.AsyncOpenAI, openai.AsyncOpenAI], through: Gateway, engine: RealEngine, ask: dict[str, Any]
) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "seed": 1} | ask
    for stream in (False, True):
        if not stream:
            asked_now = {name: value for name, value in asked.items() if name != "stream_options"}
        else:
            asked_now = asked | {"stream": True}
        answers = []
        for client, model in zip(clients, (engine.base_name, "assistant"), strict=True):
            answer = await client.chat.completions.create(model=model, **asked_now)
            chunks = [chunk.model_dump() async for chunk in answer] if stream else [answer.model_dump()]
            answers.append(chunks)
        direct, proxied = answers
        if ask.get("n"):  # which of two choices comes first is chance
            direct, proxied = (sorted(map(json.dumps, map(content_of, chunks))) for chunks in answers)  # type: ignore[assignment]
            assert direct == proxied
        else:
            assert list(map(content_of, direct)) == list(map(content_of, proxied))
    one, other = through.responses()
    assert one.choices == other.choices
    assert all(choice.token_ids for choice in one.choices)
    assert one.prompt_token_ids


async def test_vllm_takes_the_minted_id(through: Gateway) -> None:
    for path, fields in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "Hello"})):
        _, body, response = await through.post(path, {"model": "assistant", "max_tokens": 2} | fields)
        assert body["id"] == response.headers["X-Thumbwheel-Response-Id"]


async def test_vllm_stops_when_the_client_has_left(through: Gateway, engine: RealEngine) -> None:
    ask = {"model": "assistant", "messages": MESSAGES, "max_tokens": 400, "stream": True, "ignore_eos": True}
    async with through.http.post(through.url + "/v1/chat/completions", json=ask) as response:
        await response.content.readany()
        response.close()
    async with aiohttp.ClientSession() as http, asyncio.timeout(1):
        while True:
            async with http.get(engine.url + "/metrics") as metrics:
                lines = (await metrics.text()).splitlines()
            running = [float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{")]
            if running and sum(running) == 0:
                break
            await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        while not through.responses():
            await asyncio.sleep(0.02)
    assert through.responses()[0].aborted


async def test_every_other_route_of_the_engine_is_refused(through: Gateway, engine: RealEngine) -> None:
    async with through.http.get(engine.url + "/openapi.json") as response:
        paths = (await response.json())["paths"]
    table = through.app.router
    served = {resource.canonical for resource in table.resources()}
    refused = [path for path in paths if path not in served]
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} <= set(refused)
    for path in refused:
        for method in paths[path]:
            async with through.http.request(method, through.url + path.replace("{", "").replace("}", "")) as response:
                assert response.status == 404, path
    assert not_served in {route.handler for route in table.routes()}
