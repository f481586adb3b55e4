"""The poller between an Open WebUI (its export, as its version 0.6 to 0.11 answer) and a real gateway."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from loop.events import hash_rater
from loop.log import LogUnavailableError
from loop.settings import OpenWebuiSettings
from services.open_webui import (
    WINDOW_S,
    Rating,
    Seen,
    _Data,
    advance,
    change_of,
    poll,
    read_seen,
    run_open_webui,
    sorted_new,
)
from tests.gateway.conftest import Gateway, StartGateway, serve


class OpenWebui:
    """What it has, newest first, for whoever has an admin's key."""

    def __init__(self) -> None:
        self.ratings: list[dict[str, Any]] = []

    def rate(self, id: str, rating: Any, at: int, **changes: Any) -> None:
        self.ratings = [one for one in self.ratings if one["id"] != id]
        entry = {
            "id": id,
            "user_id": "user-1",
            "version": 0,
            "type": "rating",
            "data": {"rating": rating, "model_id": "assistant", "reason": "too_verbose", "comment": "Too long.",
                     "details": {"rating": 3}, "tags": ["Support"]},
            "meta": {"model_id": "assistant", "message_id": f"message-{id}", "message_index": 1, "chat_id": "chat-1"},
            "snapshot": {"chat": {"id": "chat-1", "chat": {"history": {"messages": {}}}}},
            "created_at": 1,
            "updated_at": at,
            "user": {"id": "user-1", "name": "Ann", "role": "user"},
        }  # fmt: skip
        self.ratings.insert(0, entry | changes)

    async def export(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer sk-admin":
            return web.json_response({"detail": "Not authenticated"}, status=401)
        return web.json_response(self.ratings)


@pytest.fixture
async def open_webui() -> AsyncIterator[tuple[OpenWebui, str]]:
    server = OpenWebui()
    app = web.Application()
    app.router.add_get("/api/v1/evaluations/feedbacks/all/export", server.export)
    runner, url = await serve(app)
    yield server, url
    await runner.cleanup()


def settings_for(url: str, gateway: Gateway, folder: Path, **changes: Any) -> OpenWebuiSettings:
    given = {"url": url, "token": "sk-admin", "gateway_url": gateway.url, "state": folder / "var" / "seen.json"}
    return OpenWebuiSettings(**(given | changes))


async def test_ratings_become_votes_once_and_changes_follow(
    start: StartGateway, open_webui: tuple[OpenWebui, str], tmp_path: Path
) -> None:
    gateway = await start(api_keys=["k1"])
    server, url = open_webui
    settings = settings_for(url + "/", gateway, tmp_path, api_key=SecretStr("k1"))
    server.rate("a", 1, 10)
    server.rate("b", -1, 10)
    server.rate("c", "1", 11, data={"rating": "1"}, user_id="")  # of an arena
    server.rate("d", 1, 12, meta=None)  # on no message
    assert await poll(settings) == {"ratings": 4, "new": 4, "refused": 0}
    assert await poll(settings) == {"ratings": 4, "new": 0, "refused": 0}
    server.rate("a", -1, 12)  # changed in the very second up to which all was read
    server.rate("b", None, 13)
    assert await poll(settings) == {"ratings": 4, "new": 2, "refused": 0}
    found = gateway.feedback()
    assert [(one.message_id, one.value, one.feedback_id) for one in found] == [
        ("message-a", "up", "open-webui/a/10/up"),
        ("message-b", "down", "open-webui/b/10/down"),
        ("message-c", "up", "open-webui/c/11/up"),
        ("message-a", "down", "open-webui/a/12/down"),
        ("message-b", "retract", "open-webui/b/13/retract"),
    ]
    assert [one.rater for one in found[:3]] == [*[hash_rater(b"thumbwheel", "user-1")] * 2, ""]
    assert (found[0].comment, found[0].reasons, found[0].source) == ("Too long.", ["too_verbose"], "open-webui")


def no_space(*_: Any) -> None:
    raise LogUnavailableError("no space left")


async def test_what_was_not_written_is_sent_again_and_what_is_refused_is_not(
    gateway: Gateway,
    open_webui: tuple[OpenWebui, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, url = open_webui
    settings = settings_for(url, gateway, tmp_path)
    server.rate("a", 1, 10)
    server.rate("b", 1, 10, user_id="a\nb")
    with monkeypatch.context() as full:
        full.setattr(gateway.parts.spool._log, "write", no_space)
        with pytest.raises(ConnectionError, match=r"v1/feedback answered 503, expected 207: .*could not be written"):
            await poll(settings)
    assert read_seen(settings.state) == Seen()
    with caplog.at_level(logging.WARNING):
        assert await poll(settings) == {"ratings": 2, "new": 2, "refused": 1}
    assert "a rating was refused: the vote is not valid" in caplog.text
    assert [one.message_id for one in gateway.feedback()] == ["message-a"]
    assert (await poll(settings))["new"] == 0


async def test_with_a_key_that_the_gateway_does_not_take_no_rating_is_passed_over(
    start: StartGateway, open_webui: tuple[OpenWebui, str], tmp_path: Path
) -> None:
    gateway = await start(api_keys=["good"])
    server, url = open_webui
    server.rate("a", 1, 10)
    for key in (None, SecretStr("wrong")):
        settings = settings_for(url, gateway, tmp_path, api_key=key)
        with pytest.raises(ConnectionError, match=r"takes no votes with open_webui\.api_key"):
            await poll(settings)
        assert read_seen(settings.state) == Seen()
    assert (await poll(settings_for(url, gateway, tmp_path, api_key=SecretStr("good"))))["new"] == 1
    assert [one.message_id for one in gateway.feedback()] == ["message-a"]


async def test_what_a_rater_may_not_send_yet_is_sent_later(
    start: StartGateway, open_webui: tuple[OpenWebui, str], tmp_path: Path
) -> None:
    server, url = open_webui
    hasty = await start(rater_requests_per_s=0.01, rate_burst_s=200)
    settings = settings_for(url, hasty, tmp_path)
    for n in range(4):  # one more than the user's two, and than another's one
        server.rate(f"a{n}", 1, 10 + n, user_id="user-2" if n == 1 else "user-1")
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"no more votes of the rater of 'a3' for now"):
            await poll(settings)
    assert set(read_seen(settings.state).changes) == {"a0/10/up", "a1/11/up", "a2/12/up"}
    patient = await start(gateway_id="another")
    settings = settings.model_copy(update={"gateway_url": patient.url})
    assert await poll(settings) == {"ratings": 4, "new": 1, "refused": 0}
    assert sorted(one.message_id or "" for one in patient.feedback()) == [f"message-a{n}" for n in range(4)]


async def test_a_wrong_key_and_a_server_that_is_away_are_said(
    gateway: Gateway, open_webui: tuple[OpenWebui, str], tmp_path: Path
) -> None:
    wrong = settings_for(open_webui[1], gateway, tmp_path, token=SecretStr("sk-user"))
    with pytest.raises(ConnectionError, match=r"export answered 401, expected 200: .*Not authenticated"):
        await poll(wrong)
    away = settings_for("http://127.0.0.1:9", gateway, tmp_path)
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/.* does not answer"):
        await asyncio.to_thread(run_open_webui, away, threading.Event(), once=True)
    with pytest.raises(ValueError, match=r"open_webui\.url or open_webui\.token is not set"):
        run_open_webui(OpenWebuiSettings(), threading.Event(), once=True)
    not_it = settings_for(gateway.url, gateway, tmp_path)
    with pytest.raises(ConnectionError, match="answered 404"):
        await poll(not_it)


async def test_the_loop_waits_for_a_server_that_is_away_and_ends_when_told(
    gateway: Gateway, open_webui: tuple[OpenWebui, str], tmp_path: Path
) -> None:
    stop = threading.Event()
    stop.set()
    away = settings_for("http://127.0.0.1:9", gateway, tmp_path)
    assert await asyncio.to_thread(run_open_webui, away, stop, once=False) == {}
    settings = settings_for(open_webui[1], gateway, tmp_path)
    assert await asyncio.to_thread(run_open_webui, settings, stop, once=False) == {
        "ratings": 0,
        "new": 0,
        "refused": 0,
    }


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"seen\.json is not what was left by a poll"):
        read_seen(path)


changes = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-2, 2), st.sampled_from([1, -1])), max_size=12)


@given(changes, st.data())
def test_every_last_change_is_sent_exactly_once_wherever_polls_fall(
    history: list[tuple[str, int, int]], data: Any
) -> None:
    """Open WebUI's clock may stand still, or go back a little, as that of another of its servers; a poll may come at
    any time, and its batches may end anywhere.
    """
    now, state, seen, sent = 10_000, dict[str, Rating](), Seen(), list[str]()
    for id, step, value in history:
        now += step
        state[id] = Rating(id, now, data=_Data(rating=value))
        if data.draw(st.booleans()):
            new = sorted_new(state.values(), seen)
            size = data.draw(st.integers(1, 3))
            for start in range(0, len(new), size):
                batch = new[start : start + size]
                sent += map(change_of, batch)
                seen = advance(seen, batch)
    sent += map(change_of, sorted_new(state.values(), seen))
    assert len(set(sent)) == len(sent)
    assert set(map(change_of, state.values())) <= set(sent)


def test_what_was_seen_is_kept_for_a_window() -> None:
    seen = advance(Seen(), [Rating("a", 10_000), Rating("b", 10_000 + WINDOW_S - 1)])
    assert len(seen.changes) == 2
    seen = advance(seen, [Rating("c", 10_000 + WINDOW_S)])
    assert set(seen.changes.values()) == {10_000 + WINDOW_S - 1, 10_000 + WINDOW_S}
    assert sorted_new([Rating("a", 10_000)], seen) == []
