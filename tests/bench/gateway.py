"""What the gateway costs: `python -m tests.bench.gateway`, one JSON line for each figure.

A stub engine, nginx, a bare aiohttp proxy, the gateway (capture to disk on) and the load generator are processes of
their own. The contenders
take turns in short rounds, so that what else the machine does meets them alike; latencies are those of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

ROUNDS = 5
CHUNKS = 50
_NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir};
  uwsgi_temp_path {dir}; scgi_temp_path {dir};
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 1000000;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each round")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {"direct": f"http://127.0.0.1:{(engine := free_port())}"}
        stack.enter_context(process(urls["direct"] + "/health", sys.executable, "-m", "tests.stub_engine", str(engine)))
        if shutil.which("nginx"):
            urls["nginx"] = f"http://127.0.0.1:{(port := free_port())}"
            config = folder / "nginx.conf"
            config.write_text(_NGINX.format(dir=folder, engine=engine, port=port))
            stack.enter_context(process(urls["nginx"] + "/health", "nginx", "-c", str(config)))
        else:
            print(json.dumps({"bench": "gateway", "note": "nginx is not installed: not compared with it"}))
        urls["bare aiohttp"] = f"http://127.0.0.1:{(port := free_port())}"
        bare = [sys.executable, "-m", "tests.bench.gateway_bare", urls["direct"], str(port)]
        stack.enter_context(process(urls["bare aiohttp"] + "/healthz", *bare))
        urls["gateway"] = f"http://127.0.0.1:{(port := free_port())}"
        environment = {
            "THUMBWHEEL_ENGINE__URLS": json.dumps([urls["direct"]]),
            "THUMBWHEEL_GATEWAY__PORT": str(port),
            "THUMBWHEEL_GATEWAY__METRICS_PORT": str(free_port()),
            "THUMBWHEEL_LOG__PATH": str(folder / "log.db"),
            "THUMBWHEEL_STORE__URL": f"sqlite:///{folder}/store.db",
        }
        serve = "from loop.settings import load_settings; from services.gateway.app import main; main(load_settings())"
        stack.enter_context(process(urls["gateway"] + "/healthz", sys.executable, "-c", serve, **environment))
        for kind in ("json", "stream"):
            for clients in options.clients:
                compare(urls, kind, clients, options.seconds)


def compare(urls: dict[str, str], kind: str, clients: int, seconds: float) -> None:
    """Measure all contenders in turns and print a line for each."""
    latencies: dict[str, list[float]] = {name: [] for name in urls}
    spent_s = dict.fromkeys(urls, 0.0)
    for url in urls.values():
        load(url, kind, clients, 0.5)  # warm-up
    for _ in range(ROUNDS):
        for name, url in urls.items():
            found = load(url, kind, clients, seconds)
            latencies[name] += found["latencies_ms"]
            spent_s[name] += found["seconds"]
    direct: list[float] = []
    for name in urls:
        cuts = quantiles(latencies[name], n=100)
        p50, p99 = cuts[49], cuts[98]
        direct = direct or [p50, p99]
        print(
            json.dumps(
                {
                    "bench": "gateway",
                    "kind": kind,
                    "clients": clients,
                    "through": name,
                    "p50_ms": round(p50, 3),
                    "p99_ms": round(p99, 3),
                    "added_p50_ms": round(p50 - direct[0], 3),
                    "added_p99_ms": round(p99 - direct[1], 3),
                    "requests_per_s": round(len(latencies[name]) / spent_s[name], 1),
                }
            ),
            flush=True,
        )


def load(url: str, kind: str, clients: int, seconds: float) -> dict[str, Any]:
    """One round of the load generator, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.gateway_load", url, kind, str(clients), str(seconds), str(CHUNKS)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def process(health_url: str, *command: str, **environment: str) -> Iterator[None]:
    """A server process, from its first answer to SIGTERM."""
    child = subprocess.Popen(command, env=os.environ | environment)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(health_url, timeout=2):
                    break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} did not start") from None
                time.sleep(0.05)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
