"""`thumbwheel up`: every process on one machine, from one settings file, started, watched and ended together.

Each part is a child process of its own, as it is in production. One that dies is started again; one that keeps dying
ends everything, because a half-running loop hides the fault. It takes no decisions of the parts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from loop.settings import Settings

ENGINE_START_S = 600.0
STOP_S = 30.0
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
RESTARTS = 5
RESTARTS_WINDOW_S = 120.0


@dataclass
class Child:
    """One part's process, and when it was started again."""

    name: str
    command: list[str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: deque[float] = field(default_factory=deque)

    def start(self) -> None:
        """Start it in a process group of its own, so that a Ctrl-C reaches it through us, in order."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def is_dead(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL to its whole group once the time is over."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def engine_command(settings: Settings) -> list[str]:
    """The vLLM server for the settings, with runtime LoRA loading."""
    engine = settings.engine
    url = urlsplit(engine.urls[0])
    rank = next(rank for rank in LORA_RANKS if rank >= settings.train.lora_r)
    loaded = settings.rollout.keep_loaded + 4  # besides what serves: a canary, and candidates at the gate
    return [
        *("env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "VLLM_NO_USAGE_STATS=1"),
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(engine.model), "--served-model-name", engine.base_name),
        *("--host", url.hostname or "127.0.0.1", "--port", str(url.port or 8000)),
        *("--max-model-len", str(engine.max_model_len)),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", str(loaded), "--max-lora-rank", str(rank)),
        *(("--api-key", engine.api_key.get_secret_value()) if engine.api_key else ()),
        *engine.start_args,
    ]


def children(settings: Settings, settings_path: Path | None, log_dir: Path) -> list[Child]:
    """The processes, in the order in which they start; they end in the reverse one."""
    named = [] if settings_path is None else ["--settings", str(settings_path)]
    parts = ["joiner", "gateway", "scheduler", "console", *(["open-webui"] if settings.open_webui.url else [])]
    found = [
        Child(part, [sys.executable, "-m", "services.cli", part, *named], log_dir / f"{part}.log") for part in parts
    ]
    if settings.engine.start:
        found.insert(0, Child("engine", engine_command(settings), log_dir / "engine.log"))
    return found


def run_up(settings: Settings, settings_path: Path | None, log_dir: Path) -> int:
    """Start everything, say where it is, and stay until SIGTERM, SIGINT or a part that keeps dying. Returns the
    process's exit status.
    """
    console = Console(stderr=True)
    log_dir.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    running = children(settings, settings_path, log_dir)
    try:
        for child in running:
            child.start()
        if not _wait_until_ready(settings, running, stop, console):
            return 0 if stop.is_set() else 1
        gateway, pages = settings.gateway, settings.console
        console.print(
            f"[green]ready[/]  chat   http://{gateway.host}:{gateway.port}/v1  (model {settings.engine.alias!r})"
        )
        console.print(f"       pages  http://{pages.host}:{pages.port}/\n       logs   {log_dir}/")
        return _watch(running, stop, console)
    finally:
        console.print("stopping")
        for child in reversed(running):
            child.stop(settings.gateway.drain_timeout_s + 5 if child.name == "gateway" else STOP_S)


def _watch(running: list[Child], stop: threading.Event, console: Console) -> int:
    while not stop.wait(0.5):
        for child in running:
            if not child.is_dead():
                continue
            assert child.process is not None
            now = time.monotonic()
            child.restarts.append(now)
            while child.restarts[0] < now - RESTARTS_WINDOW_S:
                child.restarts.popleft()
            status = f"{child.name} ended with status {child.process.returncode}, see {child.log_path}"
            if len(child.restarts) > RESTARTS:
                console.print(
                    f"[red]{status}; it was started again {RESTARTS} times in {RESTARTS_WINDOW_S:.0f} s: giving up"
                )
                return 1
            console.print(f"[yellow]{status}; starting it again")
            child.start()
    return 0


def _wait_until_ready(settings: Settings, running: list[Child], stop: threading.Event, console: Console) -> bool:
    host, port = settings.gateway.host, settings.gateway.port
    checks = {"gateway": f"http://{host}:{port}/healthz"}
    if settings.engine.start:
        checks["engine"] = settings.engine.urls[0].rstrip("/") + "/health"
    deadline = time.monotonic() + ENGINE_START_S
    with console.status("starting") as status:
        while checks and not stop.wait(0.2):
            for child in running:
                if child.is_dead():
                    console.print(f"[red]{child.name} ended while starting, see {child.log_path}")
                    return False
            checks = {name: url for name, url in checks.items() if not answers(url)}
            status.update(f"waiting for {', '.join(checks)}")
            if time.monotonic() > deadline:
                console.print(f"[red]{', '.join(checks)} did not answer within {ENGINE_START_S:.0f} s, see the logs")
                return False
    return not stop.is_set()


def answers(url: str) -> bool:
    """Whether a GET of `url` succeeds now."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
