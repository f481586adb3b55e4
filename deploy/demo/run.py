"""`make demo`: the whole loop on one worked example, for real, in a few minutes on two cores.

A support chatbot rambles and apologises. Customers chat with it through the gateway and vote; a night later the same
alias answers briefly, because they voted so. Everything runs as in production (`thumbwheel up`); this script is only
the customers, the clock's hand, and the one who measures before and after.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.demo import customers, measure
from loop.registry import get_adapter
from loop.settings import Settings, load_settings
from loop.store import open_store
from loop.store.examples import count_labels
from loop.store.routes import read_route
from loop.store.runs import Run, get_run
from services.scheduler import ask_for_run
from services.status import follow_run
from services.up import answers

console = Console()
HERE = Path(__file__).parent
VOTERS = 420
TEMPLATE = """\
# Made by `make demo`; go on with: .venv/bin/thumbwheel up --settings {dir}/thumbwheel.toml

[engine]
urls = ["http://127.0.0.1:{engine}"]
model = "{model}"
base_name = "support-base"
alias = "support"
start = true
start_args = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"]
max_model_len = 512

[gateway]
port = {gateway}
metrics_port = {gateway_metrics}

[log]
path = "{dir}/log.db"

[store]
url = "sqlite:///{dir}/store.db"

[joiner]
metrics_port = {joiner_metrics}

[snapshot]
dir = "{dir}/snapshots"
min_labels = 400

[train]
dir = "{dir}/adapters"
cache = "{dir}/cache"
beta = 0.4
learning_rate = 1e-3
num_train_epochs = 4
per_device_train_batch_size = 16 # of 8, one wrong thumb in ten sometimes costs the model a fact

[gate]
benchmark_tasks = ["support_facts"]
benchmark_dir = "{here}/benchmarks"
max_length_ratio = 10  # a base that rambles may get much shorter,
max_kl_to_base = 60  # and is then far from what it said: nats summed over rambling answers of 55 tokens
probe_prompts = 16
probe_max_tokens = 120

[rollout]
canary_steps = []

[scheduler]
runs_dir = "{dir}/runs"
metrics_port = {scheduler_metrics}

[console]
port = {console}
"""
PORTS = ("engine", "gateway", "gateway_metrics", "joiner_metrics", "scheduler_metrics", "console")


@dataclass(frozen=True)
class Demo:
    """Where the demo lives and what it talks to."""

    dir: Path
    settings_path: Path
    settings: Settings

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.gateway.port}/v1"


def main() -> None:
    """Run it and write `var/demo/summary.json`; ends with status 1 where the night did not end in a live adapter."""
    summary = run_demo(Path("var/demo"))
    sys.exit(0 if summary["adapter"] else 1)


def run_demo(directory: Path) -> dict[str, Any]:
    """The demo from an empty `directory`; returns what it wrote to `summary.json` there."""
    started = time.monotonic()
    demo = set_up(directory)
    service = start(demo)
    try:
        summary = _before_and_after(demo)
    finally:
        stop(service)
    summary["seconds"] = round(time.monotonic() - started, 1)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(demo, summary)
    return summary


def set_up(directory: Path) -> Demo:
    """An empty directory with the demo's settings, on free ports."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    directory = directory.absolute()
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    path = directory / "thumbwheel.toml"
    path.write_text(TEMPLATE.format(dir=directory, here=HERE, model=measure.MODEL_DIR, **ports))
    return Demo(directory, path, load_settings(path, {}))


def start(demo: Demo) -> subprocess.Popen[bytes]:
    """`thumbwheel up`, once everything answers."""
    console.rule("1  vLLM, gateway, joiner, scheduler")
    command = [sys.executable, "-m", "services.cli", "up", "--settings", str(demo.settings_path)]
    # Engine and trainer share the cores: threads that spin while they wait for their siblings would stop both.
    command = [
        "env",
        "VLLM_CPU_KVCACHE_SPACE=1",
        "OMP_WAIT_POLICY=PASSIVE",
        "OMP_NUM_THREADS=1",
        *command,
        "--logs",
        str(demo.dir / "logs"),
    ]
    service = subprocess.Popen(command)
    urls = [demo.settings.engine.urls[0] + "/health", demo.base_url.removesuffix("/v1") + "/healthz"]
    deadline = time.monotonic() + 300
    while urls:
        if service.poll() is not None or time.monotonic() > deadline:
            stop(service)
            raise SystemExit(f"the services did not start; see {demo.dir}/logs")
        urls = [url for url in urls if not answers(url)]
        time.sleep(0.2)
    return service


def stop(service: subprocess.Popen[bytes]) -> None:
    """End the services in order."""
    if service.poll() is None:
        service.send_signal(signal.SIGTERM)
        service.wait(120)


def _before_and_after(demo: Demo) -> dict[str, Any]:
    alias = demo.settings.engine.alias
    console.rule("2  before: the base model answers; customers chat and vote")
    before, _ = asyncio.run(measure.measure_served(demo.base_url, model=alias))
    pairs = asyncio.run(measure.preference_pairs(demo.base_url, model=alias))
    pairs_file = demo.dir / "pairs.jsonl"
    measure.save_pairs(pairs, pairs_file)
    tally = asyncio.run(customers.chat_and_vote(demo.base_url, model=alias, customers=VOTERS))
    _wait_for_joiner(demo)
    console.print(f"{tally.requests} requests, {tally.ups} thumbs up, {tally.downs} down, {len(tally.failures)} failed")

    console.rule("3  the night: snapshot, KTO on a QLoRA adapter, gate, swap, while customers keep chatting")
    run, chatting = _night(demo)
    console.print(f"run {run.run_id}: [bold]{run.outcome}[/]")
    if run.state != "done":
        raise SystemExit(f"the night did not end well; see {demo.dir}/logs/scheduler.log")

    console.rule("4  after: the same alias, fresh customers, the same fresh questions")
    after, _ = asyncio.run(measure.measure_served(demo.base_url, model=alias))
    store = open_store(demo.settings.store)
    live = read_route(store, alias).live
    adapter = None if live is None else Path(get_adapter(store, live).path)
    store.dispose()
    with console.status("scoring the pairs"):
        before["preference_accuracy"] = measure.score_pairs(measure.MODEL_DIR, None, pairs_file)
        after["preference_accuracy"] = measure.score_pairs(measure.MODEL_DIR, adapter, pairs_file)
    gate = json.loads((demo.settings.scheduler.runs_dir / run.run_id / "gate.json").read_text())
    return {
        **{key: {"before": before[key], "after": after[key]} for key in FIGURES},
        "failed_requests": len(chatting.failures),
        "requests_during_the_night": chatting.requests,
        "gate": gate["verdict"],
        "adapter": live,
        "run": run.run_id,
        "pairs": len(pairs),
    }


def _night(demo: Demo) -> tuple[Run, customers.Tally]:
    """Ask for the run as the clock does, and keep a few customers chatting until it has ended and a while longer."""
    store = open_store(demo.settings.store)
    over = threading.Event()
    chat = customers.chat_and_vote(
        demo.base_url,
        model=demo.settings.engine.alias,
        seed=1,
        customers=100_000,
        concurrency=4,
        pause_s=4.0,
        stop=over,
        quiet=True,
    )
    with ThreadPoolExecutor(1) as pool:
        chatting = pool.submit(asyncio.run, chat)
        try:
            run_id = ask_for_run(store).run_id
            follow_run(store, demo.settings, run_id, console)
            time.sleep(3)  # for customers on the new adapter
        finally:
            over.set()
        tally = chatting.result()
    run = get_run(store, run_id)
    store.dispose()
    assert run is not None
    return run, tally


def _wait_for_joiner(demo: Demo) -> None:
    """Until the number of labels has not grown for a second: the last thumbs are joined."""
    store = open_store(demo.settings.store)
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        labels = count_labels(store, date.min)
        if labels != last:
            last, since = labels, time.monotonic()
        time.sleep(0.1)
    store.dispose()


FIGURES = {
    "preference_accuracy": ("held-out preference accuracy", "{:.1%}"),
    "median_length_tokens": ("median reply length, tokens", "{:.0f}"),
    "apology_rate": ("answers with needless apologies", "{:.1%}"),
    "fact_accuracy": ("answers with the right fact", "{:.1%}"),
    "thumbs_up_rate": ("thumbs up", "{:.1%}"),
}


def show(demo: Demo, summary: dict[str, Any]) -> None:
    """The table, and where to look."""
    table = Table("", "before", "after", title=f"support: base model → {summary['adapter'] or 'base model'}")
    for key, (label, form) in FIGURES.items():
        table.add_row(label, form.format(summary[key]["before"]), form.format(summary[key]["after"]))
    table.add_row("requests failed during the night", "", str(summary["failed_requests"]))
    console.print(table)
    console.print(f"gate: {summary['gate']}    {summary['seconds']} s")
    console.print(f"report   {demo.settings.scheduler.runs_dir}/{summary['run']}/report.html")
    console.print(f"figures  {demo.dir}/summary.json")
    console.print(f"go on    .venv/bin/thumbwheel up --settings {demo.settings_path}", soft_wrap=True)
    console.print(f"         then chat and vote at http://127.0.0.1:{demo.settings.console.port}/playground")


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to outgoing connections: the engine takes its port a while later."""
    found: list[int] = []
    for port in random.sample(range(11_000, 16_000), 5_000):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


if __name__ == "__main__":
    main()
