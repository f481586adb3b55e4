"""How gateways on one port scale: `python -m tests.bench.gateway_processes`, one JSON line for each number of them.

Each process may use the same small share of a core (by a cgroup, so as root), so that there is enough for all of them,
the stub engine and the load on a machine with few cores: what two bring more than one is what a second core would.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from tests.bench.gateway import load, process, report
from tests.bench.share import held
from tests.ports import free_port

NUMBERS = (1, 2, 4)
SHARE = 0.12  # of a core, for each process
CLIENTS = 64  # enough for the kernel to deal them out evenly
SECONDS = 4.0
ROUNDS = 5


def main() -> None:
    try:
        measure()
    except OSError as exc:
        report(note=f"processes cannot be held to a share of a core here ({exc}): not measured")


def measure() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = f"http://127.0.0.1:{(port := free_port())}"
        stack.enter_context(process(engine + "/health", sys.executable, "-m", "tests.stub_engine", str(port)))
        urls = {number: stack.enter_context(gateways(number, engine, folder)) for number in NUMBERS}
        for kind in ("json", "stream"):
            rates: dict[int, list[float]] = {number: [] for number in NUMBERS}
            for _ in range(ROUNDS):
                for number, url in urls.items():
                    found = load(url, kind, CLIENTS, SECONDS)
                    rates[number].append(len(found["latencies_ms"]) / found["seconds"])
            one = median(rates[NUMBERS[0]])
            for number in NUMBERS:
                per_s = median(rates[number])
                figures = {"requests_per_s": round(per_s, 1), "of_one": round(per_s / one, 2)}
                report(kind=kind, processes=number, share_of_a_core_each=SHARE, **figures)


@contextmanager
def gateways(number: int, engine: str, folder: Path) -> Iterator[str]:
    """So many processes on one port, each held to its SHARE of a core; the port's URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "THUMBWHEEL_ENGINE__URLS": json.dumps([engine]),
        "THUMBWHEEL_GATEWAY__PORT": str(port),
        "THUMBWHEEL_GATEWAY__METRICS_PORT": str(free_port()),
        "THUMBWHEEL_GATEWAY__PROCESSES": str(number),
        "THUMBWHEEL_GATEWAY__TOKEN_SECRET": "of-the-bench-and-nobody-else's-secret",
        "THUMBWHEEL_LOG__PATH": str(folder / f"log-{number}.db"),
        "THUMBWHEEL_STORE__URL": f"sqlite:///{folder}/store-{number}.db",
    }
    command = [sys.executable, "-m", "services.cli", "gateway"]
    with process(url + "/healthz", *command, **environment) as parent, ExitStack() as stack:
        load(url, "json", CLIENTS, 3.0)  # all have started then
        pids = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split() or [str(parent.pid)]
        assert len(pids) == number
        for pid in pids:
            stack.enter_context(held(int(pid), SHARE))
        yield url


if __name__ == "__main__":
    main()
