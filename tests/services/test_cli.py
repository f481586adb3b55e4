"""The command: flags are settings, bad input is one clear line, secrets stay masked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loop.settings import SettingsError, TrainSettings
from services.cli import _with_flags
from tests.ports import free_port


def thumbwheel(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True)


def test_every_training_setting_is_a_flag() -> None:
    section = TrainSettings(seed=7)
    changed = _with_flags(section, ["--beta", "0.3", "--learning-rate=1e-3", "--lora-target-modules", '["q_proj"]'])
    assert (changed.beta, changed.learning_rate, changed.lora_target_modules) == (0.3, 1e-3, ["q_proj"])
    assert changed.seed == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betta", "1"], "--betta: unknown flag"),
        (["--beta"], "expected a value"),
        (["--beta", "-1"], "train.beta = '-1'.*greater than 0"),
        (["--quantization", "int3"], "train.quantization = 'int3'.*'nf4' or 'none'"),
    ],
)
def test_a_wrong_flag_is_refused_with_key_value_and_bound(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        _with_flags(TrainSettings(), arguments)


def test_settings_are_printed_with_secrets_masked(tmp_path: Path) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text('[store]\nurl = "postgresql+psycopg://app:hunter2@db/thumbwheel"\n')
    done = thumbwheel("settings", "--settings", str(path))
    assert json.loads(done.stdout)["store"]["pool_size"] == 5
    assert "hunter2" not in done.stdout


def test_bad_settings_end_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text("[train]\nbeta = 99\n")
    done = thumbwheel("status", "--settings", str(path))
    assert done.returncode == 2
    assert "train.beta = 99" in done.stderr
    assert "Traceback" not in done.stderr


def test_rolling_back_the_base_model_says_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text(f'[store]\nurl = "sqlite:///{tmp_path}/store.db"\n')
    done = thumbwheel("rollback", "--settings", str(path))
    assert done.returncode == 2
    assert "nothing to roll back" in done.stderr


def test_a_log_that_cannot_be_reached_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text(f'[store]\nurl = "sqlite:///{tmp_path}/store.db"\n[log]\npath = "{tmp_path}"\n')
    done = thumbwheel("log", "--settings", str(path))
    assert done.returncode == 2
    assert "unable to open database file" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["status", "run", "adapters", "promote v000001", "rollback", "log"])
def test_a_store_that_is_away_is_one_clear_line(tmp_path: Path, command: str) -> None:
    path, port = tmp_path / "thumbwheel.toml", free_port()
    log = f'[log]\npath = "{tmp_path}/log.db"\n'
    path.write_text(f'{log}[store]\nurl = "postgresql+psycopg://app:hunter2@127.0.0.1:{port}/thumbwheel"\n')
    done = thumbwheel(*command.split(), "--settings", str(path))
    said = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert said.startswith(f"error: store at postgresql+psycopg://app:***@127.0.0.1:{port}/thumbwheel: ")
    assert said.endswith("is it running, and is store.url right?")
    assert "Connection refused" in said
    assert "hunter2" not in said


def test_dead_letters_of_a_topic_that_is_not_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text("")
    done = thumbwheel("log", "--settings", str(path), "--topic", "elsewhere", "--replay")
    assert done.returncode == 2
    assert "--topic elsewhere: expected thumbwheel.responses or thumbwheel.feedback" in " ".join(done.stderr.split())


def test_the_poller_says_which_settings_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "thumbwheel.toml"
    path.write_text('[open_webui]\nurl = "http://127.0.0.1:9"\n')
    done = thumbwheel("open-webui", "--once", "--settings", str(path))
    assert done.returncode == 2
    assert "open_webui.token is not set" in done.stderr
    assert "Traceback" not in done.stderr
