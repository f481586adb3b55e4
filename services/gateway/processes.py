"""Several gateways on one port: each a process with an id, a spool and a journal of its own; the kernel deals the
connections out (`SO_REUSEPORT`). They keep their metrics in shared files, so any of them shows those of all.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import multiprocess

from loop.settings import GatewaySettings

RESTARTS = 5  # of one process, within the window; more, and everything ends, for a half-running gateway hides the fault
WINDOW_S = 120.0
LOOK_EVERY_S = 0.2
KILL_AFTER_S = 3.0  # after the drain's end

_log = logging.getLogger(__name__)


def supervise(gateway: GatewaySettings, arguments: list[str]) -> int:
    """Run `thumbwheel gateway ARGUMENTS` `gateway.processes` times until SIGTERM or SIGINT; one that dies is started
    again. Returns the exit status.
    """
    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stop.set())
    with TemporaryDirectory(prefix="thumbwheel-metrics-") as folder:
        running = [_start(gateway, number, arguments, folder) for number in range(gateway.processes)]
        restarts: list[float] = []
        status = 0
        while status == 0 and not stop.wait(LOOK_EVERY_S):
            for number, child in enumerate(running):
                if child.poll() is None:
                    continue
                multiprocess.mark_process_dead(child.pid, folder)  # type: ignore[no-untyped-call]
                restarts = [at for at in restarts if at > time.monotonic() - WINDOW_S] + [time.monotonic()]
                _log.error(
                    "process %d ended with status %d", number, child.returncode, extra={"action": "gateway_died"}
                )
                if len(restarts) > RESTARTS:
                    status = 1
                    break
                running[number] = _start(gateway, number, arguments, folder)
        _end(running, gateway.drain_timeout_s + KILL_AFTER_S)
    return status


def _start(gateway: GatewaySettings, number: int, arguments: list[str], metrics_dir: str) -> subprocess.Popen[bytes]:
    command = [
        *(
            "env",
            f"THUMBWHEEL_GATEWAY__PROCESS={number}",
            f"THUMBWHEEL_GATEWAY__GATEWAY_ID={gateway.gateway_id}-{number}",
        ),
        f"PROMETHEUS_MULTIPROC_DIR={Path(metrics_dir)}",
        # Its standard input is our pipe: it ends with us, however we do.
        *(sys.executable, "-m", "loop.child", "services.cli", "gateway", *arguments),
    ]
    # In a group of its own, so that a Ctrl-C reaches it through us, once.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _end(running: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """SIGTERM for all, then SIGKILL for those that are still there once the time is over."""
    deadline = time.monotonic() + timeout_s
    for child in running:
        child.terminate()
    for child in running:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdin is not None:
            child.stdin.close()
