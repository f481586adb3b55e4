"""A tiny chat model with adapters, made once: 2 layers, 60 words, on disk as vLLM and the trainer would find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loop.kto.model import attach_lora, load_base
from loop.settings import TrainSettings

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [f"w{index}" for index in range(40)] + "sorry short yes no red blue green one two three".split()
TRAIN = TrainSettings(lora_r=4, lora_alpha=8.0, quantization="none", max_length=128)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    special = ["<unk>", "</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    return folder


def train_adapter(base_model: Path, folder: Path, rows: list[tuple[list[int], list[int], bool]], steps: int) -> Path:
    """An adapter that makes the `True` completions likelier and the others less: plain gradient steps, no KTO."""
    from loop.kto.batch import policy_logps
    from loop.kto.rows import Row

    model: Any = attach_lora(load_base(base_model, "none", "float32"), TRAIN)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    batch = [Row(str(i), prompt, answer, up, 1.0, str(i)) for i, (prompt, answer, up) in enumerate(rows)]
    sign = torch.tensor([1.0 if up else -1.0 for _, _, up in rows])
    with torch.no_grad():
        start = policy_logps(model, batch)
    for _ in range(steps):
        gain = sign * (policy_logps(model, batch) - start)
        loss = -torch.nn.functional.logsigmoid(gain).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder
