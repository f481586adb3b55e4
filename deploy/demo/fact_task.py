"""Writes the demo's benchmark: does the model still know the facts? One lm-eval multiple-choice task from local files.

Each document is a question of the evaluation split and four answers that differ only in the fact, the wrong ones being
other facts' values of the same topic. `python -m deploy.demo.fact_task` makes `benchmarks/support_facts.jsonl` again.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from deploy.demo import world

FILE = Path(__file__).parent / "benchmarks" / "support_facts.jsonl"
SEED, COUNT, CHOICES = 10, 128, 4


def documents() -> list[dict[str, Any]]:
    """The task's documents, the same for everyone."""
    rng = random.Random(SEED)
    made = []
    for asked in world.questions(SEED, "eval", COUNT):
        fact, says = asked.fact, asked.fact.says[0]
        near = [other.value for other in world.facts() if other.topic == fact.topic and other.value != fact.value]
        answers = [says, *(says.replace(fact.value, value) for value in rng.sample(near, CHOICES - 1))]
        order = rng.sample(range(CHOICES), CHOICES)
        made.append({"question": asked.text, "choices": [answers[i] for i in order], "answer": order.index(0)})
    return made


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(document) + "\n" for document in documents()))
