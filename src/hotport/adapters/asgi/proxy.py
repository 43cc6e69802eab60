"""Read a request's client and scheme from a trusted proxy's header fields.

Only ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are read. RFC 7239 ``Forwarded`` is not, on purpose: a proxy that
writes one kind passes the other on as the client sent it, so a server that reads both trusts clients.
``X-Forwarded-Host`` and ``-Prefix`` are left to applications: a scope has no place for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final, TypeAlias

from hotport.trust import Host, Trusted, parse_host

__all__ = ["forwarded"]

Client: TypeAlias = tuple[str, int] | None

#: How many hops are read, from the nearest on; a head has room for thousands.
HOPS_MAX: Final = 64

#: The bound on cached hops. No address with a port is as long, so a truncated hop is no address.
HOP_BYTES_MAX: Final = 64

_IS_SECURE: Final = {b"http": False, b"ws": False, b"https": True, b"wss": True}
_SCHEMES: Final = {
    "http": ("http", "https"),
    "https": ("http", "https"),
    "ws": ("ws", "wss"),
    "wss": ("ws", "wss"),
}


def forwarded(
    headers: Iterable[tuple[bytes, bytes]], client: Client, scheme: str, trusted: Trusted
) -> tuple[Client, str]:
    """The client and the scheme of a request whose peer is trusted.

    Args:
        headers: With names in lower case.
        client: The peer, which stays the client if no field names another.
        scheme: The connection's scheme; a WebSocket's stays ``ws`` or ``wss``, a request's ``http`` or ``https``.

    Returns:
        The nearest client that is not trusted itself, else the farthest, with port 0 if none is given. The scheme is
        that of the nearest proxy: the last one in the field, since those before it came from outside.
    """
    hops = proto = None
    for name, value in headers:
        if name == b"x-forwarded-for":
            hops = value if hops is None else b"%b,%b" % (hops, value)
        elif name == b"x-forwarded-proto":
            proto = value
    if hops is not None:
        client = _client(hops, client, trusted)
    if proto is not None:
        is_secure = _IS_SECURE.get(proto.rpartition(b",")[2].strip().lower())
        if is_secure is not None:
            scheme = _SCHEMES[scheme][is_secure]
    return client, scheme


def _client(hops: bytes, client: Client, trusted: Trusted) -> Client:
    """Return the nearest untrusted hop; stop at a hop that is no address."""
    # The rest beyond HOPS_MAX contains a comma, and so is no address.
    for hop in reversed(hops.rsplit(b",", HOPS_MAX)):
        found = _parse_hop(hop.strip()[:HOP_BYTES_MAX])
        if found is None:
            return client
        host, client = found
        if not trusted.host(host):
            return client
    return client


@lru_cache(maxsize=1024)
def _parse_hop(hop: bytes) -> tuple[Host, tuple[str, int]] | None:
    """Parse ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1``, ``[2001:db8::1]`` or ``[2001:db8::1]:80``."""
    text = hop.decode("latin-1")
    if text.startswith("["):
        host, end, port = text[1:].partition("]")
        if ":" not in host or not end or (port and not port.startswith(":")):
            return None
        port = port[1:] if port else "0"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, "0"
    found = None if "%" in host else parse_host(host)
    if found is None or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 0xFFFF):
        return None
    return found, (str(found), int(port))
