"""Scheduler and console while their Postgres is away, at the start and later: they wait, say so, and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from loop import nightly
from loop.nightly import Interrupted, run_night
from loop.rollout.swap import open_fleet
from loop.settings import SchedulerSettings, Settings
from loop.store import open_store
from loop.store.runs import get_run, request_run
from tests.conftest import wait_until
from tests.ports import free_port
from tests.services_real import RealPostgres


@pytest.fixture
def server(postgres: RealPostgres) -> Iterator[RealPostgres]:
    """Runs again at the end, whatever the test has done."""
    yield postgres
    if not (postgres.folder / "data" / "postmaster.pid").exists():
        postgres.start()


def status(url: str) -> int:
    """The status of a page; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=180) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code
    except OSError:
        return 0


def test_they_wait_for_the_store_and_outlive_its_restart(server: RealPostgres, tmp_path: Path) -> None:
    settings = Settings(store=server.new_store())
    port = free_port()
    values = {
        "STORE__URL": settings.store.url.get_secret_value(),
        "ENGINE__URLS": f'["http://127.0.0.1:{free_port()}"]',
        "SCHEDULER__METRICS_PORT": free_port(),
        "SCHEDULER__TICK_S": 0.1,
        "SCHEDULER__RUNS_DIR": tmp_path / "runs",
        "CONSOLE__PORT": port,
    }
    environment = os.environ | {f"THUMBWHEEL_{name}": str(value) for name, value in values.items()}
    page = f"http://127.0.0.1:{port}/"
    logs = {part: tmp_path / f"{part}.log" for part in ("scheduler", "console")}
    server.stop()
    processes = []
    for part, path in logs.items():
        with path.open("wb") as log:
            command = [sys.executable, "-m", "services.cli", part]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def has_said(part: str, action: str) -> bool:
        return f'"action": "{action}"' in logs[part].read_text()

    try:
        for part in logs:
            wait_until(lambda part=part: has_said(part, f"{part}_waits"), f"{part} waiting")  # type: ignore[misc]
        server.start()
        wait_until(lambda: has_said("scheduler", "started"), "scheduler started")
        wait_until(lambda: status(page) == 200, "console there")
        server.stop("immediate")
        assert status(page) == 503
        wait_until(lambda: has_said("scheduler", "store_failed"), "scheduler without the store")
        server.start()
        wait_until(lambda: status(page) == 200, "console there again")
        store = open_store(settings.store)
        request_run(store, "run-1", "operator", 1)
        wait_until(lambda: (run := get_run(store, "run-1")) is not None and run.state == "skipped", "run done")
        store.dispose()
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ended = [process.wait(180) for process in processes]
    assert ended == [0, 0]
    assert "Traceback" not in "".join(path.read_text() for path in logs.values())


def test_a_run_that_loses_the_store_is_interrupted_and_not_failed(
    server: RealPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(store=server.new_store(), scheduler=SchedulerSettings(runs_dir=tmp_path))
    store = open_store(settings.store)
    run = request_run(store, "run-1", "operator", 1)

    def ask_while_it_is_away(_: nightly.Night) -> str:
        server.stop("immediate")
        with store.connect() as connection:
            connection.execute(text("SELECT 1"))
        return "done"

    monkeypatch.setattr(nightly, "_night", ask_while_it_is_away)
    with pytest.raises(Interrupted, match="the store is away"):
        run_night(settings, open_fleet(settings, store), run, threading.Event())
    server.start()
    found = get_run(store, "run-1")
    assert found is not None
    assert found.state == "running"
    store.dispose()
