"""Workers of a real service share what comes, also after one was killed and after a restart."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support import LINE_APP, Service, eventually, write_code


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
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--workers", "3") as service:
        service.wait_ready().wait_serving(3)
        with clients(service, 90):
            # The kernel would give all to the one that it wakes first. One without a processor may get less.
            assert shares(service)[0] >= 15
            assert shares(service)[-1] <= 60
        os.kill(service.worker_pids()[0], signal.SIGKILL)
        service.wait_serving(3)
        with clients(service, 90):
            assert shares(service)[0] >= 15
        service.restart()
        with clients(service, 90):
            assert shares(service)[0] >= 15
        assert (service.runtime / "load").exists()
    assert not (service.runtime / "load").exists()


def test_balance_can_be_turned_off(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--workers", "2", "--balance", "off") as service:
        service.wait_ready()
        assert not (service.runtime / "load").exists()
        service.restart()
