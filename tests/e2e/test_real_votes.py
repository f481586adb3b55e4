"""Real people's thumbs through the real processes: import, join, a nightly run with training and gate, and a kill."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from loop.registry import list_adapters
from loop.settings import Settings, load_settings
from loop.store import open_store
from loop.store.examples import count_labels
from loop.store.runs import is_leased, list_runs, run_stages
from tests.conftest import DEMO_MODEL, ROOT
from tests.ports import free_port

SHARED = ROOT.parent / "shared"
VOTES = SHARED / "data" / "oasst" / "oasst_thumbs_kto.jsonl"
STORIES = SHARED / "models" / "stories260K"
needs_votes = pytest.mark.skipif(not VOTES.is_file(), reason=f"no OpenAssistant votes at {VOTES}")


def settings_file(tmp_path: Path) -> Path:
    """Settings with everything below `tmp_path`, an engine that is not there, and training in a small budget."""
    path = tmp_path / "thumbwheel.toml"
    path.write_text(f"""
[engine]
urls = ["http://127.0.0.1:{free_port()}"]
model = "{DEMO_MODEL}"
[log]
path = "{tmp_path}/log.db"
[store]
url = "sqlite:///{tmp_path}/store.db"
[joiner]
metrics_port = {free_port()}
[snapshot]
dir = "{tmp_path}/snapshots"
min_labels = 300
window_days = 3650
[train]
dir = "{tmp_path}/adapters"
max_length = 256
truncation = "keep_end"
save_steps = 4
[gate]
bootstrap_samples = 200
[scheduler]
runs_dir = "{tmp_path}/runs"
metrics_port = {free_port()}
""")
    return path


@pytest.fixture
def opened() -> Iterator[Callable[[Settings], Engine]]:
    """Opens stores, and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(settings: Settings) -> Engine:
            store = open_store(settings.store)
            stack.callback(store.dispose)
            return store

        yield open_one


def thumbwheel(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return value


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)  # polled, within the deadline above


def start(service: str, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "services.cli", service, "--settings", str(path)]
    with (path.parent / f"{service}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log)


def join_everything(path: Path, store: Engine, labels: int) -> None:
    joiner = start("joiner", path)
    try:
        wait_for(lambda: count_labels(store, date.min) >= labels, f"{labels} labels")
    finally:
        joiner.send_signal(signal.SIGTERM)
        assert joiner.wait(180) == 0


@needs_votes
def test_a_night_on_real_votes_is_resumed_and_never_a_pass_without_evidence(
    tmp_path: Path, opened: Callable[[Settings], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings_file(tmp_path)
    monkeypatch.setenv("THUMBWHEEL_SCHEDULER__LEASE_S", "2")
    settings = load_settings(path)
    early = last_json(thumbwheel("run", "--settings", str(path)))
    assert (early["state"], early["outcome"]) == ("skipped", "skipped: 0 of 300 labels")
    for _ in range(2):  # twice imported is as once
        thumbwheel("import", str(VOTES), "--settings", str(path))
    store = opened(settings)
    join_everything(path, store, 430)
    assert count_labels(store, date.min) == 430

    first = start("scheduler", path)
    wait_for(lambda: is_leased(store, "rollout", int(time.time() * 1000)), "the scheduler")
    command = [sys.executable, "-m", "services.cli", "run", "--settings", str(path)]
    asked = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    steps = tmp_path / "adapters"
    wait_for(lambda: any(p.stat().st_size for p in steps.glob("*.partial/metrics.jsonl")), "the first training steps")
    first.kill()
    first.wait()
    run_id = list_runs(store)[0].run_id
    assert [stage.stage for stage in run_stages(store, run_id)] == ["snapshot"]
    second = start("scheduler", path)
    printed, _ = asked.communicate(timeout=400)
    second.send_signal(signal.SIGTERM)
    assert second.wait(180) == 0

    run = json.loads(printed.strip().splitlines()[-1])
    assert (run["run_id"], run["state"]) == (run_id, "done"), run
    assert len(list_runs(store)) == 2  # the skipped one, and one that was run by two schedulers
    verdict = json.loads((tmp_path / "runs" / run_id / "gate.json").read_text())
    assert verdict["verdict"] in ("insufficient", "fail")  # the engine was away: serve skew cannot be computed
    assert {c["verdict"] for c in verdict["checks"]} & {"insufficient", "fail"}
    assert Path(run["report"]).read_text().startswith("<!")
    (adapter,) = list_adapters(store)
    assert (adapter.version, adapter.state, adapter.run_id) == ("v000001", "rejected", run_id)
    assert (Path(adapter.path) / "adapter_model.safetensors").is_file()
    assert [stage.stage for stage in run_stages(store, run_id)] == [
        "snapshot", "train", "register", "gate", "rollout",
    ]  # fmt: skip
    assert "rejected" in thumbwheel("adapters", "--settings", str(path)).stdout
    assert run_id in thumbwheel("status", "--settings", str(path)).stdout
    refused = thumbwheel("promote", "v000001", "--settings", str(path), check=False)
    assert refused.returncode == 2
    assert "rejected" in refused.stderr


@needs_votes
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no stories260K at {STORIES}")
def test_train_and_score_on_a_model_that_is_not_ours(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    figures = last_json(
        thumbwheel(
            "train", "--data", str(VOTES), "--model", str(STORIES), "--out", str(tmp_path / "adapter"),
            "--chat-template", template, "--max-length", "256", "--truncation", "keep_end", "--beta=0.2",
        )
    )  # fmt: skip
    assert figures["rows"] > 100  # its vocabulary of 512 makes most answers longer than 256 tokens
    assert {"rows_per_s", "train_s", "peak_rss_mb", "loss", "kl"} <= set(figures)
    ranked = (SHARED / "data" / "oasst" / "oasst_ranked_pairs.jsonl").read_text().splitlines(keepends=True)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(sorted(ranked, key=len)[:40]))  # byte by byte, long answers take minutes to score
    scores = last_json(
        thumbwheel(
            "score", "--model", str(STORIES), "--adapter", str(tmp_path / "adapter"), "--data", str(pairs),
            "--chat-template", template,
        )
    )  # fmt: skip
    for figure in ("accuracy_sum", "accuracy_mean", "accuracy_reward"):
        assert 0 <= scores[figure] <= 1
