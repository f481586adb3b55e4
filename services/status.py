"""What the command line shows of the store: the state of things, and a run as it goes on."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from sqlalchemy import Engine

from loop.nightly import STAGES
from loop.settings import Settings
from loop.store.examples import count_labels
from loop.store.routes import read_route
from loop.store.runs import get_run, list_runs, run_stages


def show_status(store: Engine, settings: Settings, console: Console) -> None:
    """The route, the labels that wait for the next run, and the last runs."""
    route = read_route(store, settings.engine.alias)
    canary = f", canary {route.canary} at {route.canary_share:.0%}" if route.canary else ""
    console.print(f"{route.alias}: live [bold]{route.live or 'base model'}[/]{canary} (generation {route.generation})")
    since = datetime.fromtimestamp(time.time() - settings.snapshot.window_days * 86_400, UTC).date()
    labels = count_labels(store, since)
    console.print(
        f"labels: {labels} in the last {settings.snapshot.window_days} days, {settings.snapshot.min_labels} start a run"
    )
    table = Table(Column("run", no_wrap=True), "trigger", "state", "stages", "outcome")
    for run in list_runs(store, 10):
        stages = " ".join(stage.stage for stage in run_stages(store, run.run_id))
        table.add_row(run.run_id, run.trigger, run.state, stages, run.outcome)
    console.print(table)


def follow_run(store: Engine, settings: Settings, run_id: str, console: Console) -> None:
    """Show a run's stages until it has ended; in training its step, loss and kl."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(run_id, total=len(STAGES))
        while True:
            run = get_run(store, run_id)
            if run is None or run.state not in ("requested", "running"):
                return
            done = len(run_stages(store, run_id))
            stage = STAGES[min(done, len(STAGES) - 1)]
            detail = _last_step(settings.train.dir / f"{run_id}.partial" / "metrics.jsonl") if stage == "train" else ""
            progress.update(task, completed=done, description=f"{run_id} {stage} {detail}")
            time.sleep(0.3)


def _last_step(path: Path) -> str:
    try:
        line = json.loads(path.read_text().strip().splitlines()[-1])
        return f"step {line['step']} loss {line['loss']:.3f} kl {line['kl']:.2f}"
    except (OSError, ValueError, IndexError, KeyError):  # not there yet, or half a line
        return ""
