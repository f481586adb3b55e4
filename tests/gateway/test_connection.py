"""The connection to an engine: every form in which HTTP/1.1 may answer, in any pieces, and what is no answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from loop.settings import EngineSettings
from services.gateway.connection import Connection, GarbageError
from services.gateway.engines import Answer, Engines
from services.gateway.errors import Refusal
from services.gateway.relay import relayed_headers
from tests.gateway.conftest import PATIENCE_S

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def engine(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that does to each connection what the script says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"{'http' if tls is None else 'https'}://{host}:{port}"


def saying(answer: bytes, *, is_over: bool = False) -> Script:
    """Says it to every request, and hangs up where `is_over`."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readexactly(len(HEAD) + 2)
            writer.write(answer)
            await writer.drain()
            if is_over:
                return

    return script


async def connect(url: str) -> Connection:
    host, port = url.removeprefix("http://").split(":")
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
    return connection


def in_s(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def answer_of(connection: Connection) -> bytes:
    await connection.ask(HEAD, b"{}", in_s(10))
    return await connection.read_all()


@pytest.mark.parametrize(
    ("answer", "is_over", "status", "body", "is_idle"),
    [
        (OK, False, 200, b"hello", True),
        (CHUNKED, False, 200, b"hello", True),
        (OK + OK, False, 200, b"hello", False),  # more than was asked for
        (CHUNKED[:-2] + b"X-Sum: 1\r\n\r\n", False, 200, b"hello", True),  # a trailer
        (b"HTTP/1.1 100 Continue\r\nX-Interim: 1\r\n\r\n" + OK, False, 200, b"hello", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, 204, b"", True),
        (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", False, 500, b"", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", False, 200, b"hello", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", True, 200, b"hello", False),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", True, 200, b"hello", False),  # its end is the connection's
    ],
)
async def test_every_form_of_an_answer_is_read(
    answer: bytes, is_over: bool, status: int, body: bytes, is_idle: bool
) -> None:
    async with engine(saying(answer, is_over=is_over)) as url, asyncio.timeout(PATIENCE_S):
        connection = await connect(url)
        assert (await answer_of(connection), connection.status) == (body, status)
        assert "X-Interim" not in dict(connection.headers)
        assert connection.is_idle is is_idle
        connection.abort()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"SSH-2.0-OpenSSH\r\n", GarbageError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\n", GarbageError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz", GarbageError),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", GarbageError),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Much: more\r\n" * 10_000, GarbageError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + CHUNKED.partition(b"\r\n")[2], GarbageError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n" + OK.partition(b"\r\n")[2], GarbageError),
        (b"HTTP/1.1 200 OK\r\nX-A: 1\nX-B: 2\r\r\n" + OK.partition(b"\r\n")[2], GarbageError),
        (b"", ConnectionError),
        (b"HTTP/1.1 200 OK\r\nContent-", ConnectionError),
        (OK[:-1], ConnectionError),
        (CHUNKED[:-5], ConnectionError),
    ],
    ids=[
        *("other protocol", "length", "chunk", "upgrade", "endless head", "length and chunks", "two lengths"),
        *("bare line breaks", "nothing", "half head", "half body", "no end"),
    ],
)
async def test_what_is_no_answer_or_not_all_of_it_is_an_error(answer: bytes, error: type[Exception]) -> None:
    async with engine(saying(answer, is_over=True)) as url, asyncio.timeout(PATIENCE_S):
        connection = await connect(url)
        with pytest.raises(error):
            await answer_of(connection)
        assert not connection.is_idle


class Wire(asyncio.Transport):
    """Takes what is sent, to nowhere."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass


@given(answer=st.sampled_from([OK, CHUNKED]), cuts=st.lists(st.integers(1, 100), max_size=8))
async def test_the_pieces_in_which_an_answer_comes_make_no_difference(answer: bytes, cuts: list[int]) -> None:
    connection = Connection()
    connection.connection_made(Wire())
    asked = asyncio.create_task(connection.ask(HEAD, b"{}", in_s(10)))
    await asyncio.sleep(0)
    places = [0, *sorted({cut for cut in cuts if cut < len(answer)}), len(answer)]
    for start, end in pairwise(places):
        connection.data_received(answer[start:end])
    await asked
    assert (connection.status, await connection.read_all(), connection.is_idle) == (200, b"hello", True)


async def test_an_answer_that_nobody_reads_stays_with_the_engine() -> None:
    size = 64 << 20
    sent = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(HEAD) + 2)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(64):
            writer.write(bytes(size // 64))
            await writer.drain()
        sent.set()
        await reader.read()

    async with engine(script) as url, asyncio.timeout(PATIENCE_S):
        connection = await connect(url)
        await connection.ask(HEAD, b"{}", in_s(10))
        while not connection._is_paused:
            await asyncio.sleep(0)
        assert connection._waiting_bytes < 1 << 20
        assert not sent.is_set()
        assert len(await connection.read_all()) == size
        connection.abort()


# --- the pool --------------------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again_once_its_answer_was_read_to_the_end() -> None:
    opened, is_over = 0, asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        while True:
            await reader.readuntil(b"{}")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + CHUNKED.partition(b"\r\n")[2][:-5])
            await is_over.wait()
            writer.write(CHUNKED[-5:])

    async with engine(script) as url, asyncio.timeout(PATIENCE_S):
        engines = Engines(EngineSettings(urls=[url]))
        is_over.set()
        for _ in range(3):
            with await engines.post("/v1/x", b"{}", {}, "m") as answer:
                assert answer.is_stream
                assert answer.first + await answer.read() + await answer.read() == b"hello"
        assert opened == 1
        is_over.clear()
        with await engines.post("/v1/x", b"{}", {}, "m"):  # left before its end
            pass
        is_over.set()
        with await engines.post("/v1/x", b"{}", {}, "m") as answer:
            assert answer.first == b"hello"
        assert opened == 2
        engines.close()


async def test_what_was_not_read_of_one_answer_is_in_no_other() -> None:
    connection = Connection()
    connection.connection_made(Wire())
    asked = asyncio.create_task(connection.ask(HEAD, b"{}", in_s(10)))
    await asyncio.sleep(0)
    connection.data_received(CHUNKED)  # all of it, and nobody reads it
    await asked
    assert not connection.is_idle


async def test_each_request_has_a_deadline_of_its_own() -> None:
    connection, left_alone = Connection(), Connection()
    connection.connection_made(Wire())
    left_alone.connection_made(Wire())

    async with asyncio.timeout(10):
        for deadline_s, waited_s in ((0.05, 0.0), (60.0, 0.1)):  # the first one's comes while the second one waits
            asked = asyncio.create_task(connection.ask(HEAD, b"{}", in_s(deadline_s)))
            await asyncio.sleep(waited_s)
            connection.data_received(OK)
            await asked
            assert await connection.read_all() == b"hello"
        with pytest.raises(TimeoutError) as raised:
            await left_alone.ask(HEAD, b"{}", in_s(0.05))
    assert raised.value is left_alone._error


@pytest.mark.parametrize("unasked", [b"", OK, b"garbage"], ids=["closed", "an answer to nothing", "garbage"])
async def test_a_waiting_connection_that_the_engine_has_spoilt_is_not_used(unasked: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(OK)
        await spoil.wait()
        writer.write(unasked)
        await writer.drain()
        if unasked:
            await reader.read()
        spoilt.set()

    spoil, spoilt = asyncio.Event(), asyncio.Event()
    async with engine(script) as url, asyncio.timeout(PATIENCE_S):
        engines = Engines(EngineSettings(urls=[url]))
        for _ in range(2):
            with await engines.post("/v1/x", b"{}", {}, "m") as answer:
                assert answer.first == b"hello"
            waiting = engines.replicas[0]._idle[-1][1]
            spoil.set()
            await spoilt.wait()
            while waiting.is_idle:
                await asyncio.sleep(0)
            assert engines.replicas[0].take() is None
            spoil.clear()
            spoilt.clear()
        engines.close()


def certificate(path: Path) -> Path:
    """A certificate for this machine, which has signed it itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_bytes = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key_bytes + made.public_bytes(pem))
    return path


async def test_an_engine_behind_tls_is_reached_where_its_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"{}")
            writer.write(OK)

    path = certificate(tmp_path / "engine.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    async with engine(script, tls) as url, asyncio.timeout(PATIENCE_S):
        engines = Engines(EngineSettings(urls=[url]))
        with pytest.raises(Refusal, match="Service Unavailable"):
            await engines.post("/v1/x", b"{}", {}, "m")
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        for _ in range(2):
            with await engines.post("/v1/x", b"{}", {}, "m") as answer:
                assert answer.first == b"hello"
        engines.close()


async def test_headers_are_told_before_the_first_byte_and_again_of_the_replica_that_answers() -> None:
    told: list[Answer] = []
    is_told = asyncio.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5\r\n\r\n"

    def tell(answer: Answer) -> None:
        told.append(answer)
        is_told.set()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(head)
        await is_told.wait()  # else it would wait for ever, and so would the test
        if len(told) == 2:
            writer.write(b"hello")
        is_told.clear()  # and hangs up

    async with engine(script) as url, asyncio.timeout(PATIENCE_S):
        engines = Engines(EngineSettings(urls=[url]))
        with await engines.post("/v1/x", b"{}", {}, "m", tell) as answer:
            assert answer.first == b"hello"
        assert told == [told[0], answer]
        engines.close()


async def test_headers_of_the_engines_connection_end_there() -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nX-Kept: 2\r\nContent-Length: 2\r\n\r\n{}"
    async with engine(saying(head)) as url, asyncio.timeout(PATIENCE_S):
        engines = Engines(EngineSettings(urls=[url]))
        with await engines.post("/v1/x", b"{}", {}, "m") as answer:
            assert list(relayed_headers(answer)) == ["X-Kept"]
        engines.close()
