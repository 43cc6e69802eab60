"""What is read of a port, with real sockets of this process and of others."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest

from hotport.address import TcpAddress, UdpAddress, UnixAddress, listener_name
from hotport.kernel import port as port_module
from hotport.kernel.port import options_of, ourselves, read_name, read_port
from hotport.kernel.process import reap
from hotport.kernel.sockets import bind_listener
from hotport.kernel.spawn import spawn
from hotport.model.port import Port, ReuseOptions, State


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def read(number: int, host: str = "127.0.0.1") -> Port:
    return read_port(TcpAddress(host, number), (host, number))


def server(stack: ExitStack, host: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return stack.enter_context(socket.create_server((host, 0), family=family))


def test_listener_is_read_with_its_process_and_options(stack: ExitStack) -> None:
    number = server(stack).getsockname()[1]
    port = read(number)
    (listener,) = port.sockets
    assert (listener.state, listener.uid, listener.queue, listener.waited_s) == (State.LISTEN, os.geteuid(), 0, 0)
    assert listener.options == ReuseOptions(reuse_address=True)  # create_server sets it
    assert listener.nodelay is False
    (holder,) = listener.holders
    assert holder.pid == os.getpid()
    assert holder.user == ourselves().user
    assert (port.protocol, port.number, port.is_local) == ("tcp", number, True)
    assert port.unread == () or os.geteuid() != 0


def test_connections_are_counted_together_and_told_apart_by_their_options(stack: ExitStack) -> None:
    listener = server(stack)
    number = listener.getsockname()[1]
    accepted = []
    for _ in range(3):
        stack.enter_context(socket.create_connection(("127.0.0.1", number)))
        accepted.append(stack.enter_context(listener.accept()[0]))
    accepted[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    connections = {found.options: found.count for found in read(number).sockets if found.state == State.ESTABLISHED}
    assert connections == {ReuseOptions(reuse_address=True): 2, ReuseOptions(): 1}


def test_sockets_beyond_those_that_are_looked_at_are_unknown(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = server(stack)
    number = listener.getsockname()[1]
    for _ in range(4):
        stack.enter_context(socket.create_connection(("127.0.0.1", number)))
        stack.enter_context(listener.accept()[0])
    monkeypatch.setattr(port_module, "LOOKED_AT_MAX", 2)
    connections = {found.options: found.count for found in read(number).sockets if found.state == State.ESTABLISHED}
    assert sum(connections.values()) == 4
    assert connections[None] >= 2
    monkeypatch.setattr(port_module, "SOCKETS_MAX", 3)
    assert "the rest was left out" in read(number).unread[0]


def test_somebody_in_the_queue_is_counted_with_the_time(stack: ExitStack) -> None:
    number = server(stack).getsockname()[1]
    stack.enter_context(socket.create_connection(("127.0.0.1", number)))
    found = {old.state: old for old in read(number).sockets}
    assert found[State.LISTEN].queue == 1
    assert found[State.LISTEN].waited_s < 60
    assert not found[State.ESTABLISHED].is_held


def test_outgoing_connection_is_known_by_the_listener_at_its_other_end(stack: ExitStack) -> None:
    listener = server(stack)
    client = stack.enter_context(socket.create_connection(listener.getsockname()))
    stack.enter_context(listener.accept()[0])
    outgoing = [found.peers for found in read(client.getsockname()[1]).sockets if found.is_outgoing]
    assert (f"127.0.0.1:{listener.getsockname()[1]}",) in outgoing


def test_time_wait_has_an_end_and_no_owner(stack: ExitStack) -> None:
    listener = server(stack)
    number = listener.getsockname()[1]
    client = stack.enter_context(socket.create_connection(("127.0.0.1", number)))
    listener.accept()[0].close()
    assert client.recv(1) == b""
    client.close()
    (left,) = (old for old in read(number).sockets if old.state == State.TIME_WAIT)
    assert (left.count, left.uid, left.options, left.is_held, left.is_timed) == (1, None, None, False, True)
    assert 50 < left.ends_in_s <= 61


def test_ipv6_listener_is_on_the_port_of_an_ipv4_address(stack: ExitStack) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    number = server(stack, "::1").getsockname()[1]
    found = {str(each.local): each for each in read(number).sockets}  # others may have that port of 127.0.0.1
    listener = found["[::1]"]
    assert listener.local.v6only  # the kernel sets it where the address is no wildcard
    assert read(number, "::1").local.v6only


def test_datagram_socket_is_read(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    number = sock.getsockname()[1]
    port = read_port(UdpAddress("127.0.0.1", number), ("127.0.0.1", number))
    assert port.protocol == "udp"
    assert [old.state for old in port.sockets] == [State.BOUND]


def test_unix_listener_whose_file_was_removed_is_found_with_who_has_it(tmp_path: Path) -> None:
    """`why` said that nothing has the name, while a service listened and could not be reached any more."""
    address = UnixAddress(str(tmp_path / "a.sock"))
    with bind_listener(address, backlog=1) as listener:
        names = [listener_name(address)]
        child = spawn(
            ["sleep", "1000"],
            environment={"PATH": os.defpath},
            cwd="/",
            listeners=[listener.fileno()],
            listen_names=names,
        )
        try:
            assert read_name(address).found == "socket"
            os.unlink(address.path)
            name = read_name(address)
            assert (name.found, name.is_listening) == ("nothing", True)
            assert child.pid in [holder.pid for holder in name.holders]
            assert not read_name(UnixAddress(str(tmp_path / "b.sock"))).holders
        finally:
            os.kill(child.pid, signal.SIGKILL)
            select.select([child.pidfd], [], [])
            reap(child.pid)
            os.close(child.pidfd)


def test_kernel_that_hides_bound_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", "6.1.0-18-amd64", "x", "x")))
    assert "Linux 6.8 does" in read(1).unread[0]


def test_options_of_what_is_gone_or_no_socket_are_none() -> None:
    assert options_of(2**30, 0) is None
    assert options_of(os.getpid(), 10_000) is None
    with Path("/dev/null").open() as file:
        assert options_of(os.getpid(), file.fileno()) is None


def test_address_of_another_machine_is_not_local() -> None:
    assert read(1, "192.0.2.1").is_local is False
    assert read(1, "224.0.0.1").is_local is True


def test_sandbox_without_namespace_files_takes_capabilities_at_their_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotport.kernel.procfs.has_capability", lambda _: True)
    monkeypatch.setattr("fcntl.ioctl", lambda *_: os.dup(0))
    assert ourselves().may_bind_low
    for error, may in ((OSError(25, ""), True), (PermissionError(1, ""), False)):
        monkeypatch.setattr("fcntl.ioctl", Mock(side_effect=error))
        assert ourselves().may_bind_low is may
