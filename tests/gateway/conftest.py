"""A gateway in front of the stub engine, both on the test's own loop."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr
from sqlalchemy import Engine

from loop.events import FeedbackGiven, ResponseLogged, decode_feedback, decode_response
from loop.log.embedded import EmbeddedLog
from loop.rollout.routing import Route
from loop.settings import EngineSettings, GatewaySettings, LogSettings, Settings, StoreSettings
from loop.store import write
from loop.store.routes import oldest_generation_in_use, write_route
from services.gateway.app import create_app, create_metrics_app
from services.gateway.journal import left_in
from services.gateway.parts import PARTS, Parts
from tests.stub_engine import StubEngine, create_stub

HELLO: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}


PATIENCE_S = 120.0
"""For what happens at once but for a machine that is busy with something else."""


async def until(is_so: Callable[[], bool]) -> None:
    """Look until it is so. Raises TimeoutError when the time is over."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.01)  # how often we look, within the time


async def serve(app: web.Application, port: int = 0) -> tuple[web.AppRunner, str]:
    """The application on a free port of this loop, with the arguments that the real process uses."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def set_route(store: Engine, gateway: Gateway, **fields: Any) -> None:
    """Make the route and wait until the gateway uses it, and has said so, which it does when it has kept it."""
    with write(store) as connection:
        route = write_route(connection, Route("assistant", gateway.parts.routes.route.generation, **fields), 1)
    await until(lambda: oldest_generation_in_use(store, 0) == route.generation)


def read_spool(path: Path) -> tuple[list[ResponseLogged], list[FeedbackGiven]]:
    """Everything in the spool, in the order in which it came: what a new process would find, the journal included."""
    # The journal first: what moves from it to the log meanwhile is found twice, not missed.
    journaled = [record.value for file in path.parent.glob("journal-*") for record in left_in(file)]
    log = EmbeddedLog(path)
    topics = LogSettings().responses_topic, LogSettings().feedback_topic
    responses, feedback = (
        [record.value for partition in range(log.partitions) for record in log.read(topic, partition, 0, 100_000)]
        for topic in topics
    )
    log.close()
    found = {
        logged.response_id: logged for value in [*responses, *journaled] for logged in [decode_response(value).data]
    }
    return (
        sorted(found.values(), key=lambda logged: logged.started_at_ms),
        sorted((decode_feedback(value).data for value in feedback), key=lambda given: given.hlc),
    )


@dataclass
class Gateway:
    """A running gateway and what it has written."""

    url: str
    parts: Parts
    app: web.Application
    spool_path: Path
    http: aiohttp.ClientSession

    def responses(self) -> list[ResponseLogged]:
        return read_spool(self.spool_path)[0]

    def feedback(self) -> list[FeedbackGiven]:
        return read_spool(self.spool_path)[1]

    async def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Status, JSON (or text) and the response."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        options: dict[str, Any] = {"data": io.BytesIO(data)}  # aiohttp warns of large bytes
        async with self.http.post(self.url + path, headers=headers, **options) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text()), response

    async def chat(self, **fields: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        return await self.post("/v1/chat/completions", HELLO | fields)


StartGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def stub() -> AsyncIterator[tuple[StubEngine, str]]:
    engine = StubEngine()
    runner, url = await serve(create_stub(engine))
    yield engine, url
    await runner.cleanup()


@pytest.fixture
async def start(
    stub: tuple[StubEngine, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartGateway]:
    """Starts gateways: `await start(capture_timeout_s=…, engine={…})`; fields are those of GatewaySettings."""
    # A machine that is busy with something else is neither a disk nor an engine that does not answer.
    monkeypatch.setattr("services.gateway.feedback.WRITE_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr("services.gateway.engines.HEALTH_TIMEOUT_S", PATIENCE_S)
    runners: list[web.AppRunner] = []
    sessions: list[aiohttp.ClientSession] = []

    async def start_one(engine: dict[str, Any] | None = None, store: Path | None = None, **gateway: Any) -> Gateway:
        settings = Settings(
            engine=EngineSettings(**({"urls": [stub[1]], "connect_timeout_s": PATIENCE_S} | (engine or {}))),
            gateway=GatewaySettings(**({"route_poll_s": 0.05} | gateway)),
            log=LogSettings(path=tmp_path / "log.db"),
            store=StoreSettings(url=SecretStr(f"sqlite:///{store or tmp_path / 'store.db'}")),
        )
        if "capture_timeout_s" not in gateway:  # longer than anybody may set it: see above
            patient = settings.gateway.model_copy(update={"capture_timeout_s": PATIENCE_S})
            settings = settings.model_copy(update={"gateway": patient})
        app = create_app(settings)
        runner, url = await serve(app)
        runners.append(runner)
        sessions.append(aiohttp.ClientSession())
        return Gateway(url, app[PARTS], app, tmp_path / "log.db", sessions[-1])

    yield start_one
    for session in sessions:
        await session.close()
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def gateway(start: StartGateway) -> Gateway:
    return await start()


@pytest.fixture
async def metrics_url(gateway: Gateway) -> AsyncIterator[str]:
    runner, url = await serve(create_metrics_app(gateway.app))
    yield url
    await runner.cleanup()


async def install_beside(folder: Path, *requirements: str) -> None:
    """Install packages there, for a process with the folder on its PYTHONPATH: they ask for other versions than our
    pins, and run with these as well.
    """
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--retries=12")
    child = await asyncio.create_subprocess_exec(*pip, "--target", folder, *requirements)
    assert await child.wait() == 0
