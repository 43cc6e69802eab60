"""Strategies where nobody else refuses connections, and where somebody else wants the port."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.netns import isolated, sysctl
from tests.support import DEADLINE_S, LINE_APP, RESTARTS, Gate, Hammer, Service, ask_line, eventually, write_code

STRANGER = 1000
NOBODY = 65534

#: Takes a port as soon as it can be had, says so, and keeps it until it is told to go on by a byte on stdin.
THIEF = """\
import socket, sys
name = ("127.0.0.1", int(sys.argv[1]))
print("ready", flush=True)
while True:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                sock.bind(name)
                sock.listen()
                break
            except OSError:
                pass
        print("got it", flush=True)
        sys.stdin.readline()
        break
"""

#: In the supervisor: between letting go of a port and binding it again it waits at a gate, once.
GAP = """\
import os, socket, sys
if "serve" in sys.orig_argv:
    bind = socket.socket.bind

    def bind_later(self, name):
        if self.family == socket.AF_INET and name[1] and os.path.exists("gate"):
            open("gate").close()
            os.unlink("gate")
        return bind(self, name)

    socket.socket.bind = bind_later
"""


def acting_as(uid: int) -> tuple[str, ...]:
    """What a Python command runs under to belong to another user, without any capability.

    An interpreter that only root can reach (in /root) is shown to it in a mount namespace.
    """
    drop = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")
    base = Path(sys.base_prefix)
    closed = next((path for path in reversed(base.parents) if not path.stat().st_mode & 0o001), None)
    if closed is None:
        return drop
    show = f"""set -e
held=$(mktemp -d)
mount --bind {base} $held
mount -t tmpfs -o mode=755 none {closed}
mkdir -p {base}
mount --move $held {base}
rmdir $held
exec {" ".join(drop)} "$@"
"""
    return ("unshare", "--mount", "sh", "-c", show, "sh")


def app_in(directory: Path, version: str) -> None:
    write_code(directory / "app.py", LINE_APP.format(version=version))


def service_of(stack: ExitStack, *args: str, user: int = 0) -> Service:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hp-")))
    app_in(directory, "v0")
    (directory / "sitecustomize.py").write_text(GAP)
    prefix: tuple[str, ...] = ()
    if user:
        for path in (directory, directory / "app.py"):
            path.chmod(0o777)
        prefix = acting_as(user)
    args = (*args, "--settle", "50ms", "--backlog", "4096", "app:app")
    service = Service(directory, *args, prefix=prefix, env={"PYTHONPATH": str(directory)})
    if user:
        next(directory.glob("manager-*")).chmod(0o777)
    return stack.enter_context(service).wait_ready()


def restarts(migrate: str, strategy: str, is_guarded: bool, count: int, user: int) -> dict[str, Any]:
    """Restart under load; what clients met, and what was reported."""
    assert sysctl("net.ipv4.tcp_migrate_req", migrate)
    with ExitStack() as stack:
        guard = ("--guard",) if is_guarded else ()
        service = service_of(stack, "--strategy", strategy, *guard, "--workers", "2", user=user)
        clients = stack.enter_context(Hammer(service.port))
        reports = []
        for number in range(1, count + 1):
            app_in(service.directory, f"v{number}")
            reports.append(service.restart())
            clients.wait_answers(10, f"v{number}")
        clients.__exit__()
        return {
            "failures": dict(clients.failures),
            "answers": clients.answers.total(),
            "outcomes": sorted({(report["outcome"], report["strategy"]) for report in reports}),
            "refused": sum(report["refused"] or 0 for report in reports),
            "reset": sum(report["reset"] or 0 for report in reports),
            "gaps": sorted(report["rebind_gap_us"] or 0 for report in reports),
        }


@pytest.mark.soak
@pytest.mark.parametrize("migrate", ["0", "1"])
def test_overlap_loses_nobody_and_needs_no_privilege(migrate: str) -> None:
    found = isolated(restarts, migrate, "overlap", False, RESTARTS, NOBODY)
    assert found["outcomes"] == [["done", "overlap"]]
    assert found["failures"] == {}, found


@pytest.mark.soak
@pytest.mark.parametrize("is_guarded", [False, True])
def test_rebind_reports_exactly_what_clients_met(is_guarded: bool) -> None:
    found = isolated(restarts, "0", "rebind", is_guarded, RESTARTS, 0)
    assert found["outcomes"] == [["done", "rebind"]]
    assert found["failures"].pop("ConnectionRefusedError", 0) == found["refused"], found
    assert found["failures"].pop("ConnectionResetError", 0) == found["reset"], found
    assert not found["failures"]


@contextmanager
def thief_of(port: int) -> Iterator[subprocess.Popen[str]]:
    """Somebody of another user who binds that port in a loop."""
    command = [*acting_as(STRANGER), sys.executable, "-c", THIEF, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as thief:
        try:
            assert thief.stdout is not None
            assert thief.stdout.readline() == "ready\n"
            yield thief
        finally:
            thief.kill()


def tempt(strategy: str, is_guarded: bool, count: int) -> dict[str, Any]:
    """Restart while somebody wants the port."""
    with ExitStack() as stack:
        guard = ("--guard",) if is_guarded else ()
        service = service_of(stack, "--strategy", strategy, *guard)
        stack.enter_context(thief_of(service.port))
        outcomes = []
        for number in range(1, count + 1):
            app_in(service.directory, f"v{number}")
            outcomes.append(service.run("restart", service.name).returncode)
        return {"outcomes": outcomes, "lost": service.status()["lost"]}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("strategy", "is_guarded"), [("inherit", False), ("transfer", False), ("overlap", False), ("rebind", True)]
)
def test_stranger_never_gets_the_port(strategy: str, is_guarded: bool) -> None:
    found = isolated(tempt, strategy, is_guarded, max(1, RESTARTS // 3))
    assert set(found["outcomes"]) == {0}
    assert found["lost"] == {}


def be_robbed() -> dict[str, Any]:
    """Lose the port in the gap of a rebind, and get it back when the thief lets go of it."""
    with ExitStack() as stack:
        service = service_of(stack, "--strategy", "rebind")
        thief = stack.enter_context(thief_of(service.port))
        assert thief.stdout is not None
        gate = Gate(service.directory)
        app_in(service.directory, "v1")
        with service.start("restart", service.name) as restart:
            said = thief.stdout.readline()
            gate.open()
            outcome = restart.wait(DEADLINE_S)
        found: dict[str, Any] = {
            "thief": thief.pid,
            "said": said,
            "outcome": outcome,
            "lost": service.status()["lost"],
            "report": service.status()["last_restart"],
            "refused": service.run("restart", service.name).stderr,
        }
        thief.communicate("\n", timeout=DEADLINE_S)
        eventually(lambda: not service.status()["lost"], "the port is ours again")
        found["answer"] = ask_line(service.port)
        found["events"] = [line["event"] for line in service.log_lines() if line["event"].startswith("port.")]
        found["after"] = service.restart("--strategy", "inherit")["outcome"]
        return found


@pytest.mark.measured
def test_stranger_who_takes_the_port_in_a_rebind_is_named_and_outlived() -> None:
    found = isolated(be_robbed)
    assert found["said"] == "got it\n"
    assert found["outcome"] == 4
    ((address, why),) = found["lost"].items()
    assert address.startswith("tcp://127.0.0.1:")
    assert f"pid {found['thief']}" in why
    assert found["report"]["outcome"] == "aborted"
    assert f"pid {found['thief']}" in found["report"]["error"]
    assert "HP410" in found["refused"]
    assert found["answer"][0] == "v0"  # the old generation
    assert found["events"][-2:] == ["port.lost", "port.regained"]
    assert found["after"] == "done"
