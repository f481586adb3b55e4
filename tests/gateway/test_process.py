"""The gateway as a process: its start, its end, and what is left when it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loop.log.embedded import EmbeddedLog
from tests.conftest import ROOT
from tests.gateway.conftest import HELLO, PATIENCE_S, read_spool, until
from tests.ports import free_port
from tests.stub_engine import StubEngine

Stub = tuple[StubEngine, str]
SERVE = "from loop.settings import load_settings; from services.gateway.app import main; main(load_settings())"


def environment_of(folder: Path, port: int, metrics_port: int) -> dict[str, str]:
    """Of a gateway with its files in this folder."""
    return os.environ | {
        "THUMBWHEEL_GATEWAY__PORT": str(port),
        "THUMBWHEEL_GATEWAY__METRICS_PORT": str(metrics_port),
        "THUMBWHEEL_LOG__PATH": str(folder / "log.db"),
        "THUMBWHEEL_STORE__URL": f"sqlite:///{folder}/store.db",
    }


class Process:
    """A gateway process of its own, and where it is."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.spool_path = folder / "log.db"
        self.environment = environment
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.metrics_url = f"http://127.0.0.1:{(metrics_port := free_port())}"
        self.child = subprocess.Popen(
            [sys.executable, *(arguments or ("-c", SERVE))],
            cwd=ROOT,
            env=environment_of(folder, port, metrics_port) | environment,
        )

    async def wait_until_up(self) -> None:
        async with aiohttp.ClientSession() as http, asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    async with http.get(self.url + "/healthz") as response:
                        assert response.status == 200
                        return
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.02)

    async def wait_until_ended(self) -> int:
        return await asyncio.to_thread(self.child.wait, PATIENCE_S)


@pytest.fixture
def process(stub: Stub, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    """A gateway in front of the stub; its parameter is how long it drains."""
    environment = {
        "THUMBWHEEL_ENGINE__URLS": json.dumps([stub[1]]),
        "THUMBWHEEL_GATEWAY__DRAIN_TIMEOUT_S": getattr(request, "param", f"{PATIENCE_S:.0f}"),
        # The longest: on a busy machine, a slow write is no broken disk.
        "THUMBWHEEL_GATEWAY__CAPTURE_TIMEOUT_S": "5",
    }
    started = Process(tmp_path, **environment)
    yield started
    if started.child.poll() is None:
        started.child.kill()
    started.child.wait()


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with http.post(url, json=body) as response:
        return response.status, await response.json()


async def test_what_was_acknowledged_is_in_the_spool_after_kill_9(process: Process) -> None:
    await process.wait_until_up()
    accepted: list[str] = []
    received: list[str] = []

    async def thumbs(http: aiohttp.ClientSession) -> None:
        while True:
            body = {"message_id": "m", "value": "up"}
            status, answer = await post(http, process.url + "/v1/feedback", body)
            assert status == 202
            accepted.append(answer["feedback_id"])

    async def chats(http: aiohttp.ClientSession) -> None:
        while True:
            status, answer = await post(http, process.url + "/v1/chat/completions", HELLO)
            assert status == 200
            received.append(answer["id"])

    async with aiohttp.ClientSession() as http:
        tasks = [asyncio.create_task(work(http)) for work in (thumbs, thumbs, thumbs, chats, chats, chats)]
        await until(lambda: len(accepted) >= 200 and len(received) >= 200)
        process.child.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError | OSError) for result in results), results
    await process.wait_until_ended()
    responses, feedback = read_spool(process.spool_path)
    assert set(accepted) <= {given.feedback_id for given in feedback}
    late = set(received) - {logged.response_id for logged in responses}
    assert len(late) <= 0.05 * len(received)  # those that took too long on a busy machine went out all the same
    # What only the journal has is taken up at the next start, and the journal is gone.
    left = list(process.spool_path.parent.glob("journal-*"))
    assert left
    again = Process(process.spool_path.parent, **process.environment)
    await again.wait_until_up()
    again.child.send_signal(signal.SIGTERM)
    assert await again.wait_until_ended() == 0
    assert not list(process.spool_path.parent.glob("journal-*"))
    taken_up = read_spool(process.spool_path)[0]
    assert {logged.response_id for logged in taken_up} == {logged.response_id for logged in responses}


async def test_open_streams_end_in_order_on_sigterm(process: Process) -> None:
    await process.wait_until_up()
    ask = HELLO | {"stream": True, "stub": {"chunks": 20, "pace_s": 0.05}}
    async with aiohttp.ClientSession() as http:
        async with http.post(process.url + "/v1/chat/completions", json=ask) as response:
            await response.content.readany()
            process.child.send_signal(signal.SIGTERM)
            received = await response.read()
        assert received.endswith(b"data: [DONE]\n\n")
    assert await process.wait_until_ended() == 0
    (logged,) = read_spool(process.spool_path)[0]
    assert not logged.aborted


async def test_a_body_on_its_way_is_waited_for_on_sigterm(process: Process) -> None:
    await process.wait_until_up()
    chat, vote = json.dumps(HELLO).encode(), json.dumps({"message_id": "m", "value": "up"}).encode()
    gone_on, halves_sent = asyncio.Event(), asyncio.Barrier(3)

    async def in_halves(body: bytes) -> AsyncIterator[bytes]:
        yield body[:10]
        await halves_sent.wait()
        await gone_on.wait()
        yield body[10:]

    async with aiohttp.ClientSession() as http:
        asked = asyncio.gather(
            http.post(process.url + "/v1/chat/completions", data=in_halves(chat)),
            http.post(process.url + "/v1/feedback", data=in_halves(vote)),
        )
        await halves_sent.wait()
        await asyncio.sleep(0.2)  # they have come by then, which nothing tells
        process.child.send_signal(signal.SIGTERM)
        await until(lambda: refuses(process.url))
        gone_on.set()
        assert [response.status for response in await asked] == [200, 202]
    assert await process.wait_until_ended() == 0
    (logged,), (given,) = read_spool(process.spool_path)
    assert (logged.aborted, given.value) == (False, "up")


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


@pytest.mark.parametrize("process", ["2"], indirect=True)
async def test_streams_that_do_not_end_are_cut_off_at_the_drains_end(process: Process) -> None:
    await process.wait_until_up()
    ask = HELLO | {"stream": True, "stub": {"fault": "stall"}}
    async with aiohttp.ClientSession() as http:
        async with http.post(process.url + "/v1/chat/completions", json=ask) as response:
            await response.content.readany()
            started = time.monotonic()
            process.child.send_signal(signal.SIGTERM)
            with pytest.raises(aiohttp.ClientError):
                await response.read()
    assert await process.wait_until_ended() == 0
    assert time.monotonic() - started >= 2  # and not an hour, as the engine would have taken
    (logged,) = read_spool(process.spool_path)[0]
    assert logged.aborted


async def test_a_client_that_leaves_ends_the_upstream_request_of_the_process_too(process: Process, stub: Stub) -> None:
    await process.wait_until_up()
    engine, url = stub[0], process.url + "/v1/chat/completions"
    async with aiohttp.ClientSession() as http:
        for number, ask in enumerate(({"stub": {"fault": "slow"}}, {"stream": True, "stub": {"fault": "stall"}})):
            asked = asyncio.create_task(post(http, url, HELLO | ask))
            async with asyncio.timeout(30):
                while len(engine.requests) == number:
                    await asyncio.sleep(0.01)
            asked.cancel()
            async with asyncio.timeout(1):
                while engine.left == number:
                    await asyncio.sleep(0.01)


async def test_metrics_have_their_own_port(process: Process) -> None:
    await process.wait_until_up()
    async with aiohttp.ClientSession() as http:
        await post(http, process.url + "/v1/chat/completions", HELLO)
        counted = 'thumbwheel_gateway_requests_total{arm="live",endpoint="chat",status="200"}'
        async with asyncio.timeout(PATIENCE_S):
            while await count(http, process, counted) != 1:  # counted once it is answered
                await asyncio.sleep(0.01)
        async with http.get(process.metrics_url + "/readyz") as response:
            assert response.status == 200
        for path in ("/metrics", "/readyz"):
            async with http.get(process.url + path) as response:
                assert response.status == 404


def first_line_after(url: str, head: bytes) -> bytes:
    """What a server says though it may hang up before it has read all; clients that write on do not look for it."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        with suppress(ConnectionError):
            connection.sendall(head)
        return connection.recv(1024).partition(b"\r\n")[0]


async def test_the_process_says_so_for_one_large_header_and_does_not_buffer_a_huge_one(process: Process) -> None:
    await process.wait_until_up()
    for size, status in ((20_000, 200), (40_000, 431)):
        async with (
            aiohttp.ClientSession() as http,
            http.get(process.url + "/v1/models", headers={"X-Large": "x" * size}) as response,
        ):
            assert response.status == status
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 1_000_000 + b"\r\n\r\n"
    assert b" 400 " in await asyncio.to_thread(first_line_after, process.url, head)


async def test_what_it_takes_is_not_nested_too_deep_for_who_reads_the_log(process: Process) -> None:
    await process.wait_until_up()
    async with aiohttp.ClientSession() as http:
        for depth, expected in ((600, 200), (700, 400)):
            tool = json.loads('{"a":' * depth + "1" + "}" * depth)
            body = HELLO | {"tools": [{"type": "function", "function": {"name": "f", "parameters": tool}}]}
            assert (await post(http, process.url + "/v1/chat/completions", body))[0] == expected
    (logged,) = read_spool(process.spool_path)[0]
    assert logged.tools is not None


async def test_operators_routes_are_not_on_the_public_port(process: Process) -> None:
    await process.wait_until_up()
    async with aiohttp.ClientSession() as http:
        for path in ("/metrics", "/readyz", "/admin", "/keys", "/v1/keys", "/v1/load_lora_adapter", "/runs", "/debug"):
            for method in ("GET", "POST", "DELETE"):
                async with http.request(method, process.url + path) as response:
                    assert response.status == 404, (method, path)


def test_the_gateway_needs_neither_torch_nor_the_store_to_start() -> None:
    program = "import services.gateway.app, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint({"torch", "transformers", "sqlalchemy", "vllm", "kafka"})


LIBRARIES = "import aiohttp.web, msgspec, prometheus_client, pydantic, uvloop"


async def test_until_it_is_up_it_costs_little_more_than_its_libraries(process: Process) -> None:
    await process.wait_until_up()
    # Of the first thread: what another one loads meanwhile, nobody waits for.
    stat = Path(f"/proc/{process.child.pid}/task/{process.child.pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    program = f"{LIBRARIES}; import time; print(time.process_time())"
    least = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(2)]
    # Half a second, and 0.9 s in all, on the machine that this was written on; a slower one takes longer for both.
    assert (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") < 3 * max(float(one.stdout) for one in least)


# --- several on one port ---------------------------------------------------------------------------------------------


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid: int) -> bool:
    """Not one that has ended and is still to be buried, by whoever inherited it."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def three(stub: Stub, tmp_path: Path) -> Iterator[Process]:
    environment = {"THUMBWHEEL_GATEWAY__PROCESSES": "3", "THUMBWHEEL_GATEWAY__TOKEN_SECRET": "secret"}
    environment["THUMBWHEEL_GATEWAY__REGENERATE_WEIGHT"] = "0.2"
    started = Process(
        tmp_path,
        *("-m", "services.cli", "gateway"),
        THUMBWHEEL_ENGINE__URLS=json.dumps([stub[1]]),
        THUMBWHEEL_GATEWAY__DRAIN_TIMEOUT_S="5",
        **environment,
    )
    yield started
    if started.child.poll() is None:
        started.child.kill()  # which ends its children too
    started.child.wait()


async def count(http: aiohttp.ClientSession, process: Process, what: str) -> float:
    async with http.get(process.metrics_url + "/metrics") as response:
        return sum(float(line.split()[-1]) for line in (await response.text()).splitlines() if line.startswith(what))


async def test_several_processes_share_the_ports_and_their_metrics(three: Process) -> None:
    await three.wait_until_up()
    sources = set()
    asked = 0
    tokens = []
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
        asyncio.timeout(PATIENCE_S),
    ):
        while len(sources) < 3:  # the kernel deals them out by a hash
            async with http.post(three.url + "/v1/chat/completions", json=HELLO) as response:
                assert response.status == 200
                tokens.append(response.headers["X-Thumbwheel-Feedback-Token"])
            asked += 1
            log = EmbeddedLog(three.spool_path)
            values = [r.value for p in range(log.partitions) for r in log.read("thumbwheel.responses", p, 0, 10_000)]
            log.close()
            sources = {json.loads(value)["source"] for value in values}
        assert sources == {f"thumbwheel/gateway/gateway-1-{number}" for number in range(3)}
        while await count(http, three, "thumbwheel_gateway_requests_total") < asked:  # counted once it is answered
            await asyncio.sleep(0.01)
        for _ in range(5):  # whichever answers
            assert await count(http, three, "thumbwheel_gateway_requests_total") == asked
        for token in tokens:  # whichever signed it
            async with http.post(three.url + "/v1/feedback", json={"value": "up", "token": token}) as response:
                assert response.status == 202
        three.child.send_signal(signal.SIGTERM)
        assert await three.wait_until_ended() == 0
    assert len(read_spool(three.spool_path)[0]) == asked
    assert not list(three.spool_path.parent.glob("journal-*"))


async def test_several_processes_share_what_they_remember(three: Process) -> None:
    await three.wait_until_up()
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
        asyncio.timeout(PATIENCE_S),
    ):
        scores = three.url + "/api/public/scores"
        for n in range(12):  # 1 in 3 to the 12th, if the process had to be the same one
            score = {"id": f"own-{n}", "traceId": f"message-{n}", "name": "user-feedback", "value": 1}
            async with http.post(scores, json=score) as response:
                assert response.status == 200
            async with http.delete(f"{scores}/own-{n}") as response:
                assert response.status == 202
        for _ in range(12):
            asked = HELLO | {"metadata": {"conversation_id": "c"}}
            async with http.post(three.url + "/v1/chat/completions", json=asked) as response:
                assert response.status == 200
        three.child.send_signal(signal.SIGTERM)
        assert await three.wait_until_ended() == 0
    votes = read_spool(three.spool_path)[1]
    scored = sorted((vote.message_id or "", vote.value) for vote in votes if vote.source == "langfuse")
    assert scored == sorted((f"message-{n}", value) for n in range(12) for value in ("up", "retract"))
    assert sum(vote.source == "regenerate" for vote in votes) == 11


async def test_a_process_that_dies_is_started_again_and_all_end_with_the_first(three: Process) -> None:
    await three.wait_until_up()
    async with asyncio.timeout(PATIENCE_S):
        while len(before := children_of(three.child.pid)) < 3:
            await asyncio.sleep(0.02)
        os.kill(min(before), signal.SIGKILL)
        while len(after := children_of(three.child.pid)) < 3 or after == before:
            await asyncio.sleep(0.02)
        assert before - after == {min(before)}
        three.child.kill()
        while any(map(is_running, after)):
            await asyncio.sleep(0.02)
