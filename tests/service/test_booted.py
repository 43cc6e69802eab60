"""Under a real systemd, with the unit of the documentation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.booted import ENVIRONMENT, PYTHON, Booted, version
from tests.support import LINE_APP, eventually, write_code

UNITS = Path(__file__).parents[2] / "docs" / "examples" / "systemd"

#: Where this test runs it, and which of systemd's own units it does without.
HERE = """\
[Unit]
DefaultDependencies=no
[Service]
User=root
WorkingDirectory={directory}
Environment=PWD={directory} {environment}
BindPaths={directory}
ProtectHome=no
ExecStart=
ExecStart={serve} serve app:app --name shop --bind 127.0.0.1:8000 --workers 2 --log-format json
StandardOutput=append:{directory}/shop.log
StandardError=append:{directory}/shop.log
"""

#: Clients, each time on a new connection, from the first answer until they are told to stop; what came of them.
CLIENTS = """
import collections, json, socket, sys, threading, time
fates, over, lock = collections.Counter(), threading.Event(), threading.Lock()

def ask():
    while not over.wait(0.003):
        try:
            with socket.create_connection(("127.0.0.1", 8000), 60) as sock, sock.makefile() as file:
                sock.settimeout(60)
                sock.sendall(b"who\\n")
                fate = (file.read().split() or ["cut"])[0]
        except OSError as error:
            fate = type(error).__name__
        with lock:
            fates[fate] += 1

threads = [threading.Thread(target=ask) for _ in range(4)]
[thread.start() for thread in threads]
while not fates:
    time.sleep(0.01)
open(sys.argv[2], "w").close()
open(sys.argv[1]).close()
over.set()
[thread.join() for thread in threads]
print(json.dumps(fates))
"""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Booted]:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    serve = f"{PYTHON} -m hotport"
    units = {
        "shop.service": (UNITS / "shop.service").read_text(),
        "shop.service.d/here.conf": HERE.format(directory=tmp_path, environment=ENVIRONMENT, serve=serve),
    }
    if version() < 254:
        old = (UNITS / "before-254.conf").read_text()
        units["shop.service.d/old.conf"] = old.replace("/srv/shop/venv/bin/hotport", serve)
    with Booted(tmp_path, units) as system:
        system.run("systemctl", "start", "shop")
        yield system


@contextmanager
def asked(system: Booted, directory: Path) -> Iterator[dict[str, int]]:
    """Clients that ask all the time, and have been answered; how often they got which answer, after the block."""
    fates: dict[str, int] = {}
    end, begun = directory / "end", directory / "begun"
    for path in (end, begun):
        path.unlink(missing_ok=True)
    system.run("mkfifo", str(end))
    clients = system.start(PYTHON, "-c", CLIENTS, str(end), str(begun))
    try:
        eventually(begun.exists, "somebody was answered")
        yield fates
    finally:
        end.open("w").close()
        words, errors = clients.communicate()
    fates.update(json.loads(words or errors))


def test_restart_refuses_nobody(system: Booted, tmp_path: Path) -> None:
    assert system.show("shop")["NFileDescriptorStore"] == "1"
    with asked(system, tmp_path) as fates:
        for number in range(2):
            write_code(tmp_path / "app.py", LINE_APP.format(version=f"v{number}"))
            system.run("systemctl", "restart", "shop")
    assert fates.keys() <= {"one", "v0", "v1"}, fates
    assert fates["v1"]
    system.run("sed", "-i", "s/127.0.0.1:8000/0.0.0.0:8000/", "/etc/systemd/system/shop.service.d/here.conf")
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "restart", "shop")
    assert system.show("shop")["NFileDescriptorStore"] == "1", "the new listener, in place of the old one"
    system.run("systemctl", "stop", "shop")
    assert system.show("shop")["NFileDescriptorStore"] == "0"


def test_reload_loses_nobody_and_says_how_it_ended(system: Booted, tmp_path: Path) -> None:
    before = system.show("shop")
    with asked(system, tmp_path) as fates:
        write_code(tmp_path / "app.py", LINE_APP.format(version="two"))
        system.run("systemctl", "reload", "shop")
        assert system.show("shop")["StatusText"] == "generation 2 serves"
        write_code(tmp_path / "app.py", "import nothing_of_that_name")
        system.run("systemctl", "reload", "shop", expect=None)
        after = system.show("shop")
    assert after["StatusText"].startswith("generation 2 serves, the restart to generation 3 was aborted: Mod")
    assert (after["ActiveState"], after["MainPID"]) == ("active", before["MainPID"])
    assert fates.keys() == {"one", "two"}, fates


def test_death_of_every_process_refuses_nobody(system: Booted, tmp_path: Path) -> None:
    with asked(system, tmp_path) as fates:
        system.run("systemctl", "kill", "--signal=KILL", "shop")
        system.run(PYTHON, "-c", ASK_GENERATION)
    assert "ConnectionRefusedError" not in fates, fates
    assert system.show("shop")["NRestarts"] == "1"


def test_death_of_the_supervisor_alone_is_noticed_by_nobody(system: Booted, tmp_path: Path) -> None:
    before = system.show("shop")["MainPID"]
    drop_in = "/etc/systemd/system/shop.service.d/"
    shutil.copy(UNITS / "adopt.conf", tmp_path)
    system.run("cp", str(tmp_path / "adopt.conf"), drop_in)
    system.run("systemctl", "daemon-reload")
    with asked(system, tmp_path) as fates:
        system.run("kill", "-KILL", before)
        eventually(lambda: _has_another_supervisor(system, before), "it is started again")
    assert fates.keys() == {"one"}, fates
    assert "service.adopted" in (tmp_path / "shop.log").read_text()


def _has_another_supervisor(system: Booted, before: str) -> bool:
    now = system.show("shop")
    return now["SubState"] == "running" and now["MainPID"] != before


#: Waits in the accept queue until it is answered; what a killed worker had already accepted is another matter.
ASK_GENERATION = """
import socket
while True:
    with socket.create_connection(("127.0.0.1", 8000), 60) as sock:
        try:
            sock.sendall(b"who\\n")
            if sock.recv(100):
                break
        except ConnectionResetError:
            pass
"""
