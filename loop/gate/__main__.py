"""Run the gate on a job file, in a process of its own: `python -m loop.gate --job FILE.json`.

The job names `settings` and `train` (sections of the settings tree), `base_model`, `candidate`, `live` (null: the
base), `held_out`, `engine` ({"url", "candidate", "live", "api_key"}, or null), `out` and `report`;
`serving_checks: false` says that no engine is meant to be asked. `run_id`, `version` and `parent` go to the report.
The result is in `out` whole or not at all; the exit status is 0 whatever the verdict.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loop.settings import GateSettings, TrainSettings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.gate", description="Judge a candidate adapter.")
    parser.add_argument("--job", type=Path, required=True, help="the job, as JSON")
    job = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # A nightly run depends on no server of anybody else's: tasks and models are local files. Before the libraries look.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        settings = GateSettings.model_validate(job["settings"])
        train = TrainSettings.model_validate(job["train"])
        run_job(job, settings, train)
    except (ValidationError, ValueError, KeyError, OSError) as exc:
        sys.exit(f"gate: {exc!r}")


def run_job(job: dict[str, Any], settings: GateSettings, train: TrainSettings) -> None:
    """Judge, write the report, then the result."""
    from loop.gate.report import write_report
    from loop.gate.run import EngineProbe, run_gate

    held_out, candidate = Path(job["held_out"]), Path(job["candidate"])
    result = run_gate(
        settings,
        train,
        base_model=Path(job["base_model"]),
        candidate=candidate,
        live=None if job["live"] is None else Path(job["live"]),
        held_out=held_out,
        engine=None if job.get("engine") is None else EngineProbe(**job["engine"]),
        serving_asked=job.get("serving_checks", True),
    )
    if job.get("report"):
        write_report(Path(job["report"]), result, job)
    out = Path(job["out"])
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)
    logging.getLogger("thumbwheel.gate").info("verdict: %s", result.verdict, extra={"action": "gate_verdict"})


if __name__ == "__main__":
    main()
