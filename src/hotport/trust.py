"""Trusted proxies: peers whose statements about their clients are believed."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

__all__ = ["Host", "Trusted", "parse_host"]

EVERYBODY: Final = "*"
UNIX: Final = "unix"

Host: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_host(text: str) -> Host | None:
    """Parse an IP address without its zone, IPv4-mapped ones as IPv4; None if the text is not one."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


class Trusted:
    """The peers that are trusted.

    Args:
        entries: Addresses, networks (``10.0.0.0/8``), ``unix`` for any peer of a unix socket (its file mode
            says who can connect), ``*`` for all peers.

    Raises:
        ValueError: An entry is none of these; says what would be.
    """

    __slots__ = ("_hosts", "_is_everybody", "_is_unix", "_networks")

    def __init__(self, entries: Iterable[str]) -> None:
        words = set(entries)
        self._is_everybody = EVERYBODY in words
        self._is_unix = self._is_everybody or UNIX in words
        words -= {EVERYBODY, UNIX}
        hosts = {word: parse_host(word) for word in words}
        self._hosts = frozenset(str(host) for host in hosts.values() if host is not None)
        self._networks = tuple(_network(word) for word, host in hosts.items() if host is None)

    def peer(self, address: Any) -> bool:
        """Whether a peer is trusted: a tuple that begins with its host, or the path (mostly empty) of a unix socket.

        None, the address of a peer that has already left, is not trusted.
        """
        if not isinstance(address, tuple):
            return self._is_unix and address is not None
        if address[0] in self._hosts:
            return True
        host = parse_host(address[0])
        return host is not None and self.host(host)

    def host(self, host: Host) -> bool:
        """Whether an IP address is trusted."""
        if self._is_everybody or str(host) in self._hosts:
            return True
        return any(host in network for network in self._networks)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("it must be an address, a network like 10.0.0.0/8, unix or *") from None
    raise ValueError(f"{text} is an address within a network; the network is {meant}")
