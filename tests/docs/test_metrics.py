"""What is shipped for Prometheus and Grafana follows the metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import need

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "docs" / "examples" / "prometheus"
METRIC = r"\bhotport_[a-z0-9_]+"


def described() -> set[str]:
    """The metrics of the reference, by their names on the wire."""
    found = set()
    for name, kind in re.findall(
        rf"^\| `({METRIC})` \| (\w+) ", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE
    ):
        suffixes = {"counter": ("_total",), "gauge": ("",), "summary": ("_sum", "_count")}
        found |= {name + suffix for suffix in suffixes.get(kind, ("_bucket", "_sum", "_count"))}
    return found


def expressions() -> Iterator[str]:
    dashboard = json.loads((SHIPPED / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["expr"] for each in dashboard["annotations"]["list"])


def test_dashboard_and_rules_ask_for_metrics_that_there_are() -> None:
    known = described()
    assert len(known) > 30
    rules = (SHIPPED / "hotport.rules.yml").read_text()
    asked = set(re.findall(METRIC, "\n".join([*expressions(), rules])))
    assert asked - known - {"hotport_name"} == set()
    guide = (ROOT / "docs/how-to/metrics.md").read_text()
    assert set(re.findall(r"^\| `(Hotport\w+)`", guide, re.MULTILINE)) == set(re.findall(r"alert: (\w+)", rules))


def test_every_panel_has_a_place_of_its_own() -> None:
    places: list[dict[str, Any]] = [
        each["gridPos"] for each in json.loads((SHIPPED / "grafana.json").read_text())["panels"]
    ]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("what", ["check", "test"])
def test_promtool_takes_the_rules(what: str) -> None:
    file = "hotport.rules.yml" if what == "check" else "hotport.rules.test.yml"
    done = subprocess.run(
        [need("promtool"), what, "rules", file], cwd=SHIPPED, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    times = {"$__rate_interval": "5m", "$__interval": "1m", "$instance": ".*"}
    rules = []
    for number, text in enumerate(expressions()):
        for name, value in times.items():
            text = text.replace(name, value)
        rules.append({"record": f"a:{number}", "expr": text})
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([need("promtool"), "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
