"""The benchmarks run and store what they measured; what they measure is not a test's affair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support import DEADLINE_S, need

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


SMALL = {
    "steady.py": ("--seconds", "0.2"),
    "restart.py": (),
    "http.py": (
        *("--seconds", "0.2", "--idle", "50", "--servers", "hotport", "uvicorn"),
        *("--only", "websocket", "access-log", "latency", "memory"),
    ),
    "rebind.py": (
        *("--entries", "20", "--rate", "300", "--seconds", "1"),  # on a machine that is busy with other tests
        *("--only", "inherit", "overlap steered", "rebind warm", "rebind cold", "plain"),
    ),
    "gap.py": ("--entries", "0", "20"),
    "timewait.py": ("--entries", "0", "20", "--seconds", "0.2"),
    "peers.py": ("--servers", "hotport", "--times", "1", "--every", "2"),
    "handoff.py": ("--counts", "20", "--seconds", "0.2"),
    "power.py": ("--seconds", "0.5"),
    "hostile.py": ("--seconds", "0.2", "--servers", "hotport", "--only", "bytes", "closes"),
    "balance.py": ("--seconds", "0.2", "--connections", "40", "--servers", "hotport", "uvicorn"),
    "sharing.py": ("--seconds", "0.2"),
    "floor.py": ("--seconds", "0.2", "--servers", "hotport", "floor, eager", "--only", "targets"),
    "cost.py": ("--seconds", "0.5", "--servers", "hotport --preload", "--only", "start", "restart"),
    "why.py": ("--established", "20", "--timewait", "20"),
}

#: These have clients of their own; in a network namespace if that is permitted, and on loopback if not.
UNLOADED = (
    "rebind.py",
    "gap.py",
    "timewait.py",
    "peers.py",
    "power.py",
    "hostile.py",
    "balance.py",
    "cost.py",
    "why.py",
)


@pytest.mark.parametrize("name", SMALL)
def test_one_small_round_ends_with_samples_and_goals(tmp_path: Path, name: str) -> None:
    if name not in UNLOADED:
        need("wrk")
    if name == "power.py":
        need("haproxy")
    output = tmp_path / "result.json"
    result = subprocess.run(
        [sys.executable, BENCHMARKS / name, "--rounds", "1", "--output", output, *SMALL[name]],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(output.read_text())
    assert all(len(samples) == 1 for samples in found["samples"].values())
    assert found["machine"]["kernel"]
    for goal in found["goals"]:
        assert goal["name"] in result.stdout


def test_a_part_of_a_benchmark_does_not_replace_the_results_of_all() -> None:
    with patch.dict(os.environ):  # from which it removes what measures coverage
        from benchmarks.common import PARTS, RESULTS, arguments
    parser = arguments(None, name="http.json", rounds=1)
    for choice in ("--only", "--servers"):
        parser.add_argument(choice, nargs="+", default=["a", "b"])
    for args in ([], ["--rounds", "2"], ["--only", "b", "a"]):
        assert parser.parse_args(args).output == RESULTS / "http.json"
    for args in (["--only", "a"], ["--servers", "b"]):
        assert parser.parse_args(args).output == PARTS / "http.json"
        assert parser.parse_args([*args, "--output", "x.json"]).output == Path("x.json")
