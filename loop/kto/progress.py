"""How a run is watched: a bar on the console, `metrics.jsonl`, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS_LOG, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Watch:
    """Holds the bar and the open files; a context manager."""

    def __init__(self, work: Path, report_to: str, console: Console | None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._log = (work / METRICS_LOG).open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(work / TENSORBOARD))

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def task(self, name: str, total: int, done: int = 0) -> Any:
        """A line of the console; its id is for `advance`."""
        return self._bar.add_task(name, total=total, completed=done, figures="")

    def advance(self, task: Any, done: int, figures: str = "") -> None:
        self._bar.update(task, completed=done, figures=figures)

    def log(self, metrics: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, on its way to disk when this returns; readers may follow the file."""
        self._log.write(json.dumps(metrics) + "\n")
        self._log.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"train/{name}", value, int(metrics["step"]))


def forget_after(work: Path, step: int) -> None:
    """Take the lines after `step` out of the log: a resumed run writes them again."""
    path = work / METRICS_LOG
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
