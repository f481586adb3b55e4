"""Models whose attention takes no packs: their rows are padded, with the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from loop.kto.batch import policy_logps
from loop.kto.divergence import kl_to_base
from loop.kto.logps import is_packed, score_all
from loop.kto.model import attach_lora, load_base
from loop.kto.pack import Prompted, pad, padded_runs
from loop.kto.rows import Row
from loop.kto.train import train
from loop.settings import TrainSettings
from tests.kto.conftest import SHAPE, VOCABULARY
from tests.kto.test_kto_logps import lora_gradients, plain_logps, relative

SETTINGS = TrainSettings(quantization="none", lora_r=4, per_device_train_batch_size=4, learning_rate=1e-2)


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    match kind:
        case "bloom":  # positions by a bias that its own attention adds
            return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **ids))
        case "gpt_oss":  # attention sinks
            return GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1))
        case "lfm2":  # convolutions between the attention layers
            return Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]))
        case "mamba":  # no attention at all
            shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
            return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, **shape, **ids))


@pytest.mark.parametrize("kind", ["bloom", "gpt_oss", "lfm2", "mamba"])
def test_it_says_so_and_scores_and_learns_as_each_row_alone(
    kind: str, tmp_path: Path, make_rows: Callable[..., list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    make_model(kind).save_pretrained(tmp_path / "model")
    targets = ["in_proj"] if kind == "mamba" else "all-linear"
    settings = SETTINGS.model_copy(update={"lora_target_modules": targets})
    policy = attach_lora(load_base(tmp_path / "model", "none", "float32"), settings)
    assert "so rows are padded" in caplog.text
    assert not is_packed(policy)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = make_rows(6)
    weights = torch.linspace(-1, 1, len(rows))
    expected = torch.stack([plain_logps(policy, row).sum() for row in rows])
    (weights * expected).sum().backward()
    wanted = lora_gradients(policy)
    found = policy_logps(policy, rows)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    (weights * found).sum().backward()
    for name, gradient in lora_gradients(policy).items():
        assert relative(gradient, wanted[name]) < 1e-4, name
    scored = score_all(policy, [Prompted(row.prompt_ids, (row.completion_ids,)) for row in rows])
    assert torch.allclose(torch.stack([score[0].double().sum() for score in scored]), expected, rtol=1e-5, atol=1e-5)
    assert (kl_to_base(policy, "default", [(row.prompt_ids, row.completion_ids) for row in rows]) > 0).all()


def test_a_whole_run_of_such_a_model(tmp_path: Path, tokenizer: Any, make_rows: Callable[..., list[Row]]) -> None:
    make_model("bloom").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for row in make_rows(12):
            record = {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "label": row.desirable}
            file.write(json.dumps(record | {"conversation_id": row.conversation}) + "\n")
    settings = SETTINGS.model_copy(update={"num_train_epochs": 12, "learning_rate": 3e-2})
    train(settings, tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["loss"] for line in lines[-3:]) < sum(line["loss"] for line in lines[:3])  # an epoch each


def test_sequences_stand_side_by_side_and_only_completions_are_scored() -> None:
    batch = pad([Prompted([5, 6, 7], ([8, 9], [10])), Prompted([4], ([3],))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 0], [4, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.scored.tolist() == [2, 3, 6, 8]
    assert batch.targets.tolist() == [8, 9, 10, 3]
    assert batch.lengths.tolist() == [2, 1, 1]


def test_runs_hold_rows_of_like_length_and_keep_to_their_positions() -> None:
    items = [Prompted([1] * size, ([2],)) for size in (9, 3, 1, 3)]
    assert list(padded_runs(items, 8)) == [[2, 1], [3], [0]]
