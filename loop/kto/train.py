"""KTO on a QLoRA adapter, from a file of rows to a folder that PEFT and vLLM load.

    python -m loop.kto.train --settings-json FILE --data PATH --model DIR --out DIR

prints one JSON line when it is done (progress goes to stderr). The same call goes on where a killed one stopped. While
it runs, its files are in `<out>.partial`; `<out>` appears whole, by a rename, when the run is over. Started by
`torchrun` or `accelerate launch`, its processes share every effective batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loop.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

# Settings that do not change what is trained: a run may be gone on with after changing them.
INDIFFERENT = {"dir", "logging_steps", "save_steps", "report_to", "deadline_s", "cache", "processes"}


def train(
    settings: TrainSettings, data: Path, model_dir: Path, out: Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Train an adapter on `data` and publish it as `out`; returns the run's figures (also in `out/metrics.json`).

    Resumes `<out>.partial`; an `out` that is there already is returned as it is, if it came from the same inputs.
    Raises ValueError for bad rows, models and folders, FloatingPointError (with row ids) where numbers run away.
    """
    import torch

    from loop.kto import artifacts, batch, cache, folders, gradients, loss, model, plan, progress, rows, validation
    from loop.kto.ranks import Ranks

    # --- the run: what it is made of, and whether it is an old one
    started = time.monotonic()
    ranks = Ranks()
    inputs = {
        "data_sha256": folders.hash_files([rows.data_file(data)]),
        "base_sha256": folders.hash_model(model_dir),
        "settings": settings.model_dump(mode="json", exclude=INDIFFERENT) | {"processes": ranks.count},
    }
    if finished := folders.finished(out, inputs):
        return finished
    with ranks.first_goes_first():
        work = folders.open_work(out, inputs)

    # --- data: what is trained on, and what is only watched
    every_row, counts = plan.load_rows(settings, data, model_dir)
    train_rows, watched_rows = validation.split(every_row, settings.validation_share)
    if not train_rows:
        raise ValueError(f"{data}: validation_share = {settings.validation_share} leaves no row to train on")
    if settings.early_stopping_patience and not watched_rows:
        raise ValueError("early_stopping_patience needs rows to look at: set validation_share above 0")

    # --- model: one base, frozen; the policy is the base with the adapter on, the reference with it off
    base = model.load_base(model_dir, settings.quantization, settings.dtype)
    policy = model.attach_lora(base, settings)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    setup_s = time.monotonic() - started

    with progress.Watch(work, settings.report_to if ranks.is_first else None, console) as watch:
        # --- reference: batches of an optimiser step each, and log-probs of all rows and mismatched pairs, once
        depends_on = {"base": inputs["base_sha256"], "device": base.device.type}
        depends_on |= {"quantization": settings.quantization, "dtype": settings.dtype}
        with cache.ReferenceCache(settings.cache, depends_on) as known:
            planned = plan.make_plan(settings, policy, train_rows, known, work, ranks, watch)
            watched = validation.prepare(settings, policy, watched_rows, known, ranks) if watched_rows else None

        # --- optimiser, and the state to go on from
        optimiser = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        steps = math.ceil(len(planned.batches) * settings.num_train_epochs)
        run = artifacts.load_checkpoint(policy, optimiser, work, ranks)
        if ranks.is_first:
            progress.forget_after(work, run.step)
        earlier_s, loop_started = run.train_s, started + setup_s
        micro_batch = settings.per_device_train_batch_size
        is_late = False
        task = watch.task("train", steps, run.step)

        # --- the loop
        while run.step < steps and not run.has_stopped_improving(settings.early_stopping_patience):
            is_late = ranks.any(time.monotonic() - started > settings.deadline_s, base.device)
            if is_late and run.step:  # after one step at least: what has learned nothing is not an adapter
                logger.warning("deadline_s reached after %d of %d steps", run.step, steps, extra={"action": "deadline"})
                break
            of_step = planned.batch(run.step, settings.seed)
            for options in optimiser.param_groups:
                options["lr"] = settings.learning_rate * _schedule(settings, run.step, steps)

            logps, z0, micro_batch = gradients.backward_within_memory(
                policy, of_step, beta=settings.beta, micro_batch=micro_batch, ranks=ranks
            )
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            batch.check_finite(norm.expand(len(logps)), of_step.rows, f"step {run.step + 1}: the gradient's norm")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

            metrics = loss.kto_metrics(logps, of_step.matched, of_step.desirable, of_step.weight, z0, settings.beta)
            metrics |= {"grad_norm": float(norm), "learning_rate": optimiser.param_groups[0]["lr"]}
            run.count(metrics, len(logps), earlier_s + time.monotonic() - loop_started)
            is_last = run.step == steps
            if watched is not None and (is_last or run.step % settings.eval_steps == 0):
                run.look(watched.figures(policy, ranks), policy)
                metrics |= run.looked
            watch.advance(task, run.step, _figures(metrics, run.rows_per_s))
            if is_last or run.step % settings.logging_steps == 0 or "eval_loss" in metrics:
                where = {"step": run.step, "epoch": run.step / len(planned.batches), "rows_per_s": run.rows_per_s}
                watch.log(where | metrics)
            if not is_last and run.step % settings.save_steps == 0:
                artifacts.save_checkpoint(policy, optimiser, run, work, ranks)

    # --- the adapter, its manifest and the figures; then all of it at once
    if settings.early_stopping_patience and run.best:
        run.go_back_to_best(policy)
    result = run.figures() | {
        "rows": len(train_rows),
        "rows_validation": len(watched_rows),
        **counts,
        "rows_without_mismatch": sum(other is None for other in planned.rows.others),
        "reference_computed": planned.computed,
        "steps_planned": steps,
        "deadline_reached": is_late,
        "setup_s": setup_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
    }
    if ranks.is_first:
        manifest = inputs | {"data": data.name, "base": model_dir.name, "metrics": result}
        artifacts.publish_run(policy, manifest, work, out)
    ranks.wait()
    return result


def _schedule(settings: TrainSettings, step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then the schedule down to 0 after the last."""
    warmup = math.ceil(steps * settings.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    match settings.lr_scheduler_type:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


def _figures(metrics: dict[str, float], rows_per_s: float) -> str:
    margin = metrics.get("rewards/margins", math.nan)
    return f"loss {metrics['loss']:.4f}  kl {metrics['kl']:.3f}  margin {margin:+.3f}  {rows_per_s:.1f} rows/s"


def command(settings: TrainSettings, settings_json: Path, data: Path, model_dir: Path, out: Path) -> list[str]:
    """The module and arguments behind `python -m` that train in processes of their own."""
    program = ["loop.kto.train"]
    if settings.processes > 1:
        program = ["torch.distributed.run", "--standalone", f"--nproc-per-node={settings.processes}"]
        program += ["-m", "loop.child", "loop.kto.train"]  # torchrun's children end with whoever holds its input
    named = {"settings-json": settings_json, "data": data, "model": model_dir, "out": out}
    return [*program, *(f"--{name}={path}" for name, path in named.items())]


def main(arguments: list[str] | None = None) -> None:
    """The nightly run's subprocess. Settings are read before torch is loaded, so that a mistake in them is quick."""
    parser = argparse.ArgumentParser(prog="python -m loop.kto.train")
    for name in ("--settings-json", "--data", "--model", "--out"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("loop").setLevel(logging.INFO)
    try:
        settings = TrainSettings.model_validate_json(given.settings_json.read_text())
        result = train(settings, given.data, given.model, given.out)
    except (ValueError, FloatingPointError) as exc:
        sys.exit(f"thumbwheel train: {exc}")
    from loop.kto.ranks import Ranks

    if Ranks().is_first:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
