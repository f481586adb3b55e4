"""What the operator pages show of a filled and of an empty store, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import encode_basic_auth, web
from aiohttp.test_utils import TestClient, TestServer

from loop.settings import ConsoleSettings, GatewaySettings, Settings
from loop.store import open_store, write
from loop.store.keys import add_key, revoke_key
from services.console.app import create_app
from services.console.figures import next_run_ms
from services.console.pages import report_path
from services.console.parts import ago, duration, figure
from tests.console.conftest import client_of

Client = TestClient[web.Request, web.Application]
PAGES = ["/", "/runs", "/adapters", "/playground"]


def password(key: str) -> dict[str, str]:
    """What a browser sends once its user was asked."""
    return {"Authorization": encode_basic_auth("operator", key)}


async def text_of(client: Client, path: str, status: int = 200) -> str:
    answer = await client.get(path)
    assert answer.status == status
    return await answer.text()


async def test_the_overview_shows_each_place_of_the_loop(console: Client) -> None:
    text = await text_of(console, "/")
    for shown in ("assistant", "gateway answers", "v000001", "v000002", "takes 10 %", "454 labels", "0 3 * * * UTC"):
        assert shown in text
    assert "70.0 %" in text  # thumbs up of live
    assert "210 up, 90 down" in text
    assert "2 of 3 checks passed" in text
    assert "canary at 10%" in text


async def test_the_overview_says_when_the_gateway_is_away(filled: Settings) -> None:
    nowhere = filled.model_copy(update={"console": ConsoleSettings(gateway_url="http://127.0.0.1:9")})
    async with client_of(nowhere) as client:
        assert "gateway does not answer" in await text_of(client, "/")


@pytest.mark.parametrize("path", PAGES)
async def test_an_empty_store_has_pages_too(settings: Settings, path: str) -> None:
    async with client_of(settings) as client:
        assert "<h" in await text_of(client, path)


async def test_runs_are_listed_the_newest_first(console: Client) -> None:
    text = await text_of(console, "/runs")
    states = [text.index(word) for word in ("at train", "v000002: gate pass", "212 of 500 labels", "v000001: gate")]
    assert states == sorted(states)


async def first_run(client: Client, settings: Settings) -> str:
    text = await text_of(client, "/adapters/v000001")
    return text.split("/runs/")[1].split('"')[0]


async def test_a_run_shows_its_stages_checks_and_report(console: Client, filled: Settings) -> None:
    run_id = await first_run(console, filled)
    text = await text_of(console, f"/runs/{run_id}")
    for shown in ("15 min 12 s", "Balanced accuracy", "0.0712", "0.0391 … 0.1034", "lower bound above 0", "v000001"):
        assert shown in text
    assert "&lt;prompts&gt;" in text  # what others wrote is escaped
    assert "report.html" not in text
    await text_of(console, f"/runs/{run_id}/report.html", 404)
    folder = filled.scheduler.runs_dir / run_id
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<h1>report</h1>")
    assert f"/runs/{run_id}/report.html" in await text_of(console, f"/runs/{run_id}")
    answer = await console.get(f"/runs/{run_id}/report.html")
    assert await answer.text() == "<h1>report</h1>"
    assert answer.headers["Content-Security-Policy"].startswith("sandbox ")


# Paths that must not leave the folder of the runs, however they are written.
@pytest.mark.parametrize("run_id", ["..", "%2e%2e", "..%2fsecret", "%2e%2e%2fsecret", "%2fetc", "run%00", "unknown"])
async def test_a_report_is_never_a_file_from_elsewhere(console: Client, filled: Settings, run_id: str) -> None:
    secret = filled.scheduler.runs_dir.parent / "secret"
    secret.mkdir()
    (secret / "report.html").write_text("secret")
    (secret.parent / "report.html").write_text("secret")
    answer = await console.get(f"/runs/{run_id}/report.html")
    assert answer.status == 404
    assert "secret" not in (await answer.text()).replace(run_id, "").replace("..%2fsecret", "").replace("../secret", "")


def test_a_link_out_of_the_runs_folder_is_not_followed(tmp_path: Any) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "report.html").write_text("secret")
    assert report_path(tmp_path / "runs", "..") is None
    (tmp_path / "runs" / "one" / "report.html").symlink_to(tmp_path / "report.html")
    assert report_path(tmp_path / "runs", "one") is None


async def test_an_adapter_shows_its_lineage_and_history(console: Client) -> None:
    text = await text_of(console, "/adapters/v000002")
    for shown in ("assistant@v000002", "v000001", "9b1f0c55d1a2e7", "trained by run", "canary at 10%", "0.4312"):
        assert shown in text
    listed = await text_of(console, "/adapters")
    assert listed.index("v000002") < listed.index("v000001")


@pytest.mark.parametrize("path", ["/runs/run-none", "/adapters/v999999", "/nothing"])
async def test_what_is_not_there_gets_a_page_that_says_so(console: Client, path: str) -> None:
    assert "Not found" in await text_of(console, path, 404)


async def test_a_store_that_cannot_be_read_gets_a_page_that_says_so(console: Client, filled: Settings) -> None:
    file = filled.store.url.get_secret_value().removeprefix("sqlite:///")
    store = open_store(filled.store)
    with write(store) as connection:
        connection.exec_driver_sql("DROP TABLE runs")
    store.dispose()
    assert file
    assert "The store does not answer" in await text_of(console, "/runs", 503)


async def test_a_foreign_host_is_refused_on_loopback(console: Client) -> None:
    answer = await console.get("/", headers={"Host": "evil.example"})
    assert answer.status == 403


@pytest.mark.parametrize("path", [*PAGES, "/runs/run-1/report.html", "/static/style.css", "/nothing"])
@pytest.mark.parametrize("key", ["", "gateway-key-", "gateway-ke"])
async def test_without_a_valid_key_nothing_is_shown(console: Client, path: str, key: str) -> None:
    answer = await console.get(path, headers={"Authorization": f"Bearer {key}"})
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")  # so that a browser asks for it
    assert "an API key with the scope admin is needed" in await answer.text()
    assert (await console.get("/healthz", headers={"Authorization": ""})).status == 200


async def test_without_a_key_nothing_is_passed_on(console: Client, seen: list[Any]) -> None:
    for path, body in (("chat", CHAT), ("feedback", {"value": "up", "token": "t"})):
        answer = await console.post(f"/playground/{path}", json=body, headers={"Authorization": ""})
        assert (answer.status, seen) == (401, [])


async def test_a_key_needs_the_scope_admin_and_ends_when_it_is_taken_back(console: Client, filled: Settings) -> None:
    store = open_store(filled.store)
    _, app = add_key(store, "app", ("chat", "feedback"), 1)
    key, operator = add_key(store, "operator", ("admin",), 1)
    answer = await console.get("/", headers=password(app))
    assert (answer.status, "has not the scope admin" in await answer.text()) == (403, True)
    assert (await console.get("/", headers=password(operator))).status == 200
    revoke_key(store, key.key_id, 2)
    assert (await console.get("/", headers=password(operator))).status == 401
    store.dispose()


async def test_the_first_key_closes_the_pages_and_taking_it_back_does_not_open_them(filled: Settings) -> None:
    without = filled.model_copy(update={"gateway": GatewaySettings()})
    store = open_store(without.store)
    async with client_of(without, key="") as client:
        assert (await client.get("/")).status == 200  # there never was a key, and only this machine can call
        key, _ = add_key(store, "app", ("chat",), 1)
        assert (await client.get("/")).status == 401
        revoke_key(store, key.key_id, 2)
        assert (await client.get("/")).status == 401
    store.dispose()


async def test_beyond_loopback_the_pages_do_not_open_without_a_key(filled: Settings) -> None:
    everywhere = {"console": ConsoleSettings(host="0.0.0.0")}
    without = filled.model_copy(update=everywhere | {"gateway": GatewaySettings()})
    with pytest.raises(ValueError, match=r"console\.host is '0.0.0.0' but there is no API key"):
        await TestServer(create_app(without)).start_server()
    async with client_of(filled.model_copy(update=everywhere)) as client:
        assert (await client.get("/", headers={"Authorization": ""})).status == 401
        assert (await client.get("/")).status == 200


async def test_the_keys_are_good_while_the_store_is_away(console: Client, filled: Settings) -> None:
    store = open_store(filled.store)
    _, operator = add_key(store, "operator", ("admin",), 1)
    assert (await console.get("/runs", headers=password(operator))).status == 200
    with write(store) as connection:
        connection.exec_driver_sql("DROP TABLE api_keys")
    store.dispose()
    assert (await console.get("/runs", headers=password(operator))).status == 200
    assert (await console.get("/runs", headers=password("tw-other"))).status == 401


async def test_pages_may_not_be_framed_nor_kept(console: Client) -> None:
    answer = await console.get("/")
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"


CHAT = {"messages": [{"role": "user", "content": "When?"}], "conversation_id": "c1", "rater": "console-1"}


async def test_the_playground_streams_an_answer_through_the_gateway(console: Client, seen: list[Any]) -> None:
    answer = await console.post("/playground/chat", json=CHAT | {"temperature": 0.5})
    assert answer.status == 200
    assert answer.headers["X-Thumbwheel-Feedback-Token"] == "token-1"
    assert "Server-Internal" not in answer.headers
    assert (await answer.text()).endswith("data: [DONE]\n\n")
    path, body, headers = seen[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "assistant"
    assert (body["stream"], body["temperature"], body["user"]) == (True, 0.5, "console-1")
    assert headers["Authorization"] == "Bearer gateway-key"
    assert headers["X-Thumbwheel-Conversation-Id"] == "c1"


async def test_the_playground_votes_with_the_responses_token(console: Client, seen: list[Any]) -> None:
    answer = await console.post("/playground/feedback", json={"value": "down", "token": "token-1"})
    assert answer.status == 202
    assert seen[0][:2] == ("/v1/feedback", {"value": "down", "token": "token-1"})


async def test_the_gateways_refusals_are_passed_on(console: Client) -> None:
    answer = await console.post("/playground/chat", json=CHAT | {"messages": [{"role": "user", "content": "fail"}]})
    assert (answer.status, (await answer.json())["error"]["message"]) == (502, "no engine answers")


async def test_a_gateway_that_is_away_is_said_so(filled: Settings) -> None:
    nowhere = filled.model_copy(update={"console": ConsoleSettings(gateway_url="http://127.0.0.1:9")})
    async with client_of(nowhere) as client:
        answer = await client.post("/playground/chat", json=CHAT)
        assert answer.status == 502
        assert "the gateway does not answer" in await answer.text()


# What may not be posted: body, headers, and the answer's status.
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"value": "up", "token": "t"}', {"Content-Type": "text/plain"}, 403),  # what a form of another site can send
        (b'{"value": "up", "token": "t"}', {"Sec-Fetch-Site": "cross-site"}, 403),
        (b'{"value": "up", "token": "t"}', {"Sec-Fetch-Site": "same-site"}, 403),
        (b'{"value": "sideways", "token": "t"}', {}, 400),
        (b'{"value": "up"}', {}, 400),
        (b"\xff", {}, 400),
    ],
)
async def test_a_wrong_post_is_refused(
    console: Client, seen: list[Any], body: bytes, headers: dict[str, str], status: int
) -> None:
    answer = await console.post(
        "/playground/feedback", data=body, headers={"Content-Type": "application/json"} | headers
    )
    assert (answer.status, seen) == (status, [])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59, "59 s"), (60, "1 min"), (75, "1 min 15 s"), (7_260, "2 h 1 min"),
     (90_000, "1 d 1 h")],
)  # fmt: skip
def test_a_time_span_is_written_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_times_are_told_from_now() -> None:
    assert (ago(0, 75_000), ago(75_000, 0)) == ("1 min 15 s ago", "in 1 min 15 s")


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (1234567, "1,234,567"), (0.43125, "0.4313"), (12345.67, "12,345.7"), (None, "–"), ("x", "x")],
)
def test_a_value_is_written_as_it_reads_best(value: Any, text: str) -> None:
    assert figure(value) == text


def test_the_next_run_is_the_crontab_lines_next_time(settings: Settings) -> None:
    assert next_run_ms(settings.scheduler, 0) == 3 * 3_600_000
