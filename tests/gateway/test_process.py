"""The gateway as a process: its start, its end, and what is left when it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loop.log.embedded import EmbeddedLog
from tests.conftest import ROOT
from tests.gateway.conftest import HELLO, read_spool
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
        async with aiohttp.ClientSession() as http, asyncio.timeout(30):
            while True:
                try:
                    async with http.get(self.url + "/healthz") as response:
                        assert response.status == 200
                        return
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.02)

    async def wait_until_ended(self) -> int:
        return await asyncio.to_thread(self.child.wait, 30)


@pytest.fixture
def process(stub: Stub, tmp_path: Path) -> Iterator[Process]:
    environment = {"THUMBWHEEL_ENGINE__URLS": json.dumps([stub[1]]), "THUMBWHEEL_GATEWAY__DRAIN_TIMEOUT_S": "2"}
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
        async with asyncio.timeout(30):
            while len(accepted) < 200 or len(received) < 200:
                await asyncio.sleep(0.01)
        process.child.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError | OSError) for result in results), results
    await process.wait_until_ended()
    responses, feedback = read_spool(process.spool_path)
    assert set(accepted) <= {given.feedback_id for given in feedback}
    late = set(received) - {logged.response_id for logged in responses}
    assert len(late) <= 0.05 * len(received)  # those that took over 50 ms on a busy machine went out all the same
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


async def test_streams_that_do_not_end_are_cut_off_at_the_drains_end(process: Process) -> None:
    await process.wait_until_up()
    ask = HELLO | {"stream": True, "stub": {"fault": "stall"}}
    async with aiohttp.ClientSession() as http:
        async with http.post(process.url + "/v1/chat/completions", json=ask) as response:
            await response.content.readany()
            process.child.send_signal(signal.SIGTERM)
            started = time.monotonic()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
    assert await process.wait_until_ended() == 0
    assert 1.5 < time.monotonic() - started < 8
    (logged,) = read_spool(process.spool_path)[0]
    assert logged.aborted


async def test_metrics_have_their_own_port(process: Process) -> None:
    await process.wait_until_up()
    async with aiohttp.ClientSession() as http:
        await post(http, process.url + "/v1/chat/completions", HELLO)
        async with http.get(process.metrics_url + "/metrics") as response:
            text = await response.text()
        assert 'thumbwheel_gateway_requests_total{arm="live",endpoint="chat",status="200"} 1.0' in text
        async with http.get(process.metrics_url + "/readyz") as response:
            assert response.status == 200
        for path in ("/metrics", "/readyz"):
            async with http.get(process.url + path) as response:
                assert response.status == 404


async def test_the_process_says_so_for_one_large_header_and_does_not_buffer_a_huge_one(process: Process) -> None:
    await process.wait_until_up()
    for size, status in ((20_000, 200), (40_000, 431), (1_000_000, 400)):
        async with (
            aiohttp.ClientSession() as http,
            http.get(process.url + "/v1/models", headers={"X-Large": "x" * size}) as response,
        ):
            assert response.status == status


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


async def test_it_is_up_within_a_second_of_processor_time(process: Process) -> None:
    await process.wait_until_up()
    fields = Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()
    assert (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") < 1.5


# --- several on one port ---------------------------------------------------------------------------------------------


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.fixture
def three(stub: Stub, tmp_path: Path) -> Iterator[Process]:
    environment = {"THUMBWHEEL_GATEWAY__PROCESSES": "3", "THUMBWHEEL_GATEWAY__TOKEN_SECRET": "secret"}
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
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http, asyncio.timeout(60):
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
        for _ in range(5):  # whichever answers
            assert await count(http, three, "thumbwheel_gateway_requests_total") == asked
        for token in tokens:  # whichever signed it
            async with http.post(three.url + "/v1/feedback", json={"value": "up", "token": token}) as response:
                assert response.status == 202
        three.child.send_signal(signal.SIGTERM)
        assert await three.wait_until_ended() == 0
    assert len(read_spool(three.spool_path)[0]) == asked
    assert not list(three.spool_path.parent.glob("journal-*"))


async def test_a_process_that_dies_is_started_again_and_all_end_with_the_first(three: Process) -> None:
    await three.wait_until_up()
    async with asyncio.timeout(60):
        while len(before := children_of(three.child.pid)) < 3:
            await asyncio.sleep(0.02)
        os.kill(min(before), signal.SIGKILL)
        while len(after := children_of(three.child.pid)) < 3 or after == before:
            await asyncio.sleep(0.02)
        assert before - after == {min(before)}
        three.child.kill()
        while any(Path(f"/proc/{pid}/status").exists() for pid in after):
            await asyncio.sleep(0.02)
