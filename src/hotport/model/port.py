"""A port as it was read: its sockets, their holders and states, and what could not be read. Values only."""

from __future__ import annotations

from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

import msgspec

from hotport.model.process import Process

__all__ = [
    "LEFT",
    "Asker",
    "Ephemeral",
    "Host",
    "Local",
    "Port",
    "ReuseOptions",
    "Sockets",
    "State",
    "UnixName",
]

Host: TypeAlias = IPv4Address | IPv6Address


class State(StrEnum):
    """The state of a socket. `BOUND` is our addition: bound, and neither listening nor connected."""

    LISTEN = "LISTEN"
    BOUND = "BOUND"
    SYN_SENT = "SYN_SENT"
    SYN_RECV = "SYN_RECV"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT1 = "FIN_WAIT1"
    FIN_WAIT2 = "FIN_WAIT2"
    CLOSING = "CLOSING"
    TIME_WAIT = "TIME_WAIT"
    CLOSE_WAIT = "CLOSE_WAIT"
    LAST_ACK = "LAST_ACK"


#: Connections that this side has ended, or whose process has let go of them.
LEFT: Final = frozenset({State.FIN_WAIT1, State.FIN_WAIT2, State.CLOSING, State.TIME_WAIT, State.LAST_ACK})


class ReuseOptions(msgspec.Struct, frozen=True):
    """``SO_REUSEADDR`` and ``SO_REUSEPORT`` of a socket."""

    reuse_address: bool = False
    reuse_port: bool = False

    def __str__(self) -> str:
        names = ("SO_REUSEADDR",) * self.reuse_address + ("SO_REUSEPORT",) * self.reuse_port
        return " and ".join(names) or "neither option"


class Local(msgspec.Struct, frozen=True):
    """Where a socket is, or would be, bound.

    Attributes:
        v6only: Of an IPv6 address, whether IPv4 is left alone (IPV6_V6ONLY); None if that could not be read.
    """

    host: Host
    v6only: bool | None = False

    @property
    def plain(self) -> Host:
        """An IPv4 address that is written as IPv6 (::ffff:127.0.0.1) is an IPv4 address."""
        return getattr(self.host, "ipv4_mapped", None) or self.host

    def __str__(self) -> str:
        return f"[{self.host}]" if self.host.version == 6 else str(self.host)


class Sockets(msgspec.Struct, frozen=True):
    """Sockets on the port that are alike in everything that matters to a bind.

    Attributes:
        uid: Whose they are; None if unknown (TIME_WAIT).
        options: None where they could not be read.
        is_held: A process has a descriptor of them, though perhaps of them we may not see which.
        is_timed: The kernel ends them by itself, in at most `ends_in_s`.
        holders: Those processes that we may see, and no more than a few.
        unit: What the control group says where the process could not be seen.
        peers: Some of the other ends.
        queue: Of a listener, how many connections wait to be accepted; of others, bytes not read yet.
        backlog: Of a listener, how long its queue may become; of others, bytes that their peers have not acknowledged.
        waited_s: Of a listener, for how long at least a connection has been in its queue.
        interface: The index of the interface that they are bound to; 0 for all.
        is_outgoing: They are connections to a listener on this machine.
        nodelay: Of a listener, whether it has TCP_NODELAY, which accepted connections inherit; None if not known.
    """

    state: State
    local: Local
    count: int = 1
    uid: int | None = None
    options: ReuseOptions | None = None
    is_held: bool = True
    is_timed: bool = False
    ends_in_s: float = 0.0
    holders: tuple[Process, ...] = ()
    user: str = ""
    unit: str = ""
    peers: tuple[str, ...] = ()
    queue: int = 0
    backlog: int = 0
    waited_s: float = 0.0
    interface: int = 0
    is_outgoing: bool = False
    nodelay: bool | None = None


class Asker(msgspec.Struct, frozen=True):
    """The process that would bind.

    Attributes:
        may_bind_low: Has CAP_NET_BIND_SERVICE.
    """

    uid: int
    user: str
    may_bind_low: bool


class Ephemeral(msgspec.Struct, frozen=True):
    """Ports that the kernel gives to outgoing connections, from `low` to `high`.

    Attributes:
        reserved: Those among them that it keeps back, as in ``8080,9148-9150``.

    Sources: ip-sysctl, ip_local_port_range and ip_local_reserved_ports.
    """

    low: int = 32768
    high: int = 60999
    reserved: str = ""

    def gives(self, port: int) -> bool:
        """Whether an outgoing connection can be given a port."""
        ranges = (part.partition("-") for part in self.reserved.split(","))
        kept = any(low.isdigit() and int(low) <= port <= int(high or low) for low, _, high in ranges)
        return self.low <= port <= self.high and not kept

    def keeping(self, port: int) -> str:
        """Return the command that reserves the port as well; setting the list replaces it."""
        return f"sysctl -w net.ipv4.ip_local_reserved_ports={self.reserved}{',' * bool(self.reserved)}{port}"


class Port(msgspec.Struct, frozen=True):
    """Everything that was read about a port.

    Attributes:
        address: What was asked for, in its canonical form.
        protocol: ``tcp`` or ``udp``.
        scope: The index of the interface that an IPv6 address names, as in fe80::1%eth0; 0 if it names none.
        is_local: Whether the machine has this address; None if it could not be asked.
        low_end: Ports below this one need a capability (``net.ipv4.ip_unprivileged_port_start``).
        overflows: How often the machine has turned connections away because a queue was full.
        unread: What could not be read, and what would make it readable; a sentence each.
    """

    address: str
    protocol: str
    local: Local
    number: int
    scope: int = 0
    is_local: bool | None = True
    low_end: int = 1024
    ephemeral: Ephemeral = Ephemeral()
    sockets: tuple[Sockets, ...] = ()
    overflows: int = 0
    unread: tuple[str, ...] = ()


class UnixName(msgspec.Struct, frozen=True):
    """A socket file, or an abstract name, as it was found.

    Attributes:
        found: What has the name: ``nothing``, a ``socket``, or ``something else``.
        holders: Who has a socket under that name, as far as we may see.
        is_held: Some process has one; a socket file without is a leftover.
        is_listening: It takes connections.
        obstacle: Why nothing could be made there, by the name of an errno; empty if something could.
    """

    address: str
    path: str
    found: str = "nothing"
    holders: tuple[Process, ...] = ()
    user: str = ""
    is_held: bool = False
    is_listening: bool = False
    queue: int = 0
    backlog: int = 0
    obstacle: str = ""
    unread: tuple[str, ...] = ()

    @property
    def is_abstract(self) -> bool:
        """Whether it has no file, and disappears with its last socket."""
        return self.path.startswith("@")
