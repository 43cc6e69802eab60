"""Files that disappear under a running service."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from hotport.address import parse_address
from hotport.errors import KernelError
from hotport.kernel.fds import lock_directory, private_directory
from hotport.kernel.notify import notify
from hotport.kernel.sockets import bind_listener, socket_file
from hotport.kernel.spawn import Child
from hotport.model import lifecycle, service
from hotport.model.lifecycle import Phase
from hotport.options import Options
from hotport.supervisor import keeper
from hotport.supervisor.control import serve_control
from hotport.supervisor.keeper import keep_files
from hotport.supervisor.launch import Surroundings
from hotport.supervisor.manager import ServiceManager
from hotport.supervisor.process import WorkerProcess
from hotport.supervisor.recovery import Found
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.supervisor.upgrade import Upgrade
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import ListenOrder, Reply, Status, StatusRequest, decode, encode
from hotport.wire.sdnotify import encode_notification
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio

NAMES = ["control.sock", "notify.sock"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PAUSE_S", 0.0)


class Worker(WorkerProcess):
    """One that notes its orders, and is no process."""

    ordered: list[Any] = []  # noqa: RUF012  of the only one, from its start

    def order(self, message: Any) -> None:
        self.ordered.append(message)


class Place:
    """A supervisor in its runtime directory, with one worker that is no process."""

    def __init__(self, root: Path, stack: ExitStack, **options: Any) -> None:
        self.directory = root / "run" / "svc"
        self.socket = root / "app.sock"
        private_directory(str(root / "run"))
        private_directory(str(self.directory))
        lock = lock_directory(str(self.directory))
        assert lock is not None
        self.rundir = RuntimeDirectory.create(str(self.directory), lock, stack)
        address = parse_address(f"unix:{self.socket}")
        self.address = str(address)
        made = Options(**{"target": "app:app", "bind": (self.address,), **options})
        manager = ServiceManager({}, os.getpid())
        self.supervisor = Supervisor(
            "svc",
            str(self.directory),
            made,
            self.rundir.notify,
            Surroundings({}, str(root)),
            found=Found(listeners={1: {self.address: bind_listener(address, backlog=8)}}),
            read_options=lambda directory: made,
            manager=manager,
        )
        stack.callback(self.rundir.close)
        stack.callback(self.supervisor.close)
        self.process = Worker(1, 1, Child(os.getpid(), -1), str(self.directory / "worker-1.1.sock"), is_foreign=False)
        self.process.ordered = []
        self.process.held = set(self.supervisor.owned.sockets(1).values())
        self.process.is_talking = True
        self.supervisor.fleet.processes[1] = self.process
        self.set_service(generation=1)
        for owner, names in ((self.process, ("_orders", "_pending")), (self.supervisor, ("_put", "_inputs"))):
            for name in names:
                stream: Any = getattr(owner, name, None)
                if hasattr(stream, "close"):
                    stack.callback(stream.close)
        self.given: list[str] = []

    def set_service(self, **changes: Any) -> None:
        workers = {1: lifecycle.Worker(1, 1, Phase.SERVING)}
        self.supervisor.service = service.Service(wanted=1, workers=workers, generations=1, **changes)

    def takes(self, monkeypatch: pytest.MonkeyPatch, *, does: bool = True) -> None:
        """Whether the worker takes listeners that it is given."""

        async def transfer(listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket] = ()) -> None:
            if not does:
                raise ConnectionError("the worker has not taken its listeners")
            self.given += listeners

        monkeypatch.setattr(self.process, "transfer", transfer)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def place(tmp_path: Path, stack: ExitStack) -> Place:
    return Place(tmp_path, stack)


def sockets_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    """What has been logged since it was asked last."""
    return "".join(capsys.readouterr())


async def until(claim: Callable[[], bool]) -> None:
    """Return when something is true that a task of this loop makes true."""
    with anyio.fail_after(DEADLINE_S):
        while not claim():
            await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def kept(place: Place) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_files, place.supervisor, place.rundir)
        await anyio.wait_all_tasks_blocked()
        yield
        tasks.cancel_scope.cancel()


def ask_status(path: Path) -> Status:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path))
        sock.sendall(encode_frame(encode(StatusRequest())))
        decoder, replies = FrameDecoder(), list[Any]()
        while not replies:
            replies = [decode(payload, Reply) for payload in decoder.feed(sock.recv(65536))]
    assert isinstance(replies[0], Status)
    return replies[0]


# -- the runtime directory ----------------------------------------------------------------------------------


def remove_all(place: Place) -> None:
    shutil.rmtree(place.directory.parent, ignore_errors=True)


def move_away(place: Place) -> None:
    shutil.move(place.directory, place.directory.parent / "elsewhere")


def remove_sockets(place: Place) -> None:
    for name in NAMES:
        (place.directory / name).unlink()


def replace_sockets(place: Place) -> None:
    for name in NAMES:
        (place.directory / "other").touch()
        (place.directory / "other").rename(place.directory / name)


@pytest.mark.parametrize("happens", [remove_all, move_away, remove_sockets, replace_sockets])
async def test_commands_and_workers_reach_the_supervisor_after_its_files_were_removed(
    place: Place, happens: Callable[[Place], None]
) -> None:
    """A cleaner of /tmp had removed them: the service could never be restarted or stopped by a command again."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_control, place.supervisor, place.rundir, Upgrade(place.supervisor, place.rundir))
        async with kept(place):
            before = socket_file(str(place.directory / "control.sock"))
            happens(place)
            control = place.directory / "control.sock"
            await until(lambda: control.is_socket() and socket_file(str(control)) != before)
            await anyio.wait_all_tasks_blocked()
            status = await anyio.to_thread.run_sync(ask_status, control)
            assert status.service == "svc"
            assert notify(str(place.directory / "notify.sock"), encode_notification(ready=True))
            assert stat.S_IMODE(place.directory.stat().st_mode) == 0o700
            assert lock_directory(str(place.directory)) is None
        tasks.cancel_scope.cancel()
    shutil.rmtree(place.directory.parent / "elsewhere", ignore_errors=True)


async def test_files_are_looked_at_when_a_worker_is_started(place: Place) -> None:
    """Without inotify, a worker was started in a directory that is not there, and failed."""
    remove_all(place)
    assert place.rundir.mend(place.supervisor)
    assert sockets_in(place.directory) == NAMES
    assert not place.rundir.mend(place.supervisor)


async def test_last_words_of_a_worker_are_heard_when_the_notify_socket_is_made_again(place: Place) -> None:
    assert notify(str(place.directory / "notify.sock"), encode_notification(status="warming up"))
    (place.directory / "notify.sock").unlink()
    place.rundir.mend(place.supervisor)
    assert place.process.status == "warming up"


async def test_worker_is_told_to_make_its_socket_again(place: Place) -> None:
    place.rundir.mend(place.supervisor)
    assert place.process.ordered == [ListenOrder()]
    place.socket.rename(place.process.control_path)
    place.rundir.mend(place.supervisor)
    assert place.process.ordered == [ListenOrder()]
    os.unlink(place.process.control_path)


async def test_directory_that_another_supervisor_has_by_now_is_left_to_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would make the sockets again and again, and order the same workers about."""
    remove_all(place)
    place.directory.mkdir(parents=True, mode=0o700)
    place.directory.parent.chmod(0o700)
    other = lock_directory(str(place.directory))
    assert other is not None
    for _ in range(2):
        assert not place.rundir.mend(place.supervisor)
    assert sockets_in(place.directory) == []
    assert logged(capsys).count("another supervisor has locked it") == 1
    os.close(other)
    assert place.rundir.mend(place.supervisor)


async def test_directory_that_cannot_be_made_is_said_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    remove_all(place)
    place.directory.parent.touch()
    for _ in range(2):
        assert not place.rundir.mend(place.supervisor)
    assert logged(capsys).count("HP622") == 1
    place.directory.parent.unlink()
    assert place.rundir.mend(place.supervisor)


@pytest.mark.parametrize("claim", ["is_succeeded", "is_departing"])
async def test_files_of_another_supervisor_are_left_alone(place: Place, claim: str) -> None:
    setattr(place.supervisor, claim, True)
    remove_all(place)
    assert not place.rundir.mend(place.supervisor)
    assert not place.directory.exists()
    place.socket.unlink()
    assert not await keeper._mend_listeners(place.supervisor)
    assert not place.socket.exists()


async def test_without_inotify_the_service_runs_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise KernelError("HP214", "cannot watch files", errno=24, cause="no instance", fix="sysctl")

    monkeypatch.setattr(keeper, "Watch", refuse)
    await keep_files(place.supervisor, place.rundir)
    assert "files.not_watched" in logged(capsys)


async def test_error_that_is_not_expected_costs_a_log_line_and_not_the_supervisor(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [RuntimeError("a bug of ours"), FileNotFoundError("removed between two calls")]

    def fail(supervisor: Supervisor) -> dict[str, str]:
        if errors:
            raise errors.pop()
        return {}

    monkeypatch.setattr(keeper, "FAILED_PAUSE_S", 0.0)
    monkeypatch.setattr(keeper, "_mend_status_port", fail)
    async with kept(place):
        (place.directory / "control.sock").unlink()
        await until((place.directory / "control.sock").exists)
        await until(lambda: not errors)
    assert logged(capsys).count("] files.failed") == 2
    monkeypatch.setattr(RuntimeDirectory, "_mend", lambda *_: 1 / 0)
    place.rundir.mend(place.supervisor)
    assert "ZeroDivisionError" in logged(capsys)


# -- listeners ----------------------------------------------------------------------------------------------


async def test_socket_file_is_bound_again_and_given_to_those_who_serve(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restart said "done", doctor "nothing found", and nobody could connect."""
    place.takes(monkeypatch)
    os.chmod(place.socket, 0o666)
    (old,) = place.supervisor.owned.sockets(1).values()
    async with kept(place):
        place.socket.unlink()
        await until(lambda: place.given == [place.address])
        await anyio.wait_all_tasks_blocked()
        place.socket.unlink()
        await until(lambda: place.given == [place.address] * 2)
        await anyio.wait_all_tasks_blocked()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(place.socket))
    assert stat.S_IMODE(place.socket.stat().st_mode) == 0o666
    assert old.fileno() == -1
    assert len(place.process.held) == 1
    assert place.supervisor.owned.gone == {}
    assert "listener.remade" in logged(capsys)


async def test_socket_file_that_no_worker_takes_is_not_made_for_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients would connect, and wait for ever."""
    place.takes(monkeypatch, does=False)
    sockets = place.supervisor.owned.sockets(1)
    place.socket.unlink()
    async with kept(place):
        assert not place.socket.exists()
    assert place.supervisor.owned.sockets(1) == sockets
    (why,) = place.supervisor.owned.gone.values()
    assert why == "no worker takes it while it serves; hotport restart svc binds it again"
    assert logged(capsys).count("listener.gone") == 1


@pytest.mark.parametrize("changes", [{"command": ("server",), "target": None}, {"kind": "sockets"}])
async def test_program_that_takes_listeners_only_at_its_start_gets_it_with_the_next_restart(
    tmp_path: Path, stack: ExitStack, changes: dict[str, Any]
) -> None:
    place = Place(tmp_path, stack, **changes)
    place.socket.unlink()
    async with kept(place):
        assert not place.socket.exists()
    (why,) = place.supervisor.owned.gone.values()
    assert why.endswith("at its start, and only there; hotport restart svc binds it again")


async def test_another_server_at_the_path_is_named_and_stays(place: Place) -> None:
    place.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.socket))
        other.listen()
        async with kept(place):
            pass
    (why,) = place.supervisor.owned.gone.values()
    assert f"pid {os.getpid()}" in why
    place.supervisor.owned.close()
    assert place.socket.exists()
    place.socket.unlink()


async def test_what_is_gone_while_a_generation_starts_is_bound_when_it_serves(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.takes(monkeypatch)
    place.set_service(generation=0)
    async with kept(place):
        place.socket.unlink()
        await anyio.wait_all_tasks_blocked()
        assert not place.socket.exists()
        place.set_service(generation=1)
        place.supervisor._stepped.set()
        await until(place.socket.exists)


# -- the status port ----------------------------------------------------------------------------------------


async def test_status_port_is_bound_again(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Health checks failed until the supervisor was started again."""
    path = tmp_path / "status.sock"
    address = f"unix:{path}"
    first = bind_listener(parse_address(address), backlog=8)
    place.supervisor.use_status_port(StatusPort(address, address, first, socket_file(str(path))))
    stepped: list[StatusPort | None] = []

    async def wait() -> None:
        await place.supervisor.wait_stepped()
        stepped.append(place.supervisor.status_port)

    async with anyio.create_task_group() as tasks, kept(place):
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        os.unlink(path)
        await until(lambda: bool(stepped))
    (port,) = stepped
    assert port is not None
    assert first.fileno() == -1
    with port.listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            async with kept(place):
                pass
    assert f"is listening on {path}" in logged(capsys)
    os.unlink(path)
