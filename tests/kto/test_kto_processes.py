"""A run as several processes, what it tells the tools that watch it, and the commands that start it."""

import contextlib
import io
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from loop.kto import batch
from loop.kto.folders import partial_dir
from loop.kto.rows import Row
from loop.kto.train import train
from loop.settings import TrainSettings
from services.cli import app
from tests.kto.conftest import write
from tests.ports import free_port

SETTINGS = TrainSettings(
    quantization="none",
    lora_r=4,
    learning_rate=1e-2,
    num_train_epochs=2,
    save_steps=2,
    validation_share=0.2,
    eval_steps=3,
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


FORKS = multiprocessing.get_context("forkserver")  # a process that has torch loaded, and no threads yet
FORKS.set_forkserver_preload(["loop.kto.plan", "loop.kto.validation", "loop.kto.artifacts", "bitsandbytes"])


def in_processes(
    count: int, settings: TrainSettings, data: Path, model_dir: Path, out: Path, **environment: str
) -> None:
    """`train` in `count` processes, as torchrun would start them."""
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = (settings, data, model_dir, out)
    children = [FORKS.Process(target=_rank, args=(rank, count, environment, arguments)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
    assert [child.exitcode for child in children] == [0] * count


def _rank(rank: int, count: int, environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}  # else accelerate changes the number of threads, and rounding
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    if environment.get("SCARCE_RANK") == str(rank):
        policy_and_mismatched_logps = batch.policy_and_mismatched_logps

        def scarce(model: Any, rows: list[Row], others: Any) -> Any:
            if len(rows) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return policy_and_mismatched_logps(model, rows, others)

        batch.policy_and_mismatched_logps = scarce
    train(*arguments, console=Console(file=io.StringIO()))


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path, make_rows: Callable[..., list[Row]]) -> Path:
    """29 rows: the last batch has fewer rows than the others."""
    rows = make_rows(29, seed=4, conversations=9)
    return write([replace(row, weight=0.5 + index % 3) for index, row in enumerate(rows)], tmp_path / "rows.jsonl")


def test_two_processes_train_what_one_trains(data: Path, model_dir: Path, tmp_path: Path) -> None:
    one = SETTINGS.model_copy(update={"per_device_train_batch_size": 4})
    two = SETTINGS.model_copy(update={"per_device_train_batch_size": 2})
    in_processes(1, one, data, model_dir, tmp_path / "one")
    in_processes(2, two, data, model_dir, tmp_path / "two")
    for ours, theirs in zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"rows_per_s"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (name, ours["step"])
    wanted = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "two" / "adapter_model.safetensors").items():
        assert torch.allclose(weight, wanted[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("label", [True, False])
def test_processes_with_rows_of_one_label_alone_and_one_without_any_row(
    label: bool, model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]]
) -> None:
    data = write(make_rows(1, label=label), tmp_path / "rows.jsonl")
    settings = SETTINGS.model_copy(update={"validation_share": 0.0, "num_train_epochs": 3})
    in_processes(2, settings, data, model_dir, tmp_path / "out")
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3]


def test_where_one_process_runs_out_of_memory_all_of_them_halve(data: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"per_device_train_batch_size": 2})
    in_processes(2, settings, data, model_dir, tmp_path / "enough")
    in_processes(2, settings, data, model_dir, tmp_path / "scarce", SCARCE_RANK="1")
    for ours, theirs in zip(metrics_of(tmp_path / "scarce"), metrics_of(tmp_path / "enough"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)


def test_a_command_killed_takes_its_processes_with_it_and_another_ends_as_an_unbroken_run(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    update = {"per_device_train_batch_size": 2, "processes": 2, "lora_dropout": 0.2, "num_train_epochs": 20}
    settings = SETTINGS.model_copy(update=update)
    in_processes(2, settings, data, model_dir, tmp_path / "whole")
    broken, settings_toml = tmp_path / "broken", tmp_path / "thumbwheel.toml"
    dumped = settings.model_dump(mode="json", exclude_unset=True)
    settings_toml.write_text("[train]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in dumped.items()))
    arguments = ["--settings", settings_toml, "--data", data, "--model", model_dir, "--out", broken]
    command = [sys.executable, "-m", "services.cli", "train", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    while not list(partial_dir(broken).glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=180)  # until the last of its processes has closed its output
    assert not broken.exists()
    in_processes(2, settings, data, model_dir, broken)
    wanted = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for name, weight in load_file(broken / "adapter_model.safetensors").items():
        assert torch.allclose(weight, wanted[name], rtol=0, atol=1e-6), name
    assert [line["step"] for line in metrics_of(broken)] == [line["step"] for line in metrics_of(tmp_path / "whole")]


def test_tensorboard_gets_the_metrics_where_it_is_asked_for(data: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"report_to": "tensorboard"})
    in_processes(1, settings, data, model_dir, tmp_path / "out")
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


def test_wandb_gets_the_metrics_where_it_is_asked_for(data: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"report_to": "wandb"})
    runs = tmp_path / "wandb"
    runs.mkdir()
    in_processes(
        1,
        settings,
        data,
        model_dir,
        tmp_path / "out",
        WANDB_MODE="offline",
        WANDB_DIR=str(runs),
        WANDB__SERVICE_WAIT="180",
    )
    (kept,) = runs.glob("wandb/offline-run-*/run-*.wandb")
    for line in metrics_of(tmp_path / "out"):  # protocol buffers, with the values in JSON
        assert json.dumps(line["loss"]).encode() in kept.read_bytes()


def test_mlflow_gets_the_metrics_where_it_is_asked_for(data: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"report_to": "mlflow"})
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    in_processes(1, settings, data, model_dir, tmp_path / "out", MLFLOW_TRACKING_URI=uri)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        found = database.execute("SELECT value FROM metrics WHERE key = 'train/loss' ORDER BY step").fetchall()
    assert [value for (value,) in found] == [line["loss"] for line in metrics_of(tmp_path / "out")]


def test_a_tool_that_is_not_installed_is_named_before_anything_is_trained(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = SETTINGS.model_copy(update={"report_to": "wandb"})
    with pytest.raises(ValueError, match=r"report_to = 'wandb': .* pip install wandb"):
        train(settings, data, model_dir, tmp_path / "out", console=Console(file=io.StringIO()))


def test_the_command_takes_every_setting_as_a_flag(data: Path, model_dir: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", data, "--model", model_dir, "--out", tmp_path / "out", "--cache=" + str(tmp_path)]
    arguments += ["--quantization", "none", "--lora-r", "4", "--beta", "0.3", "--learning-rate=0.001"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 29
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert {name: settings[name] for name in ("quantization", "lora_r", "beta", "learning_rate")} == {
        "quantization": "none",
        "lora_r": 4,
        "beta": 0.3,
        "learning_rate": 0.001,
    }
    assert (tmp_path / "reference.db").exists()


def test_the_sweep_command_prints_the_best(data: Path, model_dir: Path, tmp_path: Path) -> None:
    arguments = ["sweep", "--data", data, "--model", model_dir, "--out", tmp_path / "sweep", "--betas", "0.1,0.5"]
    arguments += ["--quantization", "none", "--validation-share", "0.4"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert json.loads(done.stdout.splitlines()[-1])["best"] in ("beta-0.1-lr-0.0002", "beta-0.5-lr-0.0002")
