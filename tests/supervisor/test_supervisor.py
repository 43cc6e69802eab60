"""What the supervisor makes of the model's effects, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from hotport.model.inputs import Clock, Timer
from hotport.options import Options
from hotport.supervisor import supervisor as module
from hotport.supervisor.supervisor import ANSWER_TIMEOUT_S, Supervisor


def test_worker_that_is_stopped_has_the_time_of_an_answer_to_drain_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had all of `drain_timeout`, in which it finishes nothing: each restart took 50 s."""
    supervisor = cast("Any", Supervisor.__new__(Supervisor))
    supervisor.options = Options(target="app:app", drain_timeout_s=60.0, kill_timeout_s=1.0)
    supervisor.fleet = SimpleNamespace(processes={3: SimpleNamespace(pid=4711), 4: SimpleNamespace(pid=4712)})
    supervisor._log = structlog.get_logger()
    monkeypatch.setattr(module, "is_stopped", lambda pid: pid == 4711)
    with structlog.testing.capture_logs() as logs:
        assert supervisor._duration(Timer(Clock.DRAIN, 3)) == ANSWER_TIMEOUT_S
    (line,) = logs
    assert (line["event"], line["worker"], line["fix"]) == ("worker.stopped", 3, "kill -CONT 4711")
    with structlog.testing.capture_logs() as logs:
        assert supervisor._duration(Timer(Clock.DRAIN, 4)) == 61.0 + ANSWER_TIMEOUT_S
        assert supervisor._duration(Timer(Clock.DRAIN, 5)) == 61.0 + ANSWER_TIMEOUT_S
    assert logs == []
