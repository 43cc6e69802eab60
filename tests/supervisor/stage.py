"""A whole supervisor inside the test process, so that a test can reach into its tasks.

Its workers are real ones, but forked from an interpreter that has imported everything: they start in milliseconds. What
asks the supervisor runs in a thread, as commands and clients run in processes of their own.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hotport import runner
from hotport.kernel.spawn import Child
from hotport.observe import logs
from hotport.options.loading import load
from hotport.supervisor import starter
from hotport.supervisor.supervisor import Supervisor
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import Reply, StatusRequest, StopRequest, TakeOverRequest, decode, encode
from tests.support import DEADLINE_S, LINE_APP, eventually, write_code

TaskFactory = Callable[..., "asyncio.Task[Any]"]

#: Forks a worker for each request: one message with the descriptors of its listeners.
NURSERY = """\
import array, gc, json, os, signal, socket, sys
import hotport.adapters.stream, hotport.worker.__main__ as worker, uvloop

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
sock = socket.socket(fileno=0)
gc.freeze()
while True:
    data, fds, _, _ = socket.recv_fds(sock, 1 << 20, 64)
    if not data:
        break
    asked = json.loads(data)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        moved = [os.dup(fd) if fd < 3 + len(fds) else fd for fd in fds]
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for target, fd in enumerate(moved, 3):
            os.dup2(fd, target)
        os.closerange(3 + len(fds), 1024)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"], LISTEN_PID=str(os.getpid()))
        try:
            code = worker.main()
        finally:
            os._exit(code)
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass
    for fd in fds:
        os.close(fd)
    sock.send(str(pid).encode())
"""


class Nursery:
    """Where workers come from, in place of `hotport.kernel.spawn.spawn`."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}  # no test's
        with theirs:
            argv = [sys.executable, "-c", NURSERY]
            self._process = subprocess.Popen(argv, stdin=theirs.fileno(), env=environment)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: str,
        listeners: Sequence[int] = (),
        listen_names: Sequence[str] = (),
        held: Collection[int] = (),
        identity: object = None,
    ) -> Child:
        """As `hotport.kernel.spawn.spawn`, as this user; the worker that is forked holds no signal."""
        told = {**environment, "LISTEN_FDS": str(len(listeners)), "LISTEN_FDNAMES": ":".join(listen_names)}
        asked = json.dumps({"environment": told, "cwd": cwd}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", listeners))]
        self._sock.sendmsg([asked], rights if listeners else [])
        pid = int(self._sock.recv(100))
        return Child(pid, os.pidfd_open(pid))

    def close(self) -> None:
        self._sock.close()
        self._process.wait(DEADLINE_S)


class Stage:
    """A supervisor that runs, seen by its clients."""

    def __init__(self, directory: Path) -> None:
        self.runtime = directory / "run" / "svc"
        self.supervisor: Supervisor | None = None
        self.began = threading.Event()

    @property
    def port(self) -> int:
        assert self.supervisor is not None
        return int(next(iter(self.supervisor.listeners)).rpartition(":")[2])

    @property
    def status_port(self) -> int:
        assert self.supervisor is not None
        assert self.supervisor.status_port is not None
        return int(self.supervisor.status_port.address.rpartition(":")[2])

    @property
    def is_gone(self) -> bool:
        """The service has ended."""
        return self.supervisor is not None and self.supervisor.finished.is_set()

    def ask(self, request: msgspec.Struct) -> Any:
        """The last word of a conversation."""
        *_, last = self.replies(request)
        return last

    def replies(self, request: msgspec.Struct | bytes) -> Iterator[Any]:
        """Send a request, or a frame of any content, and yield what comes until the supervisor closes."""
        payload = request if isinstance(request, bytes) else encode(request)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(self.runtime / "control.sock"))
            sock.sendall(encode_frame(payload))
            decoder = FrameDecoder()
            while data := sock.recv(65536):
                yield from (decode(reply, Reply) for reply in decoder.feed(data))

    def lose_successor(self) -> None:
        """Take the service over, and leave before having committed; return when the supervisor has its paths again."""
        path = self.runtime / "control.sock"
        before = path.stat().st_ino
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(path))
            sock.sendall(encode_frame(encode(TakeOverRequest(version="test"))))
            _, descriptors, _, _ = socket.recv_fds(sock, 65536, 64)
            for fd in descriptors:
                os.close(fd)
        if descriptors:
            eventually(lambda: path.exists() and path.stat().st_ino != before, "it has made its paths anew")

    def is_stopped(self) -> bool:
        """The service has ended, which it is asked for."""
        assert self.supervisor is not None
        if not self.is_gone and not self.supervisor.service.is_stopping:  # a second request would cut
            with suppress(OSError):  # a conversation may fail, too
                list(self.replies(StopRequest()))
        return self.is_gone

    def wait_serving(self, workers: int = 1) -> None:
        """Return when so many workers serve, and nothing else goes on."""

        def serves() -> bool:
            status = self.ask(StatusRequest())
            return not status.restarting and [each.phase for each in status.workers] == ["serving"] * workers

        eventually(serves, f"{workers} workers serve")


def play(
    directory: Path,
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
    client: Callable[[Stage], None],
    *,
    task_factory: TaskFactory | None = None,
    takes_over: bool = False,
    **options: object,
) -> int:
    """Run a supervisor in this thread and `client` in another one; stop the service when that returns.

    Args:
        task_factory: Makes the tasks of the event loop.
        options: As in ``hotport.toml``.

    Returns:
        The supervisor's exit code.
    """
    if not (directory / "app.py").exists():
        write_code(directory / "app.py", LINE_APP.format(version="v1"))
    stage = Stage(directory)
    flags = {
        "target": "app:app",
        "name": "svc",
        "bind": ("127.0.0.1:0",),
        "settle": 0,
        **options,
    }

    async def supervise(supervisor: Supervisor, *others: Any) -> None:
        stage.supervisor = supervisor
        loop = asyncio.get_running_loop()
        if task_factory is not None:
            loop.set_task_factory(task_factory)
        stage.began.set()
        await loop.create_task(original(supervisor, *others))

    def act() -> None:
        assert stage.began.wait(DEADLINE_S)
        assert stage.supervisor is not None
        try:
            client(stage)
        finally:
            eventually(stage.is_stopped, "it ends")

    original = runner._supervise
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with ExitStack() as stack:
        for number, handler in handlers.items():  # coverage has one of its own
            stack.callback(signal.signal, number, handler)
        patch = stack.enter_context(monkeypatch.context())
        pool = stack.enter_context(ThreadPoolExecutor(1))
        patch.setenv("HOTPORT_RUNTIME_DIR", str(directory / "run"))
        patch.chdir(directory)
        patch.setattr(runner, "_supervise", supervise)
        patch.setattr(runner, "configure", lambda **_: None)
        # If an earlier test has imported rich, structlog draws each traceback with it, for seconds.
        renderer = logs.structlog.get_config()["processors"][-1]
        patch.setattr(renderer, "_exception_formatter", logs.structlog.dev.plain_traceback)
        patch.setattr(starter, "spawn", nursery.spawn)
        acting = pool.submit(act)
        code = runner.supervise(lambda cwd: load(file=None, environ={}, flags=flags, cwd=cwd), takes_over=takes_over)
        acting.result(DEADLINE_S)
    return code
