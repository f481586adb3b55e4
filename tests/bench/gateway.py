"""What the gateway costs: `python -m tests.bench.gateway`, one JSON line for each figure.

A stub engine, nginx, a bare aiohttp proxy, LiteLLM's proxy (in an environment of its own, made once under `var/`), the
gateway (capture to disk on) and the load generator are processes of their own. The contenders take turns in short
rounds, so that what else the machine does meets them alike; latencies are those of all rounds.

Then streams paced as a model paces them: chunks a second with so many at once, the time to the first one, and what a
thousand slow streams take in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tests.ports import free_port

ROUNDS = 5
CHUNKS = 50
PACE_S = 0.02
LITELLM = "litellm[proxy]==1.106.2"
LITELLM_HOME = Path("var/litellm")
_LITELLM_CONFIG = """
model_list:
  - model_name: assistant
    litellm_params: {{model: openai/assistant, api_base: "{engine}/v1", api_key: none}}
"""
_LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no fetching of prices
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # else it does not start
}
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
    parser.add_argument("--paced", type=int, nargs="+", default=[100, 200, 400], help="paced streams at once")
    parser.add_argument("--slow", type=int, default=1000, help="slow streams at once")
    parser.add_argument("--rivals", nargs="*", default=["nginx", "LiteLLM"], help="beside the engine and a bare proxy")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the stub and the load; the gateway sees to its own
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {"direct": f"http://127.0.0.1:{(engine := free_port())}"}
        stack.enter_context(process(urls["direct"] + "/health", sys.executable, "-m", "tests.stub_engine", str(engine)))
        if "nginx" in options.rivals and shutil.which("nginx"):
            urls["nginx"] = f"http://127.0.0.1:{(port := free_port())}"
            config = folder / "nginx.conf"
            config.write_text(_NGINX.format(dir=folder, engine=engine, port=port))
            stack.enter_context(process(urls["nginx"] + "/health", "nginx", "-c", str(config)))
        elif "nginx" in options.rivals:
            report(note="nginx is not installed: not compared with it")
        urls["bare aiohttp"] = f"http://127.0.0.1:{(port := free_port())}"
        bare = [sys.executable, "-m", "tests.bench.gateway_bare", urls["direct"], str(port)]
        stack.enter_context(process(urls["bare aiohttp"] + "/healthz", *bare))
        if "LiteLLM" in options.rivals and (litellm := litellm_command()):
            urls["LiteLLM"] = f"http://127.0.0.1:{(port := free_port())}"
            config = folder / "litellm.yaml"
            config.write_text(_LITELLM_CONFIG.format(engine=urls["direct"]))
            command = [litellm, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
            stack.enter_context(process(urls["LiteLLM"] + "/health/liveliness", *command, **_LITELLM_ENVIRONMENT))
        urls["gateway"] = f"http://127.0.0.1:{(port := free_port())}"
        environment = {
            "THUMBWHEEL_ENGINE__URLS": json.dumps([urls["direct"]]),
            "THUMBWHEEL_GATEWAY__PORT": str(port),
            "THUMBWHEEL_GATEWAY__METRICS_PORT": str(free_port()),
            "THUMBWHEEL_LOG__PATH": str(folder / "log.db"),
            "THUMBWHEEL_STORE__URL": f"sqlite:///{folder}/store.db",
        }
        serve = "from loop.settings import load_settings; from services.gateway.app import main; main(load_settings())"
        starting = (urls["gateway"] + "/healthz", sys.executable, "-c", serve)
        gateway = stack.enter_context(start_often(*starting, **environment))
        for kind in ("json", "stream"):
            for clients in options.clients:
                compare(urls, kind, clients, options.seconds)
        quick = {name: url for name, url in urls.items() if name != "LiteLLM"}
        for pace_s in (0.0, PACE_S):
            compare_first_chunk(quick, options.seconds, pace_s)
        for streams in options.paced:
            compare_paced(quick, streams, options.seconds, gateway)
        hold_slow(urls["gateway"], options.slow, gateway)


@contextmanager
def start_often(*starting: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The gateway, started some times over: from its process's start to its first answer."""
    seconds = []
    for n in range(ROUNDS):
        began = time.perf_counter()
        with process(*starting, **environment) as child:
            seconds.append(time.perf_counter() - began)
            if n == ROUNDS - 1:
                report(kind="start", median_s=round(median(seconds), 3), most_s=round(max(seconds), 3))
                yield child


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
        report(
            kind=kind,
            clients=clients,
            through=name,
            p50_ms=round(p50, 3),
            p99_ms=round(p99, 3),
            added_p50_ms=round(p50 - direct[0], 3),
            added_p99_ms=round(p99 - direct[1], 3),
            requests_per_s=round(len(latencies[name]) / spent_s[name], 1),
        )


def compare_first_chunk(urls: dict[str, str], seconds: float, pace_s: float) -> None:
    """Time to the first chunk of a stream, with one client. Where it is paced, all processes have been idle before, and
    wake up in turn.
    """
    found: dict[str, list[float]] = {name: [] for name in urls}
    for _ in range(ROUNDS):
        for name, url in urls.items():
            found[name] += load(url, "stream", 1, seconds, chunks=1, pace_s=pace_s)["first_chunk_ms"]
    direct = median(found["direct"])
    for name, times in found.items():
        p50 = median(times)
        added = {"p50_ms": round(p50, 3), "added_p50_ms": round(p50 - direct, 3)}
        report(kind="first chunk", pace_s=pace_s, clients=1, through=name, **added)


def compare_paced(urls: dict[str, str], streams: int, seconds: float, gateway: subprocess.Popen[bytes]) -> None:
    """Chunks a second of many streams that are each paced; what the gateway could do by its processor time, too."""
    for name, url in urls.items():
        before_s = processor_s(gateway.pid)
        found = load(url, "stream", streams, seconds, pace_s=PACE_S)
        per_s = found["chunks"] / found["seconds"]
        figures = {"offered_per_s": round(streams / PACE_S), "chunks_per_s": round(per_s), "dropped": found["dropped"]}
        if name == "gateway":
            figures["chunks_per_processor_s"] = round(found["chunks"] / (processor_s(gateway.pid) - before_s))
        report(kind="paced stream", clients=streams, through=name, **figures)


def hold_slow(url: str, streams: int, gateway: subprocess.Popen[bytes]) -> None:
    """The gateway's memory with so many streams open at once, a chunk a second each."""
    Path(f"/proc/{gateway.pid}/clear_refs").write_text("5")  # its peak counts from now
    found = load(url, "stream", streams, 0, chunks=10, pace_s=1.0)
    report(
        kind="slow stream", clients=streams, through="gateway", peak_mb=peak_mb(gateway.pid), dropped=found["dropped"]
    )


def report(**figures: Any) -> None:
    """One line of JSON."""
    print(json.dumps({"bench": "gateway", **figures}), flush=True)


def processor_s(pid: int) -> float:
    """Processor time of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int) -> float:
    """The process's largest resident memory."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return round(int(line.split()[1]) / 1024, 1)


def litellm_command() -> str | None:
    """LiteLLM's proxy, installed the first time; None where that does not work."""
    command = LITELLM_HOME / "bin" / "litellm"
    if not command.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", LITELLM_HOME], check=True)
            subprocess.run([LITELLM_HOME / "bin" / "pip", "install", "-qq", LITELLM], check=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            report(note=f"LiteLLM is not installed ({exc}): not compared with it")
            return None
    return str(command.absolute())


def load(
    url: str, kind: str, clients: int, seconds: float, *, chunks: int = CHUNKS, pace_s: float = 0.0
) -> dict[str, Any]:
    """One round of the load generator, in a process of its own."""
    arguments = [url, kind, *map(str, (clients, seconds, chunks, pace_s))]
    command = [sys.executable, "-m", "tests.bench.gateway_load", *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60)
    found: dict[str, Any] = json.loads(done.stdout)
    assert pace_s or not found["dropped"], f"{found['dropped']} answers through {url} were cut off"
    return found


@contextmanager
def process(health_url: str, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, from its first answer to SIGTERM."""
    child = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)  # ours is the figures'
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(health_url, timeout=2):
                    break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} did not start") from None
                time.sleep(0.01)
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


if __name__ == "__main__":
    main()
