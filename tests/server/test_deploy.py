"""What deploy/ says of the program is so."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from longspan.cli import app
from longspan.engine.async_engine import AsyncEngine
from longspan.server.metrics import Metrics

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from simulated import simulated_engine

DEPLOY = Path(__file__).parents[2] / "deploy"
GRAFANA = json.loads((DEPLOY / "grafana" / "longspan.json").read_text())


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def exported() -> set[str]:
    """The names under which Prometheus keeps what the server exports."""
    engine, _ = simulated_engine([4])
    text = Metrics(AsyncEngine(engine, 1), "model").text().decode()
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        family.name + end
        for family in text_string_to_metric_families(text)
        for end in ends.get(family.type, [""])
    }


def queries() -> list[str]:
    shown = [target["expr"] for panel in GRAFANA["panels"] for target in panel["targets"]]
    return shown + [str(one["query"]) for one in GRAFANA["templating"]["list"]]


def test_every_metric_of_the_dashboard_is_exported() -> None:
    known = exported()
    assert "longspan:kv_pages_used" in known
    named = {name for query in queries() for name in re.findall(r"\b(?:vllm|longspan):\w+", query)}
    assert len(named) > 15
    assert named <= known


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in GRAFANA["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def commands() -> dict[str, list[str]]:
    """The arguments of `longspan serve` in each file."""
    image = (DEPLOY / "Dockerfile").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)[0])
    unit = (DEPLOY / "longspan.service").read_text()
    started = shlex.split(re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)[0])
    (compose,) = documents("compose.yaml")
    (pod,) = (one for one in documents("kubernetes.yaml") if one["kind"] == "Deployment")
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    return {
        "Dockerfile": entry[2:],
        "longspan.service": started[2:],
        "compose.yaml": compose["services"]["longspan"]["command"],
        "kubernetes.yaml": container["args"],
    }


@pytest.mark.parametrize(
    "name", ["Dockerfile", "longspan.service", "compose.yaml", "kubernetes.yaml"]
)
def test_options_are_those_of_the_program(name: str) -> None:
    told = CliRunner().invoke(app, ["serve", "--help"]).output
    known = set(re.findall(r"--[a-z][a-z-]+", told))
    given = [word.split("=")[0] for word in commands()[name] if word.startswith("--")]
    assert given
    assert set(given) <= known


def test_everybody_waits_for_longer_than_the_server_drains() -> None:
    told = CliRunner().invoke(app, ["serve", "--help"]).output
    drain = float(re.findall(r"--drain-timeout.*?\[default: ([\d.]+)\]", told, re.DOTALL)[0])
    unit = (DEPLOY / "longspan.service").read_text()
    (compose,) = documents("compose.yaml")
    (pod,) = (one for one in documents("kubernetes.yaml") if one["kind"] == "Deployment")
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > drain + 10
    assert int(compose["services"]["longspan"]["stop_grace_period"].rstrip("s")) > drain + 10
    assert pod["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain + 10


def test_files_that_are_named_are_there() -> None:
    (compose,) = documents("compose.yaml")
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).is_file(), volume
    documents("prometheus.yml")
    for name in ("datasource.yml", "provider.yml"):
        documents(f"grafana/{name}")
    named = re.findall(r"^\| `([^`]+)`", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert {Path(name).name for name in named} == {
        path.name
        for path in DEPLOY.rglob("*")
        if path.is_file()
        and path.name not in ("README.md", "datasource.yml", "provider.yml")
        and not path.name.endswith(".dockerignore")
    }
