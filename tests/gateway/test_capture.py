"""What the log gets of what was served; and that the chat is never worse off for it."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from prometheus_client import REGISTRY

from loop.events import ResponseLogged, hash_rater, key_of_message_id, key_of_response_id
from loop.log import LogUnavailableError, NewRecord
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway, until
from tests.stub_engine import StubEngine

Stub = tuple[StubEngine, str]


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def lost(reason: str) -> float:
    return REGISTRY.get_sample_value("thumbwheel_gateway_responses_lost_total", {"reason": reason}) or 0.0


async def the_response(gateway: Gateway) -> ResponseLogged:
    """The one response in the spool, waited for where nothing else waits for it."""
    await until(lambda: bool(gateway.responses()))
    (found,) = gateway.responses()
    return found


async def test_a_response_is_logged_as_it_was_served(gateway: Gateway) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    before_ms, before_s = time.time() * 1000, time.monotonic()
    headers = {"X-Thumbwheel-Conversation-Id": "c1", "traceparent": TRACE}
    ask = HELLO | {
        "user": "ann",
        "metadata": {"message_id": "m1"},
        "temperature": 0.3,
        "tools": tools,
        "logprobs": True,
    }
    _, body, response = await gateway.post("/v1/chat/completions", ask, headers)
    (logged,) = gateway.responses()
    assert logged.response_id == body["id"]
    assert key_of_response_id(body["id"]) == key_of_message_id("m1")
    assert logged.messages == HELLO["messages"]
    assert (logged.endpoint, logged.alias, logged.adapter, logged.arm) == ("chat", "assistant", "base", "live")
    assert (logged.conversation_id, logged.message_id, logged.trace) == ("c1", "m1", TRACE)
    assert logged.rater == hash_rater(b"thumbwheel", "ann") != "ann"
    assert logged.tools == tools
    assert logged.params == {"temperature": 0.3, "logprobs": True}
    assert logged.prompt_token_ids == [2, 277, 3]
    (choice,) = logged.choices
    assert choice.token_ids == [0, 1, 2, 3, 4]
    assert choice.message["tool_calls"] == body["choices"][0]["message"]["tool_calls"]
    assert (choice.finish_reason, choice.logprobs) == ("tool_calls", [-0.5])
    assert not logged.aborted
    assert before_ms - 1 <= logged.started_at_ms <= time.time() * 1000
    assert 0 < (logged.first_token_s or 0) <= logged.duration_s <= time.monotonic() - before_s
    assert response.status == 200


OPEN_WEBUI = {
    "X-OpenWebUI-Chat-Id": "chat-1",
    "X-OpenWebUI-Message-Id": "message-1",
    "X-OpenWebUI-User-Id": "user-1",
    "X-OpenWebUI-Task": "",
}


async def test_open_webuis_ids_are_taken_from_its_headers(gateway: Gateway) -> None:
    _, body, _ = await gateway.post("/v1/chat/completions", HELLO, OPEN_WEBUI)
    (logged,) = gateway.responses()
    assert (logged.conversation_id, logged.message_id) == ("chat-1", "message-1")
    assert logged.rater == hash_rater(b"thumbwheel", "user-1")
    assert key_of_response_id(body["id"]) == key_of_message_id("message-1")
    unfilled = {name: "{{" + name + "}}" for name in OPEN_WEBUI}  # by an Open WebUI that knows no placeholders yet
    await gateway.post("/v1/chat/completions", HELLO, unfilled)
    _, logged = gateway.responses()
    assert (logged.message_id, logged.rater) == (None, None)


async def test_openais_newer_name_for_the_user_is_hashed_too(gateway: Gateway) -> None:
    await gateway.chat(safety_identifier="ann@example.com", prompt_cache_key="ann@example.com", temperature=0.5)
    (logged,) = gateway.responses()
    assert (logged.rater, logged.params) == (hash_rater(b"thumbwheel", "ann@example.com"), {"temperature": 0.5})


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_apps_background_tasks_are_answered_and_not_logged(
    gateway: Gateway, stub: Stub, is_stream: bool
) -> None:
    ask = HELLO | {"stream": is_stream}
    for body, headers in (
        (ask, OPEN_WEBUI | {"X-OpenWebUI-Task": "title_generation"}),
        (ask, {"X-Thumbwheel-Task": "tags"}),
        (ask | {"metadata": {"message_id": "message-1", "task": "follow_up_generation"}}, None),
        (ask | {"store": False}, OPEN_WEBUI | {"X-OpenWebUI-Task": "title_generation"}),
    ):
        status, _, response = await gateway.post("/v1/chat/completions", body, headers)
        assert status == 200
        assert "X-Thumbwheel-Response-Id" not in response.headers
        assert "X-Thumbwheel-Feedback-Token" not in response.headers
        assert "return_token_ids" not in stub[0].requests[-1]
    await gateway.post("/v1/chat/completions", ask, OPEN_WEBUI)
    (logged,) = gateway.responses()
    assert logged.message_id == "message-1"


@pytest.mark.parametrize("ask", [{}, {"n": 2}, {"tools": [{"type": "function", "function": {"name": "look_up"}}]}])
async def test_a_stream_is_logged_like_the_same_answer_in_one_piece(gateway: Gateway, ask: dict[str, Any]) -> None:
    await gateway.chat(**ask)
    await gateway.chat(**ask, stream=True)
    one, other = gateway.responses()
    assert one.choices == other.choices
    assert len(one.choices) == ask.get("n", 1)
    assert one.prompt_token_ids == other.prompt_token_ids == [2, 277, 3]
    assert not one.aborted
    assert not other.aborted


async def test_completions_are_logged_with_their_prompt(gateway: Gateway) -> None:
    for stream in (False, True):
        await gateway.post("/v1/completions", {"model": "assistant", "prompt": "once", "stream": stream, "logprobs": 1})
    one, other = gateway.responses()
    assert one.choices[0].token_ids == other.choices[0].token_ids == list(range(8))
    assert one.choices[0].message == other.choices[0].message
    assert (one.endpoint, one.prompt, one.messages, one.prompt_token_ids) == ("completions", "once", None, [2, 277, 3])
    assert one.choices[0].message == {"content": "".join(f" word{n}" for n in range(8))}
    assert other.choices[0].logprobs == [-0.5] * 8


async def test_a_long_stream_is_condensed_on_the_way(gateway: Gateway) -> None:
    await gateway.chat(stream=True, stub={"chunks": 500})
    logged = await the_response(gateway)
    assert logged.choices[0].message["content"] == "".join(f" word{n}" for n in range(500))
    assert logged.choices[0].token_ids == list(range(563))


@pytest.mark.parametrize(
    "ask",
    [
        {"prompt": ["a", "b"]},  # two prompts in one request are no example
        {"prompt": "a", "echo": True},  # vLLM answers echo otherwise, once token ids are asked for
    ],
)
async def test_what_can_be_no_example_is_left_alone(gateway: Gateway, stub: Stub, ask: dict[str, Any]) -> None:
    status, _, response = await gateway.post("/v1/completions", {"model": "assistant"} | ask)
    assert status == 200
    assert "X-Thumbwheel-Feedback-Token" not in response.headers
    assert "return_token_ids" not in stub[0].requests[-1]
    assert gateway.responses() == []


async def test_the_conversation_is_named_or_found(gateway: Gateway) -> None:
    first = {"role": "user", "content": "hello"}
    turns = [first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
    await gateway.chat(messages=[first])
    await gateway.chat(messages=turns)
    await gateway.chat(messages=[{"role": "user", "content": "another"}])
    await gateway.chat(messages=[first], user="ann")
    await gateway.chat(messages=[first], user="ann", metadata={"conversation_id": "c"})
    found = [logged.conversation_id for logged in gateway.responses()]
    assert found[0] == found[1] != found[2]
    assert found[3:] == [hash_rater(b"thumbwheel", "ann"), "c"]


# --- answers that do not come to their end ---------------------------------------------------------------------------


async def test_a_client_that_leaves_ends_the_upstream_request_and_is_logged_as_aborted(
    gateway: Gateway, stub: Stub
) -> None:
    ask = HELLO | {"stream": True, "stub": {"fault": "stall"}}
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as response:
        await response.content.readuntil(b"word1")
        response.close()
    await until(lambda: bool(stub[0].left))  # while it would have gone on for an hour
    logged = await the_response(gateway)
    assert logged.aborted
    assert logged.choices[0].message["content"].startswith(" word0 word1")
    await until(lambda: gateway.parts.open_requests == 0)


async def test_a_client_that_leaves_before_the_first_byte_ends_the_request_too(gateway: Gateway, stub: Stub) -> None:
    asked = asyncio.create_task(gateway.chat(stub={"fault": "slow"}))
    await until(lambda: bool(stub[0].requests))
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await until(lambda: bool(stub[0].left))


@pytest.mark.parametrize("fault", ["reset", "no_done", "error", "stall"])
async def test_a_stream_that_the_engine_breaks_off_is_passed_on_and_logged_as_aborted(
    start: StartGateway, fault: str
) -> None:
    # Short for the one that is to run out of it alone, and not so short that a busy machine may begin too late.
    gateway = await start(engine={"request_timeout_s": 3.0} if fault == "stall" else {})
    ask = HELLO | {"stream": True, "stub": {"fault": fault}}
    received = b""
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as response:
        try:
            async for block in response.content.iter_any():
                received += block
            is_cut = False
        except aiohttp.ClientPayloadError:
            is_cut = True
    assert is_cut is (fault in ("reset", "stall"))
    assert b"word1" in received
    assert received.endswith(b"data: [DONE]\n\n") is (fault == "error")
    assert (await the_response(gateway)).aborted


async def test_garbage_is_passed_on_and_costs_only_its_event(gateway: Gateway) -> None:
    before = lost("capture")
    ask = HELLO | {"stub": {"fault": "garbage"}}
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as response:
        assert await response.read() == b'\x00not json{"model":'
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask | {"stream": True}) as response:
        received = await response.read()
    assert b"data: {not json\n\n\xff\xfe" in received
    assert received.endswith(b"data: [DONE]\n\n")
    assert lost("capture") == before + 2
    assert gateway.responses() == []


async def test_an_app_that_stops_reading_is_given_up(start: StartGateway, stub: Stub) -> None:
    gateway = await start(engine={"request_timeout_s": 3.0})
    ask = HELLO | {"stream": True, "stub": {"chunks": 300, "padding": 100_000}}
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as response:
        assert response.status == 200
        await until(lambda: bool(stub[0].left))  # not reading all the while
    assert (await the_response(gateway)).aborted


async def test_an_app_that_does_not_read_an_answer_holds_no_room(start: StartGateway) -> None:
    gateway = await start(engine={"request_timeout_s": 2.0})
    body = json.dumps(HELLO | {"stub": {"padding": 2_000_000}}).encode()
    url = urlsplit(gateway.url)
    client = socket.create_connection((url.hostname, url.port))
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    await until(lambda: gateway.parts.open_requests == 1)
    await until(lambda: gateway.parts.open_requests == 0)  # not reading all the while
    client.close()
    assert not (await the_response(gateway)).aborted


# --- a spool that fails ----------------------------------------------------------------------------------------------


async def test_past_the_quota_responses_are_dropped_and_feedback_is_not(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.spool.QUOTA_EVERY_S", 0.0)
    gateway = await start(spool_quota_bytes=1 << 20)
    gateway.parts.spool._quota_bytes = 1
    before = lost("quota")
    for _ in range(2):  # the second one finds that the first one waits
        assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202
    assert (await gateway.chat())[0] == 200
    assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202
    assert lost("quota") == before + 1
    assert gateway.responses() == []
    assert len(gateway.feedback()) == 3


async def test_what_is_joined_does_not_count_against_the_quota(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.spool.QUOTA_EVERY_S", 0.0)
    gateway = await start(spool_quota_bytes=1 << 20)
    log, topic = gateway.parts.spool._log, "thumbwheel.responses"
    log.append([NewRecord(topic, f"{n}", bytes(100_000)) for n in range(20)])
    before = lost("quota")
    assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202  # which looks at it
    assert (await gateway.chat())[0] == 200
    assert lost("quota") == before + 1
    joiner = log.consumer("joiner", [topic])
    joiner.commit({(topic, partition): end for partition, end in log.end_offsets(topic).items()})
    joiner.close()
    assert log.used_bytes() > 1 << 20
    assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202
    assert (await gateway.chat())[0] == 200
    assert lost("quota") == before + 1


async def test_the_last_of_the_disk_is_kept_for_feedback(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.spool.QUOTA_EVERY_S", 0.0)
    monkeypatch.setattr("services.gateway.spool.KEPT_FREE_BYTES", 1 << 62)
    before = lost("quota")
    for _ in range(2):
        assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202
        assert (await gateway.chat())[0] == 200
    assert lost("quota") == before + 2
    assert (gateway.responses(), len(gateway.feedback())) == ([], 2)


async def test_with_a_broken_log_the_chat_goes_on_responses_wait_and_feedback_is_a_503(
    gateway: Gateway, metrics_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise LogUnavailableError("disk full")

    before = lost("failed")
    with monkeypatch.context() as broken:
        broken.setattr(gateway.parts.spool._log, "write", fail)
        assert (await gateway.chat())[0] == 200
        assert (await gateway.chat(stream=True))[0] == 200
        status, body, response = await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"})
        assert (status, body["error"]["code"], response.headers["Retry-After"]) == (503, "not_written", "1")
        async with gateway.http.get(metrics_url + "/readyz") as ready:  # what it is for, the chat, goes on
            assert (ready.status, (await ready.json())["spool"]) == (200, False)
    with monkeypatch.context() as broken:
        broken.setattr(gateway.parts.spool._log, "sync", fail)
        assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 503
    assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202
    assert (await gateway.chat())[0] == 200
    assert lost("failed") == before
    log = gateway.parts.spool._log
    await until(lambda: sum(log.end_offsets("thumbwheel.responses").values()) >= 3)


async def test_what_waits_for_a_broken_log_is_bounded_in_memory(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise LogUnavailableError("disk full")

    monkeypatch.setattr("services.gateway.spool.MAX_WAITING_BYTES", 2_000)
    before = lost("backlog")
    with monkeypatch.context() as broken:
        broken.setattr(gateway.parts.spool._log, "write", fail)
        for _ in range(8):
            assert (await gateway.chat())[0] == 200
        kept = len(gateway.responses())
        assert 0 < kept < 8
        assert lost("backlog") == before + 8 - kept
    spool = gateway.parts.spool
    await until(lambda: spool._settled_bytes >= spool._put_bytes)  # a moment after the log has it
    assert sum(spool._log.end_offsets("thumbwheel.responses").values()) == kept
    assert (await gateway.chat())[0] == 200
    assert lost("backlog") == before + 8 - kept


async def test_with_a_broken_journal_the_chat_goes_on_and_the_loss_is_counted(
    gateway: Gateway, metrics_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = lost("failed")
    with monkeypatch.context() as broken:
        broken.setattr(gateway.parts.spool._journal, "append", full)
        assert (await gateway.chat())[0] == 200
        assert (await gateway.chat(stream=True))[0] == 200
    assert lost("failed") == before + 2
    async with gateway.http.get(metrics_url + "/readyz") as ready:
        assert (ready.status, (await ready.json())["spool"]) == (200, False)
    assert gateway.responses() == []


async def hold_up(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written to the log before this is set."""
    await gateway.parts.routes.is_known.wait()  # which is kept there, before any request goes on
    write, may_go_on = gateway.parts.spool._log.write, threading.Event()

    def write_when_told(*given: Any) -> None:
        assert may_go_on.wait(PATIENCE_S)
        write(*given)

    monkeypatch.setattr(gateway.parts.spool._log, "write", write_when_told)
    return may_go_on


async def test_votes_that_wait_for_a_disk_that_hangs_are_bounded_in_memory(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.spool.MAX_WAITING_BYTES", 1_000)
    monkeypatch.setattr("services.gateway.spool.VOTES_WAITING_BYTES", 1_000)
    monkeypatch.setattr("services.gateway.feedback.WRITE_TIMEOUT_S", 0.05)
    may_go_on = await hold_up(gateway, monkeypatch)
    for _ in range(20):
        status, _, response = await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"})
        assert (status, response.headers["Retry-After"]) == (503, "1")
    spool = gateway.parts.spool
    assert spool._backlog() < 3_000  # not twenty of some 500 each
    may_go_on.set()
    await until(lambda: not spool._backlog())
    monkeypatch.setattr("services.gateway.feedback.WRITE_TIMEOUT_S", PATIENCE_S)
    assert (await gateway.post("/v1/feedback", {"message_id": "m", "value": "up"}))[0] == 202


async def test_a_slow_spool_holds_the_last_byte_for_the_capture_timeout_only(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(capture_timeout_s=0.05)
    await gateway.chat()
    before = lost("late")
    avoid_the_journal(gateway)
    may_go_on = await hold_up(gateway, monkeypatch)
    started = time.monotonic()
    assert (await gateway.chat(stream=True))[0] == 200  # while nothing is written
    assert time.monotonic() - started >= 0.05
    assert lost("late") == before + 1
    may_go_on.set()


async def test_a_slow_log_holds_up_nobody_where_the_journal_is_quick(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = await hold_up(gateway, monkeypatch)
    assert (await gateway.chat(stream=True))[0] == 200  # while nothing can be written to the log
    assert len(gateway.responses()) == 1
    may_go_on.set()


async def test_after_one_slow_write_responses_are_written_off_the_event_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, before = gateway.parts.spool._journal.append, lost("late")
    real, slept = time.monotonic, list[float]()
    # The spool's clock: what it takes for slow must not depend on how busy this machine is.
    monkeypatch.setattr("services.gateway.spool.time", SimpleNamespace(monotonic=lambda: real() + sum(slept)))

    def append_slowly(record: Any) -> Any:
        slept.append(gateway.parts.gateway.capture_timeout_s + 1)
        return append(record)

    monkeypatch.setattr(gateway.parts.spool._journal, "append", append_slowly)
    for _ in range(3):
        assert (await gateway.chat())[0] == 200
    assert len(slept) == 1
    assert lost("late") == before + 1
    assert len(gateway.responses()) == 3


def avoid_the_journal(gateway: Gateway) -> None:
    gateway.parts.spool._slow_until = time.monotonic() + 60


async def test_the_last_byte_waits_for_the_spool(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    avoid_the_journal(gateway)
    may_go_on = await hold_up(gateway, monkeypatch)
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=HELLO | {"stream": True}) as response:
        await response.content.readuntil(b'"finish_reason":"stop"')
        assert gateway.responses() == []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await response.content.readuntil(b"data: [DONE]")
        may_go_on.set()
        await response.content.readuntil(b"data: [DONE]")
        assert len(gateway.responses()) == 1
