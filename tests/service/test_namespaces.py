"""hotport where a container engine would run it: pid 1 of its own namespaces, and not as root."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support import DEADLINE_S, Service, eventually, need, write_code

DOCKERFILE = Path(__file__).parent.parent.parent / "docker" / "Dockerfile"

#: Of the image.
UID = 10001

APP = """
import os, subprocess

async def app(stream):
    await stream.receive()
    subprocess.run(["sh", "-c", "true & exit 0"], check=True)  # its child is pid 1's from then on
    await stream.send(f"{os.getuid()} {os.getppid()}".encode())
"""


def health_check(service: Service, supervisor: psutil.Process) -> int:
    """The exit code of the image's HEALTHCHECK, in the namespaces of the supervisor."""
    command = json.loads(DOCKERFILE.read_text().partition("\nHEALTHCHECK ")[2].partition("CMD ")[2].splitlines()[0])
    assert command[0] == "hotport"
    inside = (need("nsenter"), f"--target={supervisor.pid}", "--user", "--preserve-credentials", "--pid", "--mount")
    return subprocess.run(
        [*inside, sys.executable, "-m", *command], env=service.env, capture_output=True, timeout=DEADLINE_S
    ).returncode


def ask(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        client.sendall(b"who")
        return client.recv(100).decode()


def zombies_below(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # reaped since it was listed
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def test_pid_1_of_a_container_reaps_says_how_it_is_and_leaves_as_it_should(
    tmp_path: Path, container: tuple[str, ...]
) -> None:
    write_code(tmp_path / "app.py", APP)
    volume = tmp_path / "v"  # as an emptyDir of Kubernetes: everybody's
    volume.mkdir()
    volume.chmod(0o777)
    env = {"HOTPORT_RUNTIME_DIR": str(volume / "private")}
    with Service(tmp_path, "app:app", "--lame-duck", "1h", prefix=container, env=env) as service:
        service.wait_ready()
        assert service.status()["pid"] == 1
        (supervisor,) = psutil.Process(service.process.pid).children()
        assert health_check(service, supervisor) == 0
        for _ in range(5):
            assert ask(service.port) == f"{UID} 1"
        eventually(lambda: not zombies_below(supervisor), "every orphan is reaped")
        assert service.restart()["outcome"] == "done"
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client:
            supervisor.send_signal(signal.SIGTERM)
            eventually(lambda: bool(service.log_events("service.lame_duck")), "it is a lame duck")
            assert health_check(service, supervisor) == 7
            assert ask(service.port) == f"{UID} 1"
            assert service.restart(expect=4) == {}
            supervisor.send_signal(signal.SIGTERM)
            eventually(lambda: bool(service.log_events("drain.began")), "it drains")
            client.sendall(b"who")
            assert client.recv(100).decode() == f"{UID} 1"
        assert service.wait() == 0


def test_a_health_check_does_not_take_the_supervisor_of_another_container_for_its_own(
    tmp_path: Path, container: tuple[str, ...]
) -> None:
    """A container that was about to take over was healthy before it had begun: the old one answered for it."""
    write_code(tmp_path / "app.py", APP)
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        assert service.run("status", "--ready").returncode == 0
        command = [*container, sys.executable, "-m", "hotport", "status", "--ready"]
        assert subprocess.run(command, env=service.env, capture_output=True, timeout=DEADLINE_S).returncode == 7
