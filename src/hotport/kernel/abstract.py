"""Abstract unix sockets: two processes find each other by a name that needs no cleaning up.

Any process in the network namespace may connect or send to such a socket, so users check the credentials
that the kernel attaches. The names are long and random, so none can be taken beforehand.

Sources: unix(7), abstract sockets.
"""

from __future__ import annotations

import os
import socket

from hotport.errors import KernelError

__all__ = ["abstract_name", "bind_abstract", "sockaddr"]

_BACKLOG = 8


def abstract_name() -> str:
    """Make a name that cannot be guessed: ``@hotport-`` and 128 random bits."""
    return f"@hotport-{os.urandom(16).hex()}"


def sockaddr(name: str) -> str:
    """Return the address of ``@name`` or a path as bind(2) and connect(2) take it."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def bind_abstract(name: str, kind: socket.SocketKind) -> socket.socket:
    """Listen, or receive notifications, under a name.

    Args:
        kind: SOCK_STREAM listens; SOCK_DGRAM receives, and the kernel says who sent what (SO_PASSCRED).

    Returns:
        A non-blocking, close-on-exec socket, that the caller closes.

    Raises:
        KernelError: The kernel refuses (HP212).
    """
    sock: socket.socket | None = None
    try:
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.setblocking(False)
        if kind == socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # before anybody can send
        sock.bind(sockaddr(name))
        if kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise KernelError(
            "HP212",
            f"cannot make the unix socket {name}",
            errno=error.errno or 0,
            cause="no descriptor is left, or this process may make no unix sockets (RestrictAddressFamilies=)",
            fix="ulimit -n",
        ) from error
    return sock
