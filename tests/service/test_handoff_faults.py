"""Workers and the supervisor die while connections move: whoever is not killed serves on, and nobody answers twice."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import DEADLINE_S, Service, eventually, read_response, watching_pid, write_code
from tests.tls_support import Pki, connect

APP = """\
import os, signal
{fault}
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    path = scope["path"]
    body = b"%d %s" % (scope["extensions"]["hotport"]["generation"], path.encode())
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}})
    await send({{"type": "http.response.body", "body": body}})
"""

#: In the new generation's first worker: it is gone when it has the batch, and has acknowledged nothing.
DIES_WITH_THE_BATCH = """
import pathlib
import hotport.worker.handoff as handoff
adopt = handoff._adopt

def die(*args, **named):
    if not pathlib.Path("died").exists():
        pathlib.Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return adopt(*args, **named)

handoff._adopt = die
"""

OTHER_ENVELOPES = """
import hotport.worker.handoff as handoff
handoff.ENVELOPE_VERSIONS = frozenset()
"""

#: In the old generation's worker: it is gone when its batch was acknowledged, and has said nothing more.
DIES_BEFORE_GO = """
import hotport.worker.handoff as handoff
handoff.decode_ack = lambda payload: os.kill(os.getpid(), signal.SIGKILL)
"""


class Kept:
    """A client that keeps its connection, and counts what it is answered."""

    def __init__(self, port: int, pki: Pki | None = None) -> None:
        self.sock: socket.socket
        if pki is None:
            self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        else:
            self.sock = connect(port, pki.client())
        self.asked = 0

    def ask(self) -> tuple[int, bool]:
        """The generation that answers, and whether it says that this was its last answer; it is ours, and whole."""
        self.asked += 1
        path = f"/{self.sock.getsockname()[1]}/{self.asked}"
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        file = self.sock.makefile("rb", buffering=0)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = file.read(1)
            assert byte, "the connection was closed"
            head += byte
        assert head.startswith(b"HTTP/1.1 200")
        body = file.read(int(head.lower().partition(b"content-length:")[2].split()[0]))
        generation, answered = body.decode().split(" ", 1)
        assert answered == path
        return int(generation), b"connection: close" in head.lower()


@contextmanager
def serving(
    tmp_path: Path, *args: str, clients: int = 40, pki: Pki | None = None, fault: str = ""
) -> Iterator[tuple[Service, list[Kept]]]:
    write_code(tmp_path / "app.py", APP.format(fault=fault))
    if pki is not None:
        args = (*args, "--tls-cert", pki.issue("server.pem", "localhost"), "--tls-handoff", "on")
    with (
        Service(tmp_path, "app:app", "--lifespan", "off", "--keep-alive", "1h", *args) as service,
        ExitStack() as stack,
    ):
        port = service.wait_ready().port
        kept = [Kept(port, pki) for _ in range(clients)]
        for each in kept:
            stack.callback(each.sock.close)
            assert each.ask() == (1, False)
        yield service, kept


@pytest.fixture(params=["in clear", "over TLS"])
def pki(request: pytest.FixtureRequest, tmp_path: Path) -> Pki | None:
    if request.param == "in clear":
        return None
    (tmp_path / "pki").mkdir()
    return Pki(tmp_path / "pki")


def test_successor_killed_in_the_middle_of_a_batch_costs_no_connection(tmp_path: Path, pki: Pki | None) -> None:
    """The old worker has every descriptor still; it hands them to the worker that takes the dead one's place."""
    with serving(tmp_path, pki=pki) as (service, kept):
        write_code(tmp_path / "app.py", APP.format(fault=DIES_WITH_THE_BATCH))
        report = service.restart()
        assert (tmp_path / "died").exists()
        answers = [each.ask() for each in kept]
        assert all(generation == 2 for generation, _ in answers)
        assert report["connections"] == {"moved_http": len(kept)}


def test_old_worker_killed_between_acknowledgement_and_go_costs_no_connection(tmp_path: Path, pki: Pki | None) -> None:
    """The new worker has every descriptor, and sees that the other cannot serve them any more."""
    with serving(tmp_path, pki=pki, fault=DIES_BEFORE_GO) as (service, kept):
        write_code(tmp_path / "app.py", APP.format(fault=""))
        service.restart()
        assert [each.ask() for each in kept] == [(2, False)] * len(kept)


def test_generations_with_different_envelopes_answer_once_more_and_say_so(tmp_path: Path) -> None:
    with serving(tmp_path, clients=5) as (service, kept):
        write_code(tmp_path / "app.py", APP.format(fault=OTHER_ENVELOPES))
        command = service.start("restart", service.name, "--json")
        eventually(lambda: bool(service.log_events("drain.began")), "the old worker drains")
        eventually(lambda: bool(service.log_events("handoff.declined")), "it is told that nothing can move")
        assert [each.ask() for each in kept] == [(1, True)] * 5
        for each in kept:
            each.sock.close()
        out, error = command.communicate(timeout=DEADLINE_S)
        assert command.returncode == 0, out + error
        assert '"told_to_close": 5' in out


def test_supervisor_killed_while_connections_move_costs_none(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2", "--orphan-timeout", "1h") as (service, kept):
        command = service.start("restart", service.name)
        eventually(lambda: len(service.log_events("drain.began")) == 2, "both old workers drain")
        workers = psutil.Process(service.process.pid).children()
        service.kill()
        command.communicate(timeout=DEADLINE_S)
        try:
            assert all(each.ask()[0] in (1, 2) for each in kept)
            eventually(lambda: all(each.ask() == (2, False) for each in kept[:3]), "the new generation has them")
            assert [each.ask() for each in kept] == [(2, False)] * len(kept)
        finally:
            _end(service, workers)


def test_old_worker_that_is_killed_after_the_move_costs_none(tmp_path: Path) -> None:
    with serving(tmp_path) as (service, kept):
        (old,) = service.worker_pids()
        with socket.create_connection(("127.0.0.1", service.port)) as busy, watching_pid(old) as wait_for_old:
            busy.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")  # keeps the old one alive
            read_response(busy)
            command = service.start("restart", service.name)
            eventually(lambda: _moved(service, old, len(kept)), "all have moved but one")
            os.kill(old, signal.SIGKILL)
            wait_for_old()
            command.communicate(timeout=DEADLINE_S)
            assert [each.ask() for each in kept] == [(2, False)] * len(kept)


def test_status_says_who_is_waited_for_and_why(tmp_path: Path) -> None:
    with serving(tmp_path) as (service, kept):
        (old,) = service.worker_pids()
        with socket.create_connection(("127.0.0.1", service.port)) as busy:
            busy.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
            read_response(busy)
            command = service.start("restart", service.name)
            eventually(lambda: _moved(service, old, len(kept)), "all have moved but one")
            (lingering,) = _worker(service, old)["lingering"]
            peer = f"127.0.0.1:{busy.getsockname()[1]}"
            assert (lingering["peer"], lingering["kind"], lingering["why"]) == (peer, "http", "surplus")
            shown = service.run("status", service.name).stdout
            assert f"waits for {peer}: http, " in shown
            busy.sendall(b"cde")
        out, error = command.communicate(timeout=DEADLINE_S)
        assert command.returncode == 0, out + error


def _worker(service: Service, pid: int) -> dict[str, Any]:
    return next(each for each in service.status()["workers"] if each["pid"] == pid)


def _moved(service: Service, old: int, count: int) -> bool:
    workers = service.status()["workers"]
    return any(each["pid"] == old and each["connections"] == 1 for each in workers) and count == sum(
        each["adopted"] or 0 for each in workers
    )


def _end(service: Service, workers: list[psutil.Process]) -> None:
    """Workers without a supervisor: told to leave, then waited for."""
    for worker in workers:
        with suppress(psutil.NoSuchProcess):  # the old ones have left by themselves
            worker.terminate()
    psutil.wait_procs(workers, DEADLINE_S)
    for path in service.runtime.glob("*.sock"):
        path.unlink()
