"""Supervisors and workers are killed, by chance, under load: lost is what the killed worker itself held, nothing else.

A worker is stopped before it is killed, and the kernel asked which connections it has open. Each request that is not
answered must have been sent on one of these, and each of these may cost one request at most.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from hotport.kernel import procfs
from hotport.kernel.process import duplicate_descriptor, is_stopped
from hotport.wire.messages import RestartRequest
from tests.service.test_recovery import assert_healthy, die, ending, started
from tests.support import DEADLINE_S, RESTARTS, SLOWNESS, Service, eventually, write_code

#: Answers with the path, and writes down which requests it has begun, and which it has answered.
APP = """\
import asyncio, os
record = os.open(f"requests-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
async def app(scope, receive, send):
    path = scope["path"]
    os.write(record, f"began {path}\\n".encode())
    await asyncio.sleep(0.02 if path.endswith("slow") else 0)
    body = path.encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
    os.write(record, f"ended {path}\\n".encode())
"""

ARGS = (
    "app:app",
    "--lifespan",
    "off",
    "--keep-alive",
    "1h",
    "--workers",
    "2",
    "--orphan-timeout",
    "1h",
    "--settle",
    "0",
)

#: Who is killed, and while what goes on.
KINDS = ("supervisor", "supervisor in a restart", "predecessor", "heir", "newcomer", "old worker", "worker")

#: Within so long after it has begun, a restart or a take-over is hit at a moment of chance.
MOMENT_MS = int(400 * SLOWNESS)

CLIENTS = 12


class Lost(NamedTuple):
    """A request without an answer, or a connection that was closed between two of them (then without a path)."""

    path: str
    port: int
    connected_s: float
    noticed_s: float
    why: str


@dataclass
class Kill:
    """A process that was killed.

    Attributes:
        held: Ports of the clients whose connections it had open.
        losses: By such a port.
    """

    kind: str
    pid: int
    at_s: float
    held: frozenset[int] = frozenset()
    losses: dict[int, Lost] = field(default_factory=dict)


class Load:
    """Clients in threads, half of them on connections that they keep; each request has a path of its own."""

    def __init__(self, port: int) -> None:
        self.answered = 0
        self.lost: list[Lost] = []
        self.wrong: list[str] = []
        self._port = port
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)

    def wait_answers(self, count: int) -> None:
        """Return after so many more answers."""
        enough = self.answered + count
        eventually(lambda: self.answered >= enough, "clients are answered")

    def _run(self, client: int) -> None:
        is_kept, number = client % 2 == 0, 0
        while not self._is_over.is_set():
            connected_s = time.monotonic()  # before: a worker may be killed with it before this thread runs on
            try:
                sock = socket.create_connection(("127.0.0.1", self._port), DEADLINE_S)
            except OSError as error:  # the port is never refused
                self._note(wrong=f"connect: {error!r}")
                continue
            with sock:
                port, goes_on = sock.getsockname()[1], True
                while goes_on and not self._is_over.wait(0.003):
                    number += 1
                    path = f"/{client}/{number}/{'slow' if number % 4 == 0 else 'quick'}"
                    if _is_closed(sock):
                        self._note(lost=Lost("", port, connected_s, time.monotonic(), "closed"))
                        break
                    try:
                        goes_on = _ask(sock, path) and is_kept
                    except TimeoutError:
                        self._note(wrong=f"{path} hangs")
                        break
                    except OSError as error:
                        self._note(lost=Lost(path, port, connected_s, time.monotonic(), repr(error)))
                        break
                    except AssertionError as error:
                        self._note(wrong=str(error))
                        break
                    with self._lock:
                        self.answered += 1

    def _note(self, lost: Lost | None = None, wrong: str = "") -> None:
        with self._lock:
            if lost is not None:
                self.lost.append(lost)
            if wrong:
                self.wrong.append(wrong)


def _is_closed(sock: socket.socket) -> bool:
    """Whether it was closed between two requests: nothing else can be there to read."""
    return bool(select.select([sock], [], [], 0)[0])


def _ask(sock: socket.socket, path: str) -> bool:
    """Whether the connection stays open after the answer, which is whole and ours; raises OSError if there is none."""
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    data = b""
    while not (parts := data.partition(b"\r\n\r\n"))[1] or len(parts[2]) < len(path):
        got = sock.recv(4096)
        if not got:
            raise ConnectionResetError(f"the end after {len(data)} bytes")
        data += got
    assert data.startswith(b"HTTP/1.1 200"), data
    assert parts[2] == path.encode(), data
    return b"connection: close" not in parts[0].lower()


class Killer:
    """Kills, and knows what it has killed."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self._directory = directory
        self._pool = ThreadPoolExecutor(1)

    def wait_a_moment(self) -> None:
        """Let chance decide what the service is at; nothing depends on it."""
        select.poll().poll(self.random.randrange(MOMENT_MS))

    def workers(self, generation: int) -> list[int]:
        """Those of a generation that live; of all later ones for a negative number."""
        found = []
        for pid in started(self._directory):
            with suppress(OSError, ValueError):
                number = int(procfs.environment(pid).get("HOTPORT_GENERATION", "0"))
                if number == generation or (generation < 0 and number > -generation):
                    found.append(pid)
        return sorted(found)

    def worker(self, kind: str, pids: list[int]) -> None:
        """Stop one of them, look at what it holds, and kill it."""
        pid = self.random.choice(pids)
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has left in time
            return
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            eventually(lambda: is_stopped(pid) or _has_ended(pidfd), "it stands still")
            held = _clients_of(pid, pidfd)
            self.kills.append(Kill(kind, pid, time.monotonic(), held))
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)

    def supervisor(self, kind: str, service: Service) -> None:
        self.kills.append(Kill(kind, service.process.pid, time.monotonic()))
        die(service)

    def restart(self, service: Service) -> Future[list[object]]:
        """Begin a restart, whatever becomes of it; returns when its first worker is there."""
        generation = service.status()["generation"]

        def ask() -> list[object]:
            try:
                return service.ask(RestartRequest())
            except OSError:  # the supervisor is killed
                return []

        asked = self._pool.submit(ask)
        eventually(lambda: bool(self.workers(-generation)) or asked.done(), "a new worker is there")
        return asked

    def close(self) -> None:
        self._pool.shutdown()


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def _clients_of(pid: int, pidfd: int) -> frozenset[int]:
    """Ports of the clients of a process that stands still, by duplicates of its descriptors."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=duplicate_descriptor(pidfd, int(name))) as sock:
                if sock.family == socket.AF_INET and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.add(sock.getpeername()[1])
    return frozenset(found)


def _strike(kind: str, killer: Killer, service: Service, begin: Callable[..., Service]) -> Service:
    """Kill once; the service that runs afterwards."""
    generation = service.status()["generation"]
    match kind:
        case "supervisor":
            killer.supervisor(kind, service)
            service = begin().wait_ready()
        case "supervisor in a restart":
            asked = killer.restart(service)
            killer.wait_a_moment()
            killer.supervisor(kind, service)
            asked.result(DEADLINE_S)
            service = begin().wait_ready()
        case "predecessor" | "heir":
            heir = begin("--take-over")
            eventually(lambda: bool(killer.workers(-generation)) or heir.process.poll() is not None, "it has begun")
            killer.wait_a_moment()
            if heir.process.poll() is None and service.process.poll() is None:
                killer.supervisor(kind, service if kind == "predecessor" else heir)
            left = heir if heir.process.poll() is None else service
            eventually(lambda: left.process.poll() is not None or _answers(left), "it has the service's paths, or ends")
            service = left if left.process.poll() is None else begin().wait_ready()  # it had given the service away
        case "newcomer" | "old worker":
            asked = killer.restart(service)
            killer.wait_a_moment()
            found = killer.workers(-generation if kind == "newcomer" else generation)
            if found or (found := started(service.directory)):
                killer.worker(kind, found)
            asked.result(DEADLINE_S)
        case _:
            killer.worker(kind, started(service.directory))
    return service


def _answers(service: Service) -> bool:
    with suppress(OSError):
        return bool(service.status()["pid"] == service.process.pid)
    return False


def _match(killer: Killer, load: Load) -> list[Lost]:
    """Attribute each loss to the killed worker that held its connection; those that are left over."""
    unmatched = []
    for lost in load.lost:
        whose = [
            kill
            for kill in killer.kills
            if lost.port in kill.held
            and lost.connected_s < kill.at_s <= lost.noticed_s
            and lost.port not in kill.losses
        ]
        if whose:
            whose[-1].losses[lost.port] = lost
        else:
            unmatched.append(lost)
    return unmatched


def _records(directory: Path, word: str) -> dict[str, int]:
    """Which process says so of each request."""
    found: dict[str, int] = {}
    for path in directory.glob("requests-*"):
        pid = int(path.name.partition("-")[2])
        found |= {line.split()[1]: pid for line in path.read_text().splitlines() if line.startswith(f"{word} ")}
    return found


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    killer = Killer(tmp_path, seed=RESTARTS)
    yield killer
    killer.close()


@pytest.mark.soak
@pytest.mark.timeout(60 * SLOWNESS + 20 * SLOWNESS * RESTARTS)
def test_lost_is_only_what_a_killed_worker_held(
    tmp_path: Path, killer: Killer, capfd: pytest.CaptureFixture[str]
) -> None:
    write_code(tmp_path / "app.py", APP)
    kinds = list(KINDS) if len(KINDS) <= RESTARTS else killer.random.sample(KINDS, RESTARTS)
    with ending(tmp_path), ExitStack() as stack:

        def begin(*args: str) -> Service:
            return stack.enter_context(Service(tmp_path, *ARGS, *args))

        service = begin().wait_ready()
        with Load(service.port) as load:
            while len(killer.kills) < RESTARTS:
                service = _strike(killer.random.choice(kinds), killer, service, begin)
                assert_healthy(service, workers=2)
                assert service.restart()["outcome"] == "done"  # what it counts of failures begins again
                assert_healthy(service, workers=2)
                load.wait_answers(CLIENTS)
        assert service.stop() == 0
    unmatched = _match(killer, load)
    losses = [lost for kill in killer.kills for lost in kill.losses.values()]
    requests = [lost for lost in losses if lost.path]
    began, ended = _records(tmp_path, "began"), _records(tmp_path, "ended")
    pids = {lost.path: kill.pid for kill in killer.kills for lost in kill.losses.values()}
    if RESTARTS >= 10:
        with capfd.disabled():
            print(f"\n{len(killer.kills)} kills: {dict(Counter(kill.kind for kill in killer.kills))}")
            print(f"{load.answered} requests answered; unmatched: {len(unmatched)}")
            print(f"{sum(len(kill.held) for kill in killer.kills)} connections were open in workers that were killed")
            print(f"{len(requests)} requests lost, {sum(each.path in began for each in requests)} of them begun")
            print(f"{len(losses) - len(requests)} of the connections closed between two requests")
    assert not load.wrong
    assert not unmatched
    for lost in requests:
        assert lost.path not in ended or ended[lost.path] == pids[lost.path]
        assert began.get(lost.path, pids[lost.path]) == pids[lost.path], "another worker has had it"
