"""Applications whose workers fork, with multiprocessing or by hand; `test_foreign.py` has servers that pre-fork."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.support import DEADLINE_S, Service, http_get, write_code

APP = """\
import asyncio, json, multiprocessing, os, time

fork = multiprocessing.get_context("fork")

async def app(scope, receive, send):
    said = {"worker": os.getpid()}
    child = fork.Process(target=time.sleep, args=(600,), daemon=True)
    if scope["path"] == "/terminated":
        child.start()
        child.terminate()
        await asyncio.to_thread(child.join)
        said["exit"] = child.exitcode
    if scope["path"] == "/daemon":
        child.start()
        said["child"] = child.pid
    if scope["path"] == "/session":
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(write, str(os.getpid()).encode())
                time.sleep(600)
            os._exit(0)
        os.wait()
        said["child"] = int(os.read(read, 20))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(said).encode()})
"""


def said(service: Service, path: str) -> dict[str, int]:
    status, body = http_get(service.port, path)
    assert status == 200
    return json.loads(body)  # type: ignore[no-any-return]


def test_child_that_is_terminated_ends_and_its_worker_stays(tmp_path: Path) -> None:
    """The worker took the signal for its own, and left; the child lived on."""
    write_code(tmp_path / "app.py", APP)
    with Service(tmp_path, "app:app").wait_ready() as service:
        answer = said(service, "/terminated")
        assert answer["exit"] == -signal.SIGTERM
        assert said(service, "/")["worker"] == answer["worker"]
        assert not service.log_events("drain.began")


def test_restart_does_not_wait_for_a_daemon_child(tmp_path: Path) -> None:
    """It has inherited handlers that did nothing, and its parent waited for its end for ever."""
    write_code(tmp_path / "app.py", APP)
    with Service(tmp_path, "app:app", "--drain-timeout", "600s", "--kill-timeout", "600s").wait_ready() as service:
        child = psutil.Process(said(service, "/daemon")["child"])
        assert service.restart()["outcome"] == "done"
        child.wait(DEADLINE_S)


def test_session_of_a_child_keeps_neither_port_nor_connection(tmp_path: Path) -> None:
    """The port went on listening after the service had stopped, and nobody ever accepted."""
    write_code(tmp_path / "app.py", APP)
    with (
        Service(tmp_path, "app:app", "--drain-timeout", "1s").wait_ready() as service,
        socket.create_connection(("127.0.0.1", service.port)) as client,
    ):
        port = service.port
        client.settimeout(DEADLINE_S)
        child = said(service, "/session")["child"]
        try:
            assert service.run("stop", "svc").returncode == 5  # this client is cut
            assert service.wait() == 5
            assert client.recv(1) == b""
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            assert psutil.pid_exists(child)
        finally:
            os.kill(child, signal.SIGKILL)
