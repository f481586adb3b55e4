"""Does the candidate still know what live knows? Tasks of `lm-eval`, from local files, on the model in memory.

A drop counts only where live beats chance: on a task that live guesses at, a difference says nothing about knowledge
lost. Chance is the task's `metadata: {chance: 0.25}` where it gives one; else 1 / choices for multiple-choice tasks and
0 for the others (a generated answer is not hit by guessing).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loop.gate.bootstrap import F64, Interval, cluster_bootstrap, means
from loop.gate.verdict import Check
from loop.settings import GateSettings

_PREFERRED = ("acc", "exact_match", "f1", "acc_norm")


@dataclass(frozen=True)
class Outcome:
    """One task's result: the metric of each document under either model, [n], and what guessing would get."""

    task: str
    metric: str
    candidate: F64
    live: F64
    chance: float


def run_benchmarks(model: Any, tokenizer: Any, live: str | None, settings: GateSettings) -> list[Outcome]:
    """Every configured task for the adapters `candidate` and `live` (None: the base) of a model in memory.

    Raises KeyError for a task that is not there and ValueError for one without a metric between 0 and 1.
    """
    tasks = _load_tasks(settings)
    runs = {name: _evaluate(model, tokenizer, name, tasks, settings) for name in ("candidate", live)}
    outcomes = []
    for name, task in tasks.items():
        mine, other = runs["candidate"][name], runs[live][name]
        metric = _metric_of(mine[0], task)
        sign = 1.0 if task.higher_is_better().get(metric, True) else -1.0
        values = [sign * np.asarray([float(sample[metric]) for sample in samples]) for samples in (mine, other)]
        outcomes.append(Outcome(name, metric, values[0], values[1], _chance(task, mine)))
    return outcomes


def benchmark_check(outcome: Outcome, settings: GateSettings) -> Check:
    """The task's change from live to candidate, paired by document; `not_counted` where live does not beat chance."""
    columns = np.stack([outcome.candidate - outcome.live, outcome.live], axis=1)
    documents = [str(index) for index in range(len(columns))]
    change, live = cluster_bootstrap(
        documents,
        means(columns, np.ones(len(columns))),
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    most = settings.max_benchmark_regression
    figures = f"{outcome.metric}: live {_number(live)}, candidate {np.mean(outcome.candidate):.3f}"
    check = Check(
        name=f"benchmark:{outcome.task}",
        title=f"Benchmark {outcome.task}, candidate − live",
        verdict="pass",
        value=change.value,
        low=change.low,
        high=change.high,
        threshold=-most,
        rule=f"at least {-most:g}",
        text=f"{figures}, chance {outcome.chance:.3f}, {len(columns)} documents",
    )
    if live.low is None or change.value is None:
        return replace(check, verdict="insufficient", text=f"{check.text}: too few to tell")
    if live.low <= outcome.chance:
        return replace(check, verdict="not_counted", text=f"{check.text}: live does not beat chance")
    # On the figure itself, not on its bound: a hundred documents cannot show a change of 0.02, and a threshold
    # that nothing can pass would keep every candidate out. The interval is there to be looked at.
    return check if change.value >= -most else replace(check, verdict="fail")


def _load_tasks(settings: GateSettings) -> dict[str, Any]:
    """The configured tasks by name; groups and tags give all of theirs."""
    from lm_eval.tasks import TaskManager

    folder = settings.benchmark_dir.resolve() if settings.benchmark_dir is not None else None
    manager = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
    if manager is None or not set(settings.benchmark_tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # thousands of files: only where a built-in task is named
    # Data files in a task's YAML are relative to it; lm-eval takes them from the working directory.
    with contextlib.chdir(folder) if folder is not None else contextlib.nullcontext():
        tasks: dict[str, Any] = manager.load(list(settings.benchmark_tasks))["tasks"]
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return tasks


def _evaluate(
    model: Any, tokenizer: Any, adapter: str | None, tasks: dict[str, Any], settings: GateSettings
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples (one a document, with the metrics on it) of each task under one adapter."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from loop.kto.model import scoring

    with _quiet(), _plain_attention(model), scoring(model, adapter):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
        # Not `simple_evaluate`: it would list the machine's packages and drivers after each run, which takes seconds.
        results = evaluate(
            lm=harness,
            task_dict={"tasks": tasks, "groups": {}},
            limit=settings.benchmark_limit,
            apply_chat_template=bool(getattr(tokenizer, "chat_template", None)),
            bootstrap_iters=0,
            log_samples=True,
        )
    return {name: _of_first_filter(results["samples"][name]) for name in tasks}


def _of_first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One sample a document, by document: a task with several filters gives each document once for each of them."""
    first = samples[0].get("filter") if samples else None
    return sorted((s for s in samples if s.get("filter") == first), key=lambda sample: int(sample["doc_id"]))


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Padded batches, as lm-eval makes them, need Transformers' own attention instead of the packed one."""
    from loop.kto.attention import PACKED_ATTENTION
    from loop.kto.logps import causal_model
    from loop.kto.model import prepare

    causal = causal_model(model)
    causal.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")
    try:
        yield
    finally:
        causal.set_attn_implementation(PACKED_ATTENTION)
        prepare(model)  # lm-eval puts models into evaluation mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every model that it did not load itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _metric_of(sample: dict[str, Any], task: Any) -> str:
    found = [name for name in sample["metrics"] if isinstance(sample.get(name), int | float | bool)]
    preferred = [metric for metric in (*_PREFERRED, *found) if metric in found]
    if preferred:
        return str(preferred[0])
    raise ValueError(f"benchmark {task.config.task!r} has no metric that is a number for each document")


def _chance(task: Any, samples: list[dict[str, Any]]) -> float:
    metadata = task.config.metadata or {}
    if "chance" in metadata:
        return float(metadata["chance"])
    if task.OUTPUT_TYPE == "multiple_choice":
        return float(np.mean([1 / max(1, len(sample["arguments"])) for sample in samples]))
    return 0.0


def _number(interval: Interval) -> str:
    return "?" if interval.value is None else f"{interval.value:.3f}"
