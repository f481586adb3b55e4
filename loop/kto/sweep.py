"""A run for each β and learning rate, held against each other on the same validation raters.

`<out>/beta-…-lr-…/` are the runs' adapters, `<out>/sweep.json` the table, `<out>/sweep.svg` validation accuracy against
KL. What is there already is not trained again, so an interrupted sweep goes on where it stopped. The gate's held-out
file is not opened: what a sweep has chosen is still judged on rows that chose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loop.kto.folders import write_json
from loop.kto.train import train
from loop.settings import SettingsError, TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

VALIDATION_SHARE = 0.2  # where the settings name none
FIGURES = ("eval_accuracy", "eval_auc", "eval_kl_to_base", "eval_loss")


def sweep(
    settings: TrainSettings,
    data: Path,
    model_dir: Path,
    out: Path,
    betas: Sequence[float],
    learning_rates: Sequence[float],
    *,
    console: Console,
) -> dict[str, Any]:
    """Train them all; returns the runs with their figures, and `best`, the run with the highest validation accuracy.

    Raises SettingsError for a value out of bounds and where the validation rows do not hold both labels, and what
    `train` raises.
    """
    shared: dict[str, Any] = {
        "validation_share": settings.validation_share or VALIDATION_SHARE,
        "cache": settings.cache or out / "cache",
    }
    runs: list[dict[str, Any]] = []
    for beta, learning_rate in itertools.product(betas, learning_rates):
        changed = shared | {"beta": beta, "learning_rate": learning_rate}
        name = f"beta-{beta:g}-lr-{learning_rate:g}"
        console.print(f"{name} ({len(runs) + 1} of {len(betas) * len(learning_rates)})", highlight=False)
        one = TrainSettings.model_validate(settings.model_dump() | changed)
        result = train(one, data, model_dir, out / name, console=console)
        if "eval_accuracy" not in result:
            raise SettingsError(
                f"validation_share = {one.validation_share}: {result['rows_validation']} rows, not of both labels; "
                "expected a share that holds ratings of either kind"
            )
        figures = {key: result[key] for key in FIGURES}
        runs.append({"name": name, "beta": beta, "learning_rate": learning_rate, **figures})
    best = max(runs, key=lambda run: (run["eval_accuracy"], -run["eval_kl_to_base"]))
    found = {"best": best["name"], "rows_validation": result["rows_validation"], "runs": runs}
    write_json(out / "sweep.json", found)
    _plot(runs, out / "sweep.svg")
    return found


def _plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against KL; a line for each learning rate, its points named by β."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for learning_rate, group in itertools.groupby(
        sorted(runs, key=lambda run: (run["learning_rate"], run["beta"])), key=lambda run: run["learning_rate"]
    ):
        points = list(group)
        at = [(run["eval_kl_to_base"], run["eval_accuracy"]) for run in points]
        (line,) = axes.plot(*zip(*at, strict=True), "o-", label=f"learning rate {learning_rate:g}", alpha=0.8)
        for n, (run, place) in enumerate(zip(points, at, strict=True)):
            # Each a line higher than the one before: betas often come to nearly the same place.
            named = {"xytext": (8, 11 * n - 4), "textcoords": "offset points", "color": line.get_color()}
            axes.annotate(f"β {run['beta']:g}", place, **named)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("symlog", linthresh=1)  # from learning rate to learning rate it differs by orders of magnitude
    axes.set_xlim(left=min(0.0, *(run["eval_kl_to_base"] for run in runs)))
    axes.set(xlabel="KL to the base, nats along a validation answer", ylabel="validation accuracy, balanced")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
