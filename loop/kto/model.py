"""The base model, its LoRA adapters, and the reference: one model in memory, whose adapter is on or off."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loop.kto.artifacts import ADAPTER_CONFIG
from loop.kto.attention import PACKED_ATTENTION
from loop.kto.layers import replace_layers, speed_up_lora
from loop.memory import keep_freed_memory
from loop.settings import TrainSettings

Quantization = Literal["nf4", "none"]
logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


def load_tokenizer(model_dir: Path) -> Any:
    """The model's own tokenizer. Raises ValueError where there is no model."""
    _check_model_dir(model_dir)
    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def load_base(model_dir: Path, quantization: Quantization, dtype: str) -> Any:
    """The base model on the accelerator where there is one, frozen, with dropout off and attention over packs.

    NF4 is bitsandbytes' with double quantisation, computing in `dtype`. A model whose attention cannot be packed keeps
    its own, with a warning: its rows are padded. Raises ValueError for a folder without a model.
    """
    _check_model_dir(model_dir)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    torch_dtype = getattr(torch, dtype)
    arguments: dict[str, Any] = {"dtype": torch_dtype, "device_map": {"": device}}
    if quantization == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
        )
    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, **arguments)
    if why := _why_unpackable(model):
        logger.warning(
            "model %s: %s, so rows are padded: slower, with the same numbers",
            model_dir,
            why,
            extra={"action": "attention_not_packed"},
        )
    else:
        model.set_attn_implementation(PACKED_ATTENTION)
    prepare(model)
    return model


def prepare(model: nn.Module) -> None:
    """Freeze a base model, switch its dropout off and exchange some layers, for training as for scoring.

    The model stays in training mode for good: bitsandbytes changes 4-bit weights for another, less exact kernel when
    it meets them in evaluation mode on some CPUs, and then reference and policy would be two different models.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    model.train()
    replace_layers(model)  # which tries layers out


def attach_lora(base: Any, settings: TrainSettings) -> PeftModel:
    """A new adapter on the base, float32, B = 0, A from `settings.seed`."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as exc:
        raise ValueError(f"lora_target_modules = {settings.lora_target_modules!r}: {exc}") from exc
    speed_up_lora(model)
    head = model.get_base_model().get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError("lora_target_modules includes the output head: its adapter would not be trained; leave it out")
    if settings.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_adapters(base: Any, adapters: Mapping[str, Path]) -> Any:
    """The base with every adapter of `{name: folder}` attached, for scoring; the base itself where there is none."""
    model = base
    for name, folder in adapters.items():
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(f"adapter {folder}: no {ADAPTER_CONFIG} there; expected a folder in PEFT's layout")
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    prepare(model)
    speed_up_lora(model)
    return model


@contextlib.contextmanager
def scoring(model: Any, adapter: str | None) -> Iterator[None]:
    """No gradient, LoRA dropout off, and the named adapter on; with None the reference: every adapter off."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if isinstance(model, PeftModel):
            if adapter is None:
                stack.enter_context(model.disable_adapter())
            elif model.active_adapters != [adapter]:
                model.set_adapter(adapter)
            stack.enter_context(_lora_dropout_off(model))
        elif adapter is not None:
            raise ValueError(f"adapter {adapter!r}: the model has none attached")
        yield


@contextlib.contextmanager
def _lora_dropout_off(model: nn.Module) -> Iterator[None]:
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for module in dropouts:
            module.train()


def _check_model_dir(model_dir: Path) -> None:
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"model {model_dir}: no config.json there; expected a model in Transformers' layout")


def _why_unpackable(model: Any) -> str | None:
    """What packed attention does not know of this model; None where it knows all."""
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        return f"the attention of {config.model_type} cannot be exchanged"
    if others := set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS:
        return f"{config.model_type} has layers that are no plain attention ({', '.join(sorted(others))})"
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} carries state from token to token by other means than attention"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return f"the attention of {config.model_type} has sinks"
    return None
