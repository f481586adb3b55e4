"""How much one caller may ask for, and how large a request may be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services.gateway.limits import RateLimit
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway, until
from tests.gateway.test_feedback import RESPONSE_ID

CHAT = "/v1/chat/completions"


@given(
    per_s=st.floats(0.1, 1000),
    burst=st.floats(1, 100),
    steps=st.lists(st.floats(0, 10), min_size=1, max_size=60),
)
def test_no_more_comes_through_than_a_bucket_holds_and_refills(per_s: float, burst: float, steps: list[float]) -> None:
    limit = RateLimit(per_s, burst)
    now_s, passed = 1000.0, []
    for step_s in steps:
        now_s += step_s / per_s
        wait_s = limit.wait_s("one", now_s)
        if wait_s:
            assert limit.wait_s("one", now_s + wait_s / 2) > 0
            assert limit.wait_s("one", now_s + wait_s) == 0  # when it says, there is one
            now_s += wait_s
        passed.append(now_s)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + (passed[last] - passed[first]) * per_s + 1e-3


def test_one_callers_haste_is_not_anothers() -> None:
    limit = RateLimit(1, 2)
    assert [limit.wait_s(who, 0) > 0 for who in ("a", "a", "a", "b", "b", "b")] == [False, False, True] * 2


def test_memory_is_bounded_and_the_longest_untouched_is_forgotten() -> None:
    limit = RateLimit(1, 1, max_subjects=2)
    for who in ("a", "b", "c"):
        assert limit.wait_s(who, 0) == 0
    assert len(limit) == 2
    assert limit.wait_s("c", 0) > 0
    assert limit.wait_s("a", 0) == 0


async def statuses(gateway: Gateway, path: str, bodies: list[dict[str, Any]], key: str | None = None) -> list[int]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return [(await gateway.post(path, body, headers))[0] for body in bodies]


async def test_a_key_that_asks_too_often_is_told_when_to_come_back(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"], key_requests_per_s=0.01, rate_burst_s=200)
    before_s = time.monotonic()
    assert await statuses(gateway, CHAT, [HELLO] * 2, "k1") == [200, 200]
    status, body, response = await gateway.post(CHAT, HELLO, {"Authorization": "Bearer k1"})
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert 100 - (time.monotonic() - before_s) <= int(response.headers["Retry-After"]) <= 100
    assert await statuses(gateway, CHAT, [HELLO], "k2") == [401]
    for code in ("rate_limit_exceeded", "invalid_api_key"):
        assert (REGISTRY.get_sample_value("thumbwheel_gateway_refused_total", {"code": code}) or 0) >= 1


async def test_each_key_of_the_settings_has_a_rate_of_its_own(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1", "k2"], key_requests_per_s=0.01, rate_burst_s=100)
    assert await statuses(gateway, CHAT, [HELLO] * 2, "k1") == [200, 429]
    assert await statuses(gateway, CHAT, [HELLO] * 2, "k2") == [200, 429]


async def test_what_is_for_no_engine_may_hold_so_many_bytes_and_takes_no_room_from_the_chat(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.parts.VOTE_BYTES", 100_000)
    gateway = await start(max_open_bytes=100_000)
    url, may_end, vote = gateway.url + "/v1/feedback", asyncio.Event(), b'{"message_id": "m", "value": "up"'

    async def slow() -> AsyncIterator[bytes]:
        yield vote + b" " * 99_000
        await may_end.wait()
        yield b"}"

    async with asyncio.timeout(PATIENCE_S):
        sent = asyncio.create_task(gateway.http.post(url, data=slow()))
        await until(lambda: gateway.parts.vote_room.held > 90_000)
        large = {"items": [{"message_id": "m", "value": "up", "comment": "x" * 4_000}] * 4}
        for path in ("/v1/feedback", "/api/public/ingestion", "/api/public/otel/v1/traces"):
            status, body, response = await gateway.post(path, large)
            assert (status, body["error"]["code"], response.headers["Retry-After"]) == (503, "overloaded", "1")
        assert (await gateway.chat(padding="x" * 90_000))[0] == 200
        may_end.set()
        (await sent).close()
    assert gateway.parts.vote_room.held == 0
    assert (await gateway.post("/v1/feedback", large))[0] == 207


async def test_a_rater_that_asks_too_often_holds_up_nobody_else(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"], rater_requests_per_s=0.01, rate_burst_s=200)
    asked = [HELLO | {"user": user} for user in ("ann", "ann", "ann", "bob")]
    assert await statuses(gateway, CHAT, asked, "k1") == [200, 200, 429, 200]
    votes = [{"value": "up", "message_id": "m", "rater": rater} for rater in ("cai", "cai", "cai", "dan", "ann")]
    assert await statuses(gateway, "/v1/feedback", votes, "k1") == [202, 202, 429, 202, 429]
    assert len(gateway.feedback()) == 3


async def test_votes_of_a_token_without_a_rater_are_limited_by_response(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"], rater_requests_per_s=0.01, rate_burst_s=200)
    _, made, _ = await gateway.post("/v1/feedback/tokens", {"response_id": RESPONSE_ID}, {"Authorization": "Bearer k1"})
    vote = {"value": "up", "token": made["token"]}
    assert await statuses(gateway, "/v1/feedback", [vote] * 3) == [202, 202, 429]


@pytest.mark.parametrize("path", [CHAT, "/v1/feedback", "/v1/models"])
@pytest.mark.parametrize(
    "headers",
    [{f"X-Number-{number}": "1" for number in range(110)}, {f"X-Large-{number}": "x" * 8000 for number in range(5)}],
    ids=["too many", "too large"],
)
async def test_too_many_or_too_large_headers_get_a_clear_error(
    gateway: Gateway, headers: dict[str, str], path: str
) -> None:
    method = "GET" if path == "/v1/models" else "POST"
    async with gateway.http.request(method, gateway.url + path, headers=headers) as response:
        assert response.status == 431
        assert (await response.json())["error"]["code"] == "headers_too_large"
