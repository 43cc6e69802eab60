"""What /proc says: queues that overflowed, who listens, which children have ended."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

__all__ = ["command", "listening_process", "queue_overflows", "sysctl", "zombies"]

_OVERFLOWS: Final = frozenset({"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies"})
_LISTEN: Final = "0A"  # TCP_LISTEN, as /proc/net/tcp prints it
_UNCONNECTED: Final = "07"  # TCP_CLOSE: a bound UDP socket without a peer
_COMMAND_CHARS_MAX: Final = 60


def queue_overflows() -> dict[str, int]:
    """How often the machine (the network namespace) turned connections away, since it started.

    Take it twice and subtract. Empty where the kernel does not say (some sandboxes).

    Returns:
        ``ListenOverflows`` and ``ListenDrops`` (accept queues), ``TCPReqQFullDrop`` and
        ``TCPReqQFullDoCookies`` (SYN queues): those that the kernel has.

    Sources: proc_pid_net(5) netstat; kernel ``net/ipv4/proc.c`` snmp4_net_list.
    """
    try:
        with open("/proc/net/netstat") as file:
            lines = file.read().splitlines()
    except OSError:
        return {}
    overflows = {}
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        for name, value in zip(names.split(), values.split(), strict=False):
            if name in _OVERFLOWS:
                overflows[name] = int(value)
    return overflows


def sysctl(name: str) -> str:
    """A kernel setting as text, ``?`` where it cannot be read. Sources: sysctl(8)."""
    with suppress(OSError), open(f"/proc/sys/{name.replace('.', '/')}") as file:
        return file.read().strip()
    return "?"


def zombies(parent: int) -> list[int]:
    """Children of `parent` that have ended and have not been waited for.

    Sources: proc_pid_stat(5); the name in it may contain blanks and brackets.
    """
    found = []
    for pid in _pids():
        with suppress(OSError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, ppid = file.read().rpartition(b")")[2].split()[:2]
            if state == b"Z" and int(ppid) == parent:
                found.append(pid)
    return found


def listening_process(kind: socket.SocketKind, sockaddr: tuple[Any, ...]) -> tuple[int, str] | None:
    """The pid and command that listens where a bind was refused, if we may see it.

    Best effort: None when nobody listens there, or when the process belongs to somebody else.

    Args:
        kind: SOCK_STREAM for TCP, SOCK_DGRAM for UDP.
        sockaddr: An IPv4 or IPv6 socket address, as getaddrinfo(3) gives it.

    Sources: proc_pid_net(5) tcp, tcp6, udp, udp6; proc_pid_fd(5).
    """
    links = {f"socket:[{inode}]" for inode in _listening_inodes(kind, sockaddr)}
    if not links:
        return None
    for pid in _pids():
        with suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with suppress(FileNotFoundError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in links:
                        return pid, command(pid)
    return None


def command(pid: int) -> str:
    """How a process was started, in one short line; ``?`` when it is gone.

    Sources: proc_pid_cmdline(5), which is empty for kernel threads and zombies; proc_pid_comm(5).
    """
    with suppress(OSError):
        for name in ("cmdline", "comm"):
            with open(f"/proc/{pid}/{name}", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
            if words:
                return words if len(words) <= _COMMAND_CHARS_MAX else words[: _COMMAND_CHARS_MAX - 3] + "..."
    return "?"


def _listening_inodes(kind: socket.SocketKind, sockaddr: tuple[Any, ...]) -> Iterator[str]:
    """Sockets that take the port, on an address that is the same or includes the other."""
    wanted, port = _plain(ip_address(str(sockaddr[0]).partition("%")[0])), int(sockaddr[1])
    stem, state = ("tcp", _LISTEN) if kind == socket.SOCK_STREAM else ("udp", _UNCONNECTED)
    for table in (f"/proc/net/{stem}", f"/proc/net/{stem}6"):
        with suppress(OSError), open(table) as file:
            next(file)
            for line in file:
                fields = line.split()
                host, _, port_hex = fields[1].partition(":")
                if int(port_hex, 16) != port or fields[3] != state:
                    continue
                held = _plain(_address(host))
                if held == wanted or held.is_unspecified or wanted.is_unspecified:
                    yield fields[9]


def _address(text: str) -> IPv4Address | IPv6Address:
    """The kernel prints the 32-bit words of an address in its own byte order."""
    words = [int(text[index : index + 8], 16) for index in range(0, len(text), 8)]
    return ip_address(struct.pack(f"={len(words)}I", *words))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    return getattr(address, "ipv4_mapped", None) or address


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
