"""KTO on a QLoRA adapter, from a file of rows to a folder that PEFT and vLLM load.

    python -m loop.kto.train --settings-json FILE --data PATH --model DIR --out DIR

prints one JSON line when it is done (progress goes to stderr). The same call goes on where a killed one stopped. While
it runs, its files are in `<out>.partial`; `<out>` appears whole, by a rename, when the run is over.
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
    from peft import PeftModel
    from rich.console import Console

    from loop.kto.batch import Reference
    from loop.kto.cache import ReferenceCache
    from loop.kto.groups import Group
    from loop.kto.pack import Tokens
    from loop.kto.progress import Watch
    from loop.kto.rows import Row

logger = logging.getLogger(__name__)

# Settings that do not change what is trained: a run may be gone on with after changing them.
INDIFFERENT = {"dir", "logging_steps", "save_steps", "report_to", "deadline_s", "cache"}


def train(
    settings: TrainSettings, data: Path, model_dir: Path, out: Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Train an adapter on `data` and publish it as `out`; returns the run's figures (also in `out/metrics.json`).

    Resumes `<out>.partial`; an `out` that is there already is returned as it is, if it came from the same inputs.
    Raises ValueError for bad rows, models and folders, FloatingPointError (with row ids) where numbers run away.
    """
    import torch

    from loop.kto import artifacts, batch, cache, folders, gradients, groups, loss, model, progress, rows

    # --- the run: what it is made of, and whether it is an old one
    started = time.monotonic()
    inputs = {
        "data_sha256": folders.hash_files([rows.data_file(data)]),
        "base_sha256": folders.hash_model(model_dir),
        "settings": settings.model_dump(mode="json", exclude=INDIFFERENT),
    }
    if finished := folders.finished(out, inputs):
        return finished
    work = folders.open_work(out, inputs)

    # --- data
    train_rows, counts = _load_rows(settings, data, model_dir)

    # --- model: one base, frozen; the policy is the base with the adapter on, the reference with it off
    base = model.load_base(model_dir, settings.quantization, settings.dtype)
    policy = model.attach_lora(base, settings)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    device = base.device
    setup_s = time.monotonic() - started

    with progress.Watch(work, settings.report_to, console) as watch:
        # --- reference: the batches of an optimiser step each, and log-probs of all rows and mismatched pairs, once
        depends_on = {"base": inputs["base_sha256"], "device": device.type}
        depends_on |= {"quantization": settings.quantization, "dtype": settings.dtype}
        with cache.ReferenceCache(settings.cache, depends_on) as known:
            batches, others, reference, computed = _reference(settings, policy, train_rows, known, work, watch)
        counts |= {"rows_without_mismatch": sum(other is None for other in others), "reference_computed": computed}
        desirable = torch.tensor([row.desirable for row in train_rows], device=device)  # [rows]
        weight = torch.tensor([row.weight for row in train_rows], device=device)  # [rows]
        matched, mismatched = reference.matched.to(device), reference.mismatched.to(device)  # [rows] each

        # --- optimiser, and the state to go on from
        optimiser = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        steps = math.ceil(len(batches) * settings.num_train_epochs)
        state = artifacts.load_checkpoint(policy, work) or {"step": 0, "rows": 0, "train_s": 0.0, "totals": {}}
        if "optimiser" in state:
            optimiser.load_state_dict(state["optimiser"])
            _set_random_state(state["random"])
        progress.forget_after(work, state["step"])
        earlier_s, loop_started = state["train_s"], started + setup_s
        micro_batch = settings.per_device_train_batch_size
        is_late = False
        task = watch.task("train", steps, state["step"])

        # --- the loop
        for step in range(state["step"], steps):
            is_late = time.monotonic() - started > settings.deadline_s
            if is_late and step:  # after one step at least: what has learned nothing is not an adapter
                logger.warning("deadline_s reached after %d of %d steps", step, steps, extra={"action": "deadline"})
                break
            epoch, place = divmod(step, len(batches))
            group = batches[groups.epoch_order(len(batches), epoch, settings.seed)[place]]
            indices = torch.tensor(group.rows, device=device)
            of_others = mismatched[indices]
            rows_of_step = gradients.Batch(
                [train_rows[i] for i in group.rows],
                [others[i] for i in group.rows],
                matched[indices],
                of_others[~of_others.isnan()],
                desirable[indices],
                weight[indices],
            )
            learning_rate = settings.learning_rate * _schedule(settings, step, steps)

            logps, z0, micro_batch = gradients.backward_within_memory(
                policy, rows_of_step, beta=settings.beta, micro_batch=micro_batch
            )
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            batch.check_finite(norm.expand(len(indices)), rows_of_step.rows, f"step {step + 1}: the gradient's norm")
            for options in optimiser.param_groups:
                options["lr"] = learning_rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

            metrics = loss.kto_metrics(logps, matched[indices], desirable[indices], weight[indices], z0, settings.beta)
            metrics |= {"grad_norm": float(norm), "learning_rate": learning_rate}
            state = _after_step(state, metrics, len(indices), earlier_s + time.monotonic() - loop_started)
            rate = state["rows"] / state["train_s"]
            watch.advance(task, step + 1, _figures(metrics, rate))
            if (step + 1) % settings.logging_steps == 0 or step + 1 == steps:
                place_in_run = {"step": step + 1, "epoch": (step + 1) / len(batches), "rows_per_s": rate}
                watch.log(place_in_run | metrics)
            if (step + 1) % settings.save_steps == 0 and step + 1 < steps:
                saved = state | {"optimiser": optimiser.state_dict(), "random": _random_state()}
                artifacts.save_checkpoint(policy, saved, work, step + 1)

    # --- the adapter, its manifest and the figures; then all of it at once
    result = {name: total / state["step"] for name, total in state["totals"].items()} | {
        "rows": len(train_rows),
        **counts,
        "steps": state["step"],
        "steps_planned": steps,
        "deadline_reached": is_late,
        "rows_per_s": state["rows"] / state["train_s"] if state["train_s"] else 0.0,
        "train_s": state["train_s"],
        "setup_s": setup_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
    }
    manifest = inputs | {"data": data.name, "base": model_dir.name, "metrics": result}
    artifacts.publish_run(policy, manifest, work, out)
    return result


def _load_rows(settings: TrainSettings, data: Path, model_dir: Path) -> tuple[list[Row], dict[str, int]]:
    """The rows that fit, and how many did not."""
    from loop.kto import model, rows, template

    tokenizer = model.load_tokenizer(model_dir)
    chat_template = template.read_chat_template(settings.chat_template)
    weights = (settings.desirable_weight, settings.undesirable_weight)
    records = rows.read_records(data)
    every_row = [rows.row_of(record, place, tokenizer, chat_template, weights) for place, record in records]
    fitting, counts = rows.fit(every_row, settings.max_length, settings.truncation)
    if not fitting:
        raise ValueError(f"{data}: none of {len(every_row)} rows is within max_length = {settings.max_length} tokens")
    return fitting, counts


def _reference(
    settings: TrainSettings,
    policy: PeftModel,
    train_rows: list[Row],
    cache: ReferenceCache,
    work: Path,
    watch: Watch,
) -> tuple[list[Group], list[Tokens | None], Reference, int]:
    """The batches, each row's mismatched completion, the reference's log-probs, and how many were not in the cache.

    A resumed run finds its groups and log-probs in its work folder, whatever has become of the cache.
    """
    import torch

    from loop.kto import batch, groups, model

    file = work / "reference.safetensors"
    conversations = [row.conversation for row in train_rows]
    size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    reference = batch.load_reference(file) if file.exists() else None
    if reference is None:
        plan = f"{size} rows, seed {settings.seed}"
        numbers = groups.number_groups(conversations, size, settings.seed, cache.groups(plan, train_rows))
        cache.keep_groups(plan, train_rows, numbers)
    else:
        numbers = reference.groups.tolist()
    made = groups.make_groups(conversations, numbers)
    if settings.objective == "kto":
        others = batch.mismatched_completions(train_rows, made, settings.max_length)
        _warn_of_rows_without_mismatch(sum(other is None for other in others), len(train_rows))
    else:  # without mismatched pairs z0 is 0, which is all that tells APO-zero from KTO
        others = [None] * len(train_rows)
    computed = 0
    if reference is None:
        task = watch.task("reference", len(train_rows))
        with model.scoring(policy, None):
            matched, mismatched, computed = batch.reference_logps(
                policy, train_rows, others, cache, lambda done: watch.advance(task, done)
            )
        reference = batch.Reference(matched, mismatched, torch.tensor(numbers))
        batch.save_reference(reference, file)
    return groups.make_batches(made, size, settings.seed), others, reference, computed


def _warn_of_rows_without_mismatch(without: int, rows: int) -> None:
    if without:
        logger.warning(
            "%d of %d rows leave z0's mean: their group has no other conversation; a group without any has z0 = 0",
            without,
            rows,
            extra={"action": "rows_without_mismatch"},
        )


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


def _after_step(state: dict[str, Any], metrics: dict[str, float], rows: int, train_s: float) -> dict[str, Any]:
    totals = {name: state["totals"].get(name, 0.0) + metrics[name] for name in ("loss", "kl")}
    return {"step": state["step"] + 1, "rows": state["rows"] + rows, "train_s": train_s, "totals": totals}


def _figures(metrics: dict[str, float], rows_per_s: float) -> str:
    margin = metrics.get("rewards/margins", math.nan)
    return f"loss {metrics['loss']:.4f}  kl {metrics['kl']:.3f}  margin {margin:+.3f}  {rows_per_s:.1f} rows/s"


def _random_state() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def main(arguments: list[str] | None = None) -> None:
    """The nightly run's subprocess. Settings are read before torch is loaded, so that a mistake in them is quick."""
    parser = argparse.ArgumentParser(prog="python -m loop.kto.train")
    for name in ("--settings-json", "--data", "--model", "--out"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        settings = TrainSettings.model_validate_json(given.settings_json.read_text())
        result = train(settings, given.data, given.model, given.out)
    except (ValueError, FloatingPointError) as exc:
        sys.exit(f"thumbwheel train: {exc}")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
