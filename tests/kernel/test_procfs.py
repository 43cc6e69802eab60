from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotport.kernel import procfs
from hotport.kernel.procfs import (
    accept_queue_overflows,
    command,
    control_group,
    generation,
    group,
    has_capability,
    has_timewaits,
    holders,
    is_suspended,
    listening,
    owner,
    parent,
    runtime_of,
    supervises,
    sysctl,
    unit_of,
    user_name,
)
from tests.support import DEADLINE_S, eventually


@contextmanager
def sleeping(variables: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, **(variables or {})}) as process:
        try:
            yield process
        finally:
            process.kill()


def refuse_to_open(*_: object) -> None:
    raise FileNotFoundError


def test_full_accept_queue_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        before = accept_queue_overflows()
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        after = accept_queue_overflows()
        for client in clients:
            client.close()
    assert after > before


def test_kernel_without_counters_has_no_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", refuse_to_open)
    assert accept_queue_overflows() == 0
    assert sysctl("net.core.somaxconn") == "?"


def test_sysctl_is_read() -> None:
    assert int(sysctl("net.core.somaxconn")) > 0


def test_holder_of_a_socket_is_found_with_its_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = os.fstat(server.fileno()).st_ino
        assert holders([inode], cpu_s=DEADLINE_S)[0] == {inode: [(os.getpid(), server.fileno())]}
    assert holders([inode], cpu_s=DEADLINE_S)[0] == {}
    assert holders([], cpu_s=0) == ({}, "")


def test_search_beyond_the_first_descriptors_ends_in_time_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "_pids", lambda: [os.getpid()])
    monkeypatch.setattr(procfs, "_FIRST", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = os.fstat(server.fileno()).st_ino
        assert holders([inode], cpu_s=-1) == ({}, "late")
        assert holders([inode], cpu_s=DEADLINE_S) == ({inode: [(os.getpid(), server.fileno())]}, "")


@pytest.mark.parametrize(
    ("call", "error", "gap"),
    [
        ("scandir", PermissionError, "forbidden"),
        ("readlink", PermissionError, "forbidden"),
        ("scandir", FileNotFoundError, ""),
        ("readlink", FileNotFoundError, ""),
    ],
)
def test_process_that_we_may_not_look_into_is_a_gap_and_one_that_is_gone_is_not(
    monkeypatch: pytest.MonkeyPatch, call: str, error: type[OSError], gap: str
) -> None:
    def refuse(_: str) -> list[str]:
        raise error

    monkeypatch.setattr(procfs, "_pids", lambda: [os.getpid()])
    monkeypatch.setattr(os, call, refuse)
    assert holders([1], cpu_s=DEADLINE_S) == ({}, gap)


def test_user_without_a_name_is_a_number() -> None:
    assert user_name(0) == "root"
    assert user_name(4_000_000) == "4000000"
    assert owner(os.getpid()) == user_name(os.geteuid())
    assert owner(2**30) == "?"


def test_generation_is_read_from_the_environment_of_a_worker() -> None:
    assert generation(os.getpid()) == 0
    assert generation(2**30) == 0
    stdin, ours = socket.socketpair()
    with stdin, ours:
        actions = [(os.POSIX_SPAWN_DUP2, stdin.fileno(), fd) for fd in (0, 1)]
        pid = os.posix_spawn("/bin/cat", ["cat"], {"HOTPORT_GENERATION": "7"}, file_actions=actions)
        ours.send(b"running?")
        assert ours.recv(100) == b"running?"
        assert generation(pid) == 7
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("notify", ["notify.sock", "notify-33.sock"])
def test_service_is_known_by_its_worker_and_by_its_supervisor(tmp_path: Path, notify: str) -> None:
    runtime = tmp_path / "svc"
    runtime.mkdir()
    (runtime / "control.sock").touch()
    assert runtime_of(os.getpid()) == ""
    assert runtime_of(2**22) == ""
    lock = os.open(runtime, os.O_RDONLY)
    try:
        assert runtime_of(os.getpid()) == str(runtime)
    finally:
        os.close(lock)
    worker = {"HOTPORT_GENERATION": "1", "NOTIFY_SOCKET": f"{runtime}/{notify}"}
    with sleeping(worker) as process:
        # The kernel shows an environment a little later than the exec that Popen waits for.
        eventually(lambda: runtime_of(process.pid) == str(runtime), "the worker is known")


def test_supervisor_is_known_though_its_directory_was_removed(tmp_path: Path) -> None:
    runtime = tmp_path / "svc"
    runtime.mkdir()
    assert not supervises(os.getpid(), str(runtime))
    lock = os.open(runtime, os.O_RDONLY)
    try:
        assert supervises(os.getpid(), str(runtime))
        runtime.rmdir()
        assert supervises(os.getpid(), str(runtime))
        assert not supervises(2**22, str(runtime))
    finally:
        os.close(lock)


def test_parent_of_a_process_is_read() -> None:
    with sleeping() as process:
        assert parent(process.pid) == os.getpid()
    assert parent(2**22) == 0


def test_suspended_process_is_told_from_one_that_runs() -> None:
    assert not is_suspended(os.getpid())
    assert not is_suspended(2**22)
    with sleeping() as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert is_suspended(process.pid)


def test_capabilities_of_root_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_capability(10) == (os.geteuid() == 0)
    monkeypatch.setattr("builtins.open", refuse_to_open)
    assert not has_capability(10)


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/web.service", "web.service"),
        ("/system.slice/web.service/payload", "web.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        (f"/docker/{'0a' * 32}", "0a" * 32),
        ("/user.slice/\x1b[2Ja.service", "[2Ja.service"),
        ("/", ""),
    ],
    ids=["service", "below", "session", "container", "escape", "root"],
)
def test_unit_is_the_innermost_name_that_a_person_knows(path: str, unit: str) -> None:
    assert procfs._unit(path) == unit


def test_timewaits_are_looked_for_unless_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
        assert has_timewaits()
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO("TCP: inuse 9 orphan 0 tw 0 alloc 9 mem 0\n"))
    assert not has_timewaits()
    monkeypatch.setattr("builtins.open", refuse_to_open)
    assert has_timewaits()


def test_unit_of_a_process_is_read_from_its_control_group() -> None:
    assert isinstance(unit_of(os.getpid()), str)
    assert unit_of(2**30) == ""


def test_control_group_is_found_by_its_inode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = tmp_path / "system.slice" / "web.service"
    group.mkdir(parents=True)
    monkeypatch.setattr(procfs, "_CGROUPS", str(tmp_path))
    assert control_group(group.stat().st_ino) == "web.service"
    assert control_group(tmp_path.stat().st_ino) == ""
    assert control_group(0) == ""
    assert control_group(2**40) == ""
    monkeypatch.setattr(procfs, "_CGROUPS_MAX", 0)
    assert control_group(group.stat().st_ino) == ""  # beyond what is searched


def test_command_is_short_and_never_fails() -> None:
    assert 0 < len(command(os.getpid())) <= 60
    assert command(2**30) == "?"
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 0", "x" * 500], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert command(pid) == "sh"  # a zombie has a name, and no command line any more
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("name", "argument", "told"),
    [
        ("/usr/bin/cat", "x", "/usr/bin/cat - x"),
        ("/usr/bin/cat", "x" * 500, f"cat - {'x' * 51}..."),
        ("cat", "\x1b[2J\nHP101 \x07 \u202e", "cat - [2J HP101"),
    ],
    ids=["short", "long", "escapes"],
)
def test_command_is_cut_and_does_nothing_to_a_terminal(name: str, argument: str, told: str) -> None:
    stdin, ours = socket.socketpair()
    with stdin, ours:
        pid = os.posix_spawn(
            "/bin/cat",
            [name, "-", argument],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, stdin.fileno(), fd) for fd in (0, 1)],
        )
        ours.send(b"running?")  # posix_spawn returns before the kernel has replaced the command line
        assert ours.recv(100) == b"running?"
        assert command(pid) == told
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_listeners_among_sockets_are_told_by_their_addresses(tmp_path: Path) -> None:
    path = f"{tmp_path}/a b.sock"
    with (
        socket.create_server(("127.0.0.1", 0)) as four,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
        socket.create_server(("127.0.0.1", 0)) as unasked,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as quiet,
        socket.create_connection(four.getsockname()) as client,
    ):
        unix.bind(path)
        unix.listen()
        quiet.bind(f"{tmp_path}/quiet.sock")
        inodes = {os.fstat(sock.fileno()).st_ino for sock in (four, six, unix, quiet, client)}
        assert listening(os.getpid(), inodes) == [
            f"tcp://127.0.0.1:{four.getsockname()[1]}",
            f"tcp://[::1]:{six.getsockname()[1]}",
            f"unix:{path}",
        ]
        assert os.fstat(unasked.fileno()).st_ino not in inodes
    assert listening(2**22, inodes) == []


def test_group_is_all_that_has_the_same_leader() -> None:
    assert os.getpid() in group(os.getpgid(0))
    assert group(2**22) == []
