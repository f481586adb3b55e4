"""compose.yaml, Dockerfile, settings and the install script agree with each other and with the code."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from loop.settings import Settings, load_settings

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
COMPOSE = (DEPLOY / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
OURS = ["gateway", "joiner", "scheduler", "console"]


def filled_in(text: str) -> str:
    """The text as Compose reads it with every required variable set to the word `filled`."""
    return VARIABLE.sub(lambda match: match[3] if match[2] == "-" else "filled", text)


def settings_of(service: str) -> Settings:
    environment = {name: filled_in(value) for name, value in SERVICES[service]["environment"].items()}
    assert environment.pop("THUMBWHEEL_SETTINGS") == "/etc/thumbwheel/thumbwheel.toml"
    return load_settings(DEPLOY / "thumbwheel.toml", environment)


def mounts(service: str) -> dict[str, str]:
    """What is mounted where: target to source."""
    volumes = (filled_in(volume).split(":") for volume in SERVICES[service].get("volumes", []))
    return {target: source for source, target, *_ in volumes}


@pytest.mark.parametrize("service", OURS)
def test_a_services_settings_are_valid(service: str) -> None:
    settings = settings_of(service)
    assert settings.log.kind == "kafka"
    assert settings.store.url.get_secret_value() == "postgresql+psycopg://thumbwheel:filled@postgres/thumbwheel"
    assert [key.get_secret_value() for key in settings.gateway.api_keys] == ["filled"]


@pytest.mark.parametrize("service", OURS)
def test_a_services_command_exists(service: str) -> None:
    from services.cli import app

    known = {command.name or (command.callback and command.callback.__name__) for command in app.registered_commands}
    assert SERVICES[service]["command"][0] in known


@pytest.mark.parametrize("service", SERVICES)
def test_mounted_files_and_volumes_exist(service: str) -> None:
    volumes = yaml.safe_load(COMPOSE)["volumes"]
    for source in mounts(service).values():
        assert source == "filled" or source in volumes or (DEPLOY / source).exists(), source


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_pinned_and_health_is_checked(service: str) -> None:
    image = SERVICES[service]["image"]
    assert re.search(r":v?\d+\.\d+", image), image
    assert SERVICES[service]["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}


def test_required_variables_are_in_the_example() -> None:
    example = (DEPLOY / ".env.example").read_text()
    named = {match[0] for match in VARIABLE.findall(COMPOSE)}
    assert named == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_no_secret_has_a_default() -> None:
    optional = {name for name, kind, _ in VARIABLE.findall(COMPOSE) if kind != "?"}
    assert optional == {"TRAINER_GPU", "VLLM_GPU", "VLLM_GPU_SHARE"}


def test_only_the_gateway_is_published_to_the_world() -> None:
    published = {name: port for name, service in SERVICES.items() for port in service.get("ports", [])}
    assert [name for name, port in published.items() if not port.startswith("127.0.0.1:")] == ["gateway"]
    assert "vllm" not in published


def test_vllm_reads_the_adapters_where_the_trainer_writes_them() -> None:
    settings = settings_of("scheduler")
    folder = str(settings.train.dir)
    assert mounts("vllm")[folder] == mounts("scheduler")[folder] == "adapters"
    assert mounts("vllm")[str(settings.engine.model)] == mounts("scheduler")[str(settings.engine.model)]
    assert str(settings.scheduler.runs_dir) in mounts("console")
    assert str(settings.log.path.parent) in mounts("gateway")


def test_vllms_flags_fit_the_settings() -> None:
    settings = settings_of("scheduler")
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in SERVICES["vllm"]["command"])
    assert flags["served-model-name"] == settings.engine.base_name
    assert flags["model"] == str(settings.engine.model)
    assert settings.engine.urls == [f"http://vllm:{flags['port']}"]
    assert int(flags["max-lora-rank"]) >= settings.train.lora_r
    assert int(flags["max-cpu-loras"]) >= settings.rollout.keep_loaded + 2
    assert "enable-lora" in flags
    assert SERVICES["vllm"]["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_prometheus_scrapes_every_service_at_its_port() -> None:
    settings = settings_of("scheduler")
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    ports = {part: getattr(settings, part).metrics_port for part in ("gateway", "joiner", "scheduler")}
    assert scraped[0]["static_configs"][0]["targets"] == [f"{part}:{port}" for part, port in ports.items()]
    assert scraped[1]["static_configs"][0]["targets"] == [settings.engine.urls[0].removeprefix("http://")]


def test_the_images_copy_only_what_exists() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()]
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text()
    assert len(copied) >= 6
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}\n" in kept
    torch = re.search(r"^TORCH=(\S+)$", (DEPLOY / "install.sh").read_text(), re.MULTILINE)
    assert torch is not None
    assert f"pip install {torch[1]}\n" in dockerfile


def test_the_lock_pins_what_the_project_asks_for() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (DEPLOY / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert "torch" not in pinned
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in map(Requirement, wanted):
        if requirement.name != "torch":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def run_install(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "PYTHON": "python-that-is-not-there"}
    return subprocess.run(
        ["/bin/bash", DEPLOY / "install.sh", *arguments], env=environment, capture_output=True, text=True, timeout=180
    )


def test_the_install_script_says_what_it_expects(tmp_path: Path) -> None:
    for name in ("dirname", "rm"):  # a machine with a shell and no Python
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    nothing = run_install(path=str(tmp_path))
    assert (nothing.returncode, "expected 'python' or 'debian NAME...'" in nothing.stderr) == (1, True)
    copy = tmp_path / "deploy" / "install.sh"
    copy.parent.mkdir()
    copy.write_text((DEPLOY / "install.sh").read_text())
    done = subprocess.run(
        ["/bin/bash", copy, "python"],
        env={"PATH": str(tmp_path), "PYTHON": "python-that-is-not-there"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 1
    assert "python-that-is-not-there" in done.stderr
    assert "is Python 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_install_script_installs_nothing_that_is_there() -> None:
    done = run_install("debian", "bash", path=os.environ["PATH"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=180)
    for target in ("demo", "test", "bench", "bench-trainer", "bench-gateway", "bench-join", "demo-model", "lint"):
        assert f"make {target} " in done.stdout
