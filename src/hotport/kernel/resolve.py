"""Resolve host names of addresses; a module of its own, because `hotport why` has to be quick."""

from __future__ import annotations

import socket
from typing import Any

from hotport.address import TcpAddress, UdpAddress
from hotport.errors import ConfigError

__all__ = ["resolve"]


def resolve(
    address: TcpAddress | UdpAddress, kind: socket.SocketKind
) -> tuple[socket.AddressFamily, int, tuple[Any, ...]]:
    """Resolve an address to family, protocol and socket address: of several the first IPv4 one.

    Raises:
        ConfigError: If the host is unknown (HP102).

    Sources: getaddrinfo(3) AI_PASSIVE.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        words = error.strerror if isinstance(error, socket.gaierror) else "it is not a host name"
        raise ConfigError(
            "HP102",
            f"cannot bind {address}: unknown host {address.host!r}",
            cause=f"getaddrinfo: {str(words).lower()}",
            fix=f"getent ahosts {address.host}",
            note=f"to bind all interfaces: --bind :{address.port}",
        ) from error
    family, _, protocol, _, sockaddr = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, protocol, sockaddr
