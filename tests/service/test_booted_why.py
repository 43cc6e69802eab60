"""`hotport why` about services of a real systemd: their remedy is to stop the unit, and that frees the port."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.booted import ENVIRONMENT, PYTHON, Booted

SERVICE = f"""\
[Unit]
DefaultDependencies=no
[Service]
Environment={ENVIRONMENT}
ExecStart={PYTHON} -m http.server 8000 --bind 127.0.0.1
Restart=always
RestartSec=0
"""
SOCKET = "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:8001\n"
ACTIVATED = f"[Unit]\nDefaultDependencies=no\n[Service]\nEnvironment={ENVIRONMENT}\nExecStart={PYTHON} -c 'input()'\n"
CRON = f"""\
[Unit]
DefaultDependencies=no
[Service]
Environment={ENVIRONMENT}
ExecStart=/bin/sh -c 'setsid {PYTHON} -m http.server 8002 --bind 127.0.0.1 & wait'
"""


@pytest.mark.parametrize(
    ("unit", "port", "remedy"),
    [
        ("web.service", 8000, "systemctl stop web.service"),
        ("idle.socket", 8001, "systemctl stop idle.socket idle.service"),
        ("jobs.service", 8002, "kill "),
    ],
)
def test_port_of_a_unit_is_freed_by_the_right_command(tmp_path: Path, unit: str, port: int, remedy: str) -> None:
    """A service with ``Restart=always`` comes back after a kill; a job of cron is not a reason to stop cron."""
    units = {"web.service": SERVICE, "idle.socket": SOCKET, "idle.service": ACTIVATED, "jobs.service": CRON}
    command = ("env", ENVIRONMENT, PYTHON, "-m", "hotport", "why", f"127.0.0.1:{port}")
    with Booted(tmp_path, units) as system:
        system.run("systemctl", "start", unit)
        if not unit.endswith(".socket"):
            waiting = f"until {' '.join(command)} --json | grep -q listening; do :; done"
            system.run("sh", "-c", waiting)
        page = system.run(*command, expect=1).splitlines()
        assert page[2].removeprefix("  try      ").startswith(remedy), page
        found = json.loads(system.run(*command, "--free", "--yes", "--json"))
        assert found["free"] == "yes"
        table = system.run(*command[:-1])
        assert f":{port}" not in table
