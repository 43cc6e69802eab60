"""What tests of a running service share: start it, wait for its own word, ask it, end it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

SLOWNESS = float(os.environ.get("HOTPORT_TEST_SLOWNESS", "1"))

#: One deadline for everything a test waits for, in seconds.
DEADLINE_S = 30.0 * SLOWNESS

HOTPORT = (sys.executable, "-m", "hotport")


class Service:
    """``hotport serve`` as a child process, in a directory of its own.

    Args:
        directory: Working directory; its ``run`` subdirectory becomes the runtime directory.
        args: Arguments after ``hotport serve``; ``--bind 127.0.0.1:0`` is added unless one is given.
    """

    def __init__(self, directory: Path, *args: str, name: str = "svc", env: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.name = name
        self.log_path = directory / "service.log"
        self.env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(directory / "run"), **(env or {})}
        options = ["--name", name, "--log-format", "json"]
        if "--bind" not in args:
            options += ["--bind", "127.0.0.1:0"]
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "manager.sock"))
        self.process = subprocess.Popen(
            [*HOTPORT, "serve", *options, *args],
            cwd=directory,
            env={**self.env, "NOTIFY_SOCKET": str(directory / "manager.sock"), "PWD": str(directory)},
            stdout=self.log_path.open("ab"),
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGQUIT)
            self.process.wait(DEADLINE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._notify.close()
            if kind is not None:
                sys.stderr.write(self.log())

    def wait_ready(self) -> Service:
        """Return when the supervisor has told its service manager READY=1; fail if it ends instead."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            ready, _, _ = select.select([self._notify, pidfd], [], [], DEADLINE_S)
        finally:
            os.close(pidfd)
        assert self._notify in ready, f"the service did not start:\n{self.log()}"
        assert b"READY=1" in self._notify.recv(4096)
        return self

    def wait(self) -> int:
        """The supervisor's exit code, when it ends by itself."""
        return self.process.wait(DEADLINE_S)

    def log(self) -> str:
        """Everything that the supervisor and its workers have written so far."""
        return self.log_path.read_text(errors="replace")

    def log_events(self, event: str) -> list[dict[str, Any]]:
        """The JSON log lines with this event name."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    def run(self, *args: str, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """``hotport ARGS``, and what it printed."""
        return subprocess.run(
            [*HOTPORT, *args], cwd=self.directory, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )

    def status(self) -> Any:
        """``hotport status --json``."""
        result = self.run("status", self.name, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def restart(self, *args: str, expect: int = 0, timeout_s: float = DEADLINE_S) -> Any:
        """``hotport restart --json``: the report, once the exit code is as expected."""
        result = self.run("restart", self.name, "--json", *args, timeout_s=timeout_s)
        assert result.returncode == expect, f"exit {result.returncode}\n{result.stdout}{result.stderr}\n{self.log()}"
        return json.loads(result.stdout) if result.stdout else {}

    @property
    def port(self) -> int:
        """The TCP port of the first address."""
        return int(self.status()["addresses"][0].rpartition(":")[2])

    def worker_pids(self) -> list[int]:
        """Every worker that the supervisor knows."""
        return [worker["pid"] for worker in self.status()["workers"]]

    def descendants(self) -> list[int]:
        """Every live process below the supervisor, by /proc."""
        import psutil

        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


def write_code(path: Path, text: str) -> None:
    """Write a module so that the next interpreter is sure to see it.

    Byte code is judged by the source's size and its modification time in whole seconds, so two edits within a second
    may look the same: each one is dated a second later than the one before.
    """
    before = path.stat().st_mtime if path.exists() else time.time() - 1000
    path.write_text(text)
    os.utime(path, (before + 2, before + 2))


def http_get(port: int, path: str = "/", *, headers: str = "", timeout_s: float = DEADLINE_S) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}\r\n".encode())
        return read_response(sock)


def read_response(sock: socket.socket) -> tuple[int, bytes]:
    """Read one HTTP/1.1 response with Content-Length or until the end of the connection."""
    file = sock.makefile("rb")
    status = int(file.readline().split()[1])
    length: int | None = None
    while (line := file.readline().strip()):
        key, _, value = line.partition(b":")
        if key.lower() == b"content-length":
            length = int(value)
    return status, file.read() if length is None else file.read(length)


def eventually(claim: Callable[[], bool], what: str) -> None:
    """Wait for something that nobody announces (a process to vanish from /proc), within the deadline."""
    pause = select.poll()
    end = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end, f"not within {DEADLINE_S:g} s: {what}"
        pause.poll(10)


def need(program: str) -> str:
    """The path of a program that is not Python; skips the test without it."""
    import pytest

    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


