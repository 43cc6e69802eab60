"""Asking what is left of a service: workers that end meanwhile, and processes that only look like workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from hotport.errors import ControlError
from hotport.kernel.fds import give_directory
from hotport.kernel.loadpage import make_load_page
from hotport.kernel.sockets import bind_control
from hotport.model.lifecycle import Phase
from hotport.options import WORKERS_MAX
from hotport.supervisor.recovery import Found, survey
from hotport.supervisor.takeover import take_over
from hotport.wire.frames import encode_frame
from hotport.wire.messages import Hello, Listening, Memory, encode, user_directory, worker_socket
from tests.support import STRANGER

pytestmark = pytest.mark.anyio


async def ask(directory: Path, *, answers: bool) -> Found:
    """Survey a directory with one worker, which answers or hangs up without having read anything."""

    async def behave(listener: socket.socket) -> None:
        await anyio.wait_readable(listener)
        connection, _ = listener.accept()
        with connection:
            await anyio.wait_readable(connection)
            if answers:
                hello = Hello(pid=os.getpid(), service="svc", generation=1, worker=1, phase="serving")
                connection.send(encode_frame(encode(hello)) + encode_frame(encode(Listening(addresses=()))))

    path = directory / "worker-1.1.sock"
    with bind_control(str(path)) as control:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(behave, control)
            found = await survey(str(directory))
    path.unlink()
    return found


async def test_worker_that_ends_while_it_is_asked_is_taken_to_leave(tmp_path: Path) -> None:
    found = await ask(tmp_path, answers=False)  # it took the next supervisor along, with ECONNRESET
    assert [(each.pid, each.phase) for each in found.orphans] == [(os.getpid(), Phase.DRAINING)]
    assert found.current == 2


async def test_worker_that_is_slow_to_answer_is_asked_again_while_there_is_no_listener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two generations of the strategy rebind the only worker that goes on has no listener."""
    monkeypatch.setattr("hotport.supervisor.recovery.ANSWER_TIMEOUT_S", 0.01)
    hello = Hello(pid=os.getpid(), service="svc", generation=1, worker=1, phase="ready")

    async def behave(listener: socket.socket) -> None:
        await anyio.wait_readable(listener)
        with listener.accept()[0] as hasty:
            while hasty.recv(4096):
                await anyio.wait_readable(hasty)
        await anyio.wait_readable(listener)
        with listener.accept()[0] as patient:
            patient.send(encode_frame(encode(hello)) + encode_frame(encode(Listening(addresses=()))))
            await anyio.wait_readable(patient)

    path = tmp_path / "worker-1.1.sock"
    with bind_control(str(path)) as control:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(behave, control)
            found = await survey(str(tmp_path))
    path.unlink()
    assert [(each.has_answered, each.phase) for each in found.orphans] == [(True, Phase.READY)]


async def test_another_users_socket_is_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next supervisor would have taken its listeners, and sent its signals to the stranger's process."""
    monkeypatch.setattr("hotport.kernel.sockets.peer_credentials", lambda sock: STRANGER)
    with bind_control(str(tmp_path / "worker-1.1.sock")):
        assert (await survey(str(tmp_path))).orphans == ()
    (tmp_path / "worker-1.1.sock").unlink()


async def test_nothing_is_taken_over_from_another_users_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotport.kernel.sockets.peer_credentials", lambda sock: STRANGER)
    with bind_control(str(tmp_path / "control.sock")), pytest.raises(ControlError, match="HP656") as refused:
        await take_over(str(tmp_path), "svc")
    assert "another user listens (pid 4242 of uid 65534)" in refused.value.cause
    (tmp_path / "control.sock").unlink()


@pytest.mark.parametrize(
    "garbage", [{"HOTPORT_GENERATION": "one"}, {"HOTPORT_WORKER": '{"x":' + "[" * 60_000}], ids=["number", "JSON"]
)
async def test_process_with_garbage_for_an_environment_costs_only_itself(
    tmp_path: Path, garbage: dict[str, str]
) -> None:
    """No supervisor could start as long as it ran."""
    (tmp_path / "notify.sock").touch()
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify.sock"), "HOTPORT_GENERATION": "1", **garbage}
    with subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True) as stray:  # noqa: ASYNC220
        try:
            found = await ask(tmp_path, answers=True)
        finally:
            stray.kill()
    assert [(each.pid, each.phase) for each in found.orphans] == [(os.getpid(), Phase.SERVING)]


@pytest.mark.parametrize("is_program", [False, True])
async def test_process_that_a_worker_has_started_is_none(tmp_path: Path, is_program: bool) -> None:
    (tmp_path / "notify.sock").touch()
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify.sock"), "HOTPORT_GENERATION": "1", "LISTEN_PID": "1"}
    if not is_program:
        options = '{"bind":["tcp://127.0.0.1:8000"],"target":"app:app"}'
        spec = f'{{"service":"svc","directory":"{tmp_path}","generation":1,"worker":1,"options":{options}}}'
        environment["HOTPORT_WORKER"] = spec
    with subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True) as helper:  # noqa: ASYNC220
        try:
            if is_program:
                assert (await survey(str(tmp_path))).orphans == ()
            else:
                found = await ask(tmp_path, answers=True)
                assert [(each.pid, each.phase) for each in found.orphans] == [(os.getpid(), Phase.SERVING)]
        finally:
            helper.kill()


async def test_load_page_comes_back_from_workers_one_for_each_generation(tmp_path: Path) -> None:
    """Without it, a worker that is started next would have a page of its own, and not see its siblings."""
    pages = {(1, 1): make_load_page(), (2, 2): make_load_page(), (2, 3): -1, (3, 4): -1}
    pages[2, 3] = os.dup(pages[2, 2])

    async def behave(listener: socket.socket, generation: int, worker: int) -> None:
        await anyio.wait_readable(listener)
        connection, _ = listener.accept()
        with connection:
            await anyio.wait_readable(connection)
            page = pages[generation, worker]
            hello = Hello(pid=os.getpid(), service="svc", generation=generation, worker=worker, phase="serving")
            told = Listening(addresses=(), has_page=page >= 0)
            connection.send(encode_frame(encode(hello)))
            socket.send_fds(connection, [encode_frame(encode(told))], [page] if page >= 0 else [])

    with ExitStack() as stack:
        async with anyio.create_task_group() as tasks:
            for generation, worker in pages:
                path = tmp_path / f"worker-{generation}.{worker}.sock"
                tasks.start_soon(behave, stack.enter_context(bind_control(str(path))), generation, worker)
                stack.callback(path.unlink)
            found = await survey(str(tmp_path))
    assert set(found.pages) == {1, 2}
    for generation, page in found.pages.items():
        assert os.fstat(page).st_ino == os.fstat(pages[generation, generation]).st_ino
        os.close(page)
    for page in pages.values():
        if page >= 0:
            os.close(page)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
async def test_workers_of_another_user_are_not_believed_to_be_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names a file of root's as its address, leads to a socket of root's, and wants any number of workers."""
    root_file = tmp_path / "root.sock"
    place = tmp_path / user_directory(65534)
    give_directory(str(place), 65534, 65534)
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o711)
    ready, tell = os.pipe()
    with bind_control(str(root_file)):
        (place / worker_socket(1, 2)).symlink_to(root_file)
        liar = os.fork()
        if liar == 0:
            try:
                _lie(place / worker_socket(1, 1), f"unix:{root_file}", tell)
            finally:
                os._exit(0)
        try:
            os.read(ready, 1)
            found = await survey(str(tmp_path))
            assert [(each.pid, each.user, each.phase) for each in found.orphans] == [(liar, 65534, Phase.SERVING)]
            assert found.listeners == {}
            assert found.wanted == WORKERS_MAX
        finally:
            os.kill(liar, signal.SIGKILL)
            os.waitpid(liar, 0)  # noqa: ASYNC222  it was killed
            os.close(ready)
            os.close(tell)
        assert "another user listens" in capsys.readouterr().out
        for path in place.iterdir():
            path.unlink()
    root_file.unlink()


def _lie(path: Path, address: str, tell: int) -> None:
    """Be a worker of another user."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    memory = Memory(wanted=2**40, generations=1, spawned=1)
    hello = Hello(pid=1, service="svc", generation=1, worker=1, phase="serving", memory=memory)
    with bind_control(str(path)) as control, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # a name of the kernel's choice
        listener.listen()
        control.setblocking(True)
        os.write(tell, b".")
        connection, _ = control.accept()
        told = encode_frame(encode(hello)) + encode_frame(encode(Listening(addresses=(address,))))
        socket.send_fds(connection, [told], [listener.fileno()])
        connection.recv(1000)
        signal.pause()
