"""The playbook of the documentation: ansible-core, three services as three hosts behind HAProxy, and clients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.service.test_releases import make_release, switch
from tests.support import DEADLINE_S, HOTPORT, Hammer, Service, ask_line, eventually, need, write_code

PLAYBOOKS = Path(__file__).parents[2] / "docs" / "examples" / "ansible"
HOSTS = ("web1", "web2", "web3")


class Fleet:
    """Three services that were started in their `current`, behind a port of HAProxy's."""

    def __init__(self, directory: Path, services: dict[str, Service], port: int) -> None:
        self.directory = directory
        self.services = services
        self.port = port

    def play(self, playbook: str, number: int, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a playbook."""
        program = Path(sys.executable).parent / "ansible-playbook"
        (self.directory / "hotport").write_text(f'#!/bin/sh\nexec {" ".join(HOTPORT)} "$@"\n')
        (self.directory / "hotport").chmod(0o755)
        lines = [
            f"{name} hotport_root={service.directory} "
            f"hotport_environment='{json.dumps({'HOTPORT_RUNTIME_DIR': service.env['HOTPORT_RUNTIME_DIR']})}'"
            for name, service in self.services.items()
        ]
        everywhere = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "hotport_name": "svc",
            "hotport_command": self.directory / "hotport",
        }
        lines = ["[shop]", *lines, "[shop:vars]", *(f"{name}={value}" for name, value in everywhere.items())]
        (self.directory / "inventory.ini").write_text("\n".join(lines) + "\n")
        command = [str(program), "-i", str(self.directory / "inventory.ini"), str(PLAYBOOKS / playbook)]
        given = {"release": str(number), "archive": str(self.directory / f"{number}.tar"), "bake_s": 1}
        # Its own files and those of the jobs that outlive it stay in the test's directory.
        env = {**os.environ, "HOME": str(self.directory), "ANSIBLE_HOME": str(self.directory / ".ansible")}
        return subprocess.run(
            [*command, "-e", json.dumps(given), *options],
            capture_output=True,
            text=True,
            timeout=6 * DEADLINE_S,
            check=False,
            env={**env, "ANSIBLE_ASYNC_DIR": str(self.directory / "jobs"), "LC_ALL": "C.UTF-8"},
        )

    def pack(self, number: int, code: str | None = None) -> None:
        """Make the archive of a release."""
        place = make_release(self.directory / "build", number)
        if code is not None:
            write_code(place / "app.py", code + (place / "app.py").read_text())
        with tarfile.open(self.directory / f"{number}.tar", "w") as archive:
            for path in place.iterdir():
                archive.add(path, path.name)

    def versions(self) -> list[str]:
        return [ask_line(service.port).version for service in self.services.values()]

    def links(self) -> set[str]:
        return {os.readlink(service.directory / "current") for service in self.services.values()}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    pytest.importorskip("ansible", reason="ansible-core is not installed: uv sync --group ansible")
    with ExitStack() as stack:
        services = {}
        for name in HOSTS:
            base = tmp_path / name
            make_release(base, 41)
            switch(base / "current", Path("releases/41"))
            service = stack.enter_context(Service(base, "app:app", cwd=base / "current", env={"WHO": name}))
            services[name] = service.wait_ready()
        port = stack.enter_context(balancer(tmp_path, [service.port for service in services.values()]))
        yield Fleet(tmp_path, services, port)


@contextmanager
def balancer(directory: Path, ports: list[int]) -> Iterator[int]:
    """HAProxy that tries nothing again: what a server loses, a client sees."""
    program = need("haproxy")
    with socket.create_server(("127.0.0.1", 0)) as front:
        servers = "".join(f"    server web{number} 127.0.0.1:{port}\n" for number, port in enumerate(ports))
        config = directory / "haproxy.cfg"
        config.write_text(
            "defaults\n    mode tcp\n    retries 0\n"
            "    timeout connect 30s\n    timeout client 30s\n    timeout server 30s\n"
            f"listen shop\n    bind fd@{front.fileno()}\n{servers}"
        )
        port: int = front.getsockname()[1]
        command = [program, "-db", "-q", "-f", str(config)]
        with subprocess.Popen(command, pass_fds=[front.fileno()], stderr=subprocess.DEVNULL) as process:
            try:
                yield port
            finally:
                process.kill()


def test_release_reaches_every_host_and_no_client_is_lost(fleet: Fleet) -> None:
    fleet.pack(42)
    with Hammer(fleet.port) as hammer:
        hammer.wait_answers(version="41")
        done = fleet.play("deploy.yml", 42)
        assert done.returncode == 0, done.stdout + done.stderr
        hammer.wait_answers(version="42")
    assert not hammer.failures
    assert fleet.versions() == ["42"] * 3
    assert fleet.links() == {"releases/42"}
    services = fleet.services.values()  # their old workers leave at once, and not at the end of the window
    eventually(lambda: all(len(each.worker_pids()) == 1 for each in services), "the old workers have left")
    gone = fleet.play("leave.yml", 42, "--limit", "web3", "-e", "lame_duck=0s")
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert fleet.services["web3"].wait() == 0


FAULT = "import os\nif os.environ['WHO'] == 'web2': raise RuntimeError('no database here')\n"


def test_release_that_fails_on_the_second_host_is_taken_back_on_the_first(fleet: Fleet) -> None:
    fleet.pack(42, FAULT)
    with Hammer(fleet.port) as hammer:
        hammer.wait_answers(version="41")
        done = fleet.play("deploy.yml", 42, "-e", '{"batches": [1, 1, 1]}')
        assert done.returncode != 0
        assert "release 42 was taken back on every host" in done.stdout, done.stdout + done.stderr
        hammer.wait_answers(version="41")
    assert not hammer.failures
    assert hammer.answers["42"] > 0, "the first host has served it"
    assert fleet.versions() == ["41"] * 3, done.stdout
    assert fleet.links() == {"releases/41"}
    generations = [ask_line(service.port).generation for service in fleet.services.values()]
    assert generations == ["1"] * 3, "the old workers themselves"
