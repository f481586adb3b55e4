"""The nightly run, stage by stage, from top to bottom: snapshot, train, register, gate, rollout.

A finished stage is recorded with its output and never done again; an interrupted run goes on at the first one that is
not. So each stage is idempotent: the snapshot is made from the run's own time, training resumes at its last checkpoint,
registering the same run again gives the same version. Training and the gate's scoring are subprocesses, so that their
memory goes when they end; this module knows no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from loop import metrics, registry
from loop.kto.train import command as training
from loop.rollout.swap import Fleet, go_live, load_everywhere, start_canary, unload_unneeded, wait_for_gateways
from loop.rollout.vllm import EngineError
from loop.settings import Settings
from loop.snapshot import make_snapshot
from loop.store.engine import StoreUnavailableError, is_passing, write
from loop.store.examples import count_labels
from loop.store.routes import read_route
from loop.store.runs import Run, Stage, record_stage, run_stages, set_run

log = logging.getLogger("thumbwheel.nightly")

STAGES = ("snapshot", "train", "register", "gate", "rollout")
DAY_MS = 86_400_000


class Interrupted(Exception):
    """The run was told to stop, or lost its lease; it stays as it is, to be resumed."""


class RunFailed(RuntimeError):
    """A stage cannot be finished; the message says what failed and where to look."""


class Skipped(Exception):
    """There is nothing to do tonight; the message says why."""


@dataclass(frozen=True)
class Night:
    """What the stages of one run share."""

    settings: Settings
    fleet: Fleet
    run: Run
    dir: Path
    stop: threading.Event

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage, or take its output from where it was done before. Raises Interrupted before a new one."""
        for done in run_stages(self.fleet.store, self.run.run_id):
            if done.stage == name:
                return done.output
        if self.stop.is_set():
            raise Interrupted(f"stopped before {name}")
        log.info("stage started", extra={"action": "stage_started", "run": self.run.run_id, "stage": name})
        started_ms = _now_ms()
        output = work()
        record_stage(self.fleet.store, Stage(self.run.run_id, name, output, started_ms, _now_ms()))
        metrics.scheduler_stage_seconds.labels(name).set((_now_ms() - started_ms) / 1000)
        log.info("stage finished", extra={"action": "stage_finished", "run": self.run.run_id, "stage": name})
        return output


def new_run_id(now_ms: int) -> str:
    """The name of a run asked for at this time; sorts by it."""
    return datetime.fromtimestamp(now_ms / 1000, UTC).strftime("run-%Y%m%dT%H%M%S.%f")[:-3]


def run_night(settings: Settings, fleet: Fleet, run: Run, stop: threading.Event) -> Run:
    """Do the run, or what is left of it, and record how it ended.

    Raises Interrupted once `stop` is set, and where the store is away; the run is then still `running`, for whoever
    takes it up.
    """
    directory = settings.scheduler.runs_dir / run.run_id
    directory.mkdir(parents=True, exist_ok=True)
    set_run(fleet.store, run.run_id, "running", "")
    try:
        state, outcome = "done", _night(Night(settings, fleet, run, directory, stop))
        metrics.scheduler_last_success_timestamp_seconds.set(time.time())
    except Skipped as reason:
        state, outcome = "skipped", f"skipped: {reason}"
    except Interrupted:
        raise
    except Exception as exc:  # the process's top for a run: whatever went wrong is the run's outcome, counted
        if fleet.store.dialect.name == "postgresql" and (isinstance(exc, StoreUnavailableError) or is_passing(exc)):
            raise Interrupted(f"the store is away: {exc}") from exc
        log.exception("run failed", extra={"action": "run_failed", "run": run.run_id})
        state, outcome = "failed", f"failed: {exc}"
    now_ms = _now_ms()
    ended = Run(run.run_id, run.trigger, state, outcome, run.created_at_ms, now_ms)  # type: ignore[arg-type]
    set_run(fleet.store, run.run_id, ended.state, outcome, now_ms)
    metrics.scheduler_runs.labels(state).inc()
    metrics.scheduler_run_seconds.set((now_ms - run.created_at_ms) / 1000)
    log.info("run ended", extra={"action": "run_ended", "run": run.run_id, "state": state, "outcome": outcome})
    return ended


def _night(night: Night) -> str:
    """The whole run; returns its outcome in words."""
    snapshot = night.stage("snapshot", lambda: _snapshot(night))
    trained = night.stage("train", lambda: _train(night, snapshot))
    registered = night.stage("register", lambda: _register(night, snapshot, trained))
    gate = night.stage("gate", lambda: _gate(night, snapshot, registered))
    rollout = night.stage("rollout", lambda: _roll_out(night, registered["version"], gate))
    return f"{registered['version']}: gate {gate['verdict']}; {rollout['outcome']}"


def _snapshot(night: Night) -> dict[str, Any]:
    settings = night.settings.snapshot
    since = datetime.fromtimestamp((night.run.created_at_ms - settings.window_days * DAY_MS) / 1000, UTC).date()
    labels = count_labels(night.fleet.store, since)
    if labels < settings.min_labels:
        raise Skipped(f"{labels} of {settings.min_labels} labels")
    snapshot = make_snapshot(
        night.fleet.store, settings, out=settings.dir / night.run.run_id, now_ms=night.run.created_at_ms
    )
    return snapshot.summary()


def _train(night: Night, snapshot: dict[str, Any]) -> dict[str, Any]:
    settings = night.settings.train
    out = settings.dir / night.run.run_id
    settings_file = night.dir / "train.json"
    settings_file.write_text(settings.model_dump_json(indent=1))
    _run_module(
        night,
        training(settings, settings_file, Path(snapshot["train_path"]), Path(night.settings.engine.model), out),
        night.dir / "train.log",
        settings.deadline_s + 600,
        follow=out.with_name(out.name + ".partial") / "metrics.jsonl",
    )
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return {"path": str(out.absolute()), **result}


def _register(night: Night, snapshot: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    alias = night.settings.engine.alias
    parent = read_route(night.fleet.store, alias).live
    adapter = registry.register_candidate(
        night.fleet.store,
        alias=alias,
        parent=parent,
        run_id=night.run.run_id,
        path=trained["path"],
        manifest={
            "snapshot": snapshot["snapshot_id"],
            "settings": night.settings.train.model_dump(mode="json"),
            "code": package_version("thumbwheel"),
            "base_model": str(night.settings.engine.model),
            "training": {key: trained.get(key) for key in ("rows", "steps", "loss", "kl", "train_s")},
        },
        now_ms=_now_ms(),
    )
    return {"version": adapter.version, "parent": parent, "path": adapter.path}


def _gate(night: Night, snapshot: dict[str, Any], registered: dict[str, Any]) -> dict[str, Any]:
    fleet, version = night.fleet, registered["version"]
    live = registered["parent"]
    engine = None
    try:
        load_everywhere(fleet, version)  # beside the live one, with no route to it
        engine = {
            "url": fleet.engine.urls[0],
            "candidate": fleet.name(version),
            "live": fleet.engine.base_name if live is None else fleet.name(live),
            "api_key": fleet.engine.api_key.get_secret_value() if fleet.engine.api_key else None,
        }
    except EngineError as exc:  # the checks that need it will be `insufficient`
        log.error("candidate not loaded", extra={"action": "candidate_not_loaded", "version": version, "why": str(exc)})
    job = {
        "settings": night.settings.gate.model_dump(mode="json"),
        "base_model": str(night.settings.engine.model),
        "candidate": registered["path"],
        "live": None if live is None else registry.get_adapter(fleet.store, live).path,
        "held_out": snapshot["held_out_path"],
        "train": night.settings.train.model_dump(mode="json"),
        "engine": engine,
        "snapshot": snapshot,
        "out": str(night.dir / "gate.json"),
        "report": str(night.dir / "report.html"),
        "run_id": night.run.run_id,
        "version": version,
        "parent": live,
    }
    job_file = night.dir / "gate-job.json"
    job_file.touch(mode=0o600)  # it may hold the engine's key
    job_file.write_text(json.dumps(job, indent=1))
    _run_module(night, ["loop.gate", "--job", str(job_file)], night.dir / "gate.log", night.settings.train.deadline_s)
    result: dict[str, Any] = json.loads((night.dir / "gate.json").read_text())
    metrics.gate_verdicts.labels(result["verdict"]).inc()
    for check in result["checks"]:
        if check["value"] is not None:
            metrics.gate_value.labels(check["name"]).set(check["value"])
    return result | {"report": job["report"]}


def _roll_out(night: Night, version: str, gate: dict[str, Any]) -> dict[str, Any]:
    fleet, now_ms = night.fleet, _now_ms()
    verdict = gate["verdict"]
    if verdict != "pass":
        why = "; ".join(c["name"] for c in gate["checks"] if c["verdict"] in ("fail", "insufficient"))
        with write(fleet.store) as connection:
            registry.move(
                connection, version, "rejected", f"gate: {verdict} ({why})", now_ms, manifest={"verdict": verdict}
            )
        _unload_rejected(fleet)
        return {"outcome": f"rejected ({why})"}
    if registry.get_adapter(fleet.store, version).state == "candidate":
        with write(fleet.store) as connection:
            registry.move(connection, version, "approved", "gate: pass", now_ms, manifest={"verdict": verdict})
    if night.settings.rollout.canary_steps:
        share = night.settings.rollout.canary_steps[0]
        route = start_canary(fleet, version, share, f"canary at {share:.0%}", now_ms)
        outcome = f"canary at {share:.0%}"
    else:
        route = go_live(fleet, version, "gate: pass; no canary steps are configured", now_ms)
        outcome = "live"
    acknowledged = wait_for_gateways(fleet, route.generation, night.settings.rollout.drain_timeout_s)
    return {"outcome": outcome, "generation": route.generation, "acknowledged": acknowledged}


def _unload_rejected(fleet: Fleet) -> None:
    try:
        unload_unneeded(fleet, _now_ms())
    except EngineError as exc:  # the watch tries again on its next tick
        log.warning("rejected candidate not unloaded", extra={"action": "unload_failed", "why": str(exc)})


def _run_module(
    night: Night, command: list[str], log_path: Path, deadline_s: float, *, follow: Path | None = None
) -> None:
    """Run `python -m command` until it ends; its output goes to `log_path`, its last metrics line to Prometheus.

    Raises Interrupted where the run is stopped (the child is told so, and has time to write a checkpoint) and
    RunFailed where the child fails or passes the deadline.
    """
    deadline = time.monotonic() + deadline_s
    with log_path.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "loop.child", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                if night.stop.wait(0.2):
                    raise Interrupted(f"stopped in {command[0]}")
                if time.monotonic() > deadline:
                    raise RunFailed(f"{command[0]} passed its deadline of {deadline_s:.0f} s, see {log_path}")
                if follow is not None:
                    _show_progress(follow)
        finally:
            _end(child)
    if child.returncode != 0:
        last = log_path.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        raise RunFailed(f"{command[0]} ended with status {child.returncode}: {last[0]:.500} (see {log_path})")


def _end(child: subprocess.Popen[bytes], patience_s: float = 30.0) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.stdin is not None
    child.stdin.close()


def _show_progress(path: Path) -> None:
    """The last line of the trainer's metrics, on /metrics."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            line = json.loads(file.read().rsplit(b"\n", 2)[-2])
    except (OSError, ValueError, IndexError):  # not there yet, or half a line
        return
    metrics.train_loss.set(line.get("loss", 0.0))
    metrics.train_kl.set(line.get("kl", 0.0))
    metrics.train_rows_per_second.set(line.get("rows_per_s", 0.0))


def _now_ms() -> int:
    return int(time.time() * 1000)
