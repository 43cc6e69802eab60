"""``hotport status --watch``: what it draws, and that it goes on while supervisors come and go."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from hotport.cli._top import LANES_SHOWN, Top, watch
from hotport.cli.output import console
from hotport.errors import ControlError
from hotport.wire.messages import Mishap, PhaseTime, Status, WorkerStatus
from hotport.wire.recording import Recording
from tests.cli.test_output import EVIL, SHOWN
from tests.support import run_here
from tests.wire.test_trace import RECORDING


def status(requests: int, *, pid: int = 11, connections: int = 3) -> Status:
    worker = WorkerStatus(
        worker=1, generation=2, pid=pid, phase="serving", age_s=1.0, rss_bytes=1, connections=connections,
        requests=requests, lag_s=0.004,
    )  # fmt: skip
    return Status(
        service="svc", pid=1, version="1", generation=2, wanted=1, restarting=0, addresses=("tcp://127.0.0.1:1",),
        target="app:app", age_s=1.0, rss_bytes=1, workers=(worker,), stage="ready", queues={"tcp://127.0.0.1:1": 7},
    )  # fmt: skip


def drawn(top: Top, width: int = 110) -> str:
    out = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  closed below
    with out.file:
        out.print(top.picture(width, 0.0))
    return out.export_text()


def test_requests_are_counted_by_the_second_and_new_workers_count_at_once() -> None:
    top = Top()
    top.hear(status(1000), [], 10.0)
    assert "; 3 connections, 0 requests/s, 7 waiting, lag 4 ms" in top.line()
    top.hear(status(1200), [], 12.0)
    assert "100 requests/s" in top.line()
    top.hear(status(60, pid=12), [], 14.0)
    assert "30 requests/s" in top.line()
    top.hear(msgspec.structs.replace(status(60, pid=12), restarting=3), [], 15.0)
    assert "generation 2, restarting into 3; 3 connections, 0 requests/s" in top.line()


def test_picture_has_workers_charts_restarts_lanes_and_mishaps() -> None:
    mishap = Mishap(at=0.0, event="worker.lost", generation=2, worker=4, why="was killed by SIGKILL")
    aborted = msgspec.structs.replace(
        RECORDING, report=msgspec.structs.replace(RECORDING.report, outcome="aborted", generation=9)
    )
    top = Top()
    top.hear(msgspec.structs.replace(status(1), mishaps=(mishap,)), [aborted, RECORDING], 1.0)
    text = drawn(top)
    for said in (
        *("svc: generation 2 serves app:app", "requests/s", "waiting in the accept queue 7"),
        *("1 to 2  done  0.50 s  7 moved http", "1 to 9  aborted", "draining 35 ms", "worker 4: was killed by SIGKILL"),
    ):
        assert said in text
    lanes = {line.split()[0]: line for line in text.splitlines() if line.startswith("    ") and "█" in line}
    assert {"steps", "1.1", "2.3"} <= lanes.keys()
    assert all(len(line) <= 110 for line in text.splitlines())
    assert drawn(top, width=40)


def test_restart_that_is_in_progress_says_what_it_does() -> None:
    report = msgspec.structs.replace(RECORDING.report, outcome="", phases=(PhaseTime(name="ready", ms=5.0),))
    lanes = RECORDING.lanes * LANES_SHOWN
    going = msgspec.structs.replace(RECORDING, report=report, is_over=False, lanes=lanes)
    top = Top()
    top.hear(msgspec.structs.replace(status(1), restarting=2), [going], 1.0)
    assert "1 to 2  opening  0.01 s" in drawn(top)
    top.hear(status(1), [going], 2.0)
    assert "1 to 2  not known: its supervisor was killed" in drawn(top)
    begun = msgspec.structs.replace(going, report=msgspec.structs.replace(report, phases=()))
    top.hear(msgspec.structs.replace(status(1), restarting=2), [begun], 3.0)
    assert "1 to 2  starting" in drawn(top)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_it_goes_on_until_interrupted(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws as on a terminal
    answers = [status(1), None, msgspec.structs.replace(status(1), service=EVIL)]

    def ask() -> Status:
        if (answer := answers.pop(0)) is None:
            raise ControlError("HP606", "cannot reach the supervisor of svc", cause=EVIL)
        return answer

    def pause(seconds: float) -> None:
        if not answers:
            raise KeyboardInterrupt

    def read() -> list[Recording]:
        return []

    watch(ask, read, console(), pause)
    out = capsys.readouterr().out
    assert "svc" in out
    assert f"cannot reach the supervisor of svc: {SHOWN}; trying again" in out
    assert f"{SHOWN}: " in out
    assert "\x1b[2J[/]" not in out
    assert Top().line() == ""


def test_it_is_for_people(tmp_path: Path) -> None:
    for flag in ("--json", "--ready"):
        refused = run_here("status", "--watch", flag, cwd=tmp_path, env={"HOTPORT_RUNTIME_DIR": str(tmp_path)})
        assert refused.returncode == 2
        assert "--watch" in refused.stderr
