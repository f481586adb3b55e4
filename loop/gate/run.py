"""The gate: score a candidate and the live adapter on the same held-out votes, and decide. Reads downward.

A check that cannot be computed is `insufficient`; nothing here turns an error into a pass. Errors of the core (files,
model, log-probs that are not finite) are raised: then there is no verdict, which is no pass either.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loop.gate import probe as engine_probe
from loop.gate.benchmarks import benchmark_check, run_benchmarks
from loop.gate.bootstrap import F64, cluster_bootstrap, means
from loop.gate.inputs import Inputs, choose_probes, read_inputs
from loop.gate.preference import Ratios, preference_checks, reference_point
from loop.gate.probe import Probe, ProbeError
from loop.gate.scoring import Scores, score
from loop.gate.serving import length_check, manner, mean_over_tokens, skew_check
from loop.gate.verdict import Check, Verdict, decide, must_be_at_most, uncomputed
from loop.kto.divergence import kl_to_base
from loop.kto.model import load_adapters, load_base, load_tokenizer
from loop.kto.template import read_chat_template
from loop.settings import GateSettings, TrainSettings

log = logging.getLogger("thumbwheel.gate")
Progress = Callable[[str], None]

SERVING_CHECKS = {
    "length_ratio": "Median reply length, candidate / live",
    "serve_skew": "Serve skew: mean gap, engine to trainer",
}
MIN_ANSWERED = 8
"""Fewest answered probe prompts that a figure is drawn from, and no less than half of those asked."""


@dataclass(frozen=True)
class EngineProbe:
    """A running engine in which candidate and live are loaded under these names."""

    url: str
    candidate: str
    live: str
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class GateResult:
    """The verdict and what it rests on."""

    verdict: Verdict
    checks: list[Check]
    figures: dict[str, Any]
    arrays: dict[str, F64] = field(repr=False)
    """Figures of single rows and tokens, for the report's plots; not in the JSON."""

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "checks": [asdict(check) for check in self.checks], "figures": self.figures}


def run_gate(
    settings: GateSettings,
    train: TrainSettings,
    *,
    base_model: Path,
    candidate: Path,
    live: Path | None,
    held_out: Path,
    engine: EngineProbe | None,
    serving_asked: bool = True,
    progress: Progress = log.info,
) -> GateResult:
    """Judge the adapter `candidate` against `live` (None: the base model) on the rows of the file `held_out`.

    `train` is what the candidate was trained with: its β, chat template, longest row, dtype and quantisation. Without
    an `engine` the checks on serving are `insufficient`, unless they are not asked for.
    Raises ValueError for a model, an adapter or rows that cannot be read, FloatingPointError for log-probs that are not
    finite.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(base_model)
    chat_template = read_chat_template(train.chat_template)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    inputs, counts = read_inputs(held_out, tokenizer, chat_template, train)

    # --- preference: one model in memory, on the base as it is served
    progress(f"scoring {len(inputs.rows)} held-out rows")
    adapters = {"candidate": candidate} | ({} if live is None else {"live": live})
    model = load_adapters(load_base(base_model, "none", train.dtype), adapters)
    base = score(model, None, inputs.prompted)
    mine = score(model, "candidate", inputs.prompted)
    ratios = ratios_of(mine, base)
    live_ratios = Ratios.of_base(len(inputs.rows)) if live is None else None
    if live_ratios is None:
        live_ratios = ratios_of(score(model, "live", inputs.prompted), base)
    checks = preference_checks(ratios, live_ratios, inputs.held_out, settings)

    # --- behaviour on held-out answers, and where it is served
    progress("divergence from the base")
    divergence = kl_to_base(model, "candidate", [(r.prompt_ids, r.completion_ids) for r in inputs.rows])
    checks.append(_kl_check(divergence, inputs, settings))
    serving_checks, serving_figures, arrays = _serving(
        model, tokenizer, inputs, engine if serving_asked else None, serving_asked, settings, progress
    )
    checks += serving_checks

    # --- benchmarks
    checks += _benchmarks(model, tokenizer, None if live is None else "live", settings, progress)

    # --- the same adapter on the base that it was trained on
    del model
    gc.collect()
    checks.append(_quantization_check(mine, inputs, base_model, candidate, settings, train, progress))

    figures = {
        **counts,
        "beta": train.beta,
        "z0": {"candidate": _z0(ratios), "live": _z0(live_ratios)},
        "nats_per_token": _nats_per_token({"candidate": mine, "base": base}, inputs),
        "serving": serving_figures,
        "seconds": round(time.monotonic() - started, 2),
    }
    arrays |= {
        "desirable": inputs.held_out.desirable.astype(np.float64),
        "reward": train.beta * ratios.matched,
        "live_reward": train.beta * live_ratios.matched,
        "kl": divergence,
    }
    return GateResult(decide(checks), checks, figures, arrays)


def ratios_of(policy: Scores, base: Scores) -> Ratios:
    return Ratios(policy.sums - base.sums, policy.mismatched - base.mismatched)


def _kl_check(divergence: F64, inputs: Inputs, settings: GateSettings) -> Check:
    name, title = "kl_to_base", "KL to the base, a held-out answer"
    if not inputs.rows:
        return uncomputed(name, title, "no held-out rows", settings.max_kl_to_base)
    (found,) = cluster_bootstrap(
        inputs.held_out.clusters,
        means(divergence[:, None], inputs.held_out.weight),
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    return must_be_at_most(name, title, found, settings.max_kl_to_base, unit="nats")


def _serving(
    model: Any,
    tokenizer: Any,
    inputs: Inputs,
    engine: EngineProbe | None,
    is_asked: bool,
    settings: GateSettings,
    progress: Progress,
) -> tuple[list[Check], dict[str, Any], dict[str, F64]]:
    """Length and skew checks, figures on how the answers read, and arrays for the report."""
    if not is_asked:
        text = "checks on serving are not asked for"
        return [Check(name, title, "not_asked", text=text) for name, title in SERVING_CHECKS.items()], {}, {}
    if engine is None:
        return _no_serving("no engine serves the candidate"), {}, {}
    prompts = choose_probes(inputs.rows, settings.probe_prompts)
    progress(f"probing the engine with {len(prompts)} prompts")
    try:
        answered = _ask(engine, prompts, settings)
    except ProbeError as exc:
        return _no_serving(str(exc)), {}, {}
    probes = {"candidate": [a[1] for a in answered], "live": [a[2] for a in answered]}
    trainer = score(model, "candidate", [(prompt, mine.token_ids, None) for prompt, mine, _ in answered])
    skew, gaps = skew_check(probes["candidate"], trainer.tokens, settings)
    figures: dict[str, Any] = {
        who: manner([tokenizer.decode(p.token_ids, skip_special_tokens=True) for p in found], found)
        for who, found in probes.items()
    }
    figures |= {"probe_prompts": len(prompts), "answered": len(answered), "largest_skew_nats": float(gaps.max())}
    arrays = {
        "candidate_lengths": np.asarray([len(p.token_ids) for p in probes["candidate"]], dtype=np.float64),
        "live_lengths": np.asarray([len(p.token_ids) for p in probes["live"]], dtype=np.float64),
        "skew": gaps,
    }
    return [length_check(probes["candidate"], probes["live"], settings), skew], figures, arrays


def _ask(engine: EngineProbe, prompts: list[list[int]], settings: GateSettings) -> list[tuple[list[int], Probe, Probe]]:
    """Prompt, the candidate's answer and live's, where the engine gave both. Raises ProbeError for too few."""
    answers = [
        engine_probe.generate(engine.url, name, prompts, settings.probe_max_tokens, engine.api_key)
        for name in (engine.candidate, engine.live)
    ]
    answered = [
        (prompt, mine, other)
        for prompt, mine, other in zip(prompts, *answers, strict=True)
        if mine is not None and other is not None and mine.token_ids
    ]
    if len(answered) < min(settings.probe_prompts, max(MIN_ANSWERED, len(prompts) // 2)):
        raise ProbeError(f"{len(answered)} of {len(prompts)} probe prompts were answered")
    return answered


def _no_serving(why: str) -> list[Check]:
    return [uncomputed(name, title, why) for name, title in SERVING_CHECKS.items()]


def _benchmarks(
    model: Any, tokenizer: Any, live: str | None, settings: GateSettings, progress: Progress
) -> list[Check]:
    if not settings.benchmark_tasks:
        return []
    progress(f"benchmarks: {', '.join(settings.benchmark_tasks)}")
    try:
        return [benchmark_check(outcome, settings) for outcome in run_benchmarks(model, tokenizer, live, settings)]
    except Exception as exc:  # tasks are other people's code: whatever they raise, the check was not made
        log.exception("benchmarks failed", extra={"action": "benchmarks_failed"})
        names = settings.benchmark_tasks
        return [uncomputed(f"benchmark:{name}", f"Benchmark {name}", f"{type(exc).__name__}: {exc}") for name in names]


def _quantization_check(
    served: Scores,
    inputs: Inputs,
    base_model: Path,
    candidate: Path,
    settings: GateSettings,
    train: TrainSettings,
    progress: Progress,
) -> Check:
    """The candidate's token log-probs on the quantised base of its training against those on the base as served."""
    name, title, most = (
        "quantization_shift",
        "Mean gap, training's base to serving's",
        settings.max_quantization_shift_nats,
    )
    if train.quantization == "none":
        return Check(name, title, "not_asked", threshold=most, text="the candidate was trained on the base as served")
    if not inputs.rows:
        return uncomputed(name, title, "no held-out rows", most)
    progress(f"the candidate on {train.quantization}")
    model = load_adapters(load_base(base_model, train.quantization, train.dtype), {"candidate": candidate})
    trained = score(model, "candidate", [(row.prompt_ids, row.completion_ids, None) for row in inputs.rows])
    gaps = [np.abs(a - b) for a, b in zip(trained.tokens, served.tokens, strict=True)]
    found = mean_over_tokens(gaps, inputs.held_out.clusters, settings)
    return must_be_at_most(name, title, found, most, unit="nats/token")


def _z0(ratios: Ratios) -> float:
    return float(reference_point(ratios, np.ones((1, len(ratios.matched))))[0])


def _nats_per_token(scores: dict[str, Scores], inputs: Inputs) -> dict[str, Any]:
    """Mean negative log-prob a token of answers of either label: how expected they are to each model."""
    found = {}
    for who, scored in scores.items():
        for label, wanted in (("desirable", True), ("undesirable", False)):
            tokens = [t for t, is_up in zip(scored.tokens, inputs.held_out.desirable, strict=True) if is_up == wanted]
            found[f"{who}_{label}"] = -float(np.concatenate(tokens).mean()) if tokens else None
    return found
