"""Take listeners back from the service manager's store (sd_pid_notify_with_fds(3), ``FDSTORE=1``)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hotport.address import Address, TcpAddress, UdpAddress, UnixAddress, parse_address
from hotport.errors import ConfigError, KernelError
from hotport.kernel import sockdiag
from hotport.kernel.resolve import resolve
from hotport.kernel.sockets import inherited_listener, location
from hotport.wire.listenfds import parse_listen_environment
from hotport.wire.sdnotify import parse_store_name

__all__ = ["TakenBack", "is_bound_to", "take_back"]


@dataclass(frozen=True, slots=True)
class TakenBack:
    """The listeners from the store.

    Attributes:
        listeners: By address as given to `take_back`; non-blocking and close-on-exec; the caller closes them.
        unfit: Names in the store that are not needed; their sockets are closed here, but not yet in the store.
    """

    listeners: Mapping[str, socket.socket]
    unfit: tuple[str, ...]


def take_back(addresses: Sequence[str], environ: Mapping[str, str], *, backlog: int) -> TakenBack:
    """Find the listeners of `addresses` among the descriptors that the service manager has passed to this process.

    A listener fits an address if a new one would be bound to the same place: its bound address counts, not its name
    alone. Port 0 takes the port that it got before.

    Args:
        addresses: As in the options, each of them once.
        environ: With ``LISTEN_FDS`` and ``LISTEN_FDNAMES``; sockets with names of other programs are ignored.
        backlog: Length of the accept queues from now on.

    Raises:
        ConfigError: The variables contradict each other (HP320), or a host is unknown (HP102).
    """
    stored: list[tuple[str, Address, socket.socket]] = []
    unfit = []
    for fd, name in parse_listen_environment(environ, os.getpid()):
        address = parse_store_name(name)
        if address is None:
            continue
        try:
            stored.append((name, address, inherited_listener(fd)))
        except ConfigError:
            unfit.append(name)
            with suppress(OSError):
                os.close(fd)
    listeners: dict[str, socket.socket] = {}
    for text in sorted(addresses, key=lambda text: text.endswith(":0")):  # port 0, which fits any port, chooses last
        wanted = parse_address(text)
        found = next((entry for entry in stored if _fits(wanted, entry[1], entry[2])), None)
        if found is not None:
            stored.remove(found)
            listeners[text] = found[2]
            if found[2].type == socket.SOCK_STREAM:
                found[2].listen(backlog)
    for name, _, sock in stored:
        unfit.append(name)
        sock.close()
    return TakenBack(listeners, tuple(dict.fromkeys(unfit)))


def is_bound_to(address: Address, sock: socket.socket) -> bool:
    """Whether a socket is the one that clients of an address reach; unix ones need netlink (sock_diag(7))."""
    return _fits(address, address, sock)


def _fits(wanted: Address, named: Address, sock: socket.socket) -> bool:
    match wanted:
        case TcpAddress() | UdpAddress():
            kind = socket.SOCK_STREAM if isinstance(wanted, TcpAddress) else socket.SOCK_DGRAM
            family, _, sockaddr = resolve(wanted, kind)
            if (sock.family, sock.type) != (family, kind):
                return False
            host, port = sock.getsockname()[:2]
            return host == sockaddr[0] and wanted.port in {0, port}
        case UnixAddress():
            is_unix = (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
            return is_unix and location(str(wanted)) == named and (wanted.is_abstract or _is_at(sock, wanted.path))
        case _:
            return False  # of a socket unit, which keeps the listener itself


def _is_at(sock: socket.socket, path: str) -> bool:
    """Whether clients of a socket file reach this socket, which was bound under another name (`_place`)."""
    inode = os.fstat(sock.fileno()).st_ino
    with suppress(OSError, KernelError):
        found = os.lstat(path)
        files = [each.file for each in sockdiag.unix() if each.inode == inode]
        return files == [(found.st_dev, found.st_ino)]
    return False
