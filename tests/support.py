"""What tests of a running service share: start it, wait for its own word, ask it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import psutil

from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import Reply, StatusRequest, decode, encode

SLOWNESS = float(os.environ.get("HOTPORT_TEST_SLOWNESS", "1"))

#: One deadline for everything a test waits for, in seconds.
DEADLINE_S = 30.0 * SLOWNESS

HOTPORT = (sys.executable, "-m", "hotport")


class Service:
    """``hotport serve`` as a child process, in a directory of its own.

    Args:
        directory: Working directory; its ``run`` subdirectory becomes the runtime directory.
        cwd: Another working directory, as a shell would name it: with its symbolic links.
        prefix: What the command runs under, for example ``unshare``.
        args: Arguments after ``hotport serve``.
        default_bind: Where it listens if `args` do not say it; None leaves it to ``hotport.toml``.
    """

    def __init__(
        self,
        directory: Path,
        *args: str,
        name: str = "svc",
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        cwd: Path | None = None,
        default_bind: str | None = "127.0.0.1:0",
    ) -> None:
        self.directory = directory
        self.name = name
        self.log_path = directory / "service.log"
        self.env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(directory / "run"), **(env or {})}
        options = ["--name", name, "--log-format", "json"]
        if default_bind is not None and "--bind" not in args:
            options += ["--bind", default_bind]
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify_path = directory / f"manager-{os.urandom(3).hex()}.sock"
        self._notify.bind(str(self._notify_path))
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *HOTPORT, "serve", *options, *args],
                cwd=cwd or directory,
                env={**self.env, "PWD": str(cwd or directory), "NOTIFY_SOCKET": str(self._notify_path)},
                stdout=log,
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
                self.kill()
            self._notify.close()
            self._notify_path.unlink()
            if kind is not None:
                sys.stderr.write(self.log())

    def wait_ready(self) -> Service:
        """Return when the supervisor has told its service manager READY=1, and every worker serves.

        Fails if it ends instead. READY=1 is said when the first worker serves.
        """
        pidfd = os.pidfd_open(self.process.pid)
        try:
            ready, _, _ = select.select([self._notify.fileno(), pidfd], [], [], DEADLINE_S)
        finally:
            os.close(pidfd)
        assert self._notify.fileno() in ready, f"the service did not start:\n{self.log()}"
        assert b"READY=1" in self._notify.recv(4096)
        self.wait_serving()
        return self

    def wait_serving(self, workers: int | None = None) -> None:
        """Return when there are so many workers (as many as are wanted), and all of them serve."""

        def all_serve() -> bool:
            status = self.status()
            phases = [worker["phase"] for worker in status["workers"]]
            return phases == ["serving"] * (status["wanted"] if workers is None else workers)

        eventually(all_serve, "every worker serves")

    @property
    def runtime(self) -> Path:
        """The service's own runtime directory."""
        return Path(self.env["HOTPORT_RUNTIME_DIR"], self.name)

    def kill(self) -> None:
        """SIGKILL the supervisor, and sweep away the sockets that it had no time to unlink."""
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for name in ("control.sock", "notify.sock"):
            (self.runtime / name).unlink(missing_ok=True)

    def wait(self) -> int:
        """The supervisor's exit code, when it ends by itself."""
        return self.process.wait(DEADLINE_S)

    def log(self) -> str:
        """Everything that the supervisor and its workers have written so far."""
        return self.log_path.read_text(errors="replace")

    def log_events(self, event: str) -> list[dict[str, Any]]:
        """The JSON log lines with this event name."""
        return [line for line in self.log_lines() if line.get("event") == event]

    def log_lines(self) -> list[dict[str, Any]]:
        """Every log line that is complete."""
        lines = self.log().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def run(self, *args: str, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """``hotport ARGS``, and what it printed."""
        return subprocess.run(
            [*HOTPORT, *args], cwd=self.directory, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )

    def ask(self, request: msgspec.Struct) -> list[Any]:
        """Every reply to one request, over the control socket itself: no command to start for each."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(self.runtime / "control.sock"))
            sock.sendall(encode_frame(encode(request)))
            decoder = FrameDecoder()
            replies: list[Any] = []
            while data := sock.recv(65536):
                replies += [decode(payload, Reply) for payload in decoder.feed(data)]
            return replies

    def status(self) -> Any:
        """What ``hotport status --json`` prints."""
        return msgspec.to_builtins(self.ask(StatusRequest())[-1])

    def start(self, *args: str) -> subprocess.Popen[str]:
        """``hotport ARGS``, running; the caller waits for it."""
        return subprocess.Popen(
            [*HOTPORT, *args],
            cwd=self.directory,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

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

    def descriptors(self) -> int:
        """How many descriptors the supervisor has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def descendants(self) -> list[int]:
        """Every live process below the supervisor, by /proc."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


#: Answers one line, ``VERSION GENERATION PID``, to whatever a connection sends first, and closes.
LINE_APP = """\
import os

async def app(stream):
    await stream.receive()
    await stream.send(f"{version} {{os.environ['HOTPORT_GENERATION']}} {{os.getpid()}}\\n".encode())
"""


class Answer(NamedTuple):
    """What a server that speaks like `LINE_APP` has said."""

    version: str
    generation: str
    pid: int


def ask_line(port: int) -> Answer:
    """Ask `LINE_APP` on a connection of its own; raises OSError or ValueError if it is refused, reset or cut."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
        sock.settimeout(DEADLINE_S)
        sock.sendall(b"who\n")
        text = b""
        while data := sock.recv(4096):
            text += data
    version, generation, pid = text.decode().split()
    return Answer(version, generation, int(pid))


class Hammer:
    """Clients in threads that ask, each time on a new connection, until the block ends.

    Args:
        ask: Asks a server that answers with version, generation and pid.

    Attributes:
        answers: How often each version has answered.
        failures: What went wrong, by kind.
    """

    def __init__(self, port: int, *, clients: int = 2, ask: Callable[[int], Answer] = ask_line) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.pids: set[int] = set()
        self._port = port
        self._ask = ask
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Hammer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def wait(self, claim: Callable[[], bool], what: str) -> None:
        """Return when `claim` has become true; looked at after each answer."""
        with self._changed:
            assert self._changed.wait_for(claim, DEADLINE_S), f"{what}: {self.answers}, {self.failures}"

    def wait_answers(self, count: int = 20, version: str | None = None) -> None:
        """Return after `count` more answers (of that version)."""
        begin = self._count(version)
        self.wait(lambda: self._count(version) >= begin + count, f"{count} answers of {version or 'anybody'}")

    def _count(self, version: str | None) -> int:
        return self.answers.total() if version is None else self.answers[version]

    def _run(self) -> None:
        while not self._is_over.wait(0.002):  # load, but not so much that what is tested gets no processor
            try:
                answer = self._ask(self._port)
            except (OSError, ValueError, IndexError) as error:  # the last two: an answer that is not whole
                with self._changed:
                    self.failures[type(error).__name__] += 1
                    self._changed.notify_all()
            else:
                with self._changed:
                    self.answers[answer.version] += 1
                    self.pids.add(answer.pid)
                    self._changed.notify_all()


class Gate:
    """Holds code back at a line of its own, ``open("gate").close()``, until the test lets it go on.

    Opening a FIFO for reading waits for a writer (fifo(7)).
    """

    LINE = 'open("gate").close()\n'

    def __init__(self, directory: Path) -> None:
        self._path = directory / "gate"
        os.mkfifo(self._path)

    def open(self) -> None:
        """Let it go on; waits until somebody has come to the gate."""
        writer: list[int] = []

        def has_opened() -> bool:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads
                writer.append(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK))
            return bool(writer)

        eventually(has_opened, "somebody waits at the gate")
        os.close(writer[0])


@contextmanager
def watching_pid(pid: int) -> Iterator[Callable[[], None]]:
    """Gives a function that returns when that process has ended; take it while the process lives."""
    pidfd = os.pidfd_open(pid)

    def wait() -> None:
        ready, _, _ = select.select([pidfd], [], [], DEADLINE_S)
        assert ready, f"pid {pid} still runs"

    try:
        yield wait
    finally:
        os.close(pidfd)


def assert_three_lines(text: str, code: str) -> None:
    """An error is what happened under a stable code, a cause and something to try, and nothing else."""
    lines = text.rstrip("\n").split("\n")
    assert len(lines) == 3, text
    assert lines[0].startswith(f"{code} "), text
    assert lines[1].startswith("  cause: "), text
    assert lines[2].startswith("  try:   "), text
    assert all(len(line) > 9 for line in lines), text


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
    while line := file.readline().strip():
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

    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")  # Debian's is root's only
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found
