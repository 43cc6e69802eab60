"""Every program that the docs show runs, and does across a restart what its page says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.sync.client import connect as connect_websocket

from tests.support import DEADLINE_S, HOTPORT, Service, http_get, need, read_response, watching_pid

EXAMPLES = Path(__file__).parent.parent.parent / "docs" / "examples"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the examples in it."""
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), DEADLINE_S)


@pytest.mark.parametrize("module", ["with_uvicorn", "with_hypercorn", "with_aiohttp"])
def test_a_server_inside_a_worker_answers_before_and_after_a_restart(directory: Path, module: str) -> None:
    with Service(directory, f"{module}:main") as service:
        port = service.wait_ready().port
        assert http_get(port)[0] == 200
        assert service.restart()["connections"] == {"server_finished": 1}
        assert http_get(port)[0] == 200


def test_uvicorn_that_cannot_start_ends_the_service_with_its_traceback(directory: Path) -> None:
    (directory / "app.py").write_text("raise RuntimeError('broken')\n")
    with Service(directory, "with_uvicorn:main") as service:
        assert service.wait() == 3
        assert "RuntimeError: broken" in service.log()


def test_a_foreign_program_answers_before_and_after_a_restart(directory: Path) -> None:
    with Service(directory, "--", sys.executable, "foreign.py") as service:
        port = service.wait_ready().port
        for _ in range(2):
            with connect(port) as client:
                assert client.recv(100) == b"hello\n"
            service.restart()


@pytest.mark.parametrize("target", ["lines:handler", "protocol:Lines"])
def test_a_long_connection_is_told_and_ended_by_its_application(directory: Path, target: str) -> None:
    with Service(directory, target) as service, connect(service.wait_ready().port) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"250 hello\n"
        assert service.restart()["connections"] == {"finished": 1}
        assert client.makefile().read() == "221 leaving within 30 s\n"


def test_an_event_stream_says_goodbye_and_ends_whole(directory: Path) -> None:
    with Service(directory, "events:app") as service, connect(service.wait_ready().port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        with client.makefile("rb") as file:
            assert b"200" in file.readline()
            restart = service.start("restart", service.name, "--json")
            lines = list(iter(file.readline, b"0\r\n"))
            assert b"event: bye\n" in lines
        report, _ = restart.communicate(timeout=DEADLINE_S)
        assert json.loads(report)["connections"] == {"moved_http": 1}


def test_a_websocket_goes_on_counting_in_the_new_generation(directory: Path) -> None:
    with (
        Service(directory, "websocket:app").wait_ready() as service,
        connect_websocket(f"ws://127.0.0.1:{service.port}/") as client,
    ):
        for number in range(1, 4):
            client.send("hello")
            assert client.recv(DEADLINE_S) == f"{number} hello"
            assert service.restart()["connections"] == {"moved_websocket": 1}


@pytest.mark.parametrize("target", ["counting:handler", "counter:Counter"])
def test_a_stream_and_a_protocol_go_on_counting_in_the_new_generation(directory: Path, target: str) -> None:
    with (
        Service(directory, target).wait_ready() as service,
        socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client,
        client.makefile("r") as lines,
    ):
        for number in range(1, 4):
            client.sendall(b"hello\n")
            assert lines.readline() == f"{number} hello\n"
            (fate,) = service.restart()["connections"]
            assert fate.startswith("moved_")


def test_datagrams_are_answered_through_a_restart(directory: Path) -> None:
    with (
        Service(directory, "datagrams:Echo", "--bind", "udp://127.0.0.1:0").wait_ready() as service,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(("127.0.0.1", service.port))
        client.settimeout(DEADLINE_S)
        for _ in range(2):
            client.send(b"hello")
            assert client.recv(100) == b"hello"
            service.restart()


def test_an_embedded_server_drains_on_sigterm(directory: Path) -> None:
    command = [sys.executable, "embedded.py"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        with connect(port) as client:
            client.sendall(b"before")
            assert client.recv(100) == b"before"
            process.send_signal(signal.SIGTERM)
            client.sendall(b"after")
            assert client.recv(100) == b"after"
        assert process.wait(DEADLINE_S) == 0


def test_a_program_that_restarts_itself_goes_on_counting(directory: Path) -> None:
    command = [sys.executable, "restarting.py"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, address = process.stdout.readline().split()
        with connect(int(address.rpartition(":")[2])) as client, client.makefile("r") as answers:
            for number in range(1, 4):
                client.sendall(b"hello")
                assert answers.readline() == f"{number}\n"
                with watching_pid(int(pid)) as wait_ended:
                    os.kill(int(pid), signal.SIGHUP)
                    pid, same = process.stdout.readline().split()
                    wait_ended()
                assert same == address
        assert process.wait(DEADLINE_S) == 0
        os.kill(int(pid), signal.SIGTERM)
        assert process.stdout.read() == ""


def test_an_answer_that_crosses_a_restart_comes_from_the_old_code(directory: Path) -> None:
    with Service(directory, "app:app", "--workers", "2") as service, connect(service.wait_ready().port) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        restart = service.start("restart", service.name, "--json")
        assert read_response(client) == (200, b"version one, generation 1\n")
        report, _ = restart.communicate(timeout=DEADLINE_S)
        assert json.loads(report)["outcome"] == "done"
        assert http_get(service.port) == (200, b"version one, generation 2\n")


def test_a_socket_that_a_service_manager_holds_is_taken_by_its_name(directory: Path) -> None:
    manager = [need("systemd-socket-activate"), "-l", str(directory / "s"), "--fdname=web"]
    environment = ["-E", f"HOTPORT_RUNTIME_DIR={directory / 'run'}"]
    command = [*HOTPORT, "serve", "app:app", "--bind", "systemd:web"]
    with subprocess.Popen(
        [*manager, *environment, *command], cwd=directory, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith("Listening on")
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(DEADLINE_S)
                client.connect(str(directory / "s"))  # this starts it
                client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
                assert read_response(client) == (200, b"version one, generation 1\n")
        finally:
            process.send_signal(signal.SIGTERM)
            _, words = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, words
    (directory / "s").unlink(missing_ok=True)
