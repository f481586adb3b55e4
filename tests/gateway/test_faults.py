"""What else goes wrong between an app and its engine. Chat is never worse off for the capture's sake, and no accepted
feedback is lost. Engines that fail are in `test_capture.py` and `test_engines.py`, tokens in `test_feedback.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loop.events import hash_rater, key_of_message_id, key_of_response_id
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway, read_spool
from tests.gateway.test_process import Process
from tests.stub_engine import StubEngine

Stub = tuple[StubEngine, str]


async def test_an_app_that_reads_slowly_gets_everything(gateway: Gateway) -> None:
    ask = HELLO | {"stream": True, "stub": {"chunks": 400, "padding": 50_000}}  # more than every buffer on the way
    received = b""
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=ask) as response:
        await asyncio.sleep(1.0)
        assert gateway.responses() == []  # the engine is held up
        while block := await response.content.read(100_000):
            received += block
            await asyncio.sleep(0.005)
    assert received.endswith(b"data: [DONE]\n\n")
    assert received.count(b"word") == 400
    (logged,) = gateway.responses()
    assert (logged.aborted, logged.choices[0].message["content"].count("word")) == (False, 400)


async def test_a_body_of_50_mb_is_refused_by_default_and_taken_where_settings_say_so(
    start: StartGateway, stub: Stub
) -> None:
    text = "x" * 50_000_000
    body = json.dumps(HELLO | {"messages": [{"role": "user", "content": text}]}).encode()
    status, answer, _ = await (await start()).post("/v1/chat/completions", body)
    assert (status, "larger than 33554432" in answer["error"]["message"]) == (413, True)
    assert stub[0].requests == []
    gateway = await start(max_body_bytes=64 << 20)
    assert (await gateway.post("/v1/chat/completions", body))[0] == 200
    assert stub[0].requests[-1]["messages"][0]["content"] == text
    assert (await gateway.chat())[0] == 200


async def test_a_body_without_a_length_is_bounded_too(start: StartGateway, stub: Stub) -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 1_000

    gateway = await start(max_body_bytes=4096)
    async with gateway.http.post(gateway.url + "/v1/chat/completions", data=endless()) as response:
        assert response.status == 413
    assert stub[0].requests == []


INJECTIONS = [
    "'; DROP TABLE examples; --",
    '" OR 1=1; --',
    "m1') ON CONFLICT DO NOTHING; --",
    "%s %(id)s {0} $1 ?",
    "\u00fc\u4e2d\U0001f44d",
]


@pytest.mark.parametrize("text", INJECTIONS)
async def test_sql_in_ids_is_only_text(gateway: Gateway, text: str) -> None:
    metadata = {"message_id": text, "conversation_id": text}
    assert (await gateway.chat(user=text, metadata=metadata))[0] == 200
    for body in ({"message_id": text}, {"message_id": "m", "feedback_id": text, "rater": text, "reasons": [text]}):
        assert (await gateway.post("/v1/feedback", {"value": "up"} | body))[0] == 202
    (logged,) = gateway.responses()
    assert (logged.message_id, logged.conversation_id) == (text, text)
    assert logged.rater == hash_rater(b"thumbwheel", text)
    one, other = gateway.feedback()
    assert (one.message_id, other.feedback_id, other.reasons) == (text, text, [text])


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: stolen=1", "a\nX-Admin: 1", "a\x00b", "a\x1b[31m", "x" * 512])
async def test_ids_that_are_none_cost_no_chat_and_reach_no_header_and_no_log(gateway: Gateway, text: str) -> None:
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:32]
    status, _, response = await gateway.chat(metadata={"message_id": text, "conversation_id": text})
    assert status == 200
    assert response.headers.keys().isdisjoint({"Set-Cookie", "X-Admin"})
    (logged,) = gateway.responses()
    assert (logged.message_id, logged.conversation_id) == (digest, digest)
    assert (await gateway.post("/v1/feedback", {"value": "up", "message_id": text}))[0] == 202
    (vote,) = gateway.feedback()
    assert vote.message_id == digest  # the same, so that they meet
    assert key_of_response_id(logged.response_id) == key_of_message_id(text)


@pytest.mark.parametrize("text", ["a\r\nSet-Cookie: stolen=1", "a\nX-Admin: 1", "a\n", "a\x00b", "a\x1b[31m"])
async def test_line_breaks_in_what_a_vote_says_of_itself_are_refused(gateway: Gateway, stub: Stub, text: str) -> None:
    for name in ("feedback_id", "rater", "source", "reasons"):
        body = {"message_id": "m", name: [text] if name == "reasons" else text}
        assert (await gateway.post("/v1/feedback", {"value": "up"} | body))[0] == 422
    status, _, response = await gateway.chat(model=text)
    assert status == 404
    assert response.headers.keys().isdisjoint({"Set-Cookie", "X-Admin"})
    assert stub[0].requests == []
    assert gateway.responses() == gateway.feedback() == []


async def test_a_header_in_two_lines_is_refused(gateway: Gateway, stub: Stub) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    body = json.dumps(HELLO).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"traceparent: 00-a\r\n b\r\nX-Request-Id: a\x00b\r\n\r\n" + body)
    assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert stub[0].requests == []


async def test_header_bytes_that_are_no_text_do_no_harm(gateway: Gateway, stub: Stub) -> None:
    chat, vote = json.dumps(HELLO).encode(), b'{"message_id": "m", "value": "up"}'
    cases = [
        ("/v1/chat/completions", "X-Thumbwheel-Message-Id", chat, b" 200 "),
        ("/v1/chat/completions", "X-OpenWebUI-User-Id", chat, b" 200 "),
        ("/v1/chat/completions", "Origin", chat, b" 403 "),
        ("/v1/chat/completions", "traceparent", chat, b" 200 "),
        ("/v1/chat/completions", "Authorization", chat, b" 200 "),
        ("/v1/feedback", "Idempotency-Key", vote, b" 422 "),
        ("/v1/feedback", "X-Thumbwheel-Feedback-Token", vote, b" 401 "),
    ]
    for path, name, body, status in cases:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{name}: "
        writer.write(head.encode() + b"\xff\xfe\r\n\r\n" + body)
        assert status in await reader.readline(), name
        writer.close()
        await writer.wait_closed()
    assert "traceparent" not in {name.lower() for name in stub[0].headers[0]}
    assert len(gateway.responses()) == 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt": "\xff"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\xff"}], "metadata": "\xff"}'),
    ],
)
async def test_a_prompt_that_is_no_text_is_the_engines_to_judge(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, path: str, body: bytes
) -> None:
    status, answer, _ = await gateway.post(path, body)
    assert (status, answer["error"]["message"]) == (400, "There was an error parsing the body")
    assert not caplog.records  # a stranger cannot fill the disk with tracebacks


async def test_a_callers_request_id_is_never_the_engines(gateway: Gateway, stub: Stub) -> None:
    _, body, _ = await gateway.post("/v1/chat/completions", HELLO, {"X-Request-Id": "mine"})
    assert "mine" not in body["id"]
    assert {name.lower(): value for name, value in stub[0].headers[-1].items()}["x-request-id"] in body["id"]


async def test_on_a_full_disk_chat_goes_on_and_no_vote_is_accepted_that_is_not_there(
    stub: Stub, tmp_path: Path
) -> None:
    process = Process(tmp_path, THUMBWHEEL_ENGINE__URLS=json.dumps([stub[1]]))
    try:
        await process.wait_until_up()
        accepted: list[str] = []
        statuses = set()
        async with aiohttp.ClientSession() as http:

            async def vote(number: int) -> int:
                body = {"message_id": "m", "value": "up", "feedback_id": f"f{number}"}
                async with http.post(process.url + "/v1/feedback", json=body) as response:
                    if response.status == 202:
                        accepted.append(body["feedback_id"])
                    return response.status

            assert await vote(0) == 202
            # From now on no file of the process grows beyond this, as on a disk that is full.
            _, hard = resource.prlimit(process.child.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.child.pid, resource.RLIMIT_FSIZE, (150_000, hard))
            async with asyncio.timeout(PATIENCE_S):
                for number in range(1, 2_000):
                    async with http.post(process.url + "/v1/chat/completions", json=HELLO) as response:
                        assert response.status == 200
                    statuses.add(status := await vote(number))
                    if status == 503:
                        break
            assert 503 in statuses
            resource.prlimit(process.child.pid, resource.RLIMIT_FSIZE, (hard, hard))
            async with asyncio.timeout(PATIENCE_S):
                while await vote(9_999) != 202:
                    await asyncio.sleep(0.1)
        assert {given.feedback_id for given in read_spool(process.spool_path)[1]} >= set(accepted)
    finally:
        process.child.kill()
        process.child.wait()
