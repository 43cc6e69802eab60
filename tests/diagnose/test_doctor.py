from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from hotport.diagnose.doctor import (
    ListenerState,
    Machine,
    Managed,
    Member,
    examine,
    examine_service,
    read_machine,
    read_service,
)
from hotport.model.port import Ephemeral
from hotport.options import Options
from hotport.wire.messages import Status, WorkerStatus
from tests.support import HOTPORT, LINE_APP, Service, write_code

SOUND = Machine(
    kernel=(6, 18),
    has_pidfd=True,
    descriptors_max=20_000,
    runtime_root="/run/hotport",
    runtime_obstacle="",
    may_bind_low=False,
    somaxconn=4096,
    aborts_on_overflow=False,
    low_end=1024,
    ephemeral=Ephemeral(32768, 60999, "40000,50000-50010"),
    overflows=0,
)
LISTENER = ListenerState(
    "tcp://127.0.0.1:8000", nodelay=True, strangers=(), joiners=(), is_shared=False, migrates=False
)
MEMBER = Member("worker 1.1", 7, (), (10, 1024))


def whats(machine: Machine, *bind: str) -> list[str]:
    found = list(examine(machine, Options(bind=bind)))
    assert all(finding.consequence and (finding.fix or finding.note) for finding in found)
    return [finding.what for finding in found]


def test_sound_machine_has_nothing_to_repair() -> None:
    assert whats(SOUND, ":8000", "unix:a.sock", "[::]:0", "127.0.0.1:40000", ":50005", "nonsense:") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": (5, 2)}, "pidfd_open does not work (Linux 5.2)"),
        ({"has_pidfd": False}, "pidfd_open does not work (Linux 6.18)"),
        ({"somaxconn": 128}, "net.core.somaxconn is 128, below the backlog of 4096"),
        ({"aborts_on_overflow": True}, "net.ipv4.tcp_abort_on_overflow is 1"),
        ({"overflows": 1234}, "accept queues have overflowed 1,234 times"),
        ({"descriptors_max": 1024}, "a process may open 1,024 descriptors"),
        ({"runtime_obstacle": "belongs to eve"}, "the runtime directory /run/hotport belongs to eve"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_weakness_of_a_machine_is_found(change: dict[str, object], words: str) -> None:
    (what,) = whats(replace(SOUND, **change))
    assert words in what


def test_what_cannot_be_read_is_not_found_fault_with() -> None:
    assert whats(replace(SOUND, somaxconn=None, low_end=None), ":80") == []


def test_ports_that_may_not_be_bound_or_be_given_away_are_found() -> None:
    (low,) = whats(SOUND, ":80")
    assert "tcp://0.0.0.0:80 is below net.ipv4.ip_unprivileged_port_start (1024)" in low
    assert whats(replace(SOUND, may_bind_low=True), ":80") == []
    (outgoing,) = whats(SOUND, ":40001")
    assert "one of the ports for outgoing connections (32768 to 60999)" in outgoing


@pytest.mark.parametrize(
    ("listener", "member", "words"),
    [
        ({"strangers": ("pid 9 (sleep 1000, user www)",)}, {}, "is also held by pid 9 (sleep 1000, user www)"),
        ({"joiners": ("pid 9 (thief, user www)",)}, {}, "pid 9 (thief, user www) listens on the port of"),
        ({"is_shared": True}, {}, "has SO_REUSEPORT, and net.ipv4.tcp_migrate_req is 0"),
        ({"nodelay": False}, {}, "has TCP_NODELAY off"),
        ({}, {"inheritable": (3, 4)}, "sockets of worker 1.1 (pid 7) are inheritable: descriptors 3, 4"),
        ({}, {"descriptors": (1000, 1024)}, "worker 1.1 (pid 7) has 1,000 of 1,024 descriptors open"),
    ],
)
def test_each_weakness_of_a_service_is_found(
    listener: dict[str, object], member: dict[str, object], words: str
) -> None:
    changed = replace(LISTENER, **listener), replace(MEMBER, **member)
    (finding,) = examine_service([changed[0]], [changed[1]])
    assert words in finding.what
    assert finding.consequence
    assert finding.fix or finding.note


def test_socket_file_that_is_gone_is_found() -> None:
    (finding,) = examine_service([], [], gone={"unix:/run/app.sock": "pid 9 (thief) is listening on it"})
    assert (
        finding.what
        == "the socket file of unix:/run/app.sock was removed or replaced (pid 9 (thief) is listening on it)"
    )
    assert finding.consequence
    assert finding.fix


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({1: 900, 2: 50, 3: 50}, "worker 1 has 900 of 1,000 connections, one of 3 workers"),
        ({1: 20, 2: 0}, ""),  # few of them may be anywhere
        ({1: 400, 2: 600}, ""),
        ({1: 5000}, ""),
        ({}, ""),
    ],
)
def test_uneven_shares_of_workers_are_found(shares: dict[int, int], words: str) -> None:
    assert [finding.what for finding in examine_service([], [], shares=shares)] == ([words] if words else [])


@pytest.mark.parametrize(
    ("kill_mode", "is_sound"),
    [("control-group", False), ("none", False), ("mixed", True), ("process", True), ("", True)],
)
def test_ways_of_systemd_to_end_a_service_are_known(kill_mode: str, is_sound: bool) -> None:
    findings = list(examine_service([], [], managed=Managed("shop.service", kill_mode)))
    assert [finding.what for finding in findings] == ([] if is_sound else [f"shop.service has KillMode={kill_mode}"])
    assert all(finding.consequence and "systemctl edit shop.service" in finding.fix for finding in findings)


def test_sound_service_has_nothing_to_repair() -> None:
    unread = replace(MEMBER, descriptors=None)
    assert not list(examine_service([LISTENER, replace(LISTENER, is_shared=True, migrates=True)], [MEMBER, unread]))


def test_this_machine_is_read(tmp_path: Path) -> None:
    machine = read_machine(tmp_path / "run")
    assert machine.kernel >= (5, 3)
    assert machine.has_pidfd
    assert machine.descriptors_max > 0
    assert machine.runtime_obstacle == ""


def test_runtime_directory_that_is_no_good_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    assert read_machine(path).runtime_obstacle == "may be entered by others (mode 0755)"
    path.chmod(0o700)
    assert read_machine(path).runtime_obstacle == ""
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    assert read_machine(path).runtime_obstacle == "belongs to root" or os.getuid() != 0
    monkeypatch.undo()
    (tmp_path / "file").touch()
    assert read_machine(tmp_path / "file").runtime_obstacle.startswith("is not a directory")
    assert read_machine(tmp_path / "file" / "run").runtime_obstacle == "cannot be looked at: not a directory"
    assert "cannot be made" in read_machine(tmp_path / "none" / "run").runtime_obstacle


def test_kernel_that_refuses_pidfds_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert not read_machine(tmp_path).has_pidfd


def test_service_is_read_with_strangers_and_what_is_inheritable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        heir = subprocess.Popen(["sleep", "1000"], pass_fds=[server.fileno()])
        try:
            status = Status(
                service="svc",
                pid=os.getpid(),
                version="",
                generation=1,
                wanted=1,
                restarting=0,
                addresses=(address, "unix:a.sock", "tcp://127.0.0.1:1"),
                target="",
                age_s=0,
                rss_bytes=0,
                workers=(WorkerStatus(worker=1, generation=1, pid=2**30, phase="serving", age_s=0),),
            )
            (listener,), (supervisor, worker), _ = read_service(status)
        finally:
            heir.kill()
            heir.wait()
        assert listener.address == address
        assert listener.nodelay is False
        assert len(listener.strangers) == 1
        assert f"pid {heir.pid} (sleep 1000" in listener.strangers[0]
        assert listener.joiners == ()
        assert server.fileno() in supervisor.inheritable
        assert supervisor.descriptors is not None
        assert worker == Member("worker 1.1", 2**30, (), None)


@pytest.mark.measured
def test_service_of_ours_has_nothing_to_repair(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        done = service.run("doctor", service.name)
        assert "looked at the machine and the service" in done.stderr
        findings = json.loads(service.run("doctor", "--json").stdout)
        alone = [finding["what"] for finding in findings if service.name in str(finding) or "127.0.0.1" in str(finding)]
        assert alone == [what for what in alone if "outgoing connections" in what]
        assert done.returncode == (1 if findings else 0)
        assert service.run("doctor", "nobody").returncode == 6


@pytest.mark.measured
def test_machine_is_examined_where_no_service_runs(tmp_path: Path) -> None:
    (tmp_path / "hotport.toml").write_text('bind = ["127.0.0.1:80"]\nbacklog = 1000000\n')
    environment = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [*HOTPORT, "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "below the backlog of 1000000" in done.stdout
    assert "no service runs here" in done.stderr
    (inherit,) = [line for line in done.stdout.splitlines() if line.startswith("inherit")]
    assert inherit.split()[-4:] == ["can;", "restarts", "take", "it"]


def test_strategies_that_cannot_work_here_are_shown_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "hotport.toml").write_text('bind = ["unix:app.sock"]\n')
    environment = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run")}
    done = subprocess.run([*HOTPORT, "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "cannot: a unix address is a file" in done.stdout


@pytest.mark.parametrize(
    ("proxies", "keep_alive_s", "is_found"),
    [
        (("127.0.0.1", "::1", "unix"), 5.0, False),
        (("10.0.0.0/8", "unix"), 5.0, True),
        (("*",), 60.0, True),
        (("*",), 75.0, False),
    ],
)
def test_connections_that_end_before_a_balancer_expects_it_are_found(
    proxies: tuple[str, ...], keep_alive_s: float, is_found: bool
) -> None:
    found = list(examine(SOUND, Options(bind=(), trusted_proxy=proxies, keep_alive_s=keep_alive_s)))
    assert [finding.fix for finding in found] == (['keep_alive = "75s"'] if is_found else [])
