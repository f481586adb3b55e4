"""What no client sends that means well: paths and methods past the allowlist, bodies that two servers would read in two
ways, packed bodies; and answers that have no body.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY

from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway
from tests.gateway.test_connection import engine
from tests.stub_engine import StubEngine

Stub = tuple[StubEngine, str]
BODY = json.dumps(HELLO).encode()
LENGTH = f"Content-Length: {len(BODY)}\r\n".encode()
START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
CHAT = START + LENGTH + b"\r\n" + BODY
LAST = START + b"Connection: close\r\n" + LENGTH + b"\r\n" + BODY


async def said(gateway: Gateway, sent: bytes) -> bytes:
    """Everything that the gateway answers until it hangs up, for which the last request must be a reason."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(sent)
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.close()


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


@pytest.mark.parametrize(
    "target",
    [
        "/v1/load_lora_adapter",
        "//v1/load_lora_adapter",
        "/v1//load_lora_adapter",
        "/v1/./load_lora_adapter",
        "/v1/chat/completions/../../load_lora_adapter",
        "/v1/chat/completions/%2e%2e/%2e%2e/load_lora_adapter",
        "/v1/chat/completions%2f..%2f..%2fload_lora_adapter",
        "/v1/chat/..;/load_lora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/load_lora_adapter?/v1/chat/completions",
        "/v1/load_lora_adapter#/v1/chat/completions",
        "/v1/%6coad_lora_adapter",
        "/V1/LOAD_LORA_ADAPTER",
        "/v1\\load_lora_adapter",
        "http://engine/v1/load_lora_adapter",
        "/tokenize/",
        "/tokenize/../metrics",
        "/v1/feedback/../load_lora_adapter",
        "*",
    ],
)
async def test_no_way_of_writing_a_path_leads_past_the_allowlist(gateway: Gateway, stub: Stub, target: str) -> None:
    for head in ("", "X-HTTP-Method-Override: POST\r\nX-Original-URL: /metrics\r\nX-Rewrite-URL: /metrics\r\n"):
        for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "BREW"):
            start = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}".encode()
            (status,) = statuses(await said(gateway, start + LENGTH + b"\r\n" + BODY))
            assert status in (400, 403, 404), method
    assert (stub[0].admin_calls, stub[0].requests) == (0, [])


async def test_a_streams_headers_come_with_its_first_chunk_in_one_packet(gateway: Gateway) -> None:
    body = json.dumps(HELLO | {"stream": True, "stub": {"pace_s": 0.01}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(START + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(PATIENCE_S):
        packet = await reader.read(65536)
    head, _, chunks = packet.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert chunks.count(b"data: ") == 1
    writer.close()


async def test_it_is_no_way_to_another_host(gateway: Gateway, stub: Stub) -> None:
    there = stub[1].removeprefix("http://")
    rest = f"HTTP/1.1\r\nHost: {there}\r\nConnection: close\r\n\r\n"
    tunnel = f"CONNECT {there} HTTP/1.1\r\nHost: x\r\n\r\n"
    for sent in (f"{tunnel}GET /metrics {rest}", f"GET http://{there}/metrics {rest}"):
        assert set(statuses(await said(gateway, sent.encode()))) == {404}
    assert stub[0].admin_calls == 0


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: identity\r\n" + LENGTH,
        b"Transfer-Encoding : chunked\r\n" + LENGTH,
        b"Transfer-Encoding:\x0bchunked\r\n" + LENGTH,
        LENGTH + b"Content-Length: 0\r\n",
        b"Content-Length: +10\r\n",
        b"Content-Length: 1_0\r\n",
        b"Content-Length: 0x10\r\n",
        b"Content-Length: -1\r\n",
        b" Content-Length: 10\r\n",
    ],
)
async def test_a_length_that_two_servers_would_read_in_two_ways_is_refused(
    gateway: Gateway, stub: Stub, head: bytes
) -> None:
    assert statuses(await said(gateway, START + head + b"\r\n0\r\n\r\n" + LAST)) == [400]
    assert stub[0].requests == []


async def test_what_is_no_http_is_counted_and_not_logged(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("thumbwheel_gateway_refused_total", {"code": "bad_http"}) or 0.0

    before = count()
    for head in (b"Authorization: Bearer tw-\x00secret\r\n", b"X-Large: " + b"x" * 100_000 + b"\r\n", b"no header\r\n"):
        assert statuses(await said(gateway, START + head + b"\r\n")) == [400]
    assert count() == before + 3
    assert caplog.records == []


async def test_requests_in_a_row_are_told_apart_and_an_unread_body_is_no_request(gateway: Gateway, stub: Stub) -> None:
    hidden = b"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    refused = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden
    chunked = START + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert statuses(await said(gateway, refused + CHAT + chunked + LAST)) == [404, 200, 200, 200]
    assert [seen["messages"] for seen in stub[0].requests] == [HELLO["messages"]] * 3
    assert all("Content-Length" in headers and "Transfer-Encoding" not in headers for headers in stub[0].headers)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"Expect: 100-continue\r\n", [100, 200]),
        (b"Expect: wonders\r\n", [417]),
        (b"Connection: upgrade\r\nUpgrade: websocket\r\n", [200]),
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", [200]),
        (b"Connection: Content-Length, X-Request-Id\r\n", [200]),
    ],
)
async def test_what_concerns_one_connection_is_not_the_engines(
    gateway: Gateway, stub: Stub, head: bytes, expected: list[int]
) -> None:
    answer = await said(gateway, START + b"Connection: close\r\n" + head + LENGTH + b"\r\n" + BODY)
    assert statuses(answer) == expected
    names = {name.lower() for headers in stub[0].headers for name in headers}
    assert names.isdisjoint({"expect", "connection", "upgrade", "http2-settings", "transfer-encoding"})


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_packed_body_is_bounded_by_what_is_in_it(
    start: StartGateway, stub: Stub, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    gateway = await start(max_body_bytes=1 << 20, api_keys=["k1"])
    packed = {"Content-Encoding": encoding}
    headers = packed | {"Authorization": "Bearer k1"}
    assert (await gateway.post("/v1/chat/completions", pack(BODY), headers))[0] == 200
    assert (await gateway.post("/v1/chat/completions", pack(b" " * (8 << 20) + BODY), headers))[0] == 413
    assert (await gateway.post("/v1/feedback", pack(b" " * 100_000), packed))[0] == 413
    for path in ("/v1/chat/completions", "/v1/feedback", "/api/public/scores"):
        status, answer, _ = await gateway.post(path, b"\x1f\x8b but not packed", headers)
        assert (status, answer["error"]["code"]) == (400, "invalid_body")
    assert len(stub[0].requests) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b'{"messages":%b}'),
        ("/v1/chat/completions", b'{"metadata":%b}'),
        ("/v1/completions", b'{"prompt":%b}'),
        ("/tokenize", b'{"messages":%b}'),
        ("/v1/feedback", b'{"value":"up","message_id":"m","reasons":%b}'),
        ("/v1/feedback", b'{"items":[{"value":"up","message_id":"m"},%b]}'),
        ("/v1/feedback/tokens", b"%b"),
        ("/api/public/scores", b'{"name":"user-feedback","value":1,"traceId":"m","metadata":%b}'),
        ("/api/public/scores", b"%b"),
        ("/api/public/ingestion", b'{"batch":[%b]}'),
    ],
)
async def test_what_is_nested_too_deep_is_refused(gateway: Gateway, stub: Stub, path: str, body: bytes) -> None:
    status, answer, _ = await gateway.post(path, body % (b"[" * 20_000 + b"]" * 20_000))
    assert (status, answer["error"]["type"]) in {(400, "invalid_request_error"), (422, "invalid_request_error")}
    assert stub[0].requests == gateway.feedback() == []


async def test_a_body_of_unknown_length_is_refused_once_it_is_too_large(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    head = b"POST /v1/feedback HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head + b"%x\r\n" % 30_000_000 + bytes(100_000))  # and no more, for the moment
    async with asyncio.timeout(PATIENCE_S):
        assert b" 413 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("answer", ["204 No Content", "304 Not Modified\r\nContent-Length: 100"])
async def test_an_answer_without_a_body_leaves_the_connection_in_step(start: StartGateway, answer: str) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 " + answer.encode() + b"\r\n\r\n")

    async with engine(script) as url:
        gateway = await start(engine={"urls": [url]})
        assert statuses(await said(gateway, CHAT * 2 + LAST)) == [int(answer[:3])] * 3
        assert gateway.responses() == []
