"""What may know what: the design's rules about imports and names, held by walking the source of loop and services."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("loop/**/*.py"), *ROOT.glob("services/**/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}

# Heavy or foreign packages, and the only places that may import them.
CONFINED = {
    "kafka": ("loop/log/kafka.py",),
    "torch": ("loop/kto/", "loop/gate/"),
    "transformers": ("loop/kto/", "loop/gate/"),
    "peft": ("loop/kto/", "loop/gate/"),
    "bitsandbytes": ("loop/kto/", "loop/gate/"),
    "accelerate": ("loop/kto/",),
    "lm_eval": ("loop/gate/",),
    "presidio_analyzer": ("services/gateway/redact.py",),
    "vllm": (),  # a server that we start and speak HTTP to
    "trl": (),  # a yardstick of tests and benchmarks
    "fastapi": (),
}


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every import at any depth as (module, name); the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who knows whom"
            yield from ((node.module or "", alias.name) for alias in node.names)


def packages_of(path: str) -> set[str]:
    return {module.partition(".")[0] for module, _ in imported(TREES[path])}


def test_the_walk_finds_the_source() -> None:
    assert "loop/settings.py" in TREES
    assert "services/cli.py" in TREES


def test_loop_never_imports_services() -> None:
    assert [path for path in TREES if path.startswith("loop/") and "services" in packages_of(path)] == []


def test_nothing_imports_tests_or_deploy() -> None:
    assert [path for path in TREES if packages_of(path) & {"tests", "deploy"}] == []


@pytest.mark.parametrize("package", CONFINED)
def test_a_confined_package_is_imported_in_its_place_only(package: str) -> None:
    importers = [path for path in TREES if package in packages_of(path)]
    assert [path for path in importers if not path.startswith(CONFINED[package])] == []


def test_only_the_vllm_client_names_the_engines_admin_routes() -> None:
    naming = [
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "load_lora_adapter" in node.value
    ]
    assert set(naming) <= {"loop/rollout/vllm.py"}


def test_metrics_are_declared_in_one_module() -> None:
    kinds = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
    declaring = {
        path
        for path, tree in TREES.items()
        for module, name in imported(tree)
        if module.startswith("prometheus_client") and name in kinds
    }
    assert declaring == {"loop/metrics.py"}


def test_the_environment_is_read_in_settings_only() -> None:
    reading = {
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        # Written it may be: libraries have switches that are nothing else.
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"} and isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & {"environ"})
    }
    assert reading == {"loop/settings.py"}


def test_settings_know_no_other_module_of_ours() -> None:
    assert packages_of("loop/settings.py").isdisjoint({"loop", "services"})


def test_services_start_without_torch() -> None:
    modules = [path.removesuffix(".py").replace("/", ".") for path in TREES if path.startswith("services/")]
    modules = [module.removesuffix(".__init__") for module in modules if not module.endswith("__main__")]
    heavy = set(CONFINED) - {"kafka"}
    program = f"import {', '.join(modules)}, sys; sys.exit(', '.join(sys.modules.keys() & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.strip() == ""


def test_modules_say_what_they_own() -> None:
    assert [path for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []
