"""The probe against the real engine: what the stub promises is what vLLM does."""

from __future__ import annotations

import numpy as np
import pytest

from loop.gate.probe import ProbeError, generate
from loop.gate.scoring import score
from loop.gate.serving import skew_check
from loop.kto.model import load_base, load_tokenizer
from loop.settings import GateSettings
from tests.conftest import RealEngine


@pytest.mark.engine
def test_the_engines_log_probs_are_the_trainers(engine: RealEngine) -> None:
    tokenizer = load_tokenizer(engine.model_dir)
    asked = ["Where can I download an invoice?", "How long will a refund take?", "Do you ship abroad?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in asked
    ]
    refused = [5] * 5000
    found = generate(engine.url, engine.base_name, [*prompts, refused], 24)
    probes = [probe for probe in found if probe is not None]
    assert found[-1] is None  # longer than the engine's context
    assert len(probes) == len(prompts)
    assert all(probe.token_ids[-1] == tokenizer.eos_token_id or probe.is_cut for probe in probes)

    model = load_base(engine.model_dir, "none", "float32")
    rows = [(prompt, probe.token_ids, None) for prompt, probe in zip(prompts, probes, strict=True)]
    check, gaps = skew_check(probes, score(model, None, rows).tokens, GateSettings())
    assert check.verdict == "pass"
    assert float(np.max(gaps)) < 1e-2

    with pytest.raises(ProbeError, match="404"):
        generate(engine.url, "nobody", prompts[:1], 4)
