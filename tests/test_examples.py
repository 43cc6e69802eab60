"""Every file of examples/ runs as it is, and does what its head says."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, Service, http_get

EXAMPLES = Path(__file__).parent.parent / "examples"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), DEADLINE_S)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", ["fastapi_app:app", "wsgi_flask:app"])
def test_greeting_before_and_after_a_restart(examples: Path, target: str) -> None:
    with Service(examples, target) as service:
        port = service.wait_ready().port
        for _ in range(2):
            status, body = http_get(port, "/greetings/Ann")
            assert (status, json.loads(body)) == (200, {"greeting": "Hello, Ann!"})
            assert service.restart()["outcome"] == "done"


def test_django_single_file(examples: Path) -> None:
    with Service(examples, "django_single_file:application") as service, connect(service.wait_ready().port) as client:
        client.sendall(b"GET /?name=Ann HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert client.makefile().read().endswith('{"greeting": "Hello, Ann!"}')


def test_event_stream_asks_its_client_to_come_back(examples: Path) -> None:
    with Service(examples, "starlette_sse_drain:app") as service, connect(service.wait_ready().port) as client:
        client.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: 41\r\n\r\n")
        with client.makefile("rb") as file:
            while b"data: 42" not in file.readline():
                pass
            restart = service.start("restart", service.name, "--json")
            rest = b"".join(iter(file.readline, b"0\r\n"))
        assert b"retry: " in rest
        report, _ = restart.communicate(timeout=DEADLINE_S)
        assert json.loads(report)["connections"] == {"moved_http": 1}


def test_chat_passes_lines_on_and_asks_everybody_to_come_back(examples: Path) -> None:
    with Service(examples, "raw_stream_chat:chat") as service:
        port = service.wait_ready().port
        with connect(port) as ann, connect(port) as bob:
            assert ann.recv(100).startswith(b"* welcome")
            assert bob.recv(100) == b"* welcome, 2 here\n"
            ann.sendall(b"hello\n")
            assert bob.recv(100) == b"hello\n"
            report = service.restart()
            assert report["connections"] == {"finished": 2}
            for client in (ann, bob):
                assert client.makefile().read() == "* the server restarts, please connect again\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_embedded_server_answers_until_it_is_told_to_end(examples: Path, number: int) -> None:
    command = [sys.executable, "embedded_server.py"]
    with subprocess.Popen(command, cwd=examples, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        status, body = http_get(port)
        assert status == 200
        assert body.endswith(b" jobs done\n")
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0


def test_every_example_is_tested() -> None:
    told = Path(__file__).read_text()
    assert {path.stem for path in EXAMPLES.glob("*.py") if path.stem not in told} == set()
