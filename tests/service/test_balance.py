"""Workers of a real service share what comes, also after one was killed and after a restart."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support import DEADLINE_S, LINE_APP, Service, eventually, write_code

HTTP_APP = """\
async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


def shares(service: Service) -> list[int]:
    return sorted(worker["connections"] or 0 for worker in service.status()["workers"])


@contextmanager
def clients(service: Service, count: int) -> Iterator[None]:
    """So many at once, which stay; until all are accepted."""
    expected = sum(shares(service)) + count
    with ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", service.port))
        eventually(lambda: sum(shares(service)) == expected, "all are accepted")
        yield
    eventually(lambda: sum(shares(service)) == expected - count, "all have left")


def test_workers_share_what_comes(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", HTTP_APP)
    args = ("app:app", "--lifespan", "off", "--workers", "3")
    with Service(tmp_path, *args) as service:

        def assert_shared() -> None:
            with clients(service, 90):
                # The kernel would give all to the one that it wakes first. Who had no processor gets its share late.
                eventually(lambda: shares(service)[0] >= 20, "each has its share")

        service.wait_ready()
        assert_shared()
        os.kill(service.worker_pids()[0], signal.SIGKILL)
        service.wait_serving(3)
        assert_shared()
        service.restart()
        assert_shared()


def test_balance_can_be_turned_off(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--workers", "2", "--balance", "off") as service:
        service.wait_ready()
        result = service.run("rebalance")
        assert result.returncode == 4
        assert "HP419 cannot rebalance svc" in result.stderr
        assert "balance is off" in result.stderr


def test_connections_move_to_workers_that_come_and_a_restart_may_come_between(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", HTTP_APP)
    args = ("app:app", "--lifespan", "off", "--keep-alive", "600s")
    with Service(tmp_path, *args) as service, ExitStack() as stack:
        service.wait_ready()
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), DEADLINE_S)) for _ in range(60)
        ]

        def assert_all_answer() -> None:
            for sock in socks:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            for sock in socks:
                answer = b""
                while not answer.endswith(b"ok"):
                    data = sock.recv(4096)
                    assert data, answer
                    answer += data
                assert b"200 OK" in answer

        assert_all_answer()
        service.run("scale", "3")
        service.wait_serving(3)
        eventually(lambda: shares(service)[0] >= 12, "the new ones have their share")
        assert_all_answer()
        assert service.run("rebalance").stdout.endswith("connections moved\n")
        assert shares(service)[0] >= 17
        assert_all_answer()
        service.run("scale", "4")
        service.restart()
        service.wait_serving(4)
        eventually(lambda: shares(service)[0] >= 7, "each has its share")
        assert_all_answer()
        assert sum(shares(service)) == 60
