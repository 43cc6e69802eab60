"""Templates and the workers that are forked from them: real processes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from hotport.address import listener_name, parse_address
from hotport.errors import StartError
from hotport.kernel import procfs
from hotport.kernel.spawn import Child
from hotport.options import Options
from hotport.supervisor import template as module
from hotport.supervisor.launch import Launch, Surroundings
from hotport.supervisor.template import Template
from tests.support import DEADLINE_S, eventually, write_code

pytestmark = pytest.mark.anyio

#: Its workers write down what they find at their start.
APP = """
import os, random, socket
import hotport

imported_by = os.getpid()

def write(name, *values):
    with open(f"{name}.{os.getpid()}", "w") as file:
        file.write(" ".join(map(str, values)))

@hotport.after_fork
def forked():
    write("forked", imported_by, os.getppid(), os.getpgrp(), random.random())

async def app(scope, receive, send):
    raise RuntimeError("not served")
"""

Start = Callable[..., Template]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a template of the code given; the workers that were forked from it are killed at the end."""
    made: list[Template] = []

    def start(code: str = APP, **options: Any) -> Template:
        write_code(tmp_path / "app.py", code)
        monkeypatch.chdir(tmp_path)
        launch = Launch.resolve(Options(target="app:app", lifespan="off", **options), Surroundings.snapshot())
        found = Template("svc", str(tmp_path), 1, launch)
        found.launch = launch  # type: ignore[attr-defined]
        made.append(found)
        return found

    yield start
    for each in made:
        if each._conversation.fileno() >= 0:
            each.end()
    for path in tmp_path.iterdir():
        if path.is_socket():  # also one that a killed worker had not named yet
            path.unlink()


def fork(template: Template, worker: int, tmp_path: Path, **passed: int) -> Child:
    return template.fork(template.launch.spec("svc", str(tmp_path), 1, worker), passed)  # type: ignore[attr-defined]


def end(child: Child, number: int = signal.SIGKILL) -> None:
    signal.pidfd_send_signal(child.pidfd, number)
    os.waitpid(child.pid, 0)
    os.close(child.pidfd)


async def loaded(template: Template) -> str:
    with anyio.fail_after(DEADLINE_S):
        return await template.wait_loaded()


def found(tmp_path: Path, child: Child, name: str = "forked") -> list[str]:
    path = tmp_path / f"{name}.{child.pid}"
    eventually(lambda: path.exists() and path.read_text() != "", f"{path} is written")
    return path.read_text().split()


async def test_workers_are_children_of_the_supervisor_with_what_was_imported_once(start: Start, tmp_path: Path) -> None:
    template = start()
    assert await loaded(template) == ""
    children = [fork(template, worker, tmp_path) for worker in (1, 2)]
    said = [found(tmp_path, child) for child in children]
    labels = [procfs.arguments(pid)[-1].rstrip() for pid in (template.pid, *(each.pid for each in children))]
    for child in children:
        end(child)  # `waitpid` proves that it is ours
    assert [each[:3] for each in said] == [[str(template.pid), str(os.getpid()), str(each.pid)] for each in children]
    assert said[0][3] != said[1][3], "random numbers of their own"
    assert labels == ["svc/1.template", "svc/1.1", "svc/1.2"]


async def test_descriptors_reach_the_worker_and_do_not_stay_in_the_template(start: Start, tmp_path: Path) -> None:
    template = start()
    assert await loaded(template) == ""
    before = os.listdir(f"/proc/{template.pid}/fd")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        name = listener_name(parse_address(f"tcp://127.0.0.1:{listener.getsockname()[1]}"))
        child = fork(template, 1, tmp_path, **{name: listener.fileno()})
        inodes = [os.fstat(listener.fileno()).st_ino]
        try:
            eventually(lambda: procfs.has_socket(child.pid, inodes), "the worker has the listener")
            eventually(lambda: os.listdir(f"/proc/{template.pid}/fd") == before, "the template has closed its own")
            assert not procfs.has_socket(template.pid, inodes)
        finally:
            end(child)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("import sys; sys.exit(7)", "HP508"),
        ("def app(): 1 / 0", "HP504"),
        (
            "from threading import *\nThread(target=Event().wait, name='pool', daemon=True).start()\n" + APP,
            "HP520 cannot fork workers from a process that has imported app:app\n"
            "  cause: its import has started threads, which forked workers would not have: pool\n",
        ),
    ],
    ids=["raises", "exits", "kind", "threads"],
)
async def test_import_that_fails_is_told(start: Start, code: str, error: str) -> None:
    template = start(code)
    assert error in await loaded(template)
    assert not template.is_loaded
    with anyio.fail_after(DEADLINE_S):
        await template.wait_ended()
    assert template.collect() == "exited 3"


async def test_template_that_dies_at_its_import_has_an_exit_status(start: Start) -> None:
    template = start("import os; os._exit(9)")
    assert await loaded(template) == ""
    assert not template.is_loaded
    with anyio.fail_after(DEADLINE_S):
        await template.wait_ended()
    assert template.collect() == "exited 9"


async def test_template_ends_with_its_supervisor(start: Start) -> None:
    template = start()
    assert await loaded(template) == ""
    template._conversation.shutdown(socket.SHUT_RDWR)
    with anyio.fail_after(DEADLINE_S):
        await template.wait_ended()
    assert template.collect() == "exited 0"


async def test_template_that_has_ended_forks_nothing(start: Start, tmp_path: Path) -> None:
    template = start()
    assert await loaded(template) == ""
    template.kill()
    with anyio.fail_after(DEADLINE_S):
        await template.wait_ended()
    with pytest.raises(StartError, match="HP522"):
        fork(template, 1, tmp_path)


async def test_template_that_hangs_is_killed(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORK_TIMEOUT_S", 0.05)
    template = start()
    assert await loaded(template) == ""
    os.kill(template.pid, signal.SIGSTOP)
    with pytest.raises(StartError, match="HP522"):
        fork(template, 1, tmp_path)
    with anyio.fail_after(DEADLINE_S):
        await template.wait_ended()
    assert template.collect() == "killed by SIGKILL"


async def test_template_without_room_for_a_process_says_so(start: Start, tmp_path: Path) -> None:
    template = start("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n" + APP)
    assert await loaded(template) == ""
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(StartError, match="HP521"):
        fork(template, 1, tmp_path, **{f"l{n}": listener.fileno() for n in range(16)})
    child = fork(template, 2, tmp_path)
    end(child)


async def test_connection_that_the_import_has_made_is_named(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as database:
        address = database.getsockname()
        template = start(f"import socket\ndb = socket.create_connection({address})\n" + APP)
        assert await loaded(template) == ""
    told = capfd.readouterr().err
    assert "preload.connection" in told
    assert str(address[1]) in told


async def test_lines_that_the_import_has_printed_are_written_once(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template = start("print('imported')\n" + APP)
    assert await loaded(template) == ""
    for worker in (1, 2):
        child = fork(template, worker, tmp_path)
        found(tmp_path, child)
        end(child, signal.SIGTERM)
    assert capfd.readouterr().out.count("imported") == 1


async def test_template_of_another_user_cannot_name_any_process(start: Start, tmp_path: Path) -> None:
    """The supervisor, which is root, ends the process groups of its workers."""
    template = start()
    with anyio.fail_after(DEADLINE_S):
        assert await template.wait_loaded() == ""
    template._user = 65534  # so that our worker is none of its
    with pytest.raises(StartError, match="HP522") as raised:
        template.fork(template.launch.spec("svc", str(tmp_path), 1, 1), {})  # type: ignore[attr-defined]
    assert "which it names, is none" in raised.value.cause
    worker = int(raised.value.cause.partition("process ")[2].partition(",")[0].rpartition(" ")[2])
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)  # noqa: ASYNC222  it was killed
