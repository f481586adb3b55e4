"""The folders of a run, and how files get into them: by a rename, whole or not at all. Knows no torch.

While a run goes on its files are in `<out>.partial`; the finished folder is renamed to `<out>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def partial_dir(out: Path) -> Path:
    """Where a run that is to become `out` keeps its files: `metrics.jsonl`, checkpoints, reference log-probs."""
    return out.with_name(out.name + ".partial")


def finished(out: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the run that made `out`, if these were its inputs; None where `out` is still to be made."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = out / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{out} exists and is not an adapter of this command: choose another folder")
    _check_same(out, json.loads(manifest.read_text()), inputs)
    shutil.rmtree(partial_dir(out), ignore_errors=True)
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def open_work(out: Path, inputs: dict[str, Any]) -> Path:
    """The run's work folder, new or as a killed run with the same inputs left it."""
    work = partial_dir(out)
    work.mkdir(parents=True, exist_ok=True)
    if (work / "run.json").exists():
        _check_same(work, json.loads((work / "run.json").read_text()), inputs)
    else:
        write_json(work / "run.json", inputs)
    return work


def _check_same(folder: Path, found: dict[str, Any], inputs: dict[str, Any]) -> None:
    differ = [key for key in ("data_sha256", "base_sha256") if found.get(key) != inputs[key]]
    before = found.get("settings", {})
    differ += [
        f"{key} ({before.get(key)!r} → {value!r})"
        for key, value in inputs["settings"].items()
        if before.get(key) != value
    ]
    if differ:
        raise ValueError(f"{folder} is another run: {', '.join(differ)}; choose another folder, or delete this one")


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
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"model {model_dir}: no config.json there; expected a model in Transformers' layout")
    kinds = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
    return hash_files([path for path in model_dir.iterdir() if path.suffix in kinds])


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
