"""The supervisor dies, at every step of what it does: its workers serve on, and the next one goes on with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from hotport.kernel import procfs
from hotport.wire.messages import Report, RestartRequest
from tests.support import LINE_APP, Hammer, Service, ask_line, assert_three_lines, eventually, watching_pid, write_code
from tests.service.test_handoff_faults import APP as HTTP_APP
from tests.service.test_handoff_faults import Kept

#: Imported by every interpreter that has its directory on its path: the supervisor kills itself before the effect of
#: that number, counted from the beginning of a restart. Timers are its own affair: nobody else can see them.
CRASHES = """
import os, signal, sys
at = int(os.environ.get("CRASH_AT", "0"))
if at and "serve" in sys.orig_argv:
    from hotport.model import service as model
    from hotport.supervisor.supervisor import Supervisor

    carry_out = Supervisor._carry_out
    passed = 0

    def crash(self, effect):
        global passed
        is_visible = not isinstance(effect, model.StartTimer | model.StopTimer | model.ExtendTimer)
        if is_visible and (passed or self.service.restart is not None):
            passed += 1
            if passed == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return carry_out(self, effect)

    Supervisor._carry_out = crash
"""

BROKEN = "raise RuntimeError('broken')\n"


def die(service: Service) -> None:
    """SIGKILL the supervisor, and collect it."""
    service.process.kill()
    service.process.wait(service.timeout_s)


@contextmanager
def ending(directory: Path) -> Iterator[None]:
    """Whatever happens, no worker of the service outlives the test."""
    try:
        yield
    finally:
        for pid in started(directory):
            with watching_pid(pid) as gone:
                os.kill(pid, signal.SIGKILL)
                gone()


def started(directory: Path) -> list[int]:
    """Every worker of the service ``svc`` that lives, whoever supervises it."""
    return procfs.leaders_with("NOTIFY_SOCKET", str(directory / "run" / "svc" / "notify.sock"))


def assert_healthy(service: Service, workers: int) -> dict[str, Any]:
    """One generation serves, whole; and there is no process and no path besides."""

    def is_healthy() -> bool:
        found = service.status()["workers"]
        generations = {each["generation"] for each in found}
        return len(found) == workers and len(generations) == 1 and all(each["phase"] == "serving" for each in found)

    service.wait_until(is_healthy, "one generation serves")
    status: dict[str, Any] = service.status()
    pids = [worker["pid"] for worker in status["workers"]]
    eventually(lambda: sorted(started(service.directory)) == sorted(pids), "nobody else is left")
    sockets = {f"worker-{each['generation']}.{each['worker']}.sock" for each in status["workers"]}
    eventually(
        lambda: set(os.listdir(service.runtime)) == {"lock", "control.sock", "notify.sock", *sockets},
        "no path is left",
    )
    return status


@pytest.mark.parametrize("kind", ["done", "aborted", "phased"])
def test_supervisor_is_killed_at_every_effect_of_a_restart(tmp_path: Path, kind: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHES)
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    args = ("app:app", "--workers", "2", "--settle", "20ms")
    env = {"PYTHONPATH": str(tmp_path)}
    with ending(tmp_path), ExitStack() as stack:
        crashes, descriptors = 0, 0
        hammer: Hammer | None = None
        while True:
            with Service(tmp_path, *args, env={**env, "CRASH_AT": str(crashes + 1)}) as service:
                service.wait_ready()
                assert_healthy(service, workers=2)
                descriptors = descriptors or service.descriptors()
                assert service.descriptors() <= descriptors + 1, service.log_tail()
                hammer = hammer or stack.enter_context(Hammer(service.port))
                hammer.wait_answers(2)
                if kind == "aborted":
                    write_code(tmp_path / "app.py", BROKEN)
                replies = service.ask(RestartRequest(phased=kind == "phased"))
                write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
                assert not hammer.failures
                if replies and isinstance(replies[-1], Report):
                    die(service)
                    break  # there is no such effect any more
                service.process.wait(service.timeout_s)
                crashes += 1
                hammer.wait_answers(2)
        assert crashes >= 8
        Service(tmp_path, *args, env=env).wait_ready().end()
