"""What a service manager hears from a program that restarts itself; it must never take a restart for an end."""

from __future__ import annotations

import array
import os
import re
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from tests.service.embedded_support import LINES, Embedded
from tests.support import DEADLINE_S


class Datagram(NamedTuple):
    """What was said, by whom, and what came with it."""

    text: str
    pid: int
    descriptors: list[int]


class FakeManager:
    """Reads one datagram when it is told to, and keeps its descriptors until then."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "manager"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.settimeout(DEADLINE_S)
        self._socket.bind(str(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.path.unlink()

    def read(self) -> Datagram:
        data, ancillary, _, _ = self._socket.recvmsg(4096, 512)
        pid, fds = 0, array.array("i")
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw)
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid = struct.unpack("iII", raw)[0]
        return Datagram(data.decode(), pid, list(fds))


@contextmanager
def managed(directory: Path, app: str) -> Iterator[tuple[FakeManager, Embedded]]:
    environment = {"NOTIFY_SOCKET": str(directory / "manager")}
    with FakeManager(directory) as manager, Embedded(directory, app, env=environment) as program:
        assert manager.read() == ("READY=1", program.pid, [])
        yield manager, program


def test_the_manager_knows_the_new_pid_before_the_old_one_has_ended(tmp_path: Path) -> None:
    with managed(tmp_path, LINES.format(version="one")) as (manager, program):
        old = program.pid
        for generation in (2, 3):
            pidfd = os.pidfd_open(old)
            program.ask()
            text, pid, _ = manager.read()
            assert pid == old
            assert re.fullmatch(r"RELOADING=1\nSTATUS=restarting\nMONOTONIC_USEC=\d+", text)
            new = program.wait("serving")["pid"]
            assert manager.read() == (f"READY=1\nSTATUS=generation {generation} serves, pid {new}", old, [])
            text = f"STATUS=pid {new} has taken over from pid {old}\nMAINPID={new}"
            assert manager.read() == (text, old, [])
            barrier = manager.read()
            assert barrier[:2] == ("BARRIER=1", old)
            assert select.select([pidfd], [], [], 0) == ([], [], []), "it waits for the manager"
            (fd,) = barrier.descriptors
            os.close(fd)
            assert select.select([pidfd], [], [], DEADLINE_S)[0]
            os.close(pidfd)
            text = f"READY=1\nSTATUS=generation {generation} serves\nMAINPID={new}"
            assert manager.read() == (text, new, [])
            old = new


def test_the_manager_learns_that_a_restart_was_aborted(tmp_path: Path) -> None:
    with managed(tmp_path, LINES.format(version="one")) as (manager, program):
        program.write("raise SystemExit(3)\n")
        said = program.fail()
        assert "exited, status unknown" in said["text"], "it is the manager's child, so the manager knows"
        assert manager.read().text.startswith("RELOADING=1\n")
        what = f"the successor did not start to serve; pid {program.pid} serves on"
        assert manager.read() == (f"READY=1\nSTATUS=restart aborted, generation 1 serves: {what}", program.pid, [])


def test_the_application_talks_to_the_manager_when_its_predecessor_has_gone(tmp_path: Path) -> None:
    """Before that its socket is the predecessor's: what it says while it starts up is not about the service."""
    with managed(tmp_path, LINES.format(version="one")) as (manager, program):
        assert program.said[0].said["notify"] == str(tmp_path / "manager")
        program.ask()
        assert program.wait("serving")["notify"].startswith("@hotport-")
        while (said := manager.read()).pid != program.pid:
            for fd in said.descriptors:
                os.close(fd)
        program.write("raise SystemExit(3)\n")
        assert program.fail()["notify"] == str(tmp_path / "manager")
