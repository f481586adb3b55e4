"""What an app gets through the gateway is what it would get from the engine."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from sqlalchemy import Engine

from loop.content import content_of
from loop.rollout.routing import Route
from loop.store import write
from loop.store.routes import write_route
from services.gateway.media import without_media
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway, serve, set_route
from tests.gateway.test_connection import engine, saying
from tests.stub_engine import ADMIN_ROUTES, StubEngine

Stub = tuple[StubEngine, str]
ASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two choices": {"n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "tools": {"tools": [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]},
    "sampling": {"temperature": 0.2, "stop": ["\n"], "seed": 7, "user": "u1", "response_format": {"type": "text"}},
}


def same(direct: dict[str, Any], through: dict[str, Any]) -> bool:
    """Equal but for the id and the model's name."""
    return direct | {"id": 0, "model": 0} == through | {"id": 0, "model": 0}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
async def test_openai_gets_what_the_engine_answers(gateway: Gateway, stub: Stub, ask: dict[str, Any]) -> None:
    messages = HELLO["messages"]
    async with (
        openai.AsyncOpenAI(base_url=stub[1] + "/v1", api_key="none") as direct,
        openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none") as through,
    ):
        one = await direct.chat.completions.create(model="base", messages=messages, **ask)
        other = await through.chat.completions.create(model="assistant", messages=messages, **ask)
        assert other.model == "assistant"
        assert same(one.model_dump(), other.model_dump())

        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        one_stream = await direct.chat.completions.create(model="base", messages=messages, **ask, **options)
        other_stream = await through.chat.completions.create(model="assistant", messages=messages, **ask, **options)
        ones = [chunk.model_dump() async for chunk in one_stream]
        others = [chunk.model_dump() async for chunk in other_stream]
        assert len(ones) == len(others) > 3
        assert all(map(same, ones, others))
        assert {chunk["model"] for chunk in others} == {"assistant"}


async def test_the_sync_client_and_completions_work_alike(gateway: Gateway, stub: Stub) -> None:
    def ask(url: str, model: str) -> list[dict[str, Any]]:
        with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
            whole = client.completions.create(model=model, prompt="hello", n=2, logprobs=1)
            stream = client.completions.create(model=model, prompt="hello", stream=True)
            return [whole.model_dump(), *(chunk.model_dump() for chunk in stream)]

    direct = await asyncio.to_thread(ask, stub[1], "base")
    through = await asyncio.to_thread(ask, gateway.url, "assistant")
    assert len(direct) == len(through) > 3
    assert all(map(same, direct, through))


@pytest.mark.parametrize("is_stream", [False, True])
async def test_bodies_are_equal_to_the_byte(gateway: Gateway, stub: Stub, is_stream: bool) -> None:
    ask = {"stream": is_stream, "stub": {"chunks": 30}}
    async with gateway.http.post(stub[1] + "/v1/chat/completions", json=HELLO | ask | {"model": "base"}) as response:
        direct = (await response.read()).replace(b'"model":"base"', b'"model":"assistant"')
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=HELLO | ask) as response:
        through = await response.read()
    ids = re.compile(rb"chatcmpl-[0-9a-f-]+")
    assert ids.sub(b"", through) == ids.sub(b"", direct)


async def test_token_ids_are_there_for_those_who_ask(gateway: Gateway) -> None:
    _, body, _ = await gateway.chat(return_token_ids=True)
    assert body["prompt_token_ids"] == [2, 277, 3]
    assert body["choices"][0]["token_ids"]
    _, body, _ = await gateway.chat()
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (None, None)


async def test_the_engine_sees_the_request_as_it_was_sent(gateway: Gateway, stub: Stub) -> None:
    message = '{"role":"user","content":"\\u00e9 \\/"}'
    odd = f'{{"model": "assistant", "messages": [{message}], "x": 1.50, "big": 12345678901234567890123}}'
    await gateway.post("/v1/chat/completions", odd.encode(), {"traceparent": "00-ab-cd-01", "Cookie": "secret"})
    seen, headers = stub[0].requests[-1], stub[0].headers[-1]
    assert seen == json.loads(odd) | {"model": "base", "return_token_ids": True}
    assert headers["traceparent"] == "00-ab-cd-01"
    assert "Cookie" not in headers


async def test_response_ids_are_minted_and_in_headers_before_the_body(gateway: Gateway) -> None:
    _, body, response = await gateway.chat()
    assert body["id"] == response.headers["X-Thumbwheel-Response-Id"]
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{16}-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f-]{21}", body["id"])
    ask = HELLO | {"stream": True, "stub": {"fault": "stall"}}
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as response:
        assert response.headers["X-Thumbwheel-Response-Id"]  # the body has not ended, nor will it
        assert response.headers["X-Thumbwheel-Feedback-Token"]


async def test_chunks_are_passed_on_when_they_come(start: StartGateway) -> None:
    has_arrived = asyncio.Semaphore(0)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(10):
            chunk = {"choices": [{"index": 0, "delta": {"content": f"word{number}"}, "finish_reason": None}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await has_arrived.acquire()  # the next one comes when the app has got this one
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner, url = await serve(app)
    gateway = await start(engine={"urls": [url]})
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=HELLO | {"stream": True}) as response:
        async with asyncio.timeout(PATIENCE_S):
            for number in range(10):
                await response.content.readuntil(f"word{number}".encode())
                has_arrived.release()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
    await runner.cleanup()


# --- routes ----------------------------------------------------------------------------------------------------------


async def test_the_alias_moves_to_the_adapter_that_the_route_names(gateway: Gateway, stub: Stub, store: Engine) -> None:
    stub[0].models.add("assistant@v000007")
    await set_route(store, gateway, live="v000007")
    _, body, _ = await gateway.chat()
    assert body["model"] == "assistant"
    assert stub[0].requests[-1]["model"] == "assistant@v000007"
    (logged,) = gateway.responses()
    assert (logged.adapter, logged.arm, logged.generation) == ("assistant@v000007", "live", 1)


async def test_a_conversation_stays_on_its_arm(gateway: Gateway, stub: Stub, store: Engine) -> None:
    stub[0].models |= {"assistant@v000001", "assistant@v000002"}
    await set_route(store, gateway, live="v000001", canary="v000002", canary_share=0.5)
    for conversation in range(20):
        for _ in range(2):
            await gateway.chat(metadata={"conversation_id": f"c{conversation}"})
    adapters: dict[str | None, set[str]] = {}
    for logged in gateway.responses():
        adapters.setdefault(logged.conversation_id, set()).add(logged.adapter)
    assert len(adapters) == 20
    assert all(len(of_one) == 1 for of_one in adapters.values())
    assert len(set.union(*adapters.values())) == 2


async def test_base_and_served_versions_can_be_asked_for_by_name(gateway: Gateway, stub: Stub, store: Engine) -> None:
    stub[0].models |= {"assistant@v000001", "assistant@v000009"}
    await set_route(store, gateway, live="v000001")
    for name in ("base", "assistant@v000001"):
        status, body, _ = await gateway.chat(model=name)
        assert (status, body["model"]) == (200, name)
    for name in ("assistant@v000009", "gpt-4o"):
        status, body, _ = await gateway.chat(model=name)
        assert status == 404
        assert body["error"]["code"] == "model_not_found"
        assert name in body["error"]["message"]


async def test_an_adapter_that_the_engine_lost_is_looked_up_once_more(
    start: StartGateway, stub: Stub, store: Engine
) -> None:
    gateway = await start(route_poll_s=60)
    await gateway.parts.routes.is_known.wait()
    stub[0].models.add("assistant@v000002")
    with write(store) as connection:
        route = write_route(connection, Route("assistant", live="v000001"), 1)
    await gateway.parts.routes.refresh()
    with write(store) as connection:
        write_route(connection, Route("assistant", route.generation, live="v000002"), 2)
    status, _, _ = await gateway.chat()
    assert status == 200
    assert [seen["model"] for seen in stub[0].requests] == ["assistant@v000001", "assistant@v000002"]
    assert gateway.responses()[0].adapter == "assistant@v000002"


async def test_a_restarted_gateway_routes_without_the_store(
    start: StartGateway, stub: Stub, store: Engine, tmp_path: Path
) -> None:
    stub[0].models.add("assistant@v000003")
    await set_route(store, await start(), live="v000003")
    (tmp_path / "file").touch()
    gateway = await start(store=tmp_path / "file" / "store.db")  # cannot be opened
    assert not gateway.parts.routes.is_store_up
    assert (await gateway.chat())[0] == 200
    assert stub[0].requests[-1]["model"] == "assistant@v000003"


async def test_models_lists_the_alias(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none") as client:
        (model,) = (await client.models.list()).data
    assert (model.id, model.owned_by) == ("assistant", "thumbwheel")
    assert model.model_dump()["max_model_len"] == 512


# --- what is not let through -----------------------------------------------------------------------------------------


async def test_the_engines_admin_routes_are_out_of_reach(gateway: Gateway, stub: Stub) -> None:
    paths = [*ADMIN_ROUTES, "/v1/../v1/load_lora_adapter", "//v1/load_lora_adapter", "/health", "/v1/models/base", "/"]
    for path in paths:
        for method in ("GET", "POST", "DELETE"):
            async with gateway.http.request(method, gateway.url + path) as response:
                assert response.status == 404, path
                assert (await response.json())["error"]["code"] == "unknown_url"
    assert stub[0].admin_calls == 0


async def test_tokenize_is_passed_through_for_the_alias(gateway: Gateway, stub: Stub) -> None:
    status, body, _ = await gateway.post("/tokenize", {"model": "assistant", "prompt": "hello"})
    assert (status, body["tokens"]) == (200, [277])
    assert stub[0].requests[-1] == {"model": "base", "prompt": "hello"}


async def test_embeddings_are_passed_through_for_the_alias(gateway: Gateway, stub: Stub) -> None:
    status, body, _ = await gateway.post("/v1/embeddings", {"model": "assistant", "input": ["a", "b"]})
    assert (status, body["model"], [one["embedding"] for one in body["data"]]) == (200, "assistant", [[0.5], [0.5]])
    assert stub[0].requests[-1] == {"model": "base", "input": ["a", "b"]}
    assert gateway.responses() == []


@pytest.mark.parametrize("size", [6, 1_000_000])  # hashed on the event loop, and beside it
async def test_images_go_through_as_they_are_and_are_logged_as_hashes(
    gateway: Gateway, stub: Stub, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed_on = []

    def noting(messages: Any) -> Any:
        hashed_on.append(threading.current_thread().name)
        return without_media(messages)

    monkeypatch.setattr("services.gateway.capture.without_media", noting)
    image = base64.b64encode(bytes(size)).decode()
    text = {"type": "text", "text": "What is this?"}

    def asked(image: str) -> list[dict[str, Any]]:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;" + image, "detail": "low"}}
        return [{"role": "user", "content": [text, part]}]

    for stream in (False, True):
        assert (await gateway.chat(messages=asked("base64," + image), stream=stream))[0] == 200
        assert stub[0].requests[-1]["messages"] == asked("base64," + image)
    digest = hashlib.sha256(image.encode()).hexdigest()
    first, second = gateway.responses()
    assert first.messages == second.messages == asked("sha256," + digest)
    assert content_of(first, first.choices[0]).unfit == "media"
    assert [name == "MainThread" for name in hashed_on] == [size == 6] * 2


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not a JSON object"),
        (b"[1]", 400, "not a JSON object"),
        (json.dumps({str(n): 0 for n in range(1_001)}).encode(), 400, "at most 1000 fields"),
        (b'{"model": 5}', 400, "model is 5"),
        (b'{"model": "assistant", "messages": 5}', 400, "not iterable"),  # the engine's own error, passed on
        (b'{"model": "assistant", "x": "' + b"x" * 20_000 + b'"}', 413, "larger than 16384"),
    ],
)
async def test_bad_requests_get_a_clear_error(start: StartGateway, body: bytes, status: int, said: str) -> None:
    gateway = await start(max_body_bytes=16_384)
    found, answer, _ = await gateway.post("/v1/chat/completions", body)
    assert found == status
    assert said in answer["error"]["message"]


async def test_bodies_above_aiohttps_one_mebibyte_are_taken(gateway: Gateway, stub: Stub) -> None:
    text = "x" * 5_000_000
    assert (await gateway.chat(messages=[{"role": "user", "content": text}]))[0] == 200
    assert stub[0].requests[-1]["messages"][0]["content"] == text


async def test_a_key_is_needed_where_keys_are_configured(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1", "k2"])
    for headers in ({}, {"Authorization": "Bearer k3"}, {"Authorization": "k1 "}):
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/feedback"):
            status, body, _ = await gateway.post(
                path, HELLO if "feedback" not in path else {"value": "up", "message_id": "m"}, headers
            )
            assert (status, body["error"]["type"]) == (401, "authentication_error")
    assert (await gateway.post("/v1/chat/completions", HELLO, {"Authorization": "Bearer k2"}))[0] == 200


async def test_cors_is_for_the_configured_origins_only(start: StartGateway) -> None:
    gateway = await start(cors_origins=["https://app.example"])
    url = gateway.url + "/v1/feedback"
    asked = {"Origin": "https://app.example", "Access-Control-Request-Headers": "x-thumbwheel-feedback-token"}
    async with gateway.http.options(url, headers=asked) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert response.headers["Access-Control-Allow-Headers"] == "x-thumbwheel-feedback-token"
    async with gateway.http.options(url, headers={"Origin": "https://evil.example"}) as response:
        assert response.status == 403
        assert "Access-Control-Allow-Origin" not in response.headers
    for stream in (False, True):
        ask = HELLO | {"stream": stream}
        async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask, headers=asked) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert "X-Thumbwheel-Feedback-Token" in response.headers["Access-Control-Expose-Headers"]
    async with gateway.http.get(gateway.url + "/nothing", headers=asked) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"  # or its error stays unread


# --- engines that fail -----------------------------------------------------------------------------------------------


async def test_the_engines_errors_come_through(gateway: Gateway) -> None:
    status, body, _ = await gateway.chat(stub={"fault": "500"})
    assert status == 500
    assert body["error"]["message"] == "EngineCore encountered an issue."
    assert gateway.responses() == []


async def test_an_engine_that_is_dead_or_hangs_up_is_a_503_and_one_that_speaks_no_http_a_502(
    start: StartGateway,
) -> None:
    dead, hasty = await start(engine={"urls": ["http://127.0.0.1:9"]}), await start()
    for gateway in (dead, hasty):
        status, body, response = await gateway.chat(stub={"fault": "reset"})
        assert (status, body["error"]["type"], body["error"]["code"]) == (503, "server_error", "engine_unavailable")
        assert response.headers["Retry-After"] == "1"
    async with engine(saying(b"SSH-2.0-OpenSSH\r\n")) as url:
        gateway = await start(engine={"urls": [url]})
        for stream in (False, True):
            status, body, _ = await gateway.chat(stream=stream)
            assert (status, body["error"]["code"]) == (502, "engine_failed")
        async with gateway.http.get(gateway.url + "/v1/models") as models:
            assert models.status == 502


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"data": null}', b'{"data": [1]}', b"\xff"])
async def test_a_list_of_models_that_is_none_is_a_502(start: StartGateway, body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with engine(saying(head + body)) as url:
        gateway = await start(engine={"urls": [url]})
        async with gateway.http.get(gateway.url + "/v1/models") as response:
            assert response.status == 502
            assert "cannot be read" in (await response.json())["error"]["message"]


async def test_an_engine_that_is_too_slow_is_a_503(start: StartGateway) -> None:
    gateway = await start(engine={"request_timeout_s": 0.2})
    status, body, _ = await gateway.chat(stub={"fault": "slow"})
    assert (status, body["error"]["code"]) == (503, "engine_timeout")


async def test_a_refused_connection_goes_to_another_replica(start: StartGateway, stub: Stub) -> None:
    gateway = await start(engine={"urls": ["http://127.0.0.1:9", stub[1]]})
    assert {(await gateway.chat())[0] for _ in range(10)} == {200}
    assert [replica.is_up for replica in gateway.parts.engines.replicas] == [False, True]


async def test_the_least_loaded_replica_takes_the_request(start: StartGateway, stub: Stub) -> None:
    all_there = asyncio.Barrier(8)

    async def count(request: web.Request) -> web.Response:
        seen.append(request.url.port)
        await all_there.wait()
        return web.json_response({"choices": []})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    seen: list[int | None] = []
    runners = []
    for _ in range(2):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", count)
        app.router.add_get("/health", health)
        runners.append(await serve(app))
    gateway = await start(engine={"urls": [url for _, url in runners]})
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(gateway.chat() for _ in range(8)))
    assert [seen.count(runner.addresses[0][1]) for runner, _ in runners] == [4, 4]
    for runner, _ in runners:
        await runner.cleanup()
