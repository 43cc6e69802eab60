"""A datagram service through restarts: every numbered datagram is answered once."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, RESTARTS, Service, write_code

APP = """\
import asyncio

class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(b"{version} " + data, address)
"""


@pytest.mark.soak
def test_numbered_datagrams_are_answered_once_each_through_restarts(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", APP.format(version=0))
    with Service(tmp_path, "app:Echo", "--bind", "udp://127.0.0.1:0", "--workers", "2") as service:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.connect(("127.0.0.1", service.wait_ready().port))
        client.settimeout(DEADLINE_S)
        answers: list[tuple[bytes, int]] = []
        is_over = threading.Event()
        room = threading.Semaphore(64)  # no more under way than a receive buffer holds
        sent = 0

        def receive() -> None:
            while not is_over.is_set() or len(answers) < sent:
                version, number = client.recv(100).split()
                answers.append((version, int(number)))
                room.release()

        receiver = threading.Thread(target=receive)
        receiver.start()

        def send_until(claim: object) -> None:
            nonlocal sent
            while not claim():  # type: ignore[operator]
                assert room.acquire(timeout=DEADLINE_S)
                client.send(b"%d" % sent)
                sent += 1

        for version in range(1, RESTARTS + 1):
            write_code(tmp_path / "app.py", APP.format(version=version))
            restart = service.start("restart", service.name)
            send_until(lambda restart=restart: restart.poll() is not None)
            out, error = restart.communicate()
            assert restart.returncode == 0, out + error
            answered = len(answers)
            send_until(lambda answered=answered: len(answers) > answered + 100)
            assert answers[-1][0] == b"%d" % version
        is_over.set()
        client.send(b"%d" % sent)
        sent += 1
        receiver.join(DEADLINE_S)
        assert sorted(number for _, number in answers) == list(range(sent))
        client.close()
