"""What chats notice of Kafka being away: `python -m tests.bench.gateway_kafka [--seconds 60]`, one JSON line.

A gateway in front of the stub engine, its events on a real Apache Kafka, under load: before the broker is killed, while
it is away, and after it has come back and has got everything.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles
from typing import Any

from tests.bench.gateway import load, process, report
from tests.conftest import wait_until
from tests.ports import free_port
from tests.services_real import RealKafka, kafka_home

CLIENTS = {"json": 1, "stream": 50}  # of streams that are paced: neither wears two cores out
PACE_S = 0.02
CHUNKS = 5
MEASURED = ("json_p50_ms", "json_p99_ms", "stream_p50_ms", "stream_p99_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long Kafka is away")
    options = parser.parse_args()
    home = kafka_home()
    if home is None:
        report(note="KAFKA_HOME is no unpacked Apache Kafka, or there is no Java: not taken away")
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        kafka = RealKafka(home, folder)
        kafka.start()
        stack.callback(lambda: kafka.stop(kill=True))
        engine, url, metrics = (f"http://127.0.0.1:{free_port()}" for _ in range(3))
        port = engine.rpartition(":")[2]
        stack.enter_context(process(engine + "/health", sys.executable, "-m", "tests.stub_engine", port))
        environment = {
            "THUMBWHEEL_ENGINE__URLS": json.dumps([engine]),
            "THUMBWHEEL_GATEWAY__PORT": url.rpartition(":")[2],
            "THUMBWHEEL_GATEWAY__METRICS_PORT": metrics.rpartition(":")[2],
            "THUMBWHEEL_LOG__KIND": "kafka",
            "THUMBWHEEL_LOG__BOOTSTRAP_SERVERS": json.dumps([kafka.server]),
            "THUMBWHEEL_LOG__PATH": str(folder / "log.db"),
            "THUMBWHEEL_STORE__URL": f"sqlite:///{folder}/store.db",
        }
        gateway = [sys.executable, "-m", "services.cli", "gateway"]
        stack.enter_context(process(url + "/healthz", *gateway, **environment))

        def waiting() -> float:
            """Records that are still to be sent."""
            with urllib.request.urlopen(metrics + "/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            return sum(float(line.split()[1]) for line in lines if line.startswith("thumbwheel_gateway_spool_records "))

        ask(url, 2.0)
        found = {"there": ask(url, options.seconds / 2)}
        kafka.stop(kill=True)
        found["away"] = ask(url, options.seconds)
        most = waiting()
        kafka.start()
        wait_until(lambda: waiting() == 0, "all of it in Kafka")
        found["back"] = ask(url, options.seconds / 2)
        figures = {f"{name}_{when}": value for when, of in found.items() for name, value in of.items()}
        ratios = {f"{name}_away_of_there": round(found["away"][name] / found["there"][name], 2) for name in MEASURED}
        report(kind="Kafka away", seconds=options.seconds, spooled=most, **figures, **ratios)


def ask(url: str, seconds: float) -> dict[str, Any]:
    """Latencies of JSON answers and of streams, half of the time each; none may fail."""
    figures: dict[str, Any] = {}
    for kind, clients in CLIENTS.items():
        found = load(url, kind, clients, seconds / 2, chunks=CHUNKS, pace_s=PACE_S)
        assert not found["dropped"], f"{found['dropped']} answers were cut off"
        cuts = quantiles(found["latencies_ms"], n=100)
        figures |= {f"{kind}_p50_ms": round(cuts[49], 2), f"{kind}_p99_ms": round(cuts[98], 2)}
    return figures


if __name__ == "__main__":
    main()
