"""A service manager for tests: hears datagrams, keeps a descriptor store, passes it on at the next start.

It follows systemd's ``service.c``: what a name means in the store, which ``RELOADING=1`` answers a reload, when a
timeout is extended. It answers ``BARRIER=1`` by closing what came with it.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support import DEADLINE_S, HOTPORT, Service

#: From ``FDSTOREREMOVE=1`` to the end of what was kept.
RELEASE_S = 0.2

#: What systemd does between fork and exec: descriptors from 3 up, and the pid that only the child knows.
ACTIVATE = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
held = [os.dup(fd) for fd in fds]
top = 3 + len(held)
moved = []
for fd in held:
    while fd < top:
        fd = os.dup(fd)
    moved.append(fd)
for number, fd in enumerate(moved):
    os.dup2(fd, 3 + number, inheritable=True)
if fds:
    os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["WATCHDOG_PID"] = str(os.getpid())
os.closerange(top, 256)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Heard(NamedTuple):
    """One datagram.

    Attributes:
        at_s: CLOCK_MONOTONIC.
        text: As it came, in full.
    """

    at_s: float
    pid: int
    text: str

    @property
    def lines(self) -> dict[str, str]:
        """Its assignments."""
        return dict(line.partition("=")[::2] for line in self.text.split("\n"))


class FakeManager(Service):
    """Starts ``hotport serve`` again and again, as ``systemctl restart`` does.

    Args:
        directory: As for `Service`; `args` as well.
        store_max: ``FileDescriptorStoreMax=``.
        passed: Sockets of a socket unit, by ``FileDescriptorName=``.
        watchdog_s: ``WatchdogSec=``.

    Attributes:
        args: Of ``hotport serve``, from the next start on.
        store: What is kept, by name.
        heard: Every datagram since the last start.
    """

    def __init__(  # the process is started by `start_unit`
        self,
        directory: Path,
        *args: str,
        name: str = "svc",
        store_max: int = 8,
        passed: Sequence[tuple[str, socket.socket]] = (),
        watchdog_s: float | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.name = name
        self.timeout_s = DEADLINE_S
        self.log_path = directory / "service.log"
        self.env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(directory / "run"), **(env or {})}
        self.store: dict[str, list[int]] = {}
        self.heard: list[Heard] = []
        self._releases: list[threading.Timer] = []
        self.args = args
        self._store_max = store_max
        self._passed = passed
        self._watchdog_s = watchdog_s
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify_path = directory / "manager.sock"
        self._notify.bind(str(self._notify_path))
        self._notify.setblocking(False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for fds in self.store.values():
            for fd in fds:
                os.close(fd)
        self.store.clear()
        for release in self._releases:
            release.join()
        super().__exit__(kind, error, tb)

    # -- systemctl -------------------------------------------------------------------------------------------

    def start_unit(self) -> Self:
        """Start it and wait for ``READY=1``."""
        self.launch()
        self.hear_until(lambda heard: heard.lines.get("READY") == "1", "READY=1")
        return self

    def launch(self) -> None:
        """Start it."""
        self.heard.clear()
        units = [(name, sock.fileno()) for name, sock in self._passed]
        stored = [(name, fd) for name, fds in self.store.items() for fd in fds]
        fds, names = [fd for _, fd in units + stored], [name for name, _ in units + stored]
        env = {**self.env, "PWD": str(self.directory), "NOTIFY_SOCKET": str(self._notify_path)}
        if fds:
            env |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        if self._store_max:
            env["FDSTORE"] = str(self._store_max)
        if self._watchdog_s is not None:
            env["WATCHDOG_USEC"] = str(round(self._watchdog_s * 1e6))
        serve = [*HOTPORT, "serve", "--name", self.name, "--log-format", "json", *self.args]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", ACTIVATE, ",".join(map(str, fds)), *serve],
                cwd=self.directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
            )

    def stop_unit(self) -> int:
        """SIGTERM, as ``systemctl restart`` sends it first; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.hear_until(lambda heard: heard.lines.get("STOPPING") == "1", "STOPPING=1")
        code = self.wait()
        self.hear_now()
        return code

    def kill_everything(self) -> None:
        """SIGKILL to every process of the unit, as after a crash with ``KillMode=mixed``."""
        workers = self.descendants()
        self.hear_now()
        self.process.kill()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        self.hear_now()

    def reload_unit(self) -> list[Heard]:
        """``Type=notify-reload``: SIGHUP, a ``RELOADING=1`` that is newer than that, then ``READY=1``; all of it."""
        self.hear_now()
        first, began_s = len(self.heard), time.monotonic()
        self.process.send_signal(signal.SIGHUP)

        def is_answer(heard: Heard) -> bool:
            lines = heard.lines
            return lines.get("RELOADING") == "1" and int(lines["MONOTONIC_USEC"]) >= int(began_s * 1e6)

        self.hear_until(is_answer, "RELOADING=1")
        self.hear_until(lambda heard: heard.lines.get("READY") == "1", "READY=1")
        return self.heard[first:]

    # -- what it says ----------------------------------------------------------------------------------------

    def hear_until(self, is_it: Callable[[Heard], bool], what: str) -> Heard:
        """Return the first datagram from now on that is meant; it is an error if the service ends before."""
        end = time.monotonic() + DEADLINE_S
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while True:
                left = end - time.monotonic()
                ready, _, _ = select.select([self._notify.fileno(), pidfd], [], [], max(0.0, left))
                while (heard := self._hear()) is not None:
                    if is_it(heard):
                        return heard
                assert pidfd not in ready, f"it ended, and has not said {what}\n{self.log_tail()}"
                assert ready, f"not within {DEADLINE_S:g} s: {what}\n{self.heard}\n{self.log_tail()}"
        finally:
            os.close(pidfd)

    def is_heard_within(self, seconds: float) -> bool:
        """Whether anything is said in so many seconds from now."""
        ready, _, _ = select.select([self._notify.fileno()], [], [], seconds)
        return bool(ready)

    def hear_now(self) -> None:
        """Take what has been said already."""
        while self._hear() is not None:
            pass

    def said(self, key: str) -> list[str]:
        """Every value of one key so far."""
        return [heard.lines[key] for heard in self.heard if key in heard.lines]

    def _hear(self) -> Heard | None:
        try:
            payload, ancillary, _, _ = self._notify.recvmsg(65536, socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4 * 253))
        except BlockingIOError:
            return None
        fds, pid = array.array("i"), 0
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
            else:
                pid, _, _ = struct.unpack("iII", data)
        heard = Heard(time.monotonic(), pid, payload.decode())
        lines = heard.lines
        if lines.get("FDSTOREREMOVE") == "1":
            self._release(self.store.pop(lines["FDNAME"], []))
        if lines.get("FDSTORE") == "1":
            self._store(lines["FDNAME"], list(fds))
            fds = array.array("i")
        for fd in fds:  # of BARRIER=1
            os.close(fd)
        self.heard.append(heard)
        return heard

    def _release(self, fds: list[int]) -> None:
        """Close them in a moment, and not before the barrier ends: systemd does it in a thread (asynchronous_close)."""

        def close() -> None:
            for fd in fds:
                os.close(fd)

        self._releases.append(threading.Timer(RELEASE_S, close))
        self._releases[-1].start()

    def _store(self, name: str, fds: list[int]) -> None:
        for fd in fds:
            kept = [other for others in self.store.values() for other in others]
            is_known = any(os.path.sameopenfile(fd, other) for other in kept)  # two of one socket have its inode
            if is_known or len(kept) >= self._store_max:
                os.close(fd)
            else:
                self.store.setdefault(name, []).append(fd)
