"""The supervisor as the first process of a container."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support import Service, eventually, need

APP = """
import subprocess

async def orphan_maker(stream):
    # The shell leaves at once; what it has started is pid 1's child from then on, and ends soon after.
    subprocess.run(["sh", "-c", "true & exit 0"], check=True)
    await stream.send(b"orphaned")
"""


@pytest.fixture
def unshare() -> str:
    path = need("unshare")
    if subprocess.run([path, "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("pid namespaces cannot be made here")
    return path


def test_orphans_are_reaped_and_restarts_work_as_pid_1(tmp_path: Path, unshare: str) -> None:
    (tmp_path / "app.py").write_text(APP)
    prefix = (unshare, "--pid", "--fork", "--mount-proc", "--kill-child")
    with Service(tmp_path, "app:orphan_maker", prefix=prefix) as service:
        service.wait_ready()
        assert service.status()["pid"] == 1
        supervisor = psutil.Process(service.process.pid).children()[0]
        for _ in range(5):
            assert connect(service) == b"orphaned"
        eventually(
            lambda: all(child.status() != psutil.STATUS_ZOMBIE for child in supervisor.children()),
            "every orphan is reaped",
        )
        assert service.restart()["outcome"] == "done"
        assert connect(service) == b"orphaned"
        supervisor.send_signal(signal.SIGTERM)
        assert service.wait() == 0


def connect(service: Service) -> bytes:
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        return client.recv(100)
