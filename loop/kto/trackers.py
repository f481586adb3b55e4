"""Where `report_to` sends a run's metrics: TensorBoard, Weights & Biases, MLflow. A resumed run goes on in its entry.

Address and account are each tool's own settings (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, …). Only TensorBoard comes with
Thumbwheel; the others are installed by those who use them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

TENSORBOARD = "tensorboard"
PROJECT = "thumbwheel"
Report = Callable[[Mapping[str, float], int], object]


@contextmanager
def open_tracker(report_to: str, work: Path) -> Iterator[Report | None]:
    """A function that takes figures and their step; None for "none". Raises ValueError where the tool is missing."""
    name = work.name.removesuffix(".partial")
    try:  # before anything is trained
        match report_to:
            case "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
            case "wandb":
                import wandb
            case "mlflow":
                import mlflow
    except ImportError as exc:
        raise ValueError(
            f"report_to = {report_to!r}: {exc}; install it into this environment: pip install {report_to}"
        ) from exc
    match report_to:
        case "tensorboard":
            with SummaryWriter(str(work / TENSORBOARD)) as writer:
                yield lambda figures, step: [writer.add_scalar(key, value, step) for key, value in figures.items()]
        case "wandb":
            entry = hashlib.sha256((work / "run.json").read_bytes() + name.encode()).hexdigest()[:16]
            with wandb.init(project=PROJECT, name=name, id=entry, resume="allow") as run:
                yield lambda figures, step: run.log(dict(figures), step=step)
        case "mlflow":
            known = work / "mlflow_run"
            if not known.exists():
                mlflow.set_experiment(PROJECT)
            with mlflow.start_run(known.read_text() if known.exists() else None, run_name=name) as run:
                known.write_text(run.info.run_id)
                yield lambda figures, step: mlflow.log_metrics(dict(figures), step=step)
        case _:
            yield None
