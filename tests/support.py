"""What tests of a running service share: start it, wait for its own word, ask it, end it."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil

from hotport import cli
from hotport.testing.service import ServeProcess

SLOWNESS = float(os.environ.get("HOTPORT_TEST_SLOWNESS", "1"))

#: Whether services import once and fork their workers, if a test does not say it.
PRELOAD = "HOTPORT_TEST_PRELOAD" in os.environ

#: One deadline for everything a test waits for, in seconds.
DEADLINE_S = 30.0 * SLOWNESS

#: How many restarts a test goes through in which one is like the other; `make soak` has more of them.
RESTARTS = int(os.environ.get("HOTPORT_TEST_RESTARTS", "2"))

#: Tests that die at each effect of a restart take so many at a time; `make soak` goes through all of them.
STRIDE = 1 if RESTARTS >= 10 else 5

#: So many repetitions fit into the time that a test is given.
USUAL_RESTARTS = 20

HOTPORT = (sys.executable, "-m", "hotport")


#: Of another user's process, by the kernel's word: pid, uid and gid.
STRANGER = (4242, 65534, 65534)


def loops(number: int) -> list[str]:
    """The event loops of one of a test's variants, by its number: in turns; `make soak` has each variant on both."""
    both = ["uvloop", "asyncio"]
    return both if RESTARTS >= 10 else [both[number % 2]]


def repetition(restarts: int) -> float:
    """How many times the usual time a test needs that repeats so often.

    300 upgrades looked like a service that hung at one of them: the test was ended there, by the time for 20.
    """
    return max(1.0, restarts / USUAL_RESTARTS)


#: Directories in a runtime directory that a supervisor leaves to the next one.
OUTLIVING = frozenset({"counters", "restarts"})


class Footprint(NamedTuple):
    """What a supervisor has: descriptors, processes below it (zombies too), files of its service, memory of its own.

    The memory is what would be free if it ended (unique set size, /proc/PID/smaps): pages of libraries are left out.
    """

    descriptors: int
    processes: int
    files: int
    memory_bytes: int

    def assert_kept(self, later: Footprint, times: int) -> None:
        """`later`, `times` restarts after this one, nothing is more but 2 KiB of memory for each; take it when warm.

        Less than 100 are too few for that: the allocator takes memory in pieces of 256 KiB and more.
        """
        assert all(after <= before for before, after in zip(self[:3], later[:3], strict=True)), (self, later)
        grown = later.memory_bytes - self.memory_bytes
        assert grown < (2048 * times if times >= 100 else 1 << 20), f"{grown} bytes in {times}"
        if times >= 100:
            print(f"\n{times} times: {later[:3]} before and after, {grown / times:.0f} bytes of memory for each")


class Service(ServeProcess):
    """``hotport serve`` as the tests of hotport itself need it: with JSON in its log, and with its commands.

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
        self._lines: list[dict[str, Any]] = []
        self._read_bytes = 0
        options = ["--log-format", "json"]
        if PRELOAD and "--" not in args and not {"--preload", "--no-preload"} & set(args):
            options.append("--preload")
        if default_bind is not None and "--bind" not in args:
            options += ["--bind", default_bind]
        super().__init__(directory, *options, *args, name=name, env=env, cwd=cwd, prefix=prefix, timeout_s=DEADLINE_S)

    def wait(self) -> int:
        """The supervisor's exit code, when it ends by itself."""
        return self.process.wait(DEADLINE_S)

    def log_events(self, event: str) -> list[dict[str, Any]]:
        """The JSON log lines with this event name."""
        return [line for line in self.log_lines() if line.get("event") == event]

    def log_lines(self) -> list[dict[str, Any]]:
        """Every log line that is complete; only those are read that have come since the last call."""
        with self.log_path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read().rpartition(b"\n")
        self._read_bytes += len(new[0] + new[1])
        self._lines += [json.loads(line) for line in new[0].split(b"\n") if line.startswith(b"{")]
        return [*self._lines]

    def run(self, *args: str, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """``hotport ARGS``, and what it printed."""
        return run_hotport(*args, cwd=self.directory, env=self.env, timeout_s=timeout_s)

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

    def worker_pids(self) -> list[int]:
        """Every worker that the supervisor knows."""
        return [worker["pid"] for worker in self.status()["workers"]]

    def accepted(self) -> int:
        """How many connections the workers that are there have taken from the accept queue."""
        return sum(worker["accepted"] or 0 for worker in self.status()["workers"])

    def descriptors(self) -> int:
        """How many descriptors the supervisor has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def paths(self) -> set[str]:
        """What is in its runtime directory, but for what outlives a supervisor."""
        return set(os.listdir(self.runtime)) - OUTLIVING

    def footprint(self) -> Footprint:
        """What the supervisor has now."""
        memory_bytes = psutil.Process(self.process.pid).memory_full_info().uss
        return Footprint(self.descriptors(), len(self.descendants()), len(self.paths()), memory_bytes)

    def descendants(self) -> list[int]:
        """Every live process below the supervisor, by /proc."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


#: Commands that only ask a supervisor: what an interpreter of their own would add is its start.
_ASKING = frozenset({"log-level", "rebalance", "reload-tls", "restart", "scale", "status", "stop", "undo", "upgrade"})


def run_hotport(
    *args: str, cwd: Path, env: Mapping[str, str], timeout_s: float = DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """``hotport ARGS`` to its end: in this process if it only asks a supervisor, else in one of its own."""
    if args[0] not in _ASKING or threading.current_thread() is not threading.main_thread():
        return subprocess.run([*HOTPORT, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)
    return run_here(*args, cwd=cwd, env=env)


def run_here(*args: str, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """``hotport ARGS`` in this process: what asks a supervisor, or is refused before anything begins."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        patch.dict(os.environ, env, clear=True),
        patch.object(sys, "argv", ["hotport", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


#: Answers one line, ``VERSION GENERATION PID``, to whatever a connection sends first, and closes.
LINE_APP = """\
import os

async def app(stream):
    await stream.receive()
    await stream.send(f"{version} {{os.environ['HOTPORT_GENERATION']}} {{os.getpid()}}\\n".encode())
"""


#: The beginning of an ASGI application's body: it lives, and answers WebSocket messages with what they say.
LIFESPAN_AND_ECHO = """\
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
        return
"""


class Answer(NamedTuple):
    """What a server that speaks like `LINE_APP` has said."""

    version: str
    generation: str
    pid: int


def ask_line(port: int, host: str = "127.0.0.1") -> Answer:
    """Ask `LINE_APP` on a connection of its own; raises OSError or ValueError if it is refused, reset or cut."""
    with socket.create_connection((host, port), DEADLINE_S) as sock:
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
    """An error is what happened under a stable code, a cause, and something to try or a note or both; nothing else."""
    lines = text.rstrip("\n").split("\n")
    assert lines[0].startswith(f"{code} "), text
    assert lines[1].startswith("  cause: "), text
    assert [line[:9] for line in lines[2:]] in (["  try:   "], ["  note:  "], ["  try:   ", "  note:  "]), text
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


def collect() -> None:
    """Collect garbage; what is no garbage by now need not be looked at around every test to come."""
    gc.collect()
    gc.freeze()


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

    unpacked = Path(__file__).parents[1] / "build" / "debian" / "bin"  # by debian.sh
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:{unpacked}"  # Debian's is root's only
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found
