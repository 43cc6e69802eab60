from __future__ import annotations

import os
import signal
import socket

import pytest

from hotport.kernel import procfs
from hotport.kernel.procfs import command, listening_process, queue_overflows, sysctl


@pytest.mark.usefixtures("alone_with_accept_queues")
def test_full_accept_queue_is_counted() -> None:
    before = queue_overflows()
    if not before:
        pytest.skip("this kernel has no /proc/net/netstat")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        after = queue_overflows()
        for client in clients:
            client.close()
    assert set(before) == set(after) >= {"ListenOverflows", "ListenDrops"}
    assert after["ListenOverflows"] > before["ListenOverflows"]


def test_kernel_without_counters_has_no_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", refuse)
    assert queue_overflows() == {}
    assert sysctl("net.core.somaxconn") == "?"


def test_sysctl_is_read() -> None:
    assert int(sysctl("net.core.somaxconn")) > 0


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"])
def test_listener_is_found_under_every_address_that_includes_it(bound: str) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    try:
        server = socket.create_server((bound, 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError:
        pytest.skip(f"{bound} cannot be bound here")
    with server:
        port = server.getsockname()[1]
        for wanted in {bound, "0.0.0.0" if family == socket.AF_INET else "::"}:
            found = listening_process(socket.SOCK_STREAM, (wanted, port))
            assert found == (os.getpid(), command(os.getpid()))
        assert listening_process(socket.SOCK_DGRAM, (bound, port)) is None


def test_listener_on_another_address_is_not_blamed() -> None:
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        assert listening_process(socket.SOCK_STREAM, ("127.0.0.1", port)) is None
        assert listening_process(socket.SOCK_STREAM, ("fe80::1%lo", port, 0, 1)) is None


def test_listener_of_a_process_that_we_may_not_look_at_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(procfs, "_pids", list)
        assert listening_process(socket.SOCK_STREAM, server.getsockname()) is None


def test_command_is_short_and_never_fails() -> None:
    assert 0 < len(command(os.getpid())) <= 60
    assert command(2**30) == "?"
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 0", "x" * 500], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert command(pid) == "sh"  # a zombie has a name, and no command line any more
    os.waitpid(pid, 0)


def test_long_command_is_cut() -> None:
    stdin, ours = socket.socketpair()
    with stdin, ours:
        pid = os.posix_spawn(
            "/bin/cat",
            ["cat", "-", "x" * 500],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, stdin.fileno(), fd) for fd in (0, 1)],
        )
        ours.send(b"running?")  # posix_spawn returns before the kernel has replaced the command line
        assert ours.recv(100) == b"running?"
        assert command(pid) == f"cat - {'x' * 51}..."
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
