"""API keys: made, scoped, rotated and taken back while the gateway runs, and known without the store."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import Engine
from typer.testing import CliRunner

from loop.keys import SCOPES, Scope
from loop.store.keys import add_key, read_keys, revoke_key
from services.cli import app
from services.gateway.identity import Claim, is_loopback
from tests.conftest import ROOT
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway
from tests.gateway.test_feedback import RESPONSE_ID
from tests.gateway.test_process import SERVE, environment_of
from tests.stub_engine import StubEngine

Stub = tuple[StubEngine, str]
VOTE = {"value": "up", "message_id": "m"}
BASE = HELLO | {"model": "base"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():
            await asyncio.sleep(0.01)


async def status_of(gateway: Gateway, key: str, body: Any = HELLO, path: str = "/v1/chat/completions") -> int:
    return (await gateway.post(path, body, bearer(key)))[0]


async def test_the_first_key_closes_the_gateway_and_taking_it_back_does_not_open_it(
    start: StartGateway, store: Engine
) -> None:
    gateway = await start()
    assert (await gateway.chat())[0] == 200  # there never was a key, and only this machine can call

    async def is_closed() -> bool:
        return (await gateway.chat())[0] == 401

    key, text = add_key(store, "app", ("chat",), 1)
    await until(is_closed)
    assert await status_of(gateway, text) == 200
    revoke_key(store, key.key_id, 2)

    async def is_revoked() -> bool:
        return await status_of(gateway, text) == 401

    await until(is_revoked)
    assert (await gateway.chat())[0] == 401


async def test_keys_are_rotated_without_a_refused_request(start: StartGateway, store: Engine) -> None:
    gateway = await start()
    old, old_text = add_key(store, "app", ("chat",), 1)

    async def is_closed() -> bool:
        return (await gateway.chat())[0] == 401

    await until(is_closed)  # until it is, it takes any key, and may learn the old one alone after it took the new one

    async def has_taken() -> bool:
        return await status_of(gateway, new_text) == 200

    statuses: list[int] = []
    is_over = asyncio.Event()

    async def use(texts: list[str]) -> None:
        while not is_over.is_set():
            statuses.append(await status_of(gateway, texts[0]))

    texts = [old_text]
    users = [asyncio.create_task(use(texts)) for _ in range(4)]
    new, new_text = add_key(store, "app", ("chat",), 2)  # both are valid at once
    await until(has_taken)
    texts[0] = new_text
    done = len(statuses)

    async def has_moved() -> bool:
        return len(statuses) >= done + 2 * len(users)

    await until(has_moved)
    revoke_key(store, old.key_id, 3)

    async def is_revoked() -> bool:
        return await status_of(gateway, old_text) == 401

    await until(is_revoked)
    is_over.set()
    await asyncio.gather(*users)
    assert set(statuses) == {200}
    assert [(key.key_id, key.name, key.revoked_at_ms) for key in read_keys(store)] == [
        (old.key_id, "app", 3),
        (new.key_id, "app", None),
    ]


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_scope_permits_its_own_and_nothing_else(start: StartGateway, store: Engine, scope: Scope) -> None:
    _, text = add_key(store, "app", (scope,), 1)
    gateway = await start()
    score = {"name": "user-feedback", "value": 1, "traceId": RESPONSE_ID}
    asked: list[tuple[str, str, dict[str, Any], Scope]] = [
        ("POST", "/v1/chat/completions", HELLO, "chat"),
        ("POST", "/v1/completions", {"prompt": "x"}, "chat"),
        ("POST", "/v1/embeddings", {"input": ["x"]}, "chat"),
        ("POST", "/tokenize", {"prompt": "x"}, "chat"),
        ("GET", "/v1/models", {}, "chat"),
        ("POST", "/v1/feedback", VOTE, "feedback"),
        ("POST", "/v1/feedback/tokens", {"response_id": RESPONSE_ID, "rater": "ann"}, "feedback"),
        ("POST", "/api/public/scores", score, "feedback"),
        ("DELETE", f"/api/public/scores/a-{RESPONSE_ID}", {}, "feedback"),
        ("POST", "/api/public/ingestion", {"batch": []}, "feedback"),
        ("POST", "/api/public/otel/v1/traces", {}, "feedback"),
        ("GET", "/api/public/projects", {}, "feedback"),
    ]
    for method, path, body, needed in asked:
        async with gateway.http.request(method, gateway.url + path, json=body, headers=bearer(text)) as response:
            status, answer = response.status, await response.json()
        if needed == scope:
            assert status in (200, 201, 202, 207), (path, answer)
        else:
            assert (status, answer["error"]["type"]) == (403, "permission_error"), path
            assert answer["error"]["code"] == "missing_scope"
            assert repr(needed) in answer["error"]["message"]


async def test_only_an_operator_chooses_who_answers(start: StartGateway, store: Engine) -> None:
    wanted: list[tuple[Scope, ...]] = [("chat",), ("chat", "admin")]
    keys = [add_key(store, "app", scopes, 1)[1] for scopes in wanted]
    gateway = await start(api_keys=["configured"])
    assert [await status_of(gateway, key, BASE) for key in (*keys, "configured")] == [403, 200, 200]


async def test_keys_are_known_without_the_store_over_a_restart(
    start: StartGateway, store: Engine, tmp_path: Path
) -> None:
    _, text = add_key(store, "app", ("chat",), 1)
    revoked, revoked_text = add_key(store, "app", ("chat",), 2)
    revoke_key(store, revoked.key_id, 3)
    first = await start()
    assert await status_of(first, text) == 200
    await first.parts.routes.is_known.wait()  # it takes them a moment before it has kept them
    (tmp_path / "file").touch()
    gateway = await start(store=tmp_path / "file" / "store.db")  # cannot be opened
    assert [await status_of(gateway, key) for key in (text, revoked_text, "tw-guessed")] == [200, 401, 401]
    assert not gateway.parts.routes.is_store_up


async def test_a_gateway_that_never_saw_its_keys_lets_nobody_in(start: StartGateway, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    gateway = await start(store=tmp_path / "file" / "store.db", api_keys=["configured"])
    assert await status_of(gateway, "configured") == 200  # what the settings say is known
    status, body, response = await gateway.post("/v1/chat/completions", HELLO, bearer("maybe"))
    assert (status, body["error"]["code"], response.headers["Retry-After"]) == (503, "not_ready", "1")
    alone = await start(store=tmp_path / "file" / "store.db", gateway_id="another")
    assert (await alone.chat())[0] == 503


async def test_another_sites_page_may_not_use_a_gateway_that_asks_for_no_key(start: StartGateway, stub: Stub) -> None:
    gateway = await start(cors_origins=["https://app.example"])
    # As a page may send them without asking first: a text, to a machine that its user trusts.
    asked = [
        ("/v1/chat/completions", HELLO),
        ("/tokenize", HELLO),
        ("/v1/feedback", VOTE | {"correction": "Buy at evil.example!"}),
        ("/v1/feedback/tokens", {"response_id": RESPONSE_ID}),
        ("/api/public/scores", {"name": "user-feedback", "value": 1, "traceId": "m"}),
    ]
    for origin in ("https://evil.example", "null", gateway.url):  # the last is what a name that was rebound looks like
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        for path, body in asked:
            status, answer, _ = await gateway.post(path, body, headers)
            assert (status, path) in {(401, "/v1/feedback"), (403, path)}
            assert answer["error"]["code"] == (None if status == 401 else "foreign_origin")
    assert stub[0].requests == gateway.feedback() == []
    token = gateway.parts.signer.sign(Claim(RESPONSE_ID, ""), int(time.time()) + 60)
    assert (await gateway.post("/v1/feedback", {"value": "up", "token": token}, headers))[0] == 202  # as from any page
    for path, body in asked:
        assert (await gateway.post(path, body, {"Origin": "https://app.example"}))[0] in (200, 202)


async def test_a_key_that_was_left_empty_is_none(start: StartGateway) -> None:
    gateway = await start(api_keys=[""])
    for headers in ({}, bearer(""), {"Authorization": "Bearer"}):
        assert (await gateway.post("/v1/chat/completions", HELLO, headers))[0] == 401


async def test_no_file_has_a_key(start: StartGateway, store: Engine, tmp_path: Path) -> None:
    key, text = add_key(store, "app", ("chat",), 1)
    assert await status_of(await start(), text) == 200
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(key.digest.encode() in content for content in files)
    assert not any(text.encode() in content for content in files)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("gateway.example", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ["gateway.rater_salt", "the default"]),
        ({"THUMBWHEEL_GATEWAY__RATER_SALT": "salt"}, ["there is no API key", "loopback only", "thumbwheel keys add"]),
        (
            {"THUMBWHEEL_GATEWAY__RATER_SALT": "salt", "THUMBWHEEL_STORE__URL": "sqlite:////dev/null/store.db"},
            ["the store, which has the API keys, is away"],
        ),
    ],
)
def test_beyond_loopback_it_does_not_start_open_or_with_guessable_raters(
    tmp_path: Path, environment: dict[str, str], said: list[str]
) -> None:
    given = environment_of(tmp_path, 0, 0) | {"THUMBWHEEL_GATEWAY__HOST": "0.0.0.0"} | environment
    program = [sys.executable, "-c", SERVE]
    done = subprocess.run(program, cwd=ROOT, env=given, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode != 0
    assert [part for part in said if part not in done.stderr] == []


def test_the_command_makes_lists_and_revokes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text(f'[store]\nurl = "sqlite:///{tmp_path}/store.db"\n')
    monkeypatch.setenv("COLUMNS", "200")

    def keys(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["keys", *arguments, "--settings", str(path)])

    made = json.loads(keys("add", "app", "--scopes", "feedback").stdout)
    assert (made["name"], made["scopes"]) == ("app", ["feedback"])
    assert json.loads(keys("add", "other").stdout)["scopes"] == ["chat", "feedback"]
    assert json.loads(keys("revoke", made["key_id"]).stdout)["key_id"] == made["key_id"]
    listed = keys("list").stdout
    (line,) = [line for line in listed.splitlines() if made["key_id"] in line]
    assert line.count("UTC") == 2  # made, and revoked
    assert made["key"] not in listed
    assert "'everything' is none; expected some of chat" in str(keys("add", "app", "--scopes", "everything").exception)
    assert "'nobody' is not known" in str(keys("revoke", "nobody").exception)
