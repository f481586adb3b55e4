"""What a training run leaves on disk: checkpoints, the adapter, its manifest. Each appears by a rename, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target` (absent or empty), all its files on disk first."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)
    os.replace(folder, target)
    _fsync(target.parent)


def make_empty(folder: Path) -> Path:
    """The folder, made, and emptied of what a killed run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, default=_plain) + "\n")
    os.replace(temporary, path)


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def hash_model(model_dir: Path) -> str:
    """SHA-256 of everything that log-probs depend on: weights, config, tokenizer, template."""
    kinds = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
    return hash_files([path for path in model_dir.iterdir() if path.suffix in kinds])


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


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
