"""The dashboard and the alert rules name only metrics that the code declares, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from loop import metrics

ROOT = Path(__file__).parent.parent.parent
GRAFANA = ROOT / "grafana"
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
SUFFIXES: dict[type, tuple[str, ...]] = {
    Counter: ("_total",),
    Gauge: ("",),
    Histogram: ("_bucket", "_count", "_sum"),
}
# A selector: metric name, then its matchers, then whatever aggregates it. Names are told from labels by the prefix.
NAME = re.compile(r"\bthumbwheel_[a-z0-9_]+")
MATCHER = re.compile(r"(\bthumbwheel_[a-z0-9_]+)\{([^}]*)\}")
BY = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")


def declared() -> dict[str, tuple[str, ...]]:
    """Every name as it stands on /metrics, with its labels."""
    return {
        f"{metric._name}{suffix}": (*metric._labelnames, *(("le",) if suffix == "_bucket" else ()))
        for metric in vars(metrics).values()
        if isinstance(metric, Counter | Gauge | Histogram)
        for suffix in SUFFIXES[type(metric)]
    }


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in DASHBOARDS:
        yield from ((path.name, panel) for panel in json.loads(path.read_text())["panels"])


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and the query."""
    for name, panel in panels():
        yield from ((f"{name}: {panel['title']}", target["expr"]) for target in panel.get("targets", []))
    for path in DASHBOARDS:
        for annotation in json.loads(path.read_text())["annotations"]["list"]:
            yield f"{path.name}: {annotation['name']}", annotation["expr"]
    for group in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]:
        yield from ((f"alert {rule['alert']}", rule["expr"]) for rule in group["rules"])


QUERIES = list(queries())


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_a_query_names_only_declared_metrics(where: str, query: str) -> None:
    named = set(NAME.findall(query))
    assert named or query.startswith("up{"), f"{where} names no metric of ours"
    assert named <= declared().keys()


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_a_query_names_only_labels_that_its_metrics_have(where: str, query: str) -> None:
    known = declared()
    scraped = {"instance", "job"}
    for metric, matchers in MATCHER.findall(query):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= {*known[metric], *scraped}
    labels = {label for name in NAME.findall(query) for label in known[name]} | scraped
    assert {label.strip() for group in BY.findall(query) for label in group.split(",")} - {""} <= labels


def test_every_metric_is_shown_or_alerts() -> None:
    shown = {name for _, query in QUERIES for name in NAME.findall(query)}
    families = {metric._name: SUFFIXES[type(metric)] for metric in vars(metrics).values() if hasattr(metric, "_name")}
    assert [name for name, ends in families.items() if not shown & {name + end for end in ends}] == []


def test_panels_have_ids_titles_and_a_place_of_their_own() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        ids = [panel["id"] for name, panel in panels() if name == path.name]
        assert len(ids) == len(set(ids))
        for name, panel in panels():
            if name != path.name:
                continue
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert place["x"] + place["w"] <= 24
            assert not taken & cells
            assert panel["type"] == "row" or (panel["title"] and panel["description"])
            taken |= cells


def test_panels_ask_the_provisioned_data_source() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        variables = {variable["name"]: variable["current"]["value"] for variable in dashboard["templating"]["list"]}
        assert variables["datasource"] in uids
    assert {panel["datasource"]["uid"] for _, panel in panels() if panel["type"] != "row"} == {"${datasource}"}


def test_provisioned_paths_are_where_compose_mounts_them() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    inside = {target: ROOT / "deploy" / source for source, target in mounts.items()}
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "thumbwheel.yaml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert inside[path].resolve() == GRAFANA / "dashboards"
    assert inside["/etc/grafana/provisioning"].resolve() == GRAFANA / "provisioning"
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert sources[0]["url"] == "http://prometheus:9090"
    assert "prometheus" in services


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yaml"), ("test", "rules", "alerts_test.yaml")],
    ids=["configuration", "alerts"],
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing; `make test` installs it"
    done = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    rules = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == alerts
