"""Every kind of socket is shown as it is; nothing is bound and nothing is sent to find out."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hotport.errors import KernelError
from hotport.kernel import sockdiag
from hotport.kernel.sockdiag import LISTEN, InetSocket, inet, is_local, lingering, unix

LOCALHOST = bytes([127, 0, 0, 1])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def tcp(port: int, family: int = socket.AF_INET, *, states: int = sockdiag.ALL_BUT_TIME_WAIT) -> list[InetSocket]:
    return list(inet(socket.IPPROTO_TCP, family, port, states=states))


def test_listener_is_shown_with_its_queue(stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=7))
    port = server.getsockname()[1]
    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    (listener,) = tcp(port, states=LISTEN)
    assert (listener.state, listener.host, listener.rqueue, listener.wqueue) == (10, LOCALHOST, 1, 7)
    assert (listener.uid, listener.inode) == (os.geteuid(), os.fstat(server.fileno()).st_ino)


def test_connection_that_nobody_has_accepted_belongs_to_no_process(stack: ExitStack) -> None:
    port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    client.send(b"hello")
    rows = inet(socket.IPPROTO_TCP, socket.AF_INET, port, states=1 << 1, with_info=True)
    (waiting,) = rows
    assert (waiting.inode, waiting.rqueue, waiting.peer_port) == (0, 5, client.getsockname()[1])
    assert waiting.waited_ms < 60_000
    assert waiting.v6only is None


def test_socket_that_is_only_bound_is_shown_where_the_kernel_can(stack: ExitStack) -> None:
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 8):
        pytest.skip("Linux shows them since 6.8")
    sleeper = stack.enter_context(socket.socket())
    sleeper.bind(("127.0.0.1", 0))
    port = sleeper.getsockname()[1]
    assert str(port) not in [
        row.split()[1].rpartition(":")[2] for row in Path("/proc/net/tcp").read_text().splitlines()
    ]
    (bound,) = tcp(port)
    assert (bound.state, bound.inode) == (7, os.fstat(sleeper.fileno()).st_ino)
    assert tcp(port + 1) == tcp(port - 1) == [] or all(row.inode != bound.inode for row in tcp(port + 1))


@pytest.mark.parametrize("v6only", [True, False])
def test_ipv6_only_is_read_from_listeners(stack: ExitStack, v6only: bool) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    server = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=not v6only))
    port = server.getsockname()[1]
    (listener,) = tcp(port, socket.AF_INET6)
    assert listener.v6only is v6only
    assert listener.host == bytes(16)
    assert tcp(port) == []


def test_datagram_socket_is_shown(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    (found,) = inet(socket.IPPROTO_UDP, socket.AF_INET, sock.getsockname()[1])
    assert (found.state, found.host) == (7, LOCALHOST)


def test_control_group_is_shown_to_everybody(stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    (listener,) = tcp(server.getsockname()[1])
    if not listener.cgroup:
        pytest.skip("a kernel without control groups of sockets, or before 5.9")
    assert listener.cgroup > 0


def test_time_wait_is_counted_with_its_end_and_not_listed(stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = server.getsockname()[1]
    ports = set()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as client:
            ports.add(client.getsockname()[1])
            server.accept()[0].close()
            assert client.recv(1) == b""
    assert [row.state for row in tcp(port)] == [10]
    ((host, left),) = lingering(socket.AF_INET, port).items()
    assert (host, left.connections, left.peer) == (LOCALHOST, 3, LOCALHOST)
    assert left.peer_port in ports
    assert 50_000 < left.last_ms <= 61_000
    assert lingering(socket.AF_INET6, port) == {}


def test_unix_sockets_are_shown_with_their_files_and_abstract_names(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(str(path))
    server.listen(5)
    abstract = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    abstract.bind(f"\0hotport-test-{os.getpid()}")
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
    found = {row.inode: row for row in unix()}
    listener = found[os.fstat(server.fileno()).st_ino]
    assert (listener.state, listener.name, listener.rqueue, listener.wqueue) == (10, str(path), 1, 5)
    assert listener.uid in {os.geteuid(), None}
    assert listener.file == (path.stat().st_dev, path.stat().st_ino)
    nameless = found[os.fstat(abstract.fileno()).st_ino]
    assert (nameless.state, nameless.name, nameless.file) == (7, f"@hotport-test-{os.getpid()}", None)
    path.unlink()


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("127.0.0.1", True), ("0.0.0.0", True), ("127.255.255.255", True), ("192.0.2.1", False), ("8.8.8.8", False)],
)
def test_local_addresses_are_told_from_others(host: str, is_ours: bool) -> None:
    assert is_local(socket.inet_aton(host)) is is_ours


def test_local_ipv6_addresses_are_told_from_others() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    assert is_local(socket.inet_pton(socket.AF_INET6, "::1"))
    assert not is_local(socket.inet_pton(socket.AF_INET6, "2001:db8::1"))


def test_forbidden_netlink_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockdiag, "NETLINK_SOCK_DIAG", 99)
    with pytest.raises(KernelError, match=r"^HP130 .*EPROTONOSUPPORT") as raised:
        tcp(1)
    assert raised.value.exit_code == 3
    monkeypatch.setattr(sockdiag, "NETLINK_ROUTE", 99)
    with pytest.raises(KernelError, match="HP130"):
        is_local(LOCALHOST)


def test_kernel_that_refuses_is_heard() -> None:
    with pytest.raises(KernelError, match="HP130") as raised:
        list(inet(socket.IPPROTO_TCP, 250, 1))
    assert raised.value.errno in {errno.ENOENT, errno.EINVAL}


def test_attributes_end_where_they_are_cut() -> None:
    whole = struct.pack("=HHI", 8, 21, 9)
    assert sockdiag._attributes(whole) == {21: struct.pack("=I", 9)}
    assert sockdiag._attributes(whole + bytes(4)) == {21: struct.pack("=I", 9)}
