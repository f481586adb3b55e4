"""How a run is watched: a bar on the console, `metrics.jsonl`, and the tracker that `report_to` names."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loop.kto.trackers import Report, open_tracker

METRICS_LOG = "metrics.jsonl"


class Watch:
    """Holds the bar and the open files; a context manager. With `report_to` None it shows and writes nothing."""

    def __init__(self, work: Path, report_to: str | None, console: Console | None) -> None:
        is_mute = report_to is None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            disable=is_mute,
        )
        self._stack = ExitStack()
        self._report: Report | None = self._stack.enter_context(open_tracker(report_to, work)) if report_to else None
        self._log = None if is_mute else self._stack.enter_context((work / METRICS_LOG).open("a", encoding="utf-8"))

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._stack.close()

    def task(self, name: str, total: int, done: int = 0) -> Any:
        """A line of the console; its id is for `advance`."""
        return self._bar.add_task(name, total=total, completed=done, figures="")

    def advance(self, task: Any, done: int, figures: str = "") -> None:
        self._bar.update(task, completed=done, figures=figures)

    def log(self, metrics: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, on its way to disk when this returns; readers may follow the file."""
        if self._log is None:
            return
        self._log.write(json.dumps(metrics) + "\n")
        self._log.flush()
        if self._report is not None:
            self._report({f"train/{name}": value for name, value in metrics.items()}, int(metrics["step"]))


def forget_after(work: Path, step: int) -> None:
    """Take the lines after `step` out of the log: a resumed run writes them again."""
    path = work / METRICS_LOG
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
