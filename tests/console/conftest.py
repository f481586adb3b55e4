"""A store as it is after some nights, a gateway that answers, and the console in front of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import SecretStr
from sqlalchemy import Engine, insert

from loop import registry
from loop.rollout.routing import Route
from loop.settings import ConsoleSettings, GatewaySettings, SchedulerSettings, Settings, SnapshotSettings, StoreSettings
from loop.store import open_store, write
from loop.store.routes import write_route
from loop.store.runs import Stage, record_stage, request_run, set_run
from loop.store.schema import examples
from services.console.app import create_app
from tests.contents import content_columns

HOUR_MS = 3_600_000
CHECKS: list[dict[str, Any]] = [
    {"name": "preference_gain", "title": "Balanced accuracy, candidate − live", "verdict": "pass", "value": 0.0712,
     "low": 0.0391, "high": 0.1034, "threshold": 0.0, "rule": "lower bound above 0", "unit": "", "text": ""},
    {"name": "kl_to_base", "title": "KL to the base", "verdict": "pass", "value": 4.82, "low": 4.31, "high": 5.4,
     "threshold": 20.0, "rule": "upper bound at most 20", "unit": "nats", "text": ""},
    {"name": "serve_skew", "title": "Serve skew", "verdict": "insufficient", "value": None, "low": None, "high": None,
     "threshold": 0.05, "rule": "", "unit": "", "text": "the engine answered 3 of 32 <prompts>"},
    {"name": "benchmark", "title": "Benchmarks", "verdict": "not_asked", "value": None, "low": None, "high": None,
     "threshold": None, "rule": "", "unit": "", "text": "no tasks are configured"},
]  # fmt: skip


def fill(store: Engine, now_ms: int) -> None:
    """Four nights: an adapter that went live, a skipped run, one that is on canary, and a run in progress."""
    first = night(store, now_ms - 72 * HOUR_MS, "pass", None)
    with write(store) as connection:
        for state, why in (("approved", "gate: pass"), ("live", "gate: pass; no canary steps are configured")):
            registry.move(connection, first, state, why, now_ms - 71 * HOUR_MS, manifest={"verdict": "pass"})
        route = write_route(connection, Route("assistant", live=first), now_ms - 71 * HOUR_MS)
    skipped = request_run(store, "run-20260102T030000.000", "clock", now_ms - 48 * HOUR_MS)
    set_run(store, skipped.run_id, "skipped", "skipped: 212 of 500 labels", now_ms - 48 * HOUR_MS + 900)
    second = night(store, now_ms - 20 * HOUR_MS, "pass", first)
    with write(store) as connection:
        for state, why in (("approved", "gate: pass"), ("canary", "canary at 10%")):
            registry.move(connection, second, state, why, now_ms - 2 * HOUR_MS, manifest={"verdict": "pass"})
        write_route(
            connection,
            Route("assistant", route.generation, live=first, canary=second, canary_share=0.1),
            now_ms - 2 * HOUR_MS,
        )
    going_on = request_run(store, "run-20260104T030000.000", "operator", now_ms - 60_000)
    set_run(store, going_on.run_id, "running", "")
    record_stage(store, Stage(going_on.run_id, "snapshot", {"read": 1200}, now_ms - 60_000, now_ms - 50_000))
    rows = [("assistant@" + first, "live", 300), ("assistant@" + second, "canary", 34), ("base", "live", 120)]
    today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
    with write(store) as connection:
        for adapter, arm, count in rows:
            for number in range(count):
                up = int(number % 10 < {"base": 5}.get(adapter, 7))
                connection.execute(
                    insert(examples).values(
                        turned_id=f"chatcmpl-{adapter}-{number}", choice_index=0, key="0" * 16, day=today,
                        adapter=adapter, arm=arm, conversation_id=None, up=up, down=1 - up, votes=[],
                        voted_at_ms=now_ms, **content_columns(),
                    )
                )  # fmt: skip


def night(store: Engine, at_ms: int, verdict: str, parent: str | None) -> str:
    """A whole run with its adapter; returns the version."""
    run_id = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("run-%Y%m%dT%H%M%S.000")
    request_run(store, run_id, "clock", at_ms)
    adapter = registry.register_candidate(
        store,
        alias="assistant",
        parent=parent,
        run_id=run_id,
        path=f"/var/lib/thumbwheel/adapters/{run_id}",
        manifest={
            "snapshot": "9b1f0c55d1a2e7",
            "code": "0.1.0",
            "base_model": "/model",
            "settings": {"beta": 0.1, "lora_r": 16, "lora_target_modules": "all-linear", "learning_rate": 2e-4},
            "training": {"rows": 1180, "steps": 148, "loss": 0.4312, "kl": 1.27, "train_s": 912.4},
        },
        now_ms=at_ms,
    )
    outputs: dict[str, tuple[int, dict[str, Any]]] = {
        "snapshot": (12, {"snapshot_id": "9b1f0c55d1a2e7", "read": 1420, "train": {"rows": 1180}, "held_out": 131}),
        "train": (912, {"rows": 1180, "loss": 0.4312, "kl": 1.27, "rows_per_s": 1.293, "train_s": 912.4}),
        "register": (1, {"version": adapter.version, "parent": parent}),
        "gate": (233, {"verdict": verdict, "checks": CHECKS, "figures": {"beta": 0.1}}),
        "rollout": (3, {"outcome": "canary at 10%", "generation": 2, "acknowledged": True}),
    }
    started = at_ms
    for stage, (seconds, output) in outputs.items():
        record_stage(store, Stage(run_id, stage, output, started, started + seconds * 1000))
        started += seconds * 1000
    set_run(store, run_id, "done", f"{adapter.version}: gate {verdict}; canary at 10%", started)
    return adapter.version


def fake_gateway(seen: list[tuple[str, dict[str, Any], dict[str, str]]]) -> web.Application:
    """Answers as the gateway does, chunk by chunk, and keeps what it was asked."""

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append((request.path, body, dict(request.headers)))
        if body["messages"][-1]["content"] == "fail":
            return web.json_response({"error": {"message": "no engine answers"}}, status=502)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "X-Thumbwheel-Response-Id": "chatcmpl-1",
                "X-Thumbwheel-Feedback-Token": "token-1",
                "Server-Internal": "hidden",
            }
        )
        await response.prepare(request)
        for word in ("Your ", "refund ", "takes <b>5</b> ", "days."):
            chunk = '{"model": "assistant@v000001", "choices": [{"delta": {"content": "%s"}}]}' % word  # noqa: UP031
            await response.write(f"data: {chunk}\n\n".encode())
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def feedback(request: web.Request) -> web.Response:
        seen.append((request.path, await request.json(), dict(request.headers)))
        return web.json_response({"status": "accepted"}, status=202)

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.post("/v1/feedback", feedback)])
    app.add_routes([web.get("/healthz", healthz)])
    return app


def client_of(settings: Settings, key: str = "gateway-key") -> TestClient[web.Request, web.Application]:
    """A console with these settings, for somebody who has the key."""
    return TestClient(TestServer(create_app(settings)), headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/store.db")),
        scheduler=SchedulerSettings(runs_dir=tmp_path / "runs"),
        snapshot=SnapshotSettings(min_labels=500),
        gateway=GatewaySettings(api_keys=[SecretStr("gateway-key")]),
    )


@pytest.fixture
def filled(settings: Settings) -> Settings:
    """The settings, with their store filled."""
    store = open_store(settings.store)
    fill(store, int(time.time() * 1000))
    store.dispose()
    return settings


@pytest.fixture
def seen() -> list[tuple[str, dict[str, Any], dict[str, str]]]:
    """What the gateway was asked: path, body, headers."""
    return []


@pytest.fixture
async def console(
    filled: Settings, seen: list[tuple[str, dict[str, Any], dict[str, str]]]
) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """The console over the filled store and the fake gateway."""
    async with TestServer(fake_gateway(seen)) as gateway:
        with_gateway = ConsoleSettings(gateway_url=str(gateway.make_url("/")))
        async with client_of(filled.model_copy(update={"console": with_gateway})) as client:
            yield client
