"""Tiny random models, and rows for them; nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loop.kto.attention import PACKED_ATTENTION
from loop.kto.model import prepare
from loop.kto.rows import Row

torch.set_num_threads(1)  # the machine's cores are shared; two threads that wait for each other are slower than one

VOCABULARY = 300
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # far from uniform: a token in the wrong place has to show
}


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    model: Any
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        case "mistral":  # a window shorter than the rows
            model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7))
        case "gemma2":  # caps on scores and on logits, every other layer with a window
            model = Gemma2ForCausalLM(
                Gemma2Config(**SHAPE, sliding_window=7, final_logit_softcapping=2.0, attn_logit_softcapping=3.0)
            )
        case "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=7))
        case "granite":  # divides its logits
            model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0))
    return model


@pytest.fixture(name="make_model")
def make_model_() -> Callable[[str], Any]:
    """Makes a model as Transformers has it."""
    return make_model


@pytest.fixture
def tiny_model() -> Callable[[str], Any]:
    """Makes a model as `load_base` hands it out."""

    def make(kind: str) -> Any:
        model = make_model(kind)
        prepare(model)
        return model

    return make


def add_lora(model: Any, attention: str, dropout: float = 0.0) -> Any:
    """LoRA on all linear layers with a random B: at B = 0 the policy is the reference, and nothing is tested."""
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    policy = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.train()
    return policy


@pytest.fixture
def lora_model() -> Callable[..., Any]:
    def make(kind: str = "llama", attention: str = PACKED_ATTENTION, dropout: float = 0.0) -> Any:
        model = make_model(kind)
        prepare(model)
        return add_lora(model, attention, dropout)

    return make


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    def make(count: int, seed: int = 0, label: bool | None = None, conversations: int | None = None) -> list[Row]:
        draw = random.Random(seed)
        return [
            Row(
                row_id=f"row-{index}",
                prompt_ids=[1] + [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 12))],
                completion_ids=[draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(0, 12))] + [2],
                desirable=draw.random() < 0.5 if label is None else label,
                weight=1.0,
                conversation=str(index % (conversations or count)),
            )
            for index in range(count)
        ]

    return make


def write(rows: list[Row], path: Path) -> Path:
    """The rows as JSONL that `train` reads."""
    with path.open("w") as file:
        for row in rows:
            record = {"id": row.row_id, "conversation_id": row.conversation, "label": row.desirable}
            record |= {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "weight": row.weight}
            file.write(json.dumps(record | {"rater": row.rater}) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes as tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    bytes_as_tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_as_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_as_tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_as_tokens,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
