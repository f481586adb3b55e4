"""Every setting is documented and bounded, and a wrong one is refused with its key, its value and what was expected."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from loop.settings import Settings, SettingsError, load_settings


def every_field() -> Iterator[tuple[str, FieldInfo]]:
    for name, section in Settings.model_fields.items():
        assert isinstance(section.annotation, type)
        assert issubclass(section.annotation, BaseModel)
        yield from ((f"{name}.{key}", field) for key, field in section.annotation.model_fields.items())


FIELDS = dict(every_field())


def written(folder: Path, text: str) -> Path:
    path = folder / "thumbwheel.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_is_documented_in_a_sentence(name: str) -> None:
    assert (FIELDS[name].description or "").rstrip().endswith(".")


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_has_a_default(name: str) -> None:
    assert not FIELDS[name].is_required()


def is_bounded(annotation: Any, metadata: list[Any]) -> bool:
    """Whether every number that the type admits has a bound."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return is_bounded(get_args(annotation)[0], list(get_args(annotation)[1:]))
    if origin in (Union, types.UnionType):
        return all(is_bounded(part, metadata) for part in get_args(annotation))
    if origin is list:
        return is_bounded(get_args(annotation)[0], [])
    return annotation not in (int, float) or bool(metadata)


@pytest.mark.parametrize("name", FIELDS)
def test_a_number_has_bounds(name: str) -> None:
    assert is_bounded(FIELDS[name].annotation, FIELDS[name].metadata)


@pytest.mark.parametrize(
    "name", [name for name in FIELDS if name.endswith(("password", "secret", "secrets", "salt", "_key", "_keys"))]
)
def test_a_secret_has_a_secret_type(name: str) -> None:
    if name != "snapshot.salt":  # assigns the split, guards nothing, and belongs in the manifest
        assert SecretStr in (FIELDS[name].annotation, *get_args(FIELDS[name].annotation))


def test_without_a_file_and_environment_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(environment={}) == Settings()


def test_the_environment_goes_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nbeta = 0.3\nlora_r = 8\n")
    train = load_settings(path, {"THUMBWHEEL_TRAIN__BETA": "0.2"}).train
    assert (train.beta, train.lora_r) == (0.2, 8)


def test_the_file_in_the_working_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "[console]\nport = 1234\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings(environment={}).console.port == 1234


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[console]\nport = 1234\n")
    assert load_settings(environment={"THUMBWHEEL_SETTINGS": str(path)}).console.port == 1234


# Environment variable, and the value that it stands for.
PARSED: list[tuple[str, str, Any]] = [
    ("ENGINE__URLS", '["http://a:1", "http://b:2"]', ["http://a:1", "http://b:2"]),  # a list is JSON
    ("ENGINE__START", "true", True),
    ("TRAIN__LEARNING_RATE", "1e-4", 1e-4),
    ("TRAIN__LORA_TARGET_MODULES", '["q_proj"]', ["q_proj"]),
    ("TRAIN__LORA_TARGET_MODULES", "all-linear", "all-linear"),
    ("SNAPSHOT__MAX_PER_RATER", "null", None),  # off
    ("SNAPSHOT__SALT", "[not json", "[not json"),
    ("ROLLOUT__CANARY_STEPS", "[]", []),
    ("SCHEDULER__RUNS_DIR", "runs", Path("runs")),
]


@pytest.mark.parametrize(("variable", "text", "value"), PARSED)
def test_the_environment_holds_any_type(variable: str, text: str, value: Any) -> None:
    section, _, key = variable.lower().partition("__")
    settings = load_settings(None, {f"THUMBWHEEL_{variable}": text})
    assert getattr(getattr(settings, section), key) == value


# What is wrong, as TOML; the same as an environment variable; and what the message must name.
WRONG: list[tuple[str, dict[str, str], list[str]]] = [
    ("[train]\nbetta = 1", {"TRAIN__BETTA": "1"}, ["train.betta", "1", "unknown key"]),
    ("[trian]\nbeta = 1", {"TRIAN__BETA": "1"}, ["trian", "unknown"]),
    ('[train]\nlora_r = "big"', {"TRAIN__LORA_R": "big"}, ["train.lora_r", "'big'", "integer"]),
    ("[train]\nlora_r = 0", {"TRAIN__LORA_R": "0"}, ["train.lora_r", "0", "greater than or equal to 1"]),
    ("[train]\nlora_r = 513", {"TRAIN__LORA_R": "513"}, ["train.lora_r", "513", "less than or equal to 512"]),
    ("[train]\nbeta = 0", {"TRAIN__BETA": "0"}, ["train.beta", "0", "greater than 0"]),
    ("[train]\nbeta = nan", {"TRAIN__BETA": "nan"}, ["train.beta", "nan"]),
    ("[train]\nmax_grad_norm = inf", {"TRAIN__MAX_GRAD_NORM": "inf"}, ["train.max_grad_norm", "inf"]),
    ("[gateway]\nport = 65536", {"GATEWAY__PORT": "65536"}, ["gateway.port", "65536", "65535"]),
    ('[log]\nkind = "redis"', {"LOG__KIND": "redis"}, ["log.kind", "'redis'", "'embedded'", "'kafka'"]),
    ("[engine]\nurls = []", {"ENGINE__URLS": "[]"}, ["engine.urls", "[]", "at least 1"]),
    ("[rollout]\ncanary_steps = [0.1, 1.5]", {"ROLLOUT__CANARY_STEPS": "[0.1, 1.5]"}, ["canary_steps.1", "1.5"]),
]


@pytest.mark.parametrize("source", ["file", "environment"])
@pytest.mark.parametrize(("toml", "variables", "named"), WRONG)
def test_a_wrong_setting_is_refused_by_name(
    tmp_path: Path, toml: str, variables: dict[str, str], named: list[str], source: str
) -> None:
    path = written(tmp_path, toml if source == "file" else "")
    environment = {f"THUMBWHEEL_{key}": value for key, value in variables.items() if source == "environment"}
    with pytest.raises(SettingsError) as refused:
        load_settings(path, environment)
    assert [part for part in named if part.lower() not in str(refused.value).lower()] == []


def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(written(tmp_path, "[train]\nlora_r = 0\nbeta = 99\n[console]\nport = -1\n"), {})
    assert [key for key in ("train.lora_r", "train.beta", "console.port") if key not in str(refused.value)] == []


def test_a_missing_or_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml does not exist"):
        load_settings(tmp_path / "absent.toml", {})
    with pytest.raises(SettingsError, match=r"thumbwheel\.toml is not TOML"):
        load_settings(written(tmp_path, "[train\n"), {})


def test_the_null_device_is_a_file_of_no_settings() -> None:
    assert load_settings(Path(os.devnull), {"THUMBWHEEL_TRAIN__BETA": "0.2"}).train.beta == 0.2


@pytest.mark.parametrize("name", ["THUMBWHEEL_BETA", "THUMBWHEEL_TRAIN", "THUMBWHEEL_"])
def test_a_variable_without_section_and_key_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: unknown setting"):
        load_settings(None, {name: "1"})


def test_other_variables_are_not_ours() -> None:
    load_settings(None, {"PATH": "/bin", "THUMB": "1"})


def test_secrets_are_masked_when_dumped(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[engine]\napi_key = "hush1"\n[gateway]\napi_keys = ["hush2"]\ntoken_secret = "hush3"\nrater_salt = "hush4"\n'
        'previous_token_secrets = ["hush7"]\n'
        '[log]\nsasl_password = "hush5"\n[store]\nurl = "postgresql+psycopg://me:hush6@host/db"\n',
    )
    settings = load_settings(path, {})
    for dump in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "hush" not in dump
    assert settings.store.url.get_secret_value().endswith("hush6@host/db")


def test_a_refused_secret_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(written(tmp_path, '[gateway]\ntoken_secret = ["hush"]\n'), {})
    assert "gateway.token_secret" in str(refused.value)
    assert "hush" not in str(refused.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().train.beta = 1.0  # type: ignore[misc]


def test_choices_are_closed() -> None:
    assert get_origin(FIELDS["log.kind"].annotation) is Literal
