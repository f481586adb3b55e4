import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from loop.kto.rows import Pair, Row
from loop.kto.score import auc, balanced_accuracy, score_file, score_pairs, score_rows
from loop.kto.train import train
from loop.settings import TrainSettings

SHARED = Path("../shared")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data is not beside the repository")


def test_auc_counts_ties_half_by_hand() -> None:
    desirable = np.array([True, True, False, False])
    assert auc(np.array([2.0, 1.0, 1.0, 0.0]), desirable) == (1 + 1 + 0.5 + 1) / 4
    assert auc(np.zeros(4), desirable) == 0.5
    assert auc(np.zeros(2), np.array([True, True])) is None


def test_balanced_accuracy_is_against_z0_by_hand() -> None:
    desirable = np.array([True, True, True, False])
    assert balanced_accuracy(np.array([3.0, 1.0, 0.5, 0.0]), desirable, z0=1.0) == ((1 + 0.5 + 0) / 3 + 1) / 2
    assert balanced_accuracy(np.zeros(2), np.array([False, False]), 0.0) is None


def test_scores_of_several_adapters_on_one_model_and_of_the_base(
    lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    model, rows = lora_model(), make_rows(6)
    model.add_adapter("live", model.peft_config["default"])  # B = 0
    candidate = score_rows(model, rows, "default")
    live = score_rows(model, rows, "live", reference=candidate)
    base = score_rows(model, rows, None)
    assert live.policy == pytest.approx(candidate.reference)
    assert base.policy == pytest.approx(candidate.reference)
    assert (base.reward == 0).all()
    assert candidate.reward != pytest.approx(0.0, abs=1e-3)
    assert candidate.tokens.tolist() == [len(row.completion_ids) for row in rows]
    assert candidate.policy == pytest.approx([tokens.sum() for tokens in candidate.policy_tokens])
    assert candidate.z0 >= 0


def test_pairs_of_equal_answers_tie_and_ties_count_half(lora_model: Callable[..., Any]) -> None:
    model = lora_model()
    same = Pair([1, 5, 6], [7, 8, 9, 2], [7, 8, 9, 2])
    assert score_pairs(model, [same], "default") == {
        "pairs": 1,
        "accuracy_sum": 0.5,
        "accuracy_mean": 0.5,
        "accuracy_reward": 0.5,
    }
    one, other = Pair([1, 5], [7, 2], [8, 9, 2]), Pair([1, 5], [8, 9, 2], [7, 2])
    scores = score_pairs(model, [one, other], None)
    assert scores == {"pairs": 2, "accuracy_sum": 0.5, "accuracy_mean": 0.5}


def head(source: Path, target: Path, count: int, longest: int) -> Path:
    lines = [line for line in source.read_text().splitlines() if len(line) < longest]
    target.write_text("\n".join(lines[:count]) + "\n")
    return target


@needs_shared
def test_real_votes_train_and_score_on_a_real_model(tmp_path: Path) -> None:
    model_dir = SHARED / "models/stories260K"
    rows = head(SHARED / "data/oasst/oasst_thumbs_kto.jsonl", tmp_path / "rows.jsonl", 24, 900)
    pairs = head(SHARED / "data/pairs/hhh_pairs.jsonl", tmp_path / "pairs.jsonl", 24, 900)
    settings = TrainSettings(chat_template=TEMPLATE, max_length=256, truncation="keep_end", num_train_epochs=2)
    with (tmp_path / "console").open("w") as console:
        result = train(settings, rows, model_dir, tmp_path / "out", console=Console(file=console))
    assert result["rows"] + result["rows_too_long"] == 24
    paired = score_file(model_dir, pairs, tmp_path / "out", chat_template=TEMPLATE)
    assert set(paired) == {"pairs", "accuracy_sum", "accuracy_mean", "accuracy_reward"}
    scored = score_file(model_dir, rows, tmp_path / "out", chat_template=TEMPLATE)
    assert 0.5 < scored["auc"] <= 1.0  # of the rows that it was trained on
    assert scored["rows_chosen"] + scored["rows_rejected"] == 24
    json.dumps(scored | paired)


@needs_shared
def test_messages_for_a_model_without_a_template_are_refused_with_the_setting_to_use(tmp_path: Path) -> None:
    rows = head(SHARED / "data/oasst/oasst_thumbs_kto.jsonl", tmp_path / "rows.jsonl", 2, 4000)
    with pytest.raises(ValueError, match="set chat_template"):
        score_file(SHARED / "models/stories260K", rows)
