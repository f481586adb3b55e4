"""What deploy/security.md says is true as far as its tests show it: each of them exists, and each threat has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROWS = re.findall(r"^\|(.*)\|$", (ROOT / "deploy" / "security.md").read_text(), re.MULTILINE)[2:]
TESTS = [test for row in ROWS for test in re.findall(r"`(tests/[^`]+)`", row)]


@pytest.mark.parametrize("named", TESTS)
def test_a_test_that_is_named_exists(named: str) -> None:
    path, _, name = named.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_threat_has_what_stops_it_and_a_test() -> None:
    assert len(ROWS) >= 15
    for row in ROWS:
        _, threat, stopped_by, shown_by = (cell.strip() for cell in row.split("|"))
        assert threat, row
        assert stopped_by, row
        assert "`tests/" in shown_by, row
