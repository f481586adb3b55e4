"""What a training run leaves on disk: the adapter in PEFT's layout, and checkpoints to go on from."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from loop.kto.card import model_card
from loop.kto.folders import make_empty, publish, write_json
from loop.kto.progress import METRICS_LOG
from loop.kto.ranks import Ranks
from loop.kto.state import State, adapter_weights
from loop.kto.trackers import TENSORBOARD

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
    save_file(adapter_weights(model), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
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


def save_checkpoint(model: PeftModel, optimiser: torch.optim.Optimizer, state: State, work: Path, ranks: Ranks) -> None:
    """`checkpoint-<step>` in the work folder, by the first process; older ones go once it is there."""
    random = ranks.gather(_random_state())
    if not ranks.is_first:
        return
    target = work / f"checkpoint-{state.step:08d}"
    fresh = make_empty(work / "checkpoint.tmp")
    save_file(adapter_weights(model), fresh / ADAPTER_WEIGHTS)
    torch.save({"state": vars(state), "optimiser": optimiser.state_dict(), "random": random}, fresh / "state.pt")
    publish(fresh, target)
    for other in work.glob("checkpoint-*"):
        if other != target:
            shutil.rmtree(other)


def load_checkpoint(model: PeftModel, optimiser: torch.optim.Optimizer, work: Path, ranks: Ranks) -> State:
    """The newest checkpoint's state, its adapter and optimiser put in place; a new state where there is none."""
    folders = sorted(work.glob("checkpoint-*"))
    if not folders:
        return State()
    set_peft_model_state_dict(model, load_file(folders[-1] / ADAPTER_WEIGHTS))
    kept = torch.load(folders[-1] / "state.pt", weights_only=True)
    optimiser.load_state_dict(kept["optimiser"])
    _set_random_state(kept["random"][ranks.index])
    return State(**kept["state"])


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    found = {}
    for package in ("thumbwheel", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
