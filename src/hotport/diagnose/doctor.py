"""Find what makes restarts lossy or fragile: on this machine, and in a running service."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from hotport.address import TcpAddress, parse_address
from hotport.errors import ConfigError
from hotport.kernel import procfs
from hotport.kernel.fds import PASSED_MODE
from hotport.kernel.port import ourselves, read_port
from hotport.kernel.resolve import resolve
from hotport.kernel.unit import kill_mode, unit_of
from hotport.model.port import Ephemeral, State
from hotport.options import Options
from hotport.options.values import format_duration
from hotport.wire.messages import Status

__all__ = [
    "Finding",
    "ListenerState",
    "Machine",
    "Managed",
    "Member",
    "examine",
    "examine_service",
    "read_machine",
    "read_service",
]

#: A worker with so many times the mean of connections, and so many more, has not the share that it should have.
UNEVEN: Final = 1.5
UNEVEN_MIN: Final = 20

#: Descriptors that a worker needs beside those of connections: listeners, its event loop, files, libraries.
SPARE: Final = 100

#: For how many seconds usual load balancers keep an idle connection to a server.
BALANCER_IDLE_S: Final = 60.0
NEARLY_FULL: Final = 0.8

#: What comes of a service manager's ways to end a service, other than those that are right.
KILL_MODES: Final = {
    "control-group": "a stop ends programs of the application before the requests that need them, a program after -- "
    "gets SIGTERM twice, and a lame duck's workers leave at once and are replaced for that time",
    "none": "a stop ends no process: workers and connections stay, and so does the port",
}


class Finding(msgspec.Struct, frozen=True):
    """One problem to repair.

    Attributes:
        what: How it is.
        consequence: What comes of it.
        fix: One command or line of configuration that can be pasted; empty if there is none.
        note: What to do beside it, or in its place, in prose.
    """

    what: str
    consequence: str
    fix: str = ""
    note: str = ""


class Machine(msgspec.Struct, frozen=True):
    """The limits of the machine; None where they could not be read."""

    kernel: tuple[int, int]
    has_pidfd: bool
    descriptors_max: int
    runtime_root: str
    runtime_obstacle: str
    may_bind_low: bool
    somaxconn: int | None
    aborts_on_overflow: bool
    low_end: int | None
    ephemeral: Ephemeral
    overflows: int


class ListenerState(msgspec.Struct, frozen=True):
    """A TCP listener of the service.

    Attributes:
        strangers: Who holds the same socket and is not of the service.
        joiners: Who listens on the port with another one.
    """

    address: str
    nodelay: bool | None
    strangers: tuple[str, ...]
    joiners: tuple[str, ...]
    is_shared: bool
    migrates: bool


class Member(msgspec.Struct, frozen=True):
    """A process of the service.

    Attributes:
        inheritable: Descriptors of sockets that every program it starts gets as well.
        descriptors: How many are open, and how many may be; None if that could not be read.
    """

    name: str
    pid: int
    inheritable: tuple[int, ...]
    descriptors: tuple[int, int] | None


def read_machine(root: Path) -> Machine:
    """Look at this machine, as this user.

    Args:
        root: Where the runtime directories of services are.
    """
    return Machine(
        kernel=procfs.kernel_version(),
        has_pidfd=_has_pidfd(),
        descriptors_max=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        runtime_root=str(root),
        runtime_obstacle=_obstacle(root),
        may_bind_low=ourselves().may_bind_low,
        somaxconn=_number(procfs.sysctl("net.core.somaxconn")),
        aborts_on_overflow=procfs.sysctl("net.ipv4.tcp_abort_on_overflow") == "1",
        low_end=_number(procfs.sysctl("net.ipv4.ip_unprivileged_port_start")),
        ephemeral=procfs.ephemeral_ports(),
        overflows=procfs.accept_queue_overflows(),
    )


class Managed(msgspec.Struct, frozen=True):
    """The unit that the service runs in, and how its service manager ends it."""

    unit: str
    kill_mode: str


def read_service(status: Status) -> tuple[list[ListenerState], list[Member], Managed | None]:
    """Read the state of a running service; leave out what is not readable.

    Raises:
        KernelError: If netlink is not to be had (HP130).
    """
    names = {status.pid: "the supervisor"}
    names |= {worker.pid: f"worker {worker.generation}.{worker.worker}" for worker in status.workers}
    members = []
    for pid, name in names.items():
        inheritable = tuple(fd for fd, (_, is_inherited) in procfs.sockets_of(pid).items() if is_inherited)
        members.append(Member(name, pid, inheritable, procfs.descriptor_use(pid)))
    listeners = [found for text in status.addresses if (found := _listener(text, frozenset(names))) is not None]
    unit = unit_of(status.pid)
    return listeners, members, Managed(unit.name, kill_mode(unit)) if unit is not None else None


def examine(machine: Machine, options: Options) -> Iterator[Finding]:
    """Find problems of a machine for a service with these options; a pure function."""
    if machine.kernel < (5, 3) or not machine.has_pidfd:
        yield Finding(
            f"pidfd_open does not work (Linux {machine.kernel[0]}.{machine.kernel[1]})",
            "hotport cannot run: it could not tell a process from another one that got its pid",
            note="use Linux 5.3 or newer; in a container, a seccomp profile that permits pidfd_open",
        )
    if machine.somaxconn is not None and machine.somaxconn < options.backlog:
        yield Finding(
            f"net.core.somaxconn is {machine.somaxconn}, below the backlog of {options.backlog}",
            "when accepting pauses for a moment, fewer connections than intended wait; the others are dropped",
            fix=f"sysctl -w net.core.somaxconn={options.backlog}",
            note="then start the service again",
        )
    if machine.aborts_on_overflow:
        yield Finding(
            "net.ipv4.tcp_abort_on_overflow is 1",
            "a client that finds the accept queue full is reset, where it would try again and get in",
            fix="sysctl -w net.ipv4.tcp_abort_on_overflow=0",
        )
    if machine.overflows:
        yield Finding(
            f"accept queues have overflowed {machine.overflows:,} times since this network was made (ListenOverflows)",
            "each time a client had to wait for a second or more, and some gave up",
            note=f"run more workers, or raise --backlog (now {options.backlog}) and net.core.somaxconn",
        )
    if machine.descriptors_max < options.backlog + SPARE:
        yield Finding(
            f"a process may open {machine.descriptors_max:,} descriptors (hard limit)",
            "connections beyond that stay in the accept queue until others end; two generations drain at once",
            fix=f"LimitNOFILE={2 * (options.backlog + SPARE)}",
            note="in the section [Service] of the unit; elsewhere, raise ulimit -Hn",
        )
    if machine.runtime_obstacle:
        yield Finding(
            f"the runtime directory {machine.runtime_root} {machine.runtime_obstacle}",
            "hotport restart, status and stop do not find the service, or it refuses to start (HP622)",
            fix=f"ls -ld {machine.runtime_root}",
            note="or set HOTPORT_RUNTIME_DIR to a directory of yours",
        )
    proxies = [peer for peer in options.trusted_proxy if peer not in Options().trusted_proxy]
    if proxies and options.keep_alive_s <= BALANCER_IDLE_S:
        yield Finding(
            f"keep_alive is {format_duration(options.keep_alive_s)}; {', '.join(proxies[:3])} may be a load balancer",
            "most keep idle connections for 60 s; one that sends a request at the moment of our close answers 502",
            fix='keep_alive = "75s"',
            note="longer than the balancer's own idle time: AWS 60 s, nginx 60 s, Heroku 55 s, Google Cloud 600 s",
        )
    for address in options.bind:
        yield from _examine_address(machine, str(address))


def examine_service(
    listeners: Sequence[ListenerState],
    members: Sequence[Member],
    *,
    gone: Mapping[str, str] | None = None,
    managed: Managed | None = None,
    shares: Mapping[int, int] | None = None,
) -> Iterator[Finding]:
    """Find problems of a running service; a pure function.

    Args:
        gone: Addresses whose socket file is not in its place, and why.
        shares: How many connections the workers of the generation that serves have, by number.
    """
    if managed is not None and managed.kill_mode in KILL_MODES:
        yield Finding(
            f"{managed.unit} has KillMode={managed.kill_mode}",
            KILL_MODES[managed.kill_mode],
            fix=f"systemctl edit {managed.unit}",
            note="set KillMode=mixed in its section [Service]",
        )
    for address, why in (gone or {}).items():
        yield Finding(
            f"the socket file of {address} was removed or replaced" + (f" ({why})" if why else ""),
            "no new client can connect there; those that are connected are served",
            fix="hotport restart",
            note="it binds the address again; find out what removes the file",
        )
    if shares and max(shares.values()) > UNEVEN * sum(shares.values()) / len(shares) + UNEVEN_MIN:
        worker, most = max(shares.items(), key=lambda share: share[1])
        yield Finding(
            f"worker {worker} has {most:,} of {sum(shares.values()):,} connections, one of {len(shares)} workers",
            "its clients wait while other workers are idle",
            fix="hotport rebalance",
            note='workers do so by themselves, unless balance or handoff is "off" or these connections cannot move',
        )
    for listener in listeners:
        if listener.strangers:
            yield Finding(
                f"{listener.address} is also held by {', '.join(listener.strangers)}",
                "the port stays busy after the service is stopped, and clients connect and hang",
                note="end that process, and start programs with closed descriptors (close_fds=True, Python's default)",
            )
        if listener.joiners:
            yield Finding(
                f"{', '.join(listener.joiners)} listens on the port of {listener.address}, too (SO_REUSEPORT)",
                "it gets a share of the connections, and what is in its queue is reset when it ends",
                note="end it, or bind without SO_REUSEPORT; hotport's own listeners are shared without",
            )
        if listener.is_shared and not listener.migrates:
            yield Finding(
                f"{listener.address} has SO_REUSEPORT, and net.ipv4.tcp_migrate_req is 0",
                "when one of the listeners closes, the connections in its queue are reset",
                fix="sysctl -w net.ipv4.tcp_migrate_req=1",
                note="it needs Linux 5.14",
            )
        if listener.nodelay is False:
            yield Finding(
                f"{listener.address} has TCP_NODELAY off",
                "the last small piece of an answer waits for the client's delayed acknowledgement, up to 40 ms",
                fix="NoDelay=true",
                note="in the section [Socket] of the systemd unit, or by the process that makes the socket",
            )
    for member in members:
        if member.inheritable:
            numbers = ", ".join(map(str, sorted(member.inheritable)[:8]))
            yield Finding(
                f"sockets of {member.name} (pid {member.pid}) are inheritable: descriptors {numbers}",
                "every program that it starts holds them as well: ports stay busy and connections stay open",
                note="call os.set_inheritable(fd, False) in the program; use SOCK_CLOEXEC in C",
            )
        if member.descriptors is not None and member.descriptors[0] > NEARLY_FULL * member.descriptors[1]:
            used, most = member.descriptors
            yield Finding(
                f"{member.name} (pid {member.pid}) has {used:,} of {most:,} descriptors open",
                "soon it can neither accept nor open files, and a restart needs room for two generations",
                note="raise LimitNOFILE= in the unit; hotport why PORT shows connections that are never closed",
            )


def _examine_address(machine: Machine, text: str) -> Iterator[Finding]:
    try:
        address = parse_address(text)
    except ConfigError:  # serve says so, in its own words
        return
    if not isinstance(address, TcpAddress) or not address.port:
        return
    sysctl = "net.ipv4.ip_unprivileged_port_start"
    if machine.low_end is not None and address.port < machine.low_end and not machine.may_bind_low:
        yield Finding(
            f"{address} is below {sysctl} ({machine.low_end}), and you may not bind there",
            "the service does not start as this user",
            fix="AmbientCapabilities=CAP_NET_BIND_SERVICE",
            note=f"in the section [Service] of the unit; or for all programs: sysctl -w {sysctl}={address.port}",
        )
    if machine.ephemeral.gives(address.port):
        yield Finding(
            f"{address} is one of the ports for outgoing connections "
            f"({machine.ephemeral.low} to {machine.ephemeral.high})",
            "while the service is stopped, an outgoing connection can be given the port: the next start fails",
            fix=machine.ephemeral.keeping(address.port),
        )


def _listener(text: str, pids: frozenset[int]) -> ListenerState | None:
    address = parse_address(text)
    if not isinstance(address, TcpAddress):
        return None
    port = read_port(address, resolve(address, socket.SOCK_STREAM)[2])
    listeners = [old for old in port.sockets if old.state == State.LISTEN]
    mine = [old for old in listeners if not pids.isdisjoint(one.pid for one in old.holders)]
    if not mine:
        return None
    return ListenerState(
        text,
        nodelay=mine[0].nodelay,
        strangers=tuple(str(one) for old in mine for one in old.holders if one.pid not in pids),
        joiners=tuple(str(one) for old in listeners if old not in mine for one in old.holders),
        is_shared=any(old.options is not None and old.options.reuse_port for old in mine),
        migrates=procfs.sysctl("net.ipv4.tcp_migrate_req") == "1",
    )


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _obstacle(root: Path) -> str:
    """Explain why services cannot have their directories there; empty if they can."""
    try:
        found = root.lstat()
    except FileNotFoundError:
        is_possible = os.access(root.parent, os.W_OK | os.X_OK, effective_ids=True)
        return "" if is_possible else f"cannot be made in {root.parent} by this user"
    except OSError as error:
        return f"cannot be looked at: {os.strerror(error.errno or 0).lower()}"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory, or a symbolic link to one"
    if found.st_uid != os.geteuid():
        return f"belongs to {procfs.user_name(found.st_uid)}"
    if stat.S_IMODE(found.st_mode) & 0o077 and stat.S_IMODE(found.st_mode) != PASSED_MODE:
        return f"may be entered by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""
