"""`thumbwheel up`: the parts as children that are started again when they die, and that end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

import httpx
import pytest

from loop.settings import OpenWebuiSettings, Settings, load_settings
from loop.store import open_store
from loop.store.examples import count_labels
from services import up
from services.up import RESTARTS, answers
from tests.conftest import ROOT, wait_until
from tests.ports import free_port

PARTS = ("joiner", "gateway", "scheduler", "console")
PORTS = ("gateway.port", "gateway.metrics_port", "joiner.metrics_port", "scheduler.metrics_port", "console.port")


@pytest.fixture
def engine() -> Iterator[str]:
    """The URL of a stub in the engine's place, which `up` does not start."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    child = subprocess.Popen([sys.executable, "-m", "tests.stub_engine", str(port)], cwd=ROOT)
    wait_until(lambda: answers(url + "/health"), "answered")
    yield url
    child.terminate()
    child.wait()


@pytest.fixture
def settings_path(engine: str, tmp_path: Path) -> Path:
    lines = [f"{name} = {free_port()}" for name in PORTS]
    lines += [f'log.path = "{tmp_path}/log.db"', f'store.url = "sqlite:///{tmp_path}/store.db"']
    lines += [f'engine.urls = ["{engine}"]', 'engine.base_name = "base"', f'scheduler.runs_dir = "{tmp_path}/runs"']
    path = tmp_path / "thumbwheel.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def service(settings_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`thumbwheel up`, once it has said that it is ready."""
    command = [sys.executable, "-m", "services.cli", "up", "--settings", str(settings_path)]
    command += ["--logs", str(settings_path.parent / "logs")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("ready" in line for line in process.stderr)
        yield process
        process.terminate()


def children(of: int) -> dict[str, int]:
    """The process ids of the parts, by name, as the kernel sees them."""
    found = {}
    for pid in Path(f"/proc/{of}/task/{of}/children").read_text().split():
        words: list[str] = []
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "services.cli" in words:  # not one that is only just forked, or has ended
            found[words[words.index("services.cli") + 1]] = int(pid)
    return found


def test_a_killed_part_is_started_again_and_a_vote_meets_its_response_there(
    settings_path: Path, service: subprocess.Popen[str]
) -> None:
    settings = load_settings(settings_path, {})
    wait_until(lambda: answers(f"http://127.0.0.1:{settings.gateway.metrics_port}/readyz"), "ready")
    before = children(service.pid)
    assert tuple(before) == PARTS
    asked = {"model": settings.engine.alias, "messages": [{"role": "user", "content": "hello"}]}
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.gateway.port}", timeout=180) as http:
        response_id = http.post("/v1/chat/completions", json=asked).raise_for_status().json()["id"]
        os.kill(before["joiner"], signal.SIGKILL)
        assert http.post("/v1/feedback", json={"response_id": response_id, "value": "up"}).status_code == 202
    store = open_store(settings.store)
    wait_until(lambda: count_labels(store, date.min) == 1, "joined")
    store.dispose()
    after = children(service.pid)
    assert {name for name in PARTS if after[name] != before[name]} == {"joiner"}
    service.terminate()
    assert service.wait(180) == 0
    assert not [pid for pid in after.values() if Path(f"/proc/{pid}").exists()]


def test_a_part_that_keeps_dying_ends_all_of_it(service: subprocess.Popen[str]) -> None:
    killed: list[int] = []
    while len(killed) <= RESTARTS:
        wait_until(lambda: children(service.pid).get("console", 0) not in [0, *killed], "started again")
        killed.append(children(service.pid)["console"])
        os.kill(killed[-1], signal.SIGKILL)
    assert service.wait(180) == 1


def test_the_poller_runs_where_an_open_webui_is_configured(tmp_path: Path) -> None:
    settings = Settings(open_webui=OpenWebuiSettings(url="http://127.0.0.1:9"))
    assert [child.name for child in up.children(settings, None, tmp_path)] == [*PARTS, "open-webui"]
    assert [child.name for child in up.children(Settings(), None, tmp_path)] == [*PARTS]
