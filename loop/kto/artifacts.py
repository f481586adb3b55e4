"""What a training run leaves on disk: the adapter in PEFT's layout, and checkpoints to go on from."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from loop.kto.card import model_card
from loop.kto.folders import make_empty, publish, write_json
from loop.kto.progress import METRICS_LOG, TENSORBOARD

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """The adapter's two files in PEFT's layout, into a folder that is published afterwards.

    The config names the base by `base_name` only: a path of this machine means nothing where the adapter is served.
    """
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    if float(config["lora_alpha"]).is_integer():
        config["lora_alpha"] = int(config["lora_alpha"])  # vLLM declares it so
    save_file(_weights(model), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, config)


def publish_run(model: PeftModel, manifest: dict[str, Any], work: Path, out: Path) -> None:
    """The adapter with its card, manifest, figures and logs as `out`, all at once; then the work folder goes."""
    fresh = make_empty(work / "adapter")
    write_adapter(model, fresh, manifest["base"])
    shutil.copy(work / METRICS_LOG, fresh)
    if (work / TENSORBOARD).exists():
        shutil.copytree(work / TENSORBOARD, fresh / TENSORBOARD)
    (fresh / "README.md").write_text(model_card(manifest))
    write_json(fresh / "metrics.json", manifest["metrics"])
    write_json(fresh / "manifest.json", manifest | {"versions": versions()})
    publish(fresh, out)
    shutil.rmtree(work)


def save_checkpoint(model: PeftModel, state: dict[str, Any], work: Path, step: int) -> None:
    """`checkpoint-<step>` in the work folder: the adapter and `state`; older ones go once it is there."""
    target = work / f"checkpoint-{step:08d}"
    fresh = make_empty(work / "checkpoint.tmp")
    save_file(_weights(model), fresh / ADAPTER_WEIGHTS)
    torch.save(state, fresh / "state.pt")
    publish(fresh, target)
    for other in work.glob("checkpoint-*"):
        if other != target:
            shutil.rmtree(other)


def load_checkpoint(model: PeftModel, work: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, its adapter put into the model; None where there is none."""
    folders = sorted(work.glob("checkpoint-*"))
    if not folders:
        return None
    set_peft_model_state_dict(model, load_file(folders[-1] / ADAPTER_WEIGHTS))
    state: dict[str, Any] = torch.load(folders[-1] / "state.pt", weights_only=True)
    return state


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    found = {}
    for package in ("thumbwheel", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _weights(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
