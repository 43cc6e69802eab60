"""What a server can leave on a port, made for real in a network namespace, and what the kernel says to a newcomer."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from itertools import count
from typing import Final, TypeAlias

from msgspec.structs import replace

from benchmarks.netns import sysctl
from hotport.address import TcpAddress, UdpAddress
from hotport.kernel.port import read_port
from hotport.model.bind import CHOICES, Can, judge
from hotport.model.port import Asker, Local, Port, ReuseOptions, State

Where: TypeAlias = tuple[str, bool]

#: Addresses that overlap in every way there is, each with IPV6_V6ONLY.
ADDRESSES: Final[tuple[Where, ...]] = (
    ("0.0.0.0", False),
    ("127.0.0.1", False),
    ("127.0.0.2", False),
    ("::", False),
    ("::", True),
    ("::1", False),
    ("::ffff:127.0.0.1", False),
    ("::ffff:0.0.0.0", False),
)
HERE: Final[Where] = ("127.0.0.1", False)

#: A user that is not root; nobody has to be called so.
STRANGER: Final = 1000
UIDS: Final = (0, STRANGER)

_ports = count(20_000)


def new_port() -> int:
    """A port that no cell has used; below those that the kernel gives away."""
    return next(_ports)


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Sockets that are made in the block belong to this user."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def opened(
    where: Where, port: int, options: ReuseOptions, *, uid: int = 0, kind: int = socket.SOCK_STREAM
) -> socket.socket:
    """A bound socket."""
    host, v6only = where
    with acting_as(uid):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, options.reuse_address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, options.reuse_port)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def kernel_says(where: Where, port: int, options: ReuseOptions, *, uid: int, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether bind, and listen, work; the socket is gone afterwards."""
    try:
        with opened(where, port, options, uid=uid, kind=kind) as sock:
            if kind == socket.SOCK_STREAM:
                sock.listen(8)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def look(port: int, kind: int = socket.SOCK_STREAM) -> Port:
    """The facts, as `hotport why` reads them."""
    address = (TcpAddress if kind == socket.SOCK_STREAM else UdpAddress)("127.0.0.1", port)
    return read_port(address, ("127.0.0.1", port))


def asked_for(port: Port, where: Where) -> Port:
    """The same facts, for another address."""
    return replace(port, local=Local(ip_address(where[0]), where[1]))


def disagreements(
    title: str, port: Port, where: Where, *, known: ReuseOptions, v6only: bool = False, kind: int = socket.SOCK_STREAM
) -> Iterator[str]:
    """Where the rule and the kernel differ, for each choice of options and each user.

    Args:
        known: Options of what is on the port, for what cannot be read (TIME_WAIT, orphans). The rule has to give
            the kernel's answer with them, and may say that it does not know without.
        v6only: Likewise.
    """
    asked = asked_for(port, where)
    sockets = tuple(
        replace(
            old,
            options=old.options or known,
            local=replace(old.local, v6only=v6only if old.local.v6only is None else old.local.v6only),
        )
        for old in port.sockets
    )
    complete = replace(asked, sockets=sockets)
    for uid in UIDS:
        asker = Asker(uid, str(uid), may_bind_low=False)
        for name, options in CHOICES.items():
            real = Can.YES if kernel_says(where, port.number, options, uid=uid, kind=kind) else Can.NO
            seen = judge(asked, asker, options)
            cell = f"{title}, new {name} at {where} by {uid}: kernel {real}"
            if seen.can == Can.UNKNOWN:
                if all(old.is_held for old in seen.blockers):
                    yield f"{cell}, but unknown though all can be read: {seen.because}"
            elif seen.can != real:
                yield f"{cell}, but {seen.can}: {seen.because}"
            if (told := judge(complete, asker, options)).can != real:
                yield f"{cell}, but {told.can} where all is known: {told.because}"


# -- what a server can leave ----------------------------------------------------------------------------------------


class Leftovers:
    """Makes them; sockets stay open until the stack is closed."""

    def __init__(
        self, port: int, options: ReuseOptions, where: Where = HERE, via: str = "127.0.0.1", uid: int = 0
    ) -> None:
        self.port = port
        self.options = options
        self.where = where
        self.via = via
        self.uid = uid
        self.stack = ExitStack()

    def keep(self, sock: socket.socket) -> socket.socket:
        self.stack.callback(_reset, sock)
        return sock

    def listener(self) -> socket.socket:
        sock = opened(self.where, self.port, self.options, uid=self.uid)
        sock.listen(16)
        return sock

    def connection(self) -> tuple[socket.socket, socket.socket]:
        """The client's and the server's end; the listener is gone."""
        with self.listener() as listener:
            client = socket.create_connection((self.via, self.port))
            with acting_as(self.uid):
                accepted, _ = listener.accept()
        return client, accepted


def _reset(sock: socket.socket) -> None:
    """Close without leaving anything."""
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _fill(sock: socket.socket) -> None:
    """Send until nothing more is taken."""
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(65536))
    except BlockingIOError:
        pass


def acknowledge(sock: socket.socket) -> None:
    """Read the end of the stream, and send now what would wait for a timer. Sources: tcp(7) TCP_QUICKACK."""
    assert sock.recv(1) == b""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _nothing(left: Leftovers) -> None:
    left.listener().close()


def _time_wait(left: Leftovers) -> None:
    client, accepted = left.connection()
    accepted.close()
    client.recv(1)
    client.close()


def _time_wait_of_the_client(left: Leftovers) -> None:
    client, accepted = left.connection()
    client.close()
    accepted.recv(1)
    accepted.close()


def _established(left: Leftovers) -> None:
    for end in left.connection():
        left.keep(end)


def _fin_wait2_orphan(left: Leftovers) -> None:
    client, accepted = left.connection()
    accepted.close()
    acknowledge(client)
    left.keep(client)


def _fin_wait2_held(left: Leftovers) -> None:
    client, accepted = left.connection()
    accepted.shutdown(socket.SHUT_WR)
    acknowledge(client)
    left.keep(client)
    left.keep(accepted)


def _fin_wait1_orphan(left: Leftovers) -> None:
    client, accepted = left.connection()
    _fill(accepted)
    accepted.close()
    left.keep(client)


def _close_wait(left: Leftovers) -> None:
    client, accepted = left.connection()
    client.close()
    left.keep(accepted)


def _last_ack_orphan(left: Leftovers) -> None:
    client, accepted = left.connection()
    _fill(accepted)
    client.shutdown(socket.SHUT_WR)
    accepted.close()
    left.keep(client)


def _reset_by_linger(left: Leftovers) -> None:
    client, accepted = left.connection()
    _reset(accepted)
    left.keep(client)


def _closed_unaccepted(left: Leftovers) -> None:
    with left.listener():
        client = socket.create_connection((left.via, left.port))
        client.send(b"hello")
    left.keep(client)


def _listening(left: Leftovers) -> None:
    left.keep(left.listener())


def _listening_unaccepted(left: Leftovers) -> None:
    left.keep(left.listener())
    left.keep(socket.create_connection((left.via, left.port)))


def _bound(left: Leftovers) -> None:
    left.keep(opened(left.where, left.port, left.options, uid=left.uid))


def _outgoing_bound(left: Leftovers) -> None:
    sock = left.keep(opened(left.where, left.port, left.options, uid=left.uid))
    with socket.create_server(("127.0.0.2", 0)) as listener:
        sock.connect(listener.getsockname())
        left.keep(listener.accept()[0])


def _outgoing_ephemeral(left: Leftovers) -> None:
    for end in _ephemeral(left):
        left.keep(end)


def _outgoing_time_wait(left: Leftovers) -> None:
    client, accepted = _ephemeral(left)
    client.close()
    accepted.recv(1)
    accepted.close()


def _ephemeral(left: Leftovers) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection from the port, which the kernel has chosen: it may choose no other."""
    with acting_as(left.uid):
        sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, left.options.reuse_address)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, left.options.reuse_port)
    with socket.create_server(("127.0.0.2", 0)) as listener:
        assert sysctl("net.ipv4.ip_local_port_range", f"{left.port} {left.port}")
        sock.connect(listener.getsockname())
        assert sysctl("net.ipv4.ip_local_port_range", "32768 60999")
        return sock, listener.accept()[0]


#: By name: what makes it, and in which states sockets are then on the port.
LEFTOVERS: Final[dict[str, tuple[Callable[[Leftovers], None], set[State]]]] = {
    "nothing": (_nothing, set()),
    "TIME_WAIT": (_time_wait, {State.TIME_WAIT}),
    "the client closed first": (_time_wait_of_the_client, set()),
    "ESTABLISHED": (_established, {State.ESTABLISHED}),
    "FIN_WAIT2 without a process": (_fin_wait2_orphan, {State.FIN_WAIT2}),
    "FIN_WAIT2 after shutdown": (_fin_wait2_held, {State.FIN_WAIT2}),
    "FIN_WAIT1 without a process": (_fin_wait1_orphan, {State.FIN_WAIT1}),
    "CLOSE_WAIT": (_close_wait, {State.CLOSE_WAIT}),
    "LAST_ACK without a process": (_last_ack_orphan, {State.LAST_ACK}),
    "reset by SO_LINGER": (_reset_by_linger, set()),
    "closed with somebody in the queue": (_closed_unaccepted, set()),
    "LISTEN": (_listening, {State.LISTEN}),
    "LISTEN with somebody in the queue": (_listening_unaccepted, {State.LISTEN, State.ESTABLISHED}),
    "BOUND": (_bound, {State.BOUND}),
    "an outgoing connection, bound": (_outgoing_bound, {State.ESTABLISHED}),
    "an outgoing connection": (_outgoing_ephemeral, {State.ESTABLISHED}),
    "an outgoing connection's TIME_WAIT": (_outgoing_time_wait, {State.TIME_WAIT}),
}
