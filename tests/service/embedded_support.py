"""A program of a test's own that embeds a server and restarts itself."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.support import DEADLINE_S, watching_pid, write_code

#: Serves ``app.APP``; USR1 restarts it. Each line that it prints begins with what it is about.
PROGRAM = """\
import asyncio, json, os, signal, sys
import hotport
import app

def tell(what, **said):
    said = {"pid": os.getpid(), "notify": os.environ.get("NOTIFY_SOCKET"), **said,
            "descriptors": len(os.listdir("/proc/self/fd"))}
    os.write(1, f"{what} {json.dumps(said)}\\n".encode())

async def main():
    loop = asyncio.get_running_loop()
    options = {"bind": "tcp://127.0.0.1:0", "drain_timeout": 20, "kill_timeout": 1, **getattr(app, "OPTIONS", {})}
    tasks = set()
    async with hotport.serve(app.APP, **options) as server:
        async def restart():
            try:
                done = await server.restart(*getattr(app, "RESTART", ()))
            except hotport.RestartError as error:
                tell("failed", code=error.code, text=str(error), notes=getattr(error, "__notes__", []),
                     phase=error.phase, serving=error.serving)
            else:
                tell("restarted", successor=done.pid, generation=done.generation, connections=done.connections,
                     handed_off=done.handed_off, finished=done.finished, cut=done.cut,
                     is_ordered=0 < done.ready_s <= done.drained_s)

        def on_usr1():
            task = loop.create_task(restart())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(signal.SIGUSR1, on_usr1)
        loop.add_signal_handler(signal.SIGTERM, server.close)
        with open("pid.new", "w") as file:
            file.write(str(os.getpid()))
        os.replace("pid.new", "pid")
        getattr(app, "BEGUN", lambda server: None)(server)
        tell("serving", generation=server.generation, addresses=server.addresses, argv=sys.argv, cwd=os.getcwd(),
             group=os.getpgid(0),
             names=sorted(name for name in os.environ if name.startswith(("LISTEN_", "HOTPORT_SUCC"))))
        await server.wait_closed()
    tell("ended", fates=dict(server.connections.fates))

if os.environ.get("LOOP") == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""

#: Answers each line with a version and its pid.
LINES = """\
import os
import hotport

@hotport.restartable
async def APP(stream):
    async for _ in stream:
        await stream.send(f"{version} {{os.getpid()}}\\n".encode())
"""


#: Kills the process where it comes to call a function; to put at the end of an ``app.py``.
CRASH = """
import importlib, os, signal

def crash(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

module, _, name = {where!r}.partition(":")
owner = importlib.import_module(module)
*path, last = name.split(".")
for each in path:
    owner = getattr(owner, each)
getattr(owner, last)
setattr(owner, last, crash)
"""


class Told(NamedTuple):
    """One line of the program."""

    what: str
    said: dict[str, Any]


class Embedded:
    """The program, all its generations: they share stdout.

    Args:
        directory: Gets ``server.py`` and ``app.py``; the working directory.
        app: The text of ``app.py``: ``APP``, and ``OPTIONS`` of `hotport.serve`.
        argv: How it is started, after the interpreter.
        prefix: What the command runs under.

    Attributes:
        process: The first generation.
        pids: Every generation that has served.
    """

    def __init__(
        self,
        directory: Path,
        app: str,
        *argv: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.directory = directory
        self.stderr_path = directory / "stderr"
        self.pids: list[int] = []
        self.said: list[Told] = []
        self.has_stopped = False
        self.write(app)
        write_code(directory / "server.py", PROGRAM)
        where = cwd or directory
        environment = {**os.environ, "PYTHONPATH": str(directory), **(env or {}), "PWD": str(where)}
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*prefix, python, *(argv or ("server.py",))],
                cwd=where,
                env=environment,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()
        self._unread = b""

    def __enter__(self) -> Self:
        self.wait("serving")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and not self.has_stopped:
                self.stop()
        finally:
            self.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()
            if kind is not None:
                sys.stderr.write(f"{self.said}\n{self.stderr()}")

    def write(self, app: str) -> None:
        """New code on disk."""
        write_code(self.directory / "app.py", app)

    def stderr(self) -> str:
        """What all generations have written there."""
        return self.stderr_path.read_text()

    @property
    def pid(self) -> int:
        """The last generation that has served."""
        return self.pids[-1]

    @property
    def serving(self) -> list[dict[str, Any]]:
        """What each generation has said about itself."""
        return [told.said for told in self.said if told.what == "serving"]

    @property
    def port(self) -> int:
        """Of the first address."""
        return int(self.serving[0]["addresses"][0].rpartition(":")[2])

    def told(self) -> Told | None:
        """The next line; None when every generation has ended."""
        end = time.monotonic() + DEADLINE_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._out], [], [], end - time.monotonic())
            assert ready, f"nothing is said: {self.said}\n{self.stderr()}"
            data = os.read(self._out, 65536)
            if not data:
                return None
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        what, _, rest = line.decode().partition(" ")
        told = Told(what, json.loads(rest))
        self.said.append(told)
        if what == "serving":
            self.pids.append(told.said["pid"])
        return told

    def wait(self, what: str) -> dict[str, Any]:
        """What is said next about that, other things left out."""
        while (told := self.told()) is not None:
            if told.what == what:
                return told.said
        raise AssertionError(f"it has ended without a word about {what}: {self.said}\n{self.stderr()}")

    def ask(self, number: int = signal.SIGUSR1) -> None:
        """Ask the last generation to restart."""
        os.kill(self.pid, number)

    def restart(self) -> dict[str, Any]:
        """Restart it, and return what it has reported once it has ended."""
        before = self.pid
        with watching_pid(before) as wait_ended:
            self.ask()
            report = self.wait("restarted")
            if self.pid == before:
                self.wait("serving")
            wait_ended()
        return report

    def fail(self) -> dict[str, Any]:
        """Restart it in vain; what it has reported."""
        self.ask()
        return self.wait("failed")

    def stop(self) -> dict[str, Any]:
        """End the last generation, which must end well; what it said."""
        os.kill(self.pid, signal.SIGTERM)
        self.has_stopped = True
        said: dict[str, Any] = {}
        while (told := self.told()) is not None:
            if told.what == "ended" and told.said["pid"] == self.pid:
                said = told.said
        assert said, self.stderr()
        return said

    def kill(self) -> None:
        """End whatever still runs."""
        for pid in {self.process.pid, *self.pids}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def connect(self) -> socket.socket:
        """A new client."""
        return self.connect_to(self.port)

    @staticmethod
    def connect_to(port: int, host: str = "127.0.0.1") -> socket.socket:
        """A new client of whoever has that port."""
        return socket.create_connection((host, port), DEADLINE_S)

    def hello(self) -> tuple[str, int]:
        """Version and pid of whoever answers a new client of `LINES`."""
        with self.connect() as client:
            return hello(client)


def hello(client: socket.socket) -> tuple[str, int]:
    """Version and pid of whoever answers."""
    client.settimeout(DEADLINE_S)
    client.sendall(b"hello\n")
    text = b""
    while not text.endswith(b"\n"):
        data = client.recv(100)
        if not data:
            raise ConnectionResetError("closed without an answer")
        text += data
    version, pid = text.decode().split()
    return version, int(pid)
