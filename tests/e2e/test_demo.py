"""`make demo` reaches what it promises, and its votes are what does it: turned around, they make the model worse."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine

from deploy.demo import measure
from deploy.demo.run import run_demo
from loop import registry
from loop.gate.run import EngineProbe, GateResult, run_gate
from loop.kto.train import train
from loop.rollout.vllm import Replica
from loop.settings import Settings, load_settings
from loop.snapshot.balance import class_weights
from loop.store import open_store
from loop.store.runs import list_runs, run_stages
from tests.conftest import RealEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo's folder and its summary, after one whole run."""
    directory = tmp_path_factory.mktemp("demo") / "demo"
    return directory, run_demo(directory)


@pytest.fixture
def settings(demo: tuple[Path, dict[str, Any]]) -> Settings:
    return load_settings(demo[0] / "thumbwheel.toml", {})


@pytest.fixture
def demo_store(settings: Settings) -> Iterator[Engine]:
    store = open_store(settings.store)
    yield store
    store.dispose()


def test_the_night_makes_the_served_answers_better(demo: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = demo
    assert json.loads((directory / "summary.json").read_text()) == summary
    before, after = (
        {key: summary[key][when] for key in summary if isinstance(summary[key], dict)} for when in ("before", "after")
    )
    assert 0.55 <= before["preference_accuracy"] <= 0.80
    assert before["fact_accuracy"] >= 0.97
    assert after["preference_accuracy"] - before["preference_accuracy"] >= 0.15
    assert after["median_length_tokens"] <= (1 - 0.38) * before["median_length_tokens"]
    assert after["apology_rate"] <= (1 - 0.61) * before["apology_rate"]
    assert after["fact_accuracy"] >= before["fact_accuracy"] - 0.01
    assert after["thumbs_up_rate"] > before["thumbs_up_rate"]


def test_the_swap_costs_no_request(demo: tuple[Path, dict[str, Any]], demo_store: Engine) -> None:
    summary = demo[1]
    assert (summary["failed_requests"], summary["gate"], summary["adapter"]) == (0, "pass", "v000001")
    assert summary["requests_during_the_night"] > 20
    adapter = registry.get_adapter(demo_store, summary["adapter"])
    assert adapter.state == "live"
    assert {"snapshot", "settings", "code", "verdict"} <= set(adapter.manifest)


def test_the_run_leaves_a_report_and_every_stage(demo: tuple[Path, dict[str, Any]], demo_store: Engine) -> None:
    run = list_runs(demo_store)[0]
    assert (run.trigger, run.state) == ("clock", "done")
    assert len(run_stages(demo_store, run.run_id)) == 5
    assert "<svg" in (demo[0] / "runs" / run.run_id / "report.html").read_text()


def flip_votes(honest: Path, flipped: Path) -> None:
    """The same rows with every label turned around, and the class weights that this asks for."""
    rows = pq.read_table(honest)
    labels = pc.invert(rows["label"])
    desirable = pc.sum(labels).as_py()
    weights = class_weights(desirable, len(rows) - desirable, "balance", "balance")
    weight = pc.if_else(labels, weights[0], weights[1])
    rows = rows.set_column(rows.schema.get_field_index("label"), "label", labels)
    pq.write_table(rows.set_column(rows.schema.get_field_index("weight"), "weight", weight.cast(pa.float64())), flipped)


@pytest.fixture
def flipped(
    demo: tuple[Path, dict[str, Any]], settings: Settings, engine: RealEngine, tmp_path: Path
) -> Iterator[Path]:
    """An adapter trained for one of the demo's epochs, on the same votes turned around, and loaded into the engine."""
    (snapshot,) = (demo[0] / "snapshots").iterdir()
    flip_votes(snapshot / "train.parquet", tmp_path / "train.parquet")
    adapter = tmp_path / "adapter"
    shorter = settings.train.model_copy(update={"num_train_epochs": 1})
    train(shorter, tmp_path / "train.parquet", settings.engine.model, adapter)
    Replica(engine.url).load("support@flipped", adapter)
    yield adapter
    Replica(engine.url).unload("support@flipped")


def test_flipped_votes_make_it_worse_and_the_gate_refuses(
    demo: tuple[Path, dict[str, Any]], settings: Settings, engine: RealEngine, flipped: Path
) -> None:
    async def served(model: str) -> dict[str, float]:
        figures, answers = await measure.measure_served(engine.url + "/v1", model=model, count=216, quiet=True)
        assert answers.failures == []
        return figures | {"mean_length_words": statistics.fmean(len(reply.split()) for reply in answers.replies)}

    pairs = demo[0] / "pairs.jsonl"
    base, worse = asyncio.run(served(engine.base_name)), asyncio.run(served("support@flipped"))
    assert measure.score_pairs(measure.MODEL_DIR, flipped, pairs) < demo[1]["preference_accuracy"]["before"]
    # The mean, for the median of the base's answers is that of a rambling one already.
    assert worse["mean_length_words"] > base["mean_length_words"]
    assert worse["apology_rate"] > base["apology_rate"]
    assert worse["thumbs_up_rate"] < base["thumbs_up_rate"]

    (snapshot,) = (demo[0] / "snapshots").iterdir()
    verdict: GateResult = run_gate(
        settings.gate,
        settings.train,
        base_model=settings.engine.model,
        candidate=flipped,
        live=None,
        held_out=snapshot / "held_out.parquet",
        engine=EngineProbe(engine.url, "support@flipped", engine.base_name),
    )
    assert verdict.verdict == "fail"
    assert next(check for check in verdict.checks if check.name.startswith("preference")).verdict == "fail"
