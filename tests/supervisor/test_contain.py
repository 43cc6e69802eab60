"""An error that nobody expected costs the service one thing at most, wherever in the supervisor it happens."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import coroutine
from typing import Any

import anyio
import pytest

import hotport
from hotport.channel import Channel
from hotport.errors import ControlError
from hotport.kernel.sockets import bind_notify
from hotport.supervisor import contain, supervisor
from hotport.supervisor.takeover import take_over
from hotport.wire.messages import (
    Progress,
    RebalanceRequest,
    ReloadTlsRequest,
    Report,
    RestartRequest,
    ScaleRequest,
    Status,
    StatusRequest,
    UndoRequest,
    UpgradeRequest,
)
from tests.supervisor.stage import Nursery, Stage, play
from tests.support import DEADLINE_S, LINE_APP, RESTARTS, SLOWNESS, Hammer, Service, eventually, write_code

PACKAGE = Path(hotport.__file__).parent

#: A place in a task of the supervisor where it waits: file and line of the innermost frame that is ours.
Site = tuple[str, int]

#: Whose awaits are tried: everything of which the supervisor makes tasks.
WATCHED = ("supervisor/", "runner.py")

#: How many awaits the life that is played here does not come to: take-overs, TLS, recovery, a want of
#: descriptors, workers that hang, commands that have to be waited for.
MISSED_MAX = 50

#: This one is what contains the others.
SELF = "supervisor/contain.py"


class InjectedError(Exception):
    """Of a kind that nothing in hotport expects."""


class Injector:
    """Makes tasks that notice each place at which they wait, and fail at some of them.

    Args:
        fails: Whether to fail at a place that is reached for the n-th time (from 1).

    Attributes:
        is_armed: It counts, and fails.
        reached: How often each place was.
        passed: All lines of ours that waited, for what they have called as well.
        thrown: Where it has failed.
    """

    def __init__(self, fails: Callable[[Site, int], bool]) -> None:
        self.is_armed = False
        self.reached: Counter[Site] = Counter()
        self.passed: set[Site] = set()
        self.thrown: list[Site] = []
        self._fails = fails

    def make(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        async def run() -> Any:
            return await self._drive(coro)

        return asyncio.Task(run(), loop=loop, **options)

    @coroutine
    def _drive(self, coro: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        resume: Callable[[Any], Any] = coro.send
        value: Any = None
        while True:
            try:
                waits_for = resume(value)
            except StopIteration as end:
                return end.value
            site = self._site(coro)
            if site is not None and self.is_armed:
                self.reached[site] += 1
                if self._fails(site, self.reached[site]):
                    self.thrown.append(site)
                    resume, value = coro.throw, InjectedError(f"at {site}")
                    continue
            try:
                resume, value = coro.send, (yield waits_for)
            except BaseException as error:
                resume, value = coro.throw, error

    def _site(self, coro: Any) -> Site | None:
        found = None
        while coro is not None and (frame := getattr(coro, "cr_frame", None)) is not None:
            path = frame.f_code.co_filename
            if path.startswith(f"{PACKAGE}/") and (name := path[len(f"{PACKAGE}/") :]).startswith(WATCHED):
                found = name, frame.f_lineno
                self.passed.add(found)
            elif frame.f_code.co_name == "__aexit__":
                return None  # a task group waits for its tasks, and these are looked at themselves
            coro = coro.cr_await
        return None if found is None or found[0] == SELF else found


def awaits() -> Iterator[tuple[str, range]]:
    """Every place in the supervisor's code that can wait, and its lines."""
    for path in [*sorted((PACKAGE / "supervisor").glob("*.py")), PACKAGE / "runner.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Await):
                assert node.end_lineno is not None
                yield str(path.relative_to(PACKAGE)), range(node.lineno, node.end_lineno + 1)
            elif isinstance(node, ast.AsyncFor | ast.AsyncWith):
                yield str(path.relative_to(PACKAGE)), range(node.lineno, node.body[0].lineno)


# -- what happens meanwhile ---------------------------------------------------------------------------------


def view(stage: Stage) -> None:
    """Look at the live page for a while, if it is there."""
    with socket.create_connection(("127.0.0.1", stage.status_port), DEADLINE_S) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        states = 0
        while states < 2 and (line := file.readline()):
            states += line == b"event: state\n"


def act(stage: Stage) -> None:
    """Everything that a service does in its life. What fails here is not what is tested, but what comes after it."""
    for number in (signal.SIGHUP, signal.SIGTTIN):
        os.kill(os.getpid(), number)
        settle(stage)
    for request in (
        RestartRequest(undo_window_s=60.0),
        UndoRequest(keep=True),
        RestartRequest(canary=1, bake_s=60.0),
        UndoRequest(),
        RestartRequest(strategy="transfer"),
        RestartRequest(phased=True),
        ReloadTlsRequest(),
        RebalanceRequest(),
        UpgradeRequest(python="/bin/false"),
        ScaleRequest(workers=1),
    ):
        with suppress(OSError):
            for reply in stage.replies(request):
                if isinstance(reply, Progress) and reply.event in ("restart.baking", "restart.watching"):
                    break  # the next request ends it
    with suppress(OSError):
        stage.lose_successor()
    for path in (b"/ready", b"/status", b"/metrics"):
        with suppress(OSError):
            probe(stage, path)
    with suppress(OSError):
        view(stage)
    settle(stage)


def settle(stage: Stage) -> None:
    """Return when nothing goes on."""

    def is_settled() -> bool:
        with suppress(OSError, ValueError):
            status = stage.ask(StatusRequest())
            if isinstance(status, Status) and status.watch is not None:
                stage.ask(UndoRequest(keep=True))
            return (
                isinstance(status, Status)
                and not status.restarting
                and {worker.phase for worker in status.workers} == {"serving"}
                and len(status.workers) == status.wanted
            )
        return False

    eventually(is_settled, "nothing goes on")


def probe(stage: Stage, path: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", stage.status_port), DEADLINE_S) as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\n\r\n" % path)
        return b"".join(iter(lambda: sock.recv(65536), b""))


class Trial:
    """One life of a service under load, with errors in it."""

    def __init__(self, directory: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._nursery = nursery
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(supervisor, "ANSWER_TIMEOUT_S", 1.0 * SLOWNESS)
        monkeypatch.setattr(contain, "RETRY_PAUSE_S", 0.01)

    def run(self, fails: Callable[[Site, int], bool], *, times: int = 1) -> Injector:
        """Nothing is lost, and then the service can be restarted and stopped.

        Args:
            times: How often it goes through everything.
        """
        write_code(self._directory / "app.py", LINE_APP.format(version="v1"))
        injector = Injector(fails)

        def client(stage: Stage) -> None:
            settle(stage)  # a worker that fails while there is no other one is a service that cannot start
            injector.is_armed = True
            with Hammer(stage.port) as hammer:
                for _ in range(times):
                    act(stage)
                write_code(self._directory / "app.py", LINE_APP.format(version="v2"))
                report = stage.ask(RestartRequest())
                assert isinstance(report, Report), report
                assert report.outcome == "done", report
                hammer.wait_answers(5, "v2")
                assert not hammer.failures

        path = self._directory / "manager.sock"
        with bind_notify(str(path)), closing_file(path):  # it never reads: soon it takes no more
            for name, value in (("NOTIFY_SOCKET", str(path)), ("WATCHDOG_USEC", "200000")):
                self._monkeypatch.setenv(name, value)
            assert (
                play(
                    self._directory,
                    self._nursery,
                    self._monkeypatch,
                    client,
                    task_factory=injector.make,
                    status_bind="127.0.0.1:0",
                    health_lag_max=60,
                    preload=True,
                    before_start="true",
                    after_restart=("sh", "-c", "cat; echo told"),
                )
                == 0
            )
        return injector


@contextmanager
def closing_file(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink()


@pytest.fixture
def trial(tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(tmp_path, nursery, monkeypatch)


def test_an_error_at_each_await_of_each_task_loses_nothing(trial: Trial, capfd: pytest.CaptureFixture[str]) -> None:
    """All of them in one life, each the first time that it is reached."""
    injector = trial.run(lambda site, count: count == 1, times=3)
    told = capfd.readouterr().out
    assert len(injector.thrown) > 30
    assert [site for site in injector.thrown if f"InjectedError: at {site}" not in told] == []
    missed = [(name, lines[0]) for name, lines in awaits() if not any((name, at) in injector.passed for at in lines)]
    assert len(missed) < MISSED_MAX, missed


def test_an_error_at_each_await_of_a_take_over_loses_nothing(
    tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the supervisor that comes; those of the one that leaves are among the others."""
    monkeypatch.setattr(contain, "RETRY_PAUSE_S", 0.01)
    injector = Injector(lambda site, count: site[0] == "supervisor/takeover.py" and count == 1)
    injector.is_armed = True
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--settle", "0").wait_ready() as old, Hammer(old.port) as hammer:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v2"))

        def client(stage: Stage) -> None:
            assert old.wait() == 0
            settle(stage)
            hammer.wait_answers(5, "v2")
            assert isinstance(stage.ask(RestartRequest()), Report)
            assert not hammer.failures

        assert play(tmp_path, nursery, monkeypatch, client, task_factory=injector.make, takes_over=True) == 0
    told = capfd.readouterr().out
    assert injector.thrown
    assert [site for site in injector.thrown if f"InjectedError: at {site}" not in told] == []


def test_a_take_over_that_fails_by_an_error_of_the_old_supervisor_leaves_it_as_it_was(
    tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It went on refusing every restart, as if it were being succeeded."""

    send = Channel.send

    async def fail(channel: Channel, data: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            raise InjectedError("while it hands over")
        await send(channel, data)

    def client(stage: Stage) -> None:
        settle(stage)
        with monkeypatch.context() as patch:
            patch.setattr(Channel, "send", fail)
            with pytest.raises(ControlError, match="HP642"):
                anyio.run(take_over, str(stage.runtime), "svc")
        settle(stage)
        assert isinstance(stage.ask(RestartRequest()), Report)

    assert play(tmp_path, nursery, monkeypatch, client) == 0
    assert "InjectedError: while it hands over" in capfd.readouterr().out


@pytest.mark.soak
@pytest.mark.skipif(RESTARTS < 10, reason="one life for each await: make soak")
@pytest.mark.timeout(3600)
def test_soak(trial: Trial, capfd: pytest.CaptureFixture[str]) -> None:
    """As above, each in a life of its own."""
    sites = sorted(trial.run(lambda site, count: False).reached)
    for target in sites:
        for occurrence in range(1, 1 + RESTARTS // 10):
            injector = trial.run(lambda site, count: (site, count) == (target, occurrence))  # noqa: B023
            told = capfd.readouterr().out
            assert not injector.thrown or f"InjectedError: at {target}" in told
            with capfd.disabled():
                print(f"{target[0]}:{target[1]} #{occurrence}")
