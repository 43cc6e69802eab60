"""List the kernel's sockets (NETLINK_SOCK_DIAG), and tell whether an address is local.

No privilege is needed: every user sees every socket of the network namespace. Nothing is bound and nothing is sent.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple

from hotport.errors import KernelError

__all__ = [
    "ALL_BUT_TIME_WAIT",
    "BOUND",
    "LISTEN",
    "TIME_WAIT",
    "UNCONNECTED",
    "InetSocket",
    "UnixSocket",
    "every",
    "inet",
    "is_local",
    "lingering",
    "unix",
    "waited_s",
]

NETLINK_ROUTE: Final = 0
NETLINK_SOCK_DIAG: Final = 4

_REQUEST: Final = 0x1  # NLM_F_REQUEST
_DUMP: Final = 0x300  # NLM_F_DUMP
_ERROR: Final = 2  # NLMSG_ERROR
_DONE: Final = 3  # NLMSG_DONE
_GETROUTE: Final = 26  # RTM_GETROUTE
_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY

#: States are bits. The one above them, TCP_BOUND_INACTIVE, asks for sockets that are bound and neither listen nor are
#: connected; the kernel has it since 6.8 and shows them as TCP_CLOSE.
ESTABLISHED: Final = 1 << 1
LISTEN: Final = 1 << 10
BOUND: Final = 1 << 13
UNCONNECTED: Final = 1 << 7  # of UDP
TIME_WAIT: Final = 1 << 6
ALL_BUT_TIME_WAIT: Final = 0xFFFF & ~TIME_WAIT

_INFO: Final = 2  # INET_DIAG_INFO
_SKV6ONLY: Final = 11  # INET_DIAG_SKV6ONLY
_CGROUP_ID: Final = 21  # INET_DIAG_CGROUP_ID

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
#: struct inet_diag_msg, without the family and our own port: as in `InetSocket`, by the size of an address.
_INET: Final = {size: struct.Struct(f"=xBBx2x2s{size}s{16 - size}x{size}s{16 - size}xI8xIIIII") for size in (4, 16)}
_LINGERING: Final = struct.Struct("=20x2x2s16s16s4x8xI16x")  # of one in TIME_WAIT: its addresses and when it ends
_UNIX: Final = struct.Struct("=xBBxI8x")  # struct unix_diag_msg: type, state, inode
_LENGTH: Final = struct.Struct("=I")
_ATTRIBUTE: Final = struct.Struct("=HH")
_WAITING_MAX: Final = 10_000
_BUFFER_BYTES: Final = 1 << 18
_LAST_ACK_RECEIVED: Final = 56  # offsetof(struct tcp_info, tcpi_last_ack_recv)

_UDIAG_SHOW: Final = 0x1 | 0x2 | 0x10 | 0x40  # name, file, queue, uid


class InetSocket(NamedTuple):
    """One TCP or UDP socket.

    Attributes:
        state: A number as in ``net/tcp_states.h``; of UDP 7 without and 1 with a peer.
        host: Where it is bound, as 4 or 16 bytes.
        timer: 3 when `expires_ms` counts down to its end.
        rqueue: Bytes not read yet; of a listener, connections that wait to be accepted.
        wqueue: Bytes that the peer has not acknowledged; of a listener, its backlog.
        uid: As this user namespace names it.
        inode: 0 if no process holds it: it waits to be accepted, or its process has let go of it.
        network_port: The peer's port as it travels; see `peer_port`.
        attributes: What else the kernel says, for `v6only`, `cgroup` and `waited_ms`: of few rows anybody asks for it.
    """

    state: int
    timer: int
    network_port: bytes
    host: bytes
    peer: bytes
    interface: int
    expires_ms: int
    rqueue: int
    wqueue: int
    uid: int
    inode: int
    attributes: bytes

    @property
    def peer_port(self) -> int:
        """The port of its peer; 0 without one."""
        return int.from_bytes(self.network_port, "big")

    @property
    def v6only(self) -> bool | None:
        """Whether it is IPv6 only; None for connections, where the kernel does not say."""
        value = _attributes(self.attributes).get(_SKV6ONLY)
        return None if value is None else value != b"\0"

    @property
    def cgroup(self) -> int:
        """Inode of its control group's directory; 0 if unknown."""
        return int.from_bytes(_attributes(self.attributes).get(_CGROUP_ID, b""), "little")

    @property
    def waited_ms(self) -> int:
        """Milliseconds since its peer sent anything: how long a connection in the accept queue has waited at least."""
        info = _attributes(self.attributes).get(_INFO, b"")[_LAST_ACK_RECEIVED : _LAST_ACK_RECEIVED + 4]
        return int.from_bytes(info, "little")


class Lingering(NamedTuple):
    """Connections in TIME_WAIT with one local address.

    Attributes:
        last_ms: Milliseconds until the last one is gone.
        peer: The other end of one of them, as 4 or 16 bytes.
    """

    connections: int
    last_ms: int
    peer: bytes
    peer_port: int


class UnixSocket(NamedTuple):
    """One AF_UNIX socket that has a name.

    Attributes:
        state: 10 listens, 7 is unconnected, 1 is connected.
        name: As it was bound; ``@`` first for an abstract one.
        file: Device and inode of its file, comparable with ``os.stat``; None for an abstract name.
        rqueue: Of a listener, connections that wait to be accepted; `wqueue` is then its backlog.
        uid: None before Linux 5.3.
    """

    state: int
    inode: int
    name: str
    file: tuple[int, int] | None
    rqueue: int
    wqueue: int
    uid: int | None


def inet(
    protocol: int, family: int, port: int, *, states: int = ALL_BUT_TIME_WAIT, with_info: bool = False
) -> Iterator[InetSocket]:
    """Every socket of one protocol and family on a local port, one at a time.

    The kernel filters by the port and not we: it ignores the port in the request for sockets that are only bound, so
    a filter program says it again (by two comparisons; the one for equality is newer).

    Args:
        protocol: IPPROTO_TCP or IPPROTO_UDP.
        with_info: Ask for ``struct tcp_info``, too, which costs another 240 bytes each.

    Raises:
        KernelError: If netlink is not to be had (HP130).

    Sources: sock_diag(7); kernel ``include/uapi/linux/inet_diag.h``, ``net/ipv4/inet_diag.c`` inet_diag_bc_run.
    """
    layout = _INET[4 if family == socket.AF_INET else 16]
    size, unpack, make = layout.size, layout.unpack_from, InetSocket._make
    for data in _dump_inet(protocol, family, port, states, with_info):
        at, end = 0, len(data)
        while at < end:  # what `_messages` does; there may be very many
            (length,) = _LENGTH.unpack_from(data, at)
            start = at + _HEADER.size
            yield make((*unpack(data, start), data[start + size : at + length]))
            at += (length + 3) & ~3


def every(protocol: int, family: int, states: int) -> Iterator[tuple[int, InetSocket]]:
    """Every socket of one protocol and family in some states, with its local port.

    Raises:
        KernelError: As `inet`.
    """
    layout = _INET[4 if family == socket.AF_INET else 16]
    for data in _dump_inet(protocol, family, 0, states, False):
        for start, end in _messages(data):
            port = int.from_bytes(data[start + 4 : start + 6], "big")  # id.idiag_sport
            yield port, InetSocket._make((*layout.unpack_from(data, start), data[start + layout.size : end]))


def waited_s(family: int, port: int) -> float:
    """For how many seconds at least a connection has been in an accept queue of a port; 0 if none is.

    Among the first ten thousand on the port, so that a crowded one does not take long.

    Raises:
        KernelError: As `inet`.
    """
    rows = inet(socket.IPPROTO_TCP, family, port, states=ESTABLISHED, with_info=True)
    return max((row.waited_ms for row in islice(rows, _WAITING_MAX) if not row.inode), default=0) / 1000


def lingering(family: int, port: int) -> dict[bytes, Lingering]:
    """Count the connections in TIME_WAIT on a local port, by their local address, without listing them.

    Raises:
        KernelError: As `inet`.
    """
    size = 4 if family == socket.AF_INET else 16
    found: dict[bytes, list[int]] = {}
    peers: dict[bytes, tuple[bytes, int]] = {}
    for data in _dump_inet(socket.IPPROTO_TCP, family, port, TIME_WAIT, False):
        if not data:
            continue
        # They are all alike, so all have one size; taking them apart at once is five times as fast as one by one.
        length = _HEADER.unpack_from(data)[0]
        rows = struct.Struct(f"{_LINGERING.format}{length - _LINGERING.size}x").iter_unpack(data)
        for peer_port, host, peer, expires_ms in rows:
            counted = found.get(host)
            if counted is None:
                found[host] = [1, expires_ms]
                peers[host] = peer[:size], int.from_bytes(peer_port, "big")
                continue
            counted[0] += 1
            if expires_ms > counted[1]:
                counted[1] = expires_ms
    return {host[:size]: Lingering(count, last_ms, *peers[host]) for host, (count, last_ms) in found.items()}


def unix() -> Iterator[UnixSocket]:
    """Every AF_UNIX socket of the network namespace that has a name.

    Raises:
        KernelError: As `inet`.

    Sources: sock_diag(7); kernel ``include/uapi/linux/unix_diag.h``: the device is the kernel's own form of it.
    """
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW, 0xFFFFFFFF, 0xFFFFFFFF)
    for data in _ask(NETLINK_SOCK_DIAG, _BY_FAMILY, _REQUEST | _DUMP, request):
        for start, end in _messages(data):
            _, state, inode = _UNIX.unpack_from(data, start)
            attributes = _attributes(data[start + _UNIX.size : end])
            name = attributes.get(0, b"")
            if not name:
                continue
            file = None
            if 1 in attributes:
                file_inode, device = struct.unpack("=II", attributes[1])
                file = os.makedev(device >> 20, device & 0xFFFFF), file_inode
            rqueue, wqueue = struct.unpack("=II", attributes.get(4, bytes(8)))
            uid = int.from_bytes(attributes[7], "little") if 7 in attributes else None
            text = "@" + os.fsdecode(name[1:]) if name[0] == 0 else os.fsdecode(name.rstrip(b"\0"))
            yield UnixSocket(state, inode, text, file, rqueue, wqueue, uid)


def is_local(host: bytes, interface: int = 0) -> bool:
    """Whether an address can be bound: a local, broadcast or multicast one.

    Args:
        host: As 4 or 16 bytes.
        interface: The index of the one that has to have it; 0 for any.

    Raises:
        KernelError: As `inet`.

    Sources: rtnetlink(7) RTM_GETROUTE, rtm_type; no packet is sent.
    """
    if not any(host):
        return True
    family = socket.AF_INET if len(host) == 4 else socket.AF_INET6
    request = struct.pack("=BBBBBBBBI", family, len(host) * 8, 0, 0, 0, 0, 0, 0, 0)
    request += _ATTRIBUTE.pack(4 + len(host), 1) + host  # RTA_DST
    if interface:
        request += _ATTRIBUTE.pack(8, 4) + struct.pack("=I", interface)  # RTA_OIF
    try:
        for data in _ask(NETLINK_ROUTE, _GETROUTE, _REQUEST, request):
            return data[_HEADER.size + 7] in {2, 3, 5}  # RTN_LOCAL, RTN_BROADCAST, RTN_MULTICAST
    except KernelError as error:
        if error.errno not in {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES}:
            raise
    return False


def _dump_inet(protocol: int, family: int, port: int, states: int, with_info: bool) -> Iterator[bytes]:
    extensions = 1 << (_INFO - 1) if with_info else 0
    request = struct.pack("=BBBxI", family, protocol, extensions, states) + bytes(40) + b"\xff" * 8
    # Each instruction: what to compare, how far to go if it holds and if not (beyond the end refuses); its operand.
    if not port:
        return _ask(NETLINK_SOCK_DIAG, _BY_FAMILY, _REQUEST | _DUMP, request)
    at_least = struct.pack("=BBHBBH", 2, 8, 20, 0, 0, port)  # INET_DIAG_BC_S_GE
    at_most = struct.pack("=BBHBBH", 3, 8, 12, 0, 0, port)  # INET_DIAG_BC_S_LE
    program = at_least + at_most
    request += _ATTRIBUTE.pack(4 + len(program), 1) + program  # INET_DIAG_REQ_BYTECODE
    return _ask(NETLINK_SOCK_DIAG, _BY_FAMILY, _REQUEST | _DUMP, request)


def _ask(protocol: int, kind: int, flags: int, request: bytes) -> Iterator[bytes]:
    """Send one request; yield buffers of whole messages, without the one that ends them."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
            sock.send(_HEADER.pack(_HEADER.size + len(request), kind, flags, 1, 0) + request)
            while True:
                data = sock.recv(_BUFFER_BYTES)
                end = _closing(data)
                yield data if end is None else data[:end]
                if end is not None or not flags & _DUMP:
                    return
    except OSError as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(
            "HP130",
            "cannot ask the kernel for its sockets",
            errno=error.errno or 0,
            cause="a sandbox (seccomp, a container, a user namespace) or the kernel's configuration forbids netlink",
            note="ask outside the sandbox; under systemd, add RestrictAddressFamilies=AF_NETLINK to the unit",
        ) from error


def _closing(data: bytes) -> int | None:
    """Find the message that ends a dump; None if it is not in this buffer.

    Raises:
        OSError: The kernel refused.
    """
    # The kernel puts it last, alone or behind the last sockets (netlink_dump_done).
    at = 0
    if _HEADER.unpack_from(data)[1] not in {_DONE, _ERROR}:
        at = len(data) - _HEADER.size - 4
        if at < 0 or _HEADER.unpack_from(data, at)[:2] != (_HEADER.size + 4, _DONE):
            return None
    number = -struct.unpack_from("=i", data, at + _HEADER.size)[0]
    if number > 0:
        raise OSError(number, os.strerror(number))
    return at


def _messages(data: bytes) -> Iterator[tuple[int, int]]:
    """Find where the body of each message begins and ends."""
    at = 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        yield at + _HEADER.size, at + length
        at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found
