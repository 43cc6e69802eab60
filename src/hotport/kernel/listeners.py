"""Read everything that listens in this network namespace; nothing is bound and nothing is sent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import islice
from typing import Final, NamedTuple

from msgspec.structs import replace

from hotport.kernel import procfs, sockdiag
from hotport.kernel.origin import describe
from hotport.kernel.sockdiag import InetSocket
from hotport.model.listening import Listening, oddities
from hotport.model.port import Local, State
from hotport.model.process import Process

__all__ = ["LISTENERS_MAX", "Found", "read_listeners"]

#: Beyond so many of a kind the rest is left out.
LISTENERS_MAX: Final = 20_000
SEARCH_CPU_S: Final = 0.5
NAMED_MAX: Final = 8
_SOCKETS: Final = (
    (socket.IPPROTO_TCP, "tcp", sockdiag.LISTEN | sockdiag.BOUND),
    (socket.IPPROTO_UDP, "udp", sockdiag.UNCONNECTED),
)


class Found(NamedTuple):
    """What listens, and what could not be read; a sentence each."""

    listening: tuple[Listening, ...]
    unread: tuple[str, ...]


def read_listeners() -> Found:
    """Read all TCP and UDP sockets without a peer, and listening AF_UNIX sockets that have a name.

    Raises:
        KernelError: If netlink is not to be had (HP130).
    """
    rows = list(_inet_rows())
    names = [row for row in sockdiag.unix() if row.state == 10]
    inodes = [row.inode for _, _, row in rows] + [row.inode for row in names]
    holders, gap = procfs.holders(inodes, cpu_s=SEARCH_CPU_S)
    seen: dict[tuple[int, int], Process] = {}

    def processes(inode: int, port: int = 0) -> tuple[Process, ...]:
        pids = list(dict.fromkeys(pid for pid, _ in holders.get(inode, ())))[:NAMED_MAX]
        for pid in pids:
            if (pid, port) not in seen:
                seen[pid, port] = describe(pid, port=port)
        return tuple(seen[pid, port] for pid in pids)

    found: dict[object, Listening] = {}
    for protocol, port, row in rows:
        one = _listening(protocol, port, row, processes(row.inode, port))
        key = protocol, one.place, one.local, one.state, tuple(each.pid for each in one.holders), one.user
        old = found.get(key)
        found[key] = one if old is None else replace(old, count=old.count + 1, queue=old.queue + one.queue)
    for name in names:
        user = "" if name.uid is None else procfs.user_name(name.uid)
        found[name.inode] = Listening(
            "unix", name.name, holders=processes(name.inode), user=user, queue=name.rqueue, backlog=name.wqueue
        )
    everything = list(found.values())
    ephemeral = procfs.ephemeral_ports()
    listening = tuple(replace(one, odd=tuple(oddities(one, everything, ephemeral))) for one in everything)
    unread = [] if not gap else ["some processes may not be looked into: root (CAP_SYS_PTRACE) sees them all"]
    if len(rows) >= LISTENERS_MAX:
        unread.append(f"there are more than {LISTENERS_MAX:,} sockets; the rest was left out")
    return Found(listening, tuple(unread))


def _inet_rows() -> Iterator[tuple[str, int, InetSocket]]:
    every = (
        (name, port, row)
        for protocol, name, states in _SOCKETS
        for family in (socket.AF_INET, socket.AF_INET6)
        for port, row in sockdiag.every(protocol, family, states)
        if port
    )
    return islice(every, LISTENERS_MAX)


def _listening(protocol: str, port: int, row: InetSocket, holders: tuple[Process, ...]) -> Listening:
    local = Local(ip_address(row.host), row.v6only if len(row.host) == 16 else False)
    family = socket.AF_INET if len(row.host) == 4 else socket.AF_INET6
    is_listening = protocol == "tcp" and row.state == 10
    return Listening(
        protocol,
        f"{local}:{port}",
        local,
        port,
        State.LISTEN if is_listening else State.BOUND,
        holders=holders,
        user=procfs.user_name(row.uid),
        unit="" if holders else procfs.control_group(row.cgroup),
        queue=row.rqueue,
        backlog=row.wqueue if is_listening else 0,
        waited_s=sockdiag.waited_s(family, port) if is_listening and row.rqueue else 0.0,
    )
