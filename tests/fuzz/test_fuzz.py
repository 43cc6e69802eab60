"""A short search of each harness; a long one is ``python tests/fuzz/run.py NAME SECONDS``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import search
from tests.fuzz.run import NAMES
from tests.fuzz.targets import TARGETS
from tests.support import DEADLINE_S

RUN = Path(__file__).with_name("run.py")


def test_each_harness_can_be_run_by_its_name() -> None:
    assert tuple(TARGETS) == NAMES


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_seeds_break_no_promise(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    with target.opened() as one_input:
        _, failed = search(one_input, seeds, executions=len(seeds) + 200)
    if failed is not None:
        raise AssertionError(f"{name} fails with {failed.data!r}") from failed.error


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="there is no atheris for this platform")
def test_atheris_drives_the_same_function(tmp_path: Path) -> None:
    options = ("--executions", "100", "--engine", "atheris", "--output", str(tmp_path))
    command = [sys.executable, str(RUN), "proxy", "10", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3 * DEADLINE_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stat::number_of_executed_units: " in result.stderr
