"""Under a service manager: what it hears, and what it keeps while nobody serves."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.manager import FakeManager
from tests.support import DEADLINE_S, LINE_APP, Hammer, write_code


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    return tmp_path


def wait_in_queue(port: int, count: int) -> list[socket.socket]:
    """Clients that have connected and asked, while nobody serves; nobody is refused."""
    clients = []
    for _ in range(count):
        clients.append(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
        clients[-1].sendall(b"who\n")
    return clients


def answers(clients: list[socket.socket]) -> set[str]:
    """Which versions have answered all of them."""
    versions = set()
    for client in clients:
        with client, client.makefile() as file:
            versions.add(file.read().split()[0])
    return versions


def test_accept_queue_outlives_a_stop_and_a_start(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--workers", "2") as manager:
        port = manager.start_unit().port
        with Hammer(port) as hammer:
            hammer.wait_answers(20)
            assert manager.stop_unit() == 0
            clients = wait_in_queue(port, 20)
            write_code(directory / "app.py", LINE_APP.format(version="two"))
            manager.start_unit()
            assert answers(clients) == {"two"}
            hammer.wait_answers(20, "two")
        assert manager.port == port
        assert not hammer.failures
