"""Faults happen in the generation and at the time for which they were asked."""

from __future__ import annotations

import http.client
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hotport.errors import ConfigError, RestartError
from hotport.testing import FaultyApp, Service
from hotport.testing.service import ServeProcess
from tests.support import DEADLINE_S, SLOWNESS, assert_three_lines, http_get
from tests.testing import apps


def serve(directory: Path, faults: str, **options: Any) -> Service:
    env = {"HOTPORT_FAULTS": faults}
    target = f"{apps.__file__}:crashing"
    return Service(target, directory=directory, env=env, factory=True, timeout_s=DEADLINE_S, **options)


def test_without_faults_it_is_the_application_itself(tmp_path: Path) -> None:
    with serve(tmp_path, "") as service:
        assert http_get(service.wait_ready().port) == (200, b"1")
        assert service.restart()["serving"] == 2


@pytest.mark.parametrize("fault", ["never-ready@2", "fail-startup@2"])
def test_a_generation_that_does_not_start_aborts_its_restart_and_the_next_one_is_done(
    tmp_path: Path, fault: str
) -> None:
    with serve(tmp_path, fault, ready_timeout=3 * SLOWNESS) as service:
        port = service.wait_ready().port
        with pytest.raises(RestartError) as caught:
            service.restart()
        assert caught.value.serving == 1
        assert http_get(port) == (200, b"1")
        assert service.restart()["serving"] == 3
        assert http_get(port) == (200, b"3")


def test_a_worker_crashes_after_so_many_requests(tmp_path: Path) -> None:
    with serve(tmp_path, "crash-after=2@1") as service:
        port = service.wait_ready().port
        assert [http_get(port)[1] for _ in range(2)] == [b"1", b"1"]
        with pytest.raises((OSError, http.client.HTTPException, IndexError)):  # an answer of no words
            http_get(port)
        service.wait_serving()


def test_a_slow_drain_takes_its_time_also_without_a_lifespan(tmp_path: Path) -> None:
    with serve(tmp_path, "slow-drain=300ms@1") as service:
        service.wait_ready()
        report = service.restart()
        times = {phase["name"]: phase["ms"] for phase in report["phases"]}
        assert max(times.values()) - min(times.values()) >= 300, times


@pytest.mark.parametrize("faults", ["never", "crash-after", "crash-after=x", "fail-startup=3", "never-ready@x"])
def test_what_is_no_fault_is_an_error(faults: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FaultyApp(apps.app, faults)
    assert_three_lines(str(caught.value), "HP722")


def test_a_supervisor_that_ends_before_it_answers_is_told_as_such() -> None:
    """It was an IndexError, which nobody expects who suppresses what a dead supervisor causes."""
    ended = SimpleNamespace(name="web", ask=lambda _: [])
    with pytest.raises(ConnectionResetError, match="the supervisor of web has ended before it has answered"):
        ServeProcess.status(ended)  # type: ignore[arg-type]
