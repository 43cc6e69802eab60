"""Signals that every process of a service gets at once, as from a service manager or a tool that signals a tree."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotport.errors import ExitCode
from hotport.model.signals import ALL, Does, Moment
from tests.support import DEADLINE_S, Gate, Service, eventually, http_get, read_response, write_code

APP = """\
async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""

HARMLESS = {Does.NOTE, Does.NOTHING, Does.REFUSE}


class Held:
    """A request that the application has begun; the client decides when it is whole."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self.sock.sendall(b"POST / HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
        assert self.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"

    def finish(self) -> int:
        """The status of the answer."""
        self.sock.sendall(b"x")
        return self.answer()

    def answer(self) -> int:
        with self.sock:
            return read_response(self.sock)[0]


def signal_all(service: Service, name: str, *, workers_first: bool = False) -> list[int]:
    """Signal every process of the service; their pids."""
    pids = [service.process.pid, *service.descendants()]
    for pid in reversed(pids) if workers_first else pids:
        os.kill(pid, signal.Signals[name])
    return pids


@contextmanager
def at(tmp_path: Path, moment: Moment) -> Iterator[tuple[Service, Held | None]]:
    """A service at that moment, with a request under way unless it only starts."""
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", (Gate.LINE if moment is Moment.STARTING else "") + APP)
    window = ("--undo-window", "1h") if moment is Moment.RESTARTING else ()
    with Service(tmp_path, "app:app", "--lifespan", "off", "--drain-timeout", "1h", *window) as service:
        if moment is Moment.STARTING:
            eventually(lambda: bool(service.log_events("worker.spawned")), "the worker is there")
            yield service, None
            if service.process.poll() is None:
                gate.open()
                service.wait_ready()
            return
        held = Held(service.wait_ready().port)
        match moment:
            case Moment.RESTARTING:
                command = service.start("restart", "svc")
                eventually(lambda: bool(service.log_events("restart.watching")), "the undo window has begun")
            case Moment.DRAINING:
                command = service.start("restart", "svc")
                eventually(lambda: bool(service.log_events("restart.done")), "the restart is done")
            case Moment.STOPPING:
                service.process.send_signal(signal.SIGTERM)
                eventually(lambda: bool(service.log_events("drain.began")), "it drains")
        yield service, held
        if moment in (Moment.RESTARTING, Moment.DRAINING):
            command.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize("moment", list(Moment))
def test_signals_to_all_end_nobody_and_the_last_one_ends_all_without_a_loss(tmp_path: Path, moment: Moment) -> None:
    """HUP and USR1 to all killed workers or the supervisor; TERM to all cut requests, and did not count them."""
    harmless = [name for name, row in ALL.items() if row[moment] in HARMLESS]
    assert "SIGUSR1" in harmless
    with at(tmp_path, moment) as (service, held):
        for name in harmless:
            pids = signal_all(service, name)
        eventually(lambda: bool(service.log_events("signal.ignored")), "one of them is in the log")
        if moment is Moment.STARTING:
            assert sorted(service.descendants()) == sorted(pids[1:])
        else:
            assert sorted(service.worker_pids()) == sorted(pids[1:])
        if moment is not Moment.STOPPING:
            signal_all(service, "SIGTERM")
        eventually(lambda: bool(service.log_events("service.stopping")), "it stops")
        if held is not None:
            assert held.finish() == 200
        assert service.wait() == ExitCode.DONE
        assert all("cut" not in key for line in service.log_events("drain.ended") for key in line)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_workers_that_are_signalled_before_the_supervisor_lose_nothing_either(tmp_path: Path, name: str) -> None:
    with at(tmp_path, Moment.SERVING) as (service, held):
        signal_all(service, name, workers_first=True)
        eventually(lambda: bool(service.log_events("service.stopping")), "it stops")
        assert held is not None
        assert held.finish() == 200
        assert service.wait() == ExitCode.DONE


def test_second_signal_to_all_cuts_and_says_so(tmp_path: Path) -> None:
    with at(tmp_path, Moment.STOPPING) as (service, held):
        signal_all(service, "SIGTERM")
        assert held is not None
        assert held.answer() == 503
        assert service.wait() == ExitCode.CUT


@pytest.mark.parametrize("has_request", [True, False])
def test_quit_to_all_cuts_at_once_and_says_so_if_there_was_something(tmp_path: Path, has_request: bool) -> None:
    """Workers were killed, so that an idle service was said to have cut something."""
    with at(tmp_path, Moment.SERVING) as (service, held):
        assert held is not None
        if not has_request:
            assert held.finish() == 200
        signal_all(service, "SIGQUIT")
        if has_request:
            assert held.answer() == 503
        assert service.wait() == (ExitCode.CUT if has_request else ExitCode.DONE)


def test_hup_to_all_restarts(tmp_path: Path) -> None:
    with at(tmp_path, Moment.SERVING) as (service, held):
        assert held is not None
        assert held.finish() == 200
        signal_all(service, "SIGHUP")
        eventually(lambda: bool(service.log_events("restart.report")), "the restart is over")
        assert http_get(service.port)[0] == 200
        assert service.status()["generation"] == 2


def test_worker_that_is_killed_while_the_service_stops_is_counted(tmp_path: Path) -> None:
    """Whoever had killed it, the service said that nothing had been cut."""
    with at(tmp_path, Moment.STOPPING) as (service, held):
        os.kill(service.worker_pids()[0], signal.SIGKILL)
        assert service.wait() == ExitCode.CUT
        assert held is not None
        held.sock.close()
