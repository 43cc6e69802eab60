"""What commands show of programs, clients and other users."""

from __future__ import annotations

import pytest
from rich.table import Table
from rich.text import Text

from hotport.cli import restart
from hotport.cli.output import console, print_report, print_status, print_tls_report, write
from hotport.cli.restart import follow
from hotport.wire.messages import Done, Lingering, Progress, Report, Status, TlsReport, WorkerStatus, WorkerTls

EVIL = "\x1b[2J[/] [bold]\x9b"
SHOWN = "\\u001b[2J[/] [bold]\\u009b"


def status() -> Status:
    lingering = Lingering(peer=EVIL, kind="http", age_s=1.0, why=EVIL)
    worker = WorkerStatus(
        worker=1, generation=1, pid=2, phase="serving", age_s=1.0, status=EVIL, lingering=(lingering,), rss_bytes=1
    )
    return Status(
        service="svc", pid=1, version="1", generation=1, wanted=1, restarting=0, addresses=(EVIL,), target=EVIL,
        age_s=1.0, rss_bytes=1, workers=(worker,), last_restart=None, stage="ready", lame_duck_left_s=None,
        status_address=EVIL, strategy="inherit", strategy_why=EVIL, strategies={}, lost={EVIL: EVIL}, gone={EVIL: EVIL},
    )  # fmt: skip


def test_status_of_a_program_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """``STATUS=[/]`` crashed ``hotport status``, and so the health check of a container."""
    print_status(status())
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 11
    assert "\x1b" not in out
    assert "\x9b" not in out


def test_error_of_an_application_in_a_report_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(
        Report(service="svc", generation=2, outcome="aborted", serving=1, previous=1, error=f"{EVIL}\nsecond line")
    )
    worker = WorkerTls(worker=1, generation=1, pid=1, outcome="kept", error=EVIL)
    print_tls_report(TlsReport(service="svc", workers=(worker,)))
    write(EVIL)
    out = capsys.readouterr().out
    assert f"{SHOWN}\nsecond line\n" in out
    assert out.count(SHOWN) == 3
    assert "\x1b" not in out


def test_progress_of_a_restart_is_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(event="restart.aborted", ms=1.0, generation=2, worker=0, detail=EVIL)
    monkeypatch.setattr(restart, "ask", lambda name, request: iter([progress, Done(detail="")]))
    monkeypatch.setattr(restart, "WORDS", {"restart.aborted": "{detail}"})
    follow("svc", None, "restart", as_json=False)
    assert SHOWN in capsys.readouterr().err
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws as on a terminal
    follow("svc", None, "restart", as_json=True)
    assert "\x1b[2J" not in capsys.readouterr().err


def test_whoever_answers_a_load_test_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_row("answered by", Text(EVIL))
    console().print(table)
    out = capsys.readouterr().out
    assert "\\u001b[2J" in out
    assert "\x1b" not in out
