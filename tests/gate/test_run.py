from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loop.gate.probe import ProbeError, generate
from loop.gate.run import EngineProbe, GateResult, run_gate
from loop.gate.scoring import score
from loop.gate.verdict import Check
from loop.kto.divergence import kl_to_base
from loop.kto.model import load_adapters, load_base
from loop.settings import GateSettings
from tests.gate.conftest import World
from tests.gate.tiny import TRAIN, stub_engine, votes, write_votes

SETTINGS = GateSettings(
    bootstrap_samples=300, max_kl_to_base=50, max_length_ratio=100, probe_prompts=12, probe_max_tokens=12
)


def judge(world: World, candidate: Path, live: Path | None = None, **changes: Any) -> GateResult:
    arguments: dict[str, Any] = {"held_out": world.held_out, "engine": None, "serving_asked": False} | changes
    settings, train = arguments.pop("settings", SETTINGS), arguments.pop("train", TRAIN)
    return run_gate(settings, train, base_model=world.base, candidate=candidate, live=live, **arguments)


def named(result: GateResult) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


# --- preference -------------------------------------------------------------------------------------------------------


def test_votes_that_were_learnt_pass_and_flipped_ones_fail(world: World) -> None:
    honest, flipped = judge(world, world.honest), judge(world, world.flipped)
    assert honest.verdict == "pass"
    assert flipped.verdict == "fail"
    gain = named(honest)["preference_gain"]
    assert gain.low is not None
    assert gain.low > 0.2
    assert named(flipped)["preference_gain"].high is not None
    assert (named(flipped)["preference_gain"].high or 0) < -0.2
    assert named(honest)["live_balanced_accuracy"].value == 0.5  # the base rewards nothing


def test_live_is_the_bar_not_the_base(world: World) -> None:
    assert judge(world, world.honest, world.flipped).verdict == "pass"
    same = judge(world, world.honest, world.honest)
    assert same.verdict == "fail"  # nothing is gained
    assert (named(same)["preference_gain"].low, named(same)["preference_gain"].high) == (0, 0)


def test_too_few_raters_or_rows_are_insufficient(world: World, tmp_path: Path) -> None:
    few_raters = write_votes(tmp_path / "raters.jsonl", votes(200, seed=3, raters=20))
    few_rows = write_votes(tmp_path / "rows.jsonl", votes(80, seed=3))
    assert judge(world, world.honest, held_out=few_raters).verdict == "insufficient"
    assert judge(world, world.honest, held_out=few_rows).verdict == "insufficient"


def test_without_raters_conversations_are_the_clusters(world: World, tmp_path: Path) -> None:
    rows = [row | {"rater": None, "conversation_id": f"c{n % 33}"} for n, row in enumerate(votes(300, seed=4))]
    result = judge(world, world.honest, held_out=write_votes(tmp_path / "anonymous.jsonl", rows))
    assert (result.figures["clusters"], result.verdict) == (33, "pass")


def test_an_empty_held_out_file_is_insufficient(world: World, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from loop.snapshot.write import SCHEMA

    pq.write_table(pa.Table.from_pylist([], schema=SCHEMA), tmp_path / "held_out.parquet")
    result = judge(world, world.honest, held_out=tmp_path / "held_out.parquet")
    assert result.verdict == "insufficient"
    json.dumps(result.to_json(), allow_nan=False)


# --- divergence and quantisation --------------------------------------------------------------------------------------


def test_kl_is_the_sum_of_exact_divergences_along_the_answer(world: World) -> None:
    rows = [([5, 6, 7, 8], [9, 10, 1]), ([6, 7], [11, 12, 13, 1])]
    model = load_adapters(load_base(world.base, "none", "float32"), {"candidate": world.honest})
    found = kl_to_base(model, "candidate", rows)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(world.base).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), str(world.honest)).eval()
    for (prompt, answer), ours in zip(rows, found, strict=True):
        with torch.no_grad():
            p, q = (m(torch.tensor([prompt + answer])).logits[0].log_softmax(-1) for m in (tuned, plain))
        positions = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected = (p.exp() * (p - q)).sum(-1)[positions].sum()
        assert ours == pytest.approx(float(expected), rel=1e-4)
        assert ours > 0


def test_a_candidate_far_from_the_base_fails(world: World) -> None:
    result = judge(world, world.honest, settings=SETTINGS.model_copy(update={"max_kl_to_base": 0.5}))
    assert (result.verdict, named(result)["kl_to_base"].verdict) == ("fail", "fail")


def test_the_shift_from_nf4_to_the_served_base_has_a_threshold(world: World) -> None:
    quantised = TRAIN.model_copy(update={"quantization": "nf4"})
    check = named(judge(world, world.honest, train=quantised))["quantization_shift"]
    assert check.value is not None
    assert check.value > 1e-3  # NF4 is another base
    strict = SETTINGS.model_copy(update={"max_quantization_shift_nats": 1e-4})
    assert judge(world, world.honest, train=quantised, settings=strict).verdict == "fail"


def test_log_probs_that_are_not_finite_are_no_verdict(world: World) -> None:
    model = load_adapters(load_base(world.base, "none", "float32"), {"candidate": world.honest})
    parameter = next(p for name, p in model.named_parameters() if "down_proj.lora_B" in name)
    parameter.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="candidate"):
        score(model, "candidate", [([5, 6], [7], None)])


# --- serving ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_serves_the_candidate_passes(world: World) -> None:
    with stub_engine(world.base, {"a@2": world.honest, "base": None}) as url:
        result = judge(world, world.honest, engine=EngineProbe(url, "a@2", "base"), serving_asked=True)
    skew = named(result)["serve_skew"]
    assert result.verdict == "pass"
    assert skew.high is not None
    assert skew.high < 1e-4
    assert result.figures["serving"]["answered"] == 12
    assert len(result.arrays["candidate_lengths"]) == 12


def test_an_engine_that_serves_something_else_fails(world: World) -> None:
    with stub_engine(world.base, {"a@2": world.flipped, "base": None}) as url:
        result = judge(world, world.honest, engine=EngineProbe(url, "a@2", "base"), serving_asked=True)
    assert named(result)["serve_skew"].verdict == "fail"
    assert result.verdict == "fail"


@pytest.mark.parametrize("trouble", ["no engine", "not there", "not loaded", "prompts refused"])
def test_serving_that_cannot_be_checked_is_insufficient(world: World, trouble: str) -> None:
    with stub_engine(world.base, {"base": None}, longest=1 if trouble == "prompts refused" else 100) as url:
        probe = EngineProbe(url, "base" if trouble == "prompts refused" else "a@2", "base")
        if trouble == "not there":
            probe = replace(probe, url="http://127.0.0.1:9")
        engine = None if trouble == "no engine" else probe
        result = judge(world, world.honest, engine=engine, serving_asked=True)
    assert {named(result)[name].verdict for name in ("serve_skew", "length_ratio")} == {"insufficient"}
    assert result.verdict == "insufficient"


def test_single_refused_prompts_are_left_out(world: World) -> None:
    with stub_engine(world.base, {"base": None}, longest=3) as url:
        found = generate(url, "base", [[5, 6], [5, 6, 7, 8], [7]], 4)
        with pytest.raises(ProbeError, match="404"):
            generate(url, "nobody", [[5, 6]], 4)
    assert [probe is None for probe in found] == [False, True, False]


# --- the job ----------------------------------------------------------------------------------------------------------


def job_of(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "settings": SETTINGS.model_dump(mode="json"),
        "train": TRAIN.model_dump(mode="json"),
        "base_model": str(world.base),
        "candidate": str(world.honest),
        "live": None,
        "held_out": str(world.held_out),
        "engine": None,
        "serving_checks": False,
        "out": str(folder / "gate.json"),
        "report": str(folder / "report.html"),
        "run_id": "run-1",
        "version": "v000001",
        "parent": None,
    } | changes


def run_job(job: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "loop.gate", "--job", str(folder / "job.json")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_a_job_leaves_its_result_and_a_report(world: World, tmp_path: Path) -> None:
    done = run_job(job_of(world, tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gate.json").read_text())
    assert result["verdict"] == "pass"
    assert {check["verdict"] for check in result["checks"]} == {"pass", "not_asked", "not_counted"}
    html = (tmp_path / "report.html").read_text()
    assert "v000001" in html
    assert html.count("<svg") >= 5
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.json", "job.json", "report.html"]


def test_a_bad_job_says_why_and_leaves_no_result(world: World, tmp_path: Path) -> None:
    wrong = SETTINGS.model_dump(mode="json") | {"confidence": 2}
    done = run_job(job_of(world, tmp_path, settings=wrong), tmp_path)
    assert done.returncode != 0
    assert "confidence" in done.stderr
    done = run_job(job_of(world, tmp_path, candidate=str(tmp_path / "nothing")), tmp_path)
    assert done.returncode != 0
    assert "nothing" in done.stderr
    assert not (tmp_path / "gate.json").exists()


def test_probes_and_intervals_are_the_same_every_time(world: World) -> None:
    first, second = judge(world, world.honest), judge(world, world.honest)
    assert first.checks == second.checks
    assert np.array_equal(first.arrays["reward"], second.arrays["reward"])
