"""Locust's processes with our clients: what they see of a restart, and of a server that fails."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotport.testing import Service
from tests.churn.scripted import Scripted, read_head, reset
from tests.support import DEADLINE_S, eventually
from tests.testing import apps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed"),
]

USERS = """\
from locust import constant
from hotport.churn.locust import ChurnUser, ConnectUser, HalfheadUser, KeepaliveUser, LateUser

ChurnUser.slow_s = 0.1
ChurnUser.wait_time = constant(0.05)
"""

FAILING = """\
from locust import constant
from hotport.churn.locust import ConnectUser

ConnectUser.wait_time = constant(0.01)
"""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.contextmanager
def locust(directory: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "locust", "-f", "users.py", "--headless", "--only-summary", *args]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=directory, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def end(process: subprocess.Popen[str]) -> str:
    """As Ctrl-C ends it; everything that it has said."""
    process.terminate()
    said, _ = process.communicate(timeout=DEADLINE_S)
    return said


def attempts(said: str) -> dict[str, tuple[int, int]]:
    """By kind of client: how many attempts, how many of them lost; from the table at the end."""
    found = re.findall(r"^(\w+) +/ +(\d+) +(\d+)\(", said, re.MULTILINE)
    return {kind: (int(made), int(lost)) for kind, made, lost in found}


def free_port() -> int:
    """Locust's master does not say which port it got, so it must be told one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_master_and_two_workers_see_nothing_of_a_restart(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS)
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(
            Service(apps.app, directory=tmp_path, workers=2, timeout_s=DEADLINE_S)
        ).wait_ready()
        asked = ["--host", service.url, "-u", "8", "-r", "8", "--stop-timeout", "10"]
        where = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers", "2"]
        master = stack.enter_context(locust(tmp_path, "--master", *where, *asked))
        workers = [
            stack.enter_context(locust(tmp_path, "--worker", "--master-host", "127.0.0.1", "--master-port", port))
            for _ in range(2)
        ]

        def has_asked(generation: int) -> bool:
            told = [w["requests"] or 0 for w in service.status()["workers"] if w["generation"] == generation]
            return sum(told) > 100

        service.wait_until(lambda: has_asked(1), "there is load before the restart")
        assert service.restart()["serving"] == 2
        service.wait_until(lambda: has_asked(2), "there is load after the restart")
        said = end(master)
        assert master.returncode == 0, said
        for worker in workers:
            worker.communicate(timeout=DEADLINE_S)
    seen = attempts(said)
    assert set(seen) == {"connect", "halfhead", "keepalive", "late"}
    assert all(made > 10 and not lost for made, lost in seen.values()), said


def test_what_a_server_does_to_its_clients_is_in_the_failures_by_name(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(FAILING)
    done: Counter[str] = Counter()
    script = ["answer", "reset", "end", "truncate", "fail"]

    def serve(sock: socket.socket) -> None:
        if not read_head(sock):
            return  # the first connection only finds out whether somebody listens
        what = script[done.total() % len(script)]
        match what:
            case "answer":
                sock.sendall(OK)
            case "reset":
                reset(sock)
            case "truncate":
                sock.sendall(OK[:-1])
            case "fail":
                sock.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
        done[what] += 1

    with Scripted(serve) as server:
        args = ["--host", f"http://127.0.0.1:{server.port}", "-u", "1", "--stop-timeout", "10"]
        with locust(tmp_path, *args) as process:
            eventually(lambda: done.total() >= 50 or process.poll() is not None, "the script is played")
            said = end(process)
    assert process.returncode == 1, said
    losses = {fate: int(count) for count, fate in re.findall(r"^(\d+) +connect /: (.*?) *$", said, re.MULTILINE)}
    assert set(losses) == {"reset after send", "closed unanswered", "truncated", "wrong status"}
    assert min(losses.values()) >= 9
    made, lost = attempts(said)["connect"]
    assert lost == sum(losses.values())
    assert made - lost >= 10
