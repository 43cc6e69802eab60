"""Read everything known about a port, without a bind and without a packet."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from hotport.address import TcpAddress, UdpAddress, UnixAddress, listener_name
from hotport.errors import ConfigError
from hotport.kernel import procfs, sockdiag
from hotport.kernel.origin import describe
from hotport.kernel.process import duplicate_descriptor
from hotport.kernel.sockdiag import InetSocket
from hotport.model.port import Asker, Host, Local, Port, ReuseOptions, Sockets, State, UnixName
from hotport.model.process import Process
from hotport.wire.listenfds import parse_listen_environment

__all__ = ["Taken", "options_of", "ourselves", "read_name", "read_port"]

_STATES: Final = {
    1: State.ESTABLISHED,
    2: State.SYN_SENT,
    3: State.SYN_RECV,
    4: State.FIN_WAIT1,
    5: State.FIN_WAIT2,
    6: State.TIME_WAIT,
    7: State.BOUND,
    8: State.CLOSE_WAIT,
    9: State.LAST_ACK,
    10: State.LISTEN,
    11: State.CLOSING,
    12: State.SYN_RECV,
}

_ALONE: Final = frozenset({7, 10})  # told apart, because each of them is somebody's: BOUND and LISTEN
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_CAP_NET_BIND_SERVICE: Final = 10
_TIMER_TO_THE_END: Final = 3

#: So many sockets of a kind are looked at one by one; of more only what the kernel says by itself is known.
LOOKED_AT_MAX: Final = 500
#: Beyond so many sockets on the port the rest is left out.
SOCKETS_MAX: Final = 200_000
#: Of more sockets that are alike than could be looked at, so many are: enough to name a process.
SAMPLE: Final = 8
#: Seconds of processor time for the search through /proc for processes.
SEARCH_CPU_S: Final = 0.2
NAMED_MAX: Final = 8

#: Why the processes of some sockets are not known, and what would help.
_GAPS: Final = {
    "forbidden": "some processes may not be looked into: root (CAP_SYS_PTRACE) sees them all",
    "late": "the processes of some sockets were not searched for to the end: too many descriptors are open here",
    "": "some sockets are held by no process that is seen here: look outside of this container",
}

_NS_GET_USERNS: Final = 0xB701


class Taken(NamedTuple):
    """Options read from a socket itself, which the kernel's list lacks; `nodelay` of listeners only."""

    options: ReuseOptions
    v6only: bool
    nodelay: bool | None


@dataclass(slots=True)
class _Alike:
    """A group of sockets that the kernel describes alike, while they are counted."""

    first: InetSocket
    count: int = 0
    inodes: list[int] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    ends_ms: int = 0
    rqueue: int = 0
    wqueue: int = 0


def ourselves() -> Asker:
    """Describe this process as one that would bind."""
    uid = os.geteuid()
    may_bind_low = procfs.has_capability(_CAP_NET_BIND_SERVICE) and _owns_network()
    return Asker(uid, procfs.user_name(uid), may_bind_low)


def read_port(address: TcpAddress | UdpAddress, sockaddr: tuple[Any, ...], *, v6only: bool = True) -> Port:
    """Read everything on the port of an address, in this network namespace.

    Bounded in time and memory: connections in TIME_WAIT are counted by the kernel's list and not kept, the
    search for processes ends after a while, and what was left out is said.

    Args:
        sockaddr: What the address is to getaddrinfo(3).
        v6only: What IPV6_V6ONLY would be for an IPv6 address.

    Raises:
        KernelError: If netlink is not to be had (HP130).

    Descriptors: some are taken from other processes by pidfd_getfd(2) for a moment, where that is permitted.
    """
    is_tcp = isinstance(address, TcpAddress)
    protocol = socket.IPPROTO_TCP if is_tcp else socket.IPPROTO_UDP
    host = ip_address(str(sockaddr[0]).partition("%")[0])
    local = Local(host, v6only if host.version == 6 else False)
    number = int(sockaddr[1])
    low_end = procfs.sysctl("net.ipv4.ip_unprivileged_port_start")
    scope = int(sockaddr[3]) if len(sockaddr) > 3 else 0
    unread = []
    alike, is_whole = _count(protocol, number)
    if not is_whole:
        unread.append(f"more than {SOCKETS_MAX:,} sockets are on the port; the rest was left out")
    if is_tcp and procfs.kernel_version() < (6, 8):
        unread.append("a socket that is bound and does not listen is not shown by this kernel; Linux 6.8 does")
    inodes = [inode for group in alike for inode in group.inodes]
    holders, gap = procfs.holders(inodes, cpu_s=SEARCH_CPU_S)
    if any(inode not in holders for inode in inodes):
        unread.append(_GAPS[gap])
    if _is_foreign():
        unread.append("this is a network of its own (a container?); ports of other networks are not seen here")
    sockets = [sockets for group in alike for sockets in _described(group, holders, number)]
    if is_tcp:
        sockets += _lingering(number)
        sockets = [_with_queue(old, number) for old in sockets]
    return Port(
        str(address),
        "tcp" if is_tcp else "udp",
        local,
        number,
        scope=scope,
        is_local=_is_local(local.plain, scope),
        low_end=int(low_end) if low_end.isdigit() else 1024,
        ephemeral=procfs.ephemeral_ports(),
        sockets=tuple(sockets),
        overflows=procfs.accept_queue_overflows(),
        unread=tuple(unread),
    )


def read_name(address: UnixAddress) -> UnixName:
    """Read which socket or file has the name of an AF_UNIX address.

    Raises:
        KernelError: If netlink is not to be had (HP130).
    """
    path = address.path
    found, obstacle, file = "nothing", "", None
    if not address.is_abstract:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            directory = os.path.dirname(path) or "."
            if not os.path.isdir(directory):
                obstacle = "ENOENT"
            elif os.statvfs(directory).f_flag & os.ST_RDONLY:
                obstacle = "EROFS"
            elif not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
                obstacle = "EACCES"
        except OSError as error:
            obstacle = errno.errorcode.get(error.errno or 0, "EACCES")
        else:
            found = "socket" if stat.S_ISSOCK(status.st_mode) else "something else"
            file = status.st_dev, status.st_ino
    named = [row for row in sockdiag.unix() if row.state != 1]
    rows = [row for row in named if (row.file == file if file else row.name == path)]
    if found == "nothing" and not address.is_abstract:
        rows = rows or _without_file(address, named)
    if address.is_abstract and rows:
        found = "socket"
    held, gap = procfs.holders([row.inode for row in rows], cpu_s=SEARCH_CPU_S)
    listening = [row for row in rows if row.state == 10]
    first = next(iter(listening or rows), None)
    is_hidden = _is_answered(path) if found == "socket" and not rows else False
    if is_hidden is not False:
        gap = "" if is_hidden else "forbidden"
    return UnixName(
        str(address),
        path,
        found,
        holders=_processes([row.inode for row in rows], held),
        user=procfs.user_name(first.uid) if first and first.uid is not None else "",
        is_held=bool(rows or is_hidden),
        is_listening=bool(listening),
        queue=first.rqueue if first else 0,
        backlog=first.wqueue if first else 0,
        obstacle=obstacle,
        unread=() if len(held) == len(rows) and is_hidden is False else (_GAPS[gap],),
    )


def _without_file(address: UnixAddress, named: Sequence[sockdiag.UnixSocket]) -> list[sockdiag.UnixSocket]:
    """Find hotport's listeners at a path whose file is gone.

    Their own name is the one that they were bound under, beside that path; workers have the path in their environment.
    """
    place = os.path.dirname(address.path)
    beside = [row for row in named if row.state == 10 and os.path.dirname(row.name) == place]
    holders, _ = procfs.holders([row.inode for row in beside], cpu_s=SEARCH_CPU_S)
    return [row for row in beside if any(_was_given(pid, address) for pid, _ in holders.get(row.inode, ()))]


def _was_given(pid: int, address: UnixAddress) -> bool:
    with suppress(ConfigError, OSError):
        given = parse_listen_environment(procfs.environment(pid), pid)
        return any(name == listener_name(address) for _, name in given)
    return False


def _is_answered(path: str) -> bool | None:
    """Whether a socket is bound to a socket file, even in another network namespace, which has no list.

    Nobody is connected: to a datagram socket a connect says nothing, and of other sockets it is refused as such. None
    where we may not ask.

    Sources: connect(2) ECONNREFUSED, EPROTOTYPE; kernel ``net/unix/af_unix.c`` unix_find_bsd.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        error = asking.connect_ex(path)
    return None if error == errno.EACCES else error not in {errno.ECONNREFUSED, errno.ENOENT}


def options_of(pid: int, fd: int) -> Taken | None:
    """Read the options of a socket that another process holds; None if that is not permitted."""
    taken = -1
    try:
        pidfd = os.pidfd_open(pid)
        try:
            taken = duplicate_descriptor(pidfd, fd)
        finally:
            os.close(pidfd)
        with socket.socket(fileno=taken) as sock:
            taken = -1  # the socket's from now on
            reuse = [sock.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_REUSEADDR, socket.SO_REUSEPORT)]
            v6only = sock.family == socket.AF_INET6 and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            is_listener = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            nodelay = bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) if is_listener else None
            return Taken(ReuseOptions(bool(reuse[0]), bool(reuse[1])), bool(v6only), nodelay)
    except OSError:  # gone, not permitted, or another file by now
        return None
    finally:
        if taken >= 0:
            os.close(taken)


def _count(protocol: int, port: int) -> tuple[list[_Alike], bool]:
    """Count the sockets on the port by kind, and tell whether all were read."""
    groups: dict[object, _Alike] = {}
    rows = chain.from_iterable(sockdiag.inet(protocol, family, port) for family in _FAMILIES)
    for row in islice(rows, SOCKETS_MAX):  # the less is done here the better
        state, timer, _, host, _, interface, expires_ms, rqueue, wqueue, uid, inode, _ = row
        is_alone = state in _ALONE and len(groups) < LOOKED_AT_MAX
        key = inode if is_alone else (state, host, uid, not inode, timer, interface)
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Alike(row)
        group.count += 1
        group.rqueue += rqueue
        group.wqueue += wqueue
        if expires_ms > group.ends_ms:
            group.ends_ms = expires_ms
        if inode and group.count <= LOOKED_AT_MAX:
            group.inodes.append(inode)
        if group.count < 4 and row.peer_port:
            group.peers.append(_text(row.peer, row.peer_port))
    for group in groups.values():
        if group.count > len(group.inodes):
            group.inodes = sorted(group.inodes)[:SAMPLE]  # the oldest: their descriptors are looked at first
    return list(groups.values()), next(rows, None) is None


def _described(group: _Alike, holders: dict[int, list[tuple[int, int]]], port: int) -> Iterator[Sockets]:
    """Describe the group as values: one for each combination of options found among its sockets."""
    row = group.first
    is_timed = row.timer == _TIMER_TO_THE_END and not row.inode
    parts: defaultdict[Taken | None, list[int]] = defaultdict(list)
    for inode in group.inodes:
        taken = next((found for pid, fd in holders.get(inode, ()) if (found := options_of(pid, fd))), None)
        parts[taken].append(inode)
    if group.count > len(group.inodes):
        parts[None] += []
    for taken, inodes in parts.items():
        v6only = row.v6only if taken is None else taken.v6only
        named = _processes(inodes, holders, port)
        count = len(inodes) + (group.count - len(group.inodes) if taken is None else 0)
        yield Sockets(
            _STATES.get(row.state, State.BOUND),
            Local(ip_address(row.host), v6only if len(row.host) == 16 else False),
            count=count,
            uid=None if is_timed else row.uid,
            options=taken.options if taken else None,
            nodelay=taken.nodelay if taken else None,
            is_held=bool(row.inode),
            is_timed=is_timed,
            ends_in_s=group.ends_ms / 1000 if is_timed else 0.0,
            holders=named,
            user="" if is_timed else procfs.user_name(row.uid),
            unit="" if named else procfs.control_group(row.cgroup),
            peers=tuple(group.peers),
            queue=group.rqueue,
            backlog=group.wqueue,
            interface=row.interface,
            is_outgoing=bool(row.peer_port) and bool(row.inode) and _listens(row),
        )


def _processes(inodes: Sequence[int], holders: dict[int, list[tuple[int, int]]], port: int = 0) -> tuple[Process, ...]:
    pids = dict.fromkeys(pid for inode in inodes for pid, _ in holders.get(inode, ()))
    return tuple(describe(pid, port=port) for pid in list(pids)[:NAMED_MAX])


def _lingering(port: int) -> Iterator[Sockets]:
    for family in _FAMILIES if procfs.has_timewaits() else ():
        for host, left in sockdiag.lingering(family, port).items():
            yield Sockets(
                State.TIME_WAIT,
                Local(ip_address(host), None if len(host) == 16 else False),
                count=left.connections,
                is_held=False,
                is_timed=True,
                ends_in_s=left.last_ms / 1000,
                peers=(_text(left.peer, left.peer_port),),
            )


def _with_queue(old: Sockets, port: int) -> Sockets:
    """Describe a listener with connections in its queue, and how long the first one has waited."""
    if old.state != State.LISTEN or not old.queue:
        return old
    family = socket.AF_INET if old.local.host.version == 4 else socket.AF_INET6
    return replace(old, waited_s=sockdiag.waited_s(family, port))


def _listens(row: InetSocket) -> bool:
    """Whether the peer of a connection is a listener of this machine: then the connection is an outgoing one."""
    family = socket.AF_INET if len(row.host) == 4 else socket.AF_INET6
    listeners = sockdiag.inet(socket.IPPROTO_TCP, family, row.peer_port, states=sockdiag.LISTEN)
    return any(not any(other.host) or other.host == row.peer for other in listeners)


def _is_local(host: Host, scope: int) -> bool:
    if host.is_multicast or sockdiag.is_local(host.packed, scope):
        return True
    return host.version == 4 and not procfs.has_routes()


def _owns_network() -> bool:
    """Whether our capabilities count in our network: not if it belongs to a user namespace above ours.

    Sources: ioctl_ns(2) NS_GET_USERNS, EPERM; network_namespaces(7).
    """
    try:
        with open("/proc/self/ns/net") as network:
            os.close(fcntl.ioctl(network, _NS_GET_USERNS))
    except PermissionError:
        return False
    except OSError:  # some sandboxes have no such files
        pass
    return True


def _is_foreign() -> bool:
    """Whether this process is in another network namespace than pid 1; false where that may not be seen.

    Sources: network_namespaces(7); proc_pid_ns(5).
    """
    with suppress(OSError):
        return os.stat("/proc/self/ns/net").st_ino != os.stat("/proc/1/ns/net").st_ino
    return False


def _text(host: bytes, port: int) -> str:
    address: Host = ip_address(host)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
