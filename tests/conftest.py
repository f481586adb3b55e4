"""Fixtures that more than one part's tests need: a store, and the real engine, started once a session."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine
from xdist.scheduler import LoadScopeScheduling

from loop.settings import EngineSettings, Settings, StoreSettings
from loop.store import open_store
from services.up import engine_command
from tests.ports import free_port

# Tests and the engine share the cores: threads that spin while they wait for their siblings would stop both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor may a test fail because an example had to wait for a core, or because chance has drawn one that it never drew
# before: what such a search finds would be blamed on a change that has nothing to do with it.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")
ROOT = Path(__file__).parent.parent
DEMO_MODEL = ROOT / "deploy" / "demo" / "model"
CPU_ARGS = ("--dtype", "float32", "--enforce-eager")
TOOL_ARGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


class EngineFirst(LoadScopeScheduling):
    """One worker keeps the real engine, and begins with it; the others take file after file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "engine" if _needs_engine(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> EngineFirst:
    return EngineFirst(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _needs_engine(item.nodeid.split("::")[0]))


def _needs_engine(file: str) -> bool:
    return file.endswith(("/test_engine.py", "/test_demo.py"))


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
    """Look until it is so. Fails, saying `what` is not, when the time is over."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not {what} within {seconds} s"
        time.sleep(0.05)  # how often we look, within the deadline


@dataclass
class RealEngine:
    """A vLLM server on the demo's base model; `restart` kills it and starts it again, its adapters forgotten."""

    url: str
    base_name: str
    model_dir: Path
    log: Path
    start_args: tuple[str, ...] = TOOL_ARGS
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = Settings(
            engine=EngineSettings(
                urls=[self.url],
                model=self.model_dir,
                base_name=self.base_name,
                max_model_len=512,
                start_args=[*CPU_ARGS, *self.start_args],
            )
        )
        # By default it closes a connection after 5 idle seconds, maybe just when a client that is not ours takes it.
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                engine_command(settings), stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"vLLM ended while starting:\n{self.log.read_text()[-3000:]}"
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)  # polled until it answers, within the deadline above
        raise AssertionError(f"vLLM did not start within 400 s:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """The real vLLM, on the demo's base model, with runtime LoRA loading."""
    log = tmp_path_factory.mktemp("engine") / "vllm.log"
    server = RealEngine(f"http://127.0.0.1:{free_port()}", "support-base", DEMO_MODEL, log)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Engine]:
    """An empty SQLite store."""
    opened = open_store(StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/store.db")))
    yield opened
    opened.dispose()
