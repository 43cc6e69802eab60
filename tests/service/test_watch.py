"""``hotport serve --watch``: code changes, and the service restarts by itself."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from hotport.cli import watch
from hotport.cli.watch import watching
from hotport.errors import ConfigError
from hotport.options import Options
from tests.support import DEADLINE_S, Service, eventually, write_code

CODE = "async def app(stream):\n    await stream.send({answer!r})\n"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    write_code(tmp_path / "app.py", CODE.format(answer=b"1"))
    with Service(tmp_path, "app:app", "--watch", "--settle", "0", "--ready-timeout", "20s") as service:
        yield service.wait_ready()


def answer(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock, sock.makefile("rb") as file:
        return file.read()


def test_changed_code_answers_without_anybody_asking(service: Service) -> None:
    port = service.port
    assert answer(port) == b"1"
    write_code(service.directory / "app.py", CODE.format(answer=b"2"))
    eventually(lambda: answer(port) == b"2", "the new code answers")


def test_broken_code_is_told_in_the_log_and_the_repair_is_served(service: Service) -> None:
    port = service.port
    write_code(service.directory / "app.py", "raise RuntimeError('half a thought')\n")
    eventually(lambda: bool(service.log_events("watch.restart_failed")), "the failure is told")
    (failed,) = service.log_events("watch.restart_failed")
    assert service.log().count("RuntimeError: half a thought") == 1
    assert failed["serving"] == 1
    assert answer(port) == b"1"
    write_code(service.directory / "app.py", CODE.format(answer=b"repaired"))
    eventually(lambda: answer(port) == b"repaired", "the repaired code answers")


def test_a_change_during_a_restart_is_not_lost(service: Service) -> None:
    port = service.port
    os.mkfifo(service.directory / "gate")
    write_code(service.directory / "app.py", "open('gate').read()\n" + CODE.format(answer=b"2"))
    with (service.directory / "gate").open("w"):  # the worker of generation 2 has come to its first line
        write_code(service.directory / "app.py", CODE.format(answer=b"3"))
    eventually(lambda: answer(port) == b"3", "the newest code answers")


def test_a_change_while_somebody_else_restarts_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    write_code(tmp_path / "gated.py", "")
    # What is watched is not what is imported first, so that a restart can be held without the watcher's knowing.
    write_code(tmp_path / "code" / "app.py", "import gated\n" + CODE.format(answer=b"1"))
    env = {"PYTHONPATH": str(tmp_path)}
    args = ("app:app", "--watch", "--settle", "0", "--app-dir", "code")
    with Service(tmp_path, *args, env=env) as service:
        port = service.wait_ready().port
        os.mkfifo(tmp_path / "gate")
        write_code(tmp_path / "gated.py", "import os; os.path.exists('gate') and open('gate').read()\n")
        os.kill(service.process.pid, signal.SIGHUP)
        with (tmp_path / "gate").open("w"):
            write_code(tmp_path / "code" / "app.py", CODE.format(answer=b"2"))
            eventually(lambda: bool(service.log_events("watch.changed")), "the change is seen")
            eventually(lambda: bool(service.log_events("control.refused")), "the restart is refused for now")
        eventually(lambda: answer(port) == b"2", "the newest code answers")


HELD = """
import pathlib

ANSWER = pathlib.Path("config.yaml").read_bytes()

async def app(stream):
    await stream.send(ANSWER)
    async for _ in stream:
        pass
"""


def test_each_edit_is_served_at_once_while_old_streams_are_open(tmp_path: Path) -> None:
    """The second edit waited for the drain of the first one: 30 s, while a page had an event stream open."""
    write_code(tmp_path / "app.py", HELD)
    (tmp_path / "config.yaml").write_bytes(b"1")
    args = ("app:app", "--watch", "--watch-path", "config.yaml", "--settle", "0")
    with ExitStack() as stack:
        port = stack.enter_context(Service(tmp_path, *args)).wait_ready().port

        def answers(wanted: bytes) -> bool:
            with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
                return sock.recv(9) == wanted

        for expected in (b"1", b"2", b"3"):
            if expected != b"1":
                (tmp_path / "new").write_bytes(expected)
                os.replace(tmp_path / "new", tmp_path / "config.yaml")
            eventually(partial(answers, expected), "the new code answers")
            stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S))


def test_the_watcher_ends_with_a_supervisor_that_was_killed(service: Service) -> None:
    below = psutil.Process(service.process.pid).children()
    (watcher,) = (child for child in below if "hotport.cli.watch" in child.cmdline())
    service.process.kill()
    try:
        eventually(lambda: is_over(watcher), "the watcher has ended")
    finally:
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        shutil.rmtree(service.directory / "run")


def is_over(process: psutil.Process) -> bool:
    """Ended, whether or not pid 1 has already collected it."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def test_watching_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"HP332[\s\S]*pip install 'hotport\[watch\]'"), watching(Options()):
        pass


def test_a_path_that_is_not_there_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"HP333 cannot watch .*/nowhere"),
        watching(Options(target="app:app", watch_path=(str(tmp_path / "nowhere"),))),
    ):
        pass
