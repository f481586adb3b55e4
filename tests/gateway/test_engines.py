"""Engines that are many, slow, or die; and what is bounded on the way to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from sqlalchemy import Engine

from services.gateway import engines
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway, serve, set_route, until
from tests.ports import free_port
from tests.stub_engine import StubEngine, create_stub

Stub = tuple[StubEngine, str]
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def replica(answer: Answer, port: int = 0) -> tuple[web.AppRunner, str]:
    """An engine that is healthy, and answers a chat as the test says."""

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


# --- bounds ----------------------------------------------------------------------------------------------------------


async def test_more_than_aiohttps_hundred_connections_are_open_upstream(start: StartGateway) -> None:
    all_there = asyncio.Barrier(150)

    async def answer(_: web.Request) -> web.Response:
        await all_there.wait()
        return web.json_response({"choices": []})

    runner, url = await replica(answer)
    gateway = await start(engine={"urls": [url]})
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as gateway.http,
        asyncio.timeout(PATIENCE_S),
    ):
        answers = await asyncio.gather(*(gateway.chat() for _ in range(150)))
    assert {status for status, _, _ in answers} == {200}
    await runner.cleanup()


async def test_an_answer_may_take_longer_than_aiohttps_300_seconds(start: StartGateway) -> None:
    gateway = await start(engine={"request_timeout_s": 1234})
    with await gateway.parts.engines.get("/v1/models") as answer:
        assert 1200 < answer.deadline_s - asyncio.get_running_loop().time() <= 1234


async def test_above_the_bound_requests_are_a_503_at_once(start: StartGateway, stub: Stub) -> None:
    gateway = await start(max_open_requests=2)
    ask = HELLO | {"stream": True, "stub": {"chunks": 5, "fault": "stall"}}
    async with (
        gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as one,
        gateway.http.post(gateway.url + "/v1/completions", json=ask | {"prompt": "x"}) as other,
    ):
        assert (one.status, other.status) == (200, 200)
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
            status, body, response = await gateway.post(path, HELLO)
            assert (status, body["error"]["code"], response.headers["Retry-After"]) == (503, "overloaded", "1")
        async with gateway.http.get(gateway.url + "/v1/models") as response:
            assert response.status == 503
        # What is no load for the engine is taken as before.
        assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202
        assert len(stub[0].requests) == 2
        one.close()
        other.close()
    await until(lambda: not gateway.parts.open_requests)
    assert (await gateway.chat())[0] == 200


async def test_above_the_bound_of_their_bytes_requests_are_a_503_at_once(start: StartGateway, stub: Stub) -> None:
    gateway = await start(max_open_bytes=1_000_000, max_body_bytes=600_000)
    large = HELLO | {"padding": "x" * 550_000, "stream": True, "stub": {"fault": "stall", "chunks": 3}}
    url = gateway.url + "/v1/chat/completions"

    async def chunked(body: Any) -> AsyncIterator[bytes]:
        yield json.dumps(body).encode()

    async with gateway.http.post(url, json=large) as one:
        assert one.status == 200
        for refused in (json.dumps(large).encode(), chunked(large)):
            async with gateway.http.post(url, data=refused) as response:
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
                assert "bytes, which is about the most" in (await response.json())["error"]["message"]
        for taken in (json.dumps(HELLO).encode(), chunked(HELLO)):
            async with gateway.http.post(url, data=taken) as response:
                assert response.status == 200
        assert len(stub[0].requests) == 3
        one.close()
    await until(lambda: not gateway.parts.room.held)
    assert (await gateway.chat(padding="x" * 550_000))[0] == 200
    alone = await start(max_open_bytes=1024)
    assert (await alone.chat(padding="x" * 5_000))[0] == 200


async def test_every_503_says_when_to_try_again(start: StartGateway) -> None:
    for engine in ({"urls": ["http://127.0.0.1:9"]}, {"request_timeout_s": 0.2}):
        gateway = await start(engine=engine)
        for ask in ({"stub": {"fault": "slow"}}, {"stub": {"fault": "slow"}, "stream": True}):
            status, _, response = await gateway.chat(**ask)
            assert (status, response.headers["Retry-After"]) == (503, "1")


# --- replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "sent"),
    [(False, "nothing"), (False, "headers"), (False, "half a body"), (True, "nothing"), (True, "headers")],
)
async def test_an_engine_that_dies_before_the_first_byte_is_sent_fails_no_request(
    start: StartGateway, stub: Stub, stream: bool, sent: str
) -> None:
    asked = 0

    async def die(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        assert request.transport is not None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream" if stream else "application/json"})
        if sent != "nothing":
            response.content_length = 1000
            await response.prepare(request)
        if sent == "half a body":
            await response.write(b'{"id": "')
        request.transport.close()
        return response

    runner, url = await replica(die)
    gateway = await start(engine={"urls": [url, stub[1]]})
    for _ in range(4):
        assert (await gateway.chat(stream=stream))[0] == 200
    assert asked > 0
    assert {replica.open_requests for replica in gateway.parts.engines.replicas} == {0}
    assert len(gateway.responses()) == 4
    await runner.cleanup()


async def test_a_dead_replica_is_taken_out_and_back_without_a_failed_request(
    start: StartGateway, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "HEALTH_EVERY_S", 0.05)
    other = StubEngine()
    runner, url = await serve(create_stub(other), port := free_port())
    gateway = await start(engine={"urls": [url, stub[1]]})
    first, second = gateway.parts.engines.replicas
    statuses: list[int] = []
    stop = asyncio.Event()

    async def chat() -> None:
        while not stop.is_set():
            statuses.append((await gateway.chat())[0])

    chats = [asyncio.create_task(chat()) for _ in range(4)]
    await until(lambda: len(other.requests) > 10)
    await runner.cleanup()
    await until(lambda: not first.is_up)
    assert gateway.parts.engines.is_up
    at = len(stub[0].requests)
    await until(lambda: len(stub[0].requests) > at + 20)
    again = StubEngine()
    runner, _ = await serve(create_stub(again), port)
    await until(lambda: len(again.requests) > 10)
    assert first.is_up
    assert second.is_up
    stop.set()
    await asyncio.gather(*chats)
    assert set(statuses) == {200}
    await runner.cleanup()


@pytest.mark.parametrize("fault", ["slow", "stall"])  # before its headers, and after them, with no byte of the body
async def test_a_replica_that_hangs_keeps_no_request_whose_first_byte_it_has_not_sent(
    start: StartGateway, stub: Stub, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(engines, "HEALTH_EVERY_S", 0.05)
    monkeypatch.setattr(engines, "HEALTH_TIMEOUT_S", 2.0)
    hangs, released = asyncio.Event(), asyncio.Event()

    async def health(_: web.Request) -> web.Response:
        if hangs.is_set():
            await released.wait()
        return web.Response()

    async def hang(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if fault == "stall":
            await response.prepare(request)
        hangs.set()
        await released.wait()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", hang)
    app.router.add_get("/health", health)
    runner, url = await serve(app)
    gateway: Gateway = await start(engine={"urls": [url, stub[1]], "request_timeout_s": 600})
    async with asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(*(gateway.chat(stream=True) for _ in range(4)))
    assert hangs.is_set()
    assert [status for status, _, _ in answers] == [200] * 4
    assert len(stub[0].requests) == 4
    assert {replica.open_requests for replica in gateway.parts.engines.replicas} == {0}
    assert not gateway.parts.engines.replicas[0].unanswered
    released.set()
    await until(lambda: gateway.parts.engines.replicas[0].is_up)
    await runner.cleanup()


async def test_the_only_engine_keeps_its_requests_while_it_hangs(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "HEALTH_EVERY_S", 0.05)
    monkeypatch.setattr(engines, "HEALTH_TIMEOUT_S", 0.05)
    asked, missed = 0, asyncio.Event()

    async def health(_: web.Request) -> web.Response:
        await missed.wait()
        return web.Response()

    async def answer(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        await until(lambda: gateway.parts.engines.replicas[0].misses > engines.DEAD_AFTER_MISSES)
        return web.json_response({"choices": []})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_get("/health", health)
    runner, url = await serve(app)
    gateway: Gateway = await start(engine={"urls": [url]})
    assert (await gateway.chat())[0] == 200
    assert asked == 1
    missed.set()
    await runner.cleanup()


async def test_an_engine_that_is_ill_gets_no_requests(
    start: StartGateway, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "HEALTH_EVERY_S", 0.05)
    is_well = True
    asked: list[Any] = []

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=200 if is_well else 503)

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.json_response({"choices": []})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_get("/health", health)
    runner, url = await serve(app)
    gateway: Gateway = await start(engine={"urls": [url, stub[1]]})
    is_well = False
    await until(lambda: not gateway.parts.engines.replicas[0].is_up)
    asked.clear()
    for _ in range(5):
        assert (await gateway.chat())[0] == 200
    assert asked == []
    await runner.cleanup()


async def test_a_restarted_replica_gets_no_request_for_an_adapter_before_it_has_it_again(
    start: StartGateway, stub: Stub, store: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LACKS_FOR_S", PATIENCE_S)
    restarted = StubEngine()
    runner, url = await serve(create_stub(restarted))
    stub[0].models.add("assistant@v000001")
    gateway: Gateway = await start(engine={"urls": [url, stub[1]]})
    await set_route(store, gateway, live="v000001")
    for _ in range(5):
        for path in ("/v1/chat/completions", "/tokenize"):
            assert (await gateway.post(path, HELLO))[0] == 200
    assert len(restarted.requests) == 1  # and then it was known
    assert (await gateway.chat(model="base"))[0] == 200
    assert len(restarted.requests) == 2  # what it has, it is asked for
    assert {logged.adapter for logged in gateway.responses()} == {"assistant@v000001", "base"}

    restarted.models.add("assistant@v000001")  # the scheduler's work
    monkeypatch.setattr(gateway.parts.engines.replicas[0], "lacks", {})  # the time is over
    assert (await gateway.chat())[0] == 200
    assert len(restarted.requests) == 3
    assert {replica.open_requests for replica in gateway.parts.engines.replicas} == {0}
    await runner.cleanup()


async def test_where_no_engine_has_the_adapter_the_app_is_told_to_try_again(
    start: StartGateway, stub: Stub, store: Engine
) -> None:
    gateway: Gateway = await start()
    await set_route(store, gateway, live="v000001")
    for path in ("/v1/chat/completions", "/tokenize"):
        status, body, response = await gateway.post(path, HELLO)
        assert (status, body["error"]["code"], response.headers["Retry-After"]) == (503, "adapter_not_loaded", "1")
    assert gateway.responses() == []
    stub[0].models.add("assistant@v000001")
    assert (await gateway.chat())[0] == 200


async def test_what_an_engine_does_not_serve_is_no_lost_adapter(start: StartGateway) -> None:
    async def chat(_: web.Request) -> web.Response:
        return web.json_response({"choices": []})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    runner, url = await serve(app)
    gateway: Gateway = await start(engine={"urls": [url]})
    assert (await gateway.post("/v1/embeddings", {"model": "assistant", "input": []}))[0] == 404
    await runner.cleanup()


@pytest.mark.parametrize("status", [500, 503])
async def test_an_error_of_an_engine_that_is_ill_is_not_the_apps(start: StartGateway, stub: Stub, status: int) -> None:
    is_well = True
    asked: list[web.Request] = []

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=200 if is_well else 503)

    async def fail(request: web.Request) -> web.Response:
        asked.append(request)
        return web.json_response({"error": {"message": "EngineCore encountered an issue."}}, status=status)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", fail)
    app.router.add_get("/health", health)
    runner, url = await serve(app)
    gateway: Gateway = await start(engine={"urls": [url, stub[1]]})
    found, body, _ = await gateway.chat()
    assert (found, body["error"]["message"]) == (status, "EngineCore encountered an issue.")  # the request's own fault
    is_well = False
    for stream in (False, True):
        assert (await gateway.chat(stream=stream))[0] == 200
    assert len(asked) == 2  # then it was out
    assert {replica.open_requests for replica in gateway.parts.engines.replicas} == {0}
    await runner.cleanup()
