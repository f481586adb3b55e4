"""The model card beside an adapter: what it is, what it was made of, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, kto, thumbwheel]
---
# An adapter trained on users' thumbs

LoRA weights for `{base}`, trained by Thumbwheel with {objective}
on unpaired feedback: {rows} rated answers, {steps} steps.

| | |
| --- | --- |
{figures}

Data SHA-256 `{data_sha256}`, base SHA-256 `{base_sha256}`. All settings and versions are in `manifest.json`, the run's
course in `metrics.jsonl`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")
```

Whether it is better than what it was to replace, the gate decides: see the report of its run.
"""
_SETTINGS = ("beta", "learning_rate", "num_train_epochs", "lora_r", "lora_alpha", "quantization", "dtype", "seed")
_OBJECTIVES = {
    "kto": "KTO ([arXiv 2402.01306](https://arxiv.org/abs/2402.01306))",
    "apo_zero_unpaired": "APO-zero ([arXiv 2408.06266](https://arxiv.org/abs/2408.06266))",
}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown in the form of the Hugging Face Hub, from a run's manifest."""
    settings, metrics = manifest["settings"], manifest["metrics"]
    figures = {"loss, mean over the run": f"{metrics['loss']:.4f}", "kl (z0), mean": f"{metrics['kl']:.4f} nats"}
    figures |= {f"`{name}`": settings[name] for name in _SETTINGS}
    return _CARD.format(
        base=manifest["base"],
        objective=_OBJECTIVES[settings["objective"]],
        rows=metrics["rows"],
        steps=metrics["steps"],
        figures="\n".join(f"| {name} | {value} |" for name, value in figures.items()),
        data_sha256=manifest["data_sha256"],
        base_sha256=manifest["base_sha256"],
    )
