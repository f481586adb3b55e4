from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loop.gate.benchmarks import Outcome, benchmark_check, run_benchmarks
from loop.gate.run import run_gate
from loop.gate.scoring import score
from loop.kto.model import load_adapters, load_base, load_tokenizer
from loop.kto.template import encode
from loop.settings import GateSettings
from tests.gate.conftest import World
from tests.gate.tiny import BAD, GOOD, TRAIN

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: documents.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
{more}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks whose right answer is what honest votes liked, `manners`, or what they did not, `rudeness`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "manners.yaml").write_text(TASK.format(name="manners", more=""))
    (made / "hopeless.yaml").write_text(TASK.format(name="hopeless", more="  chance: 1.0"))
    questions = [" ".join(f"w{(n * 7 + k * 3) % 40}" for k in range(5)) for n in range(40)]
    documents = [{"question": q, "choices": [GOOD, BAD], "answer": 0} for q in questions]
    (made / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return made


def settings_of(folder: Path, *tasks: str, **changes: Any) -> GateSettings:
    return GateSettings(
        benchmark_tasks=list(tasks), benchmark_dir=folder, bootstrap_samples=200, max_kl_to_base=50, **changes
    )


def outcome(candidate: list[int], live: list[int], chance: float = 0.25) -> Outcome:
    return Outcome("task", "acc", np.asarray(candidate, float), np.asarray(live, float), chance)


@pytest.mark.parametrize(
    ("candidate", "live", "chance", "verdict"),
    [
        ([1] * 90 + [0] * 10, [1] * 90 + [0] * 10, 0.25, "pass"),
        ([1] * 88 + [0] * 12, [1] * 90 + [0] * 10, 0.25, "pass"),  # a drop of 0.02 is allowed
        ([1] * 87 + [0] * 13, [1] * 90 + [0] * 10, 0.25, "fail"),
        ([0] * 100, [1] * 26 + [0] * 74, 0.25, "not_counted"),  # live does not beat chance
        ([0] * 100, [1] * 60 + [0] * 40, 0.25, "fail"),
        ([1], [1], 0.25, "insufficient"),  # one document tells nothing
    ],
)
def test_a_regression_counts_where_live_beats_chance(
    candidate: list[int], live: list[int], chance: float, verdict: str
) -> None:
    assert benchmark_check(outcome(candidate, live, chance), GateSettings(bootstrap_samples=400)).verdict == verdict


def test_local_tasks_run_on_the_model_in_memory(world: World, folder: Path) -> None:
    adapters = {"candidate": world.honest, "live": world.flipped}
    model: Any = load_adapters(load_base(world.base, "none", "float32"), adapters)
    tokenizer = load_tokenizer(world.base)
    settings = settings_of(folder, "manners", benchmark_limit=30)
    (found,) = run_benchmarks(model, tokenizer, "live", settings)
    assert (found.task, found.metric, found.chance, len(found.live)) == ("manners", "acc", 0.5, 30)

    # The same by hand, through the packed attention that is in place again.
    prompted = []
    for line in (folder / "documents.jsonl").read_text().splitlines()[:30]:
        document = json.loads(line)
        for answer in document["choices"]:
            prompt, ids = encode(tokenizer, [{"role": "user", "content": document["question"]}], answer, None)
            prompted.append((prompt, ids[:-1], None))  # lm-eval ends no answer
    for adapter, seen in (("candidate", found.candidate), ("live", found.live)):
        sums = score(model, adapter, prompted).sums.reshape(30, 2)
        assert seen.tolist() == (sums[:, 0] > sums[:, 1]).tolist()
    assert found.candidate.mean() > found.live.mean()


def test_a_lost_skill_fails_the_gate(world: World, folder: Path) -> None:
    settings = settings_of(folder, "manners", "hopeless")
    result = run_gate(
        settings,
        TRAIN,
        base_model=world.base,
        candidate=world.flipped,
        live=world.honest,
        held_out=world.held_out,
        engine=None,
        serving_asked=False,
    )
    verdicts = {check.name: check.verdict for check in result.checks}
    assert verdicts["benchmark:manners"] == "fail"
    assert verdicts["benchmark:hopeless"] == "not_counted"


def test_a_task_that_cannot_be_run_is_insufficient(world: World, folder: Path) -> None:
    (folder / "broken.yaml").write_text(TASK.format(name="broken", more="").replace("documents", "no_such_file"))
    result = run_gate(
        settings_of(folder, "broken"),
        TRAIN,
        base_model=world.base,
        candidate=world.honest,
        live=None,
        held_out=world.held_out,
        engine=None,
        serving_asked=False,
    )
    assert result.verdict == "insufficient"
    assert {c.name: c.verdict for c in result.checks}["benchmark:broken"] == "insufficient"
