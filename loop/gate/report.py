"""The run's report: one self-contained HTML file for people who look rather than read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from loop.gate import plots
from loop.gate.run import GateResult
from loop.gate.verdict import Check

_SECTIONS = {
    "Is there enough to judge by?": ("evidence_",),
    "Do held-out votes prefer it?": ("preference_gain", "reward_auc", "candidate_", "live_"),
    "Does it still behave?": ("kl_to_base", "length_ratio"),
    "Does it still know?": ("benchmark:",),
    "Does serving match training?": ("serve_skew", "quantization_shift"),
}
_SENTENCES = {
    "pass": "The candidate passed every check: held-out votes prefer it, and nothing else got worse.",
    "fail": "The candidate must not serve: at least one check failed.",
    "insufficient": "The candidate must not serve: at least one check could not be decided. Not shown is not passed.",
}


def write_report(path: Path, result: GateResult, job: dict[str, Any]) -> None:
    """Render the report of a job to `path`, whole or not at all. The snapshot's manifest and the training's metrics are
    shown where they lie beside the held-out file and in the candidate's folder."""
    environment = Environment(
        loader=PackageLoader("loop.gate", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": plots.number, "strip": plots.strip}
    html = environment.get_template("report.html").render(
        **{key: job.get(key) for key in ("run_id", "version", "parent")},
        result=result,
        sentence=_SENTENCES[result.verdict],
        blocking=[check for check in result.checks if check.verdict in ("fail", "insufficient")],
        sections=_sections(result.checks),
        figures=_pictures(result, _read_lines(Path(job["candidate"]) / "metrics.jsonl")),
        manners={
            who: result.figures["serving"][who] for who in ("candidate", "live") if who in result.figures["serving"]
        },
        manifest=_read_json(Path(job["held_out"]).with_name("manifest.json")),
        settings={"gate": job["settings"], "train": job["train"]},
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)


def _sections(checks: list[Check]) -> dict[str, list[Check]]:
    found = {
        title: [check for check in checks if check.name.startswith(prefixes)] for title, prefixes in _SECTIONS.items()
    }
    return {title: members for title, members in found.items() if members}


def _pictures(result: GateResult, metrics: list[dict[str, float]]) -> list[tuple[str, Any]]:
    """Captions and SVGs, for what there is data of."""
    arrays, pictures = result.arrays, []
    if len(arrays["reward"]):
        pictures.append(("Rewards the candidate gives to held-out answers", plots.rewards(arrays, "reward")))
        if arrays["live_reward"].any():
            pictures.append(("Rewards live gives to the same answers", plots.rewards(arrays, "live_reward")))
    if "candidate_lengths" in arrays:
        pictures.append(("Reply lengths on the same prompts", plots.lengths(arrays)))
        pictures.append(("Serve skew, token by token", plots.skew(arrays)))
    if metrics:
        loss = {"loss": ("loss", plots.BLUE), "kl": ("z0", plots.GREY)}
        pictures.append(("Training: loss and reference point", plots.curves(metrics, loss, "loss, nats")))
        rewards = {
            "rewards/chosen": ("thumbs up", plots.UP),
            "rewards/rejected": ("thumbs down", plots.DOWN),
            "rewards/margins": ("margin", plots.INK),
        }
        pictures.append(("Training: rewards", plots.curves(metrics, rewards, "reward")))
    return pictures


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
