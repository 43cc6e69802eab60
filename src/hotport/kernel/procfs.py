"""Read /proc: queue overflows, the holders of sockets, ended children."""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from ipaddress import ip_address
from itertools import islice
from typing import Final

from hotport.model.port import Ephemeral

__all__ = [
    "accept_queue_overflows",
    "age_s",
    "arguments",
    "comm",
    "command",
    "control_group",
    "descriptor_use",
    "environment",
    "ephemeral_ports",
    "generation",
    "group",
    "group_path",
    "has_capability",
    "has_routes",
    "has_socket",
    "has_timewaits",
    "holders",
    "kernel_version",
    "leaders_with",
    "listening",
    "owner",
    "relations",
    "resets_sent",
    "sockets_of",
    "sysctl",
    "unit_of",
    "user_name",
    "user_of",
    "zombies",
]

_COMMAND_CHARS_MAX: Final = 60
_RUNTIME_FDS: Final = 64  # among the first of a supervisor is its runtime directory
_FIRST: Final = 256  # descriptors of a process that are looked at before those of the next one
_ACCEPTS: Final = 0x10000  # __SO_ACCEPTCON
_CGROUPS: Final = "/sys/fs/cgroup"
_CGROUPS_MAX: Final = 5_000


def accept_queue_overflows() -> int:
    """Count the connections dropped for full accept queues since the network namespace was made.

    0 where the kernel does not say (some sandboxes).

    Sources: proc_pid_net(5) netstat; ListenOverflows of kernel ``net/ipv4/proc.c`` snmp4_net_list.
    """
    try:
        with open("/proc/net/netstat") as file:
            lines = file.read().splitlines()
    except OSError:
        return 0
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        counters = dict(zip(names.split(), values.split(), strict=False))
        if "ListenOverflows" in counters:
            return int(counters["ListenOverflows"])
    return 0


def resets_sent() -> int:
    """Count the TCP segments with RST that the network namespace has sent since it started.

    Take it twice and subtract. 0 where the kernel does not say.

    Sources: proc_pid_net(5) snmp; RFC 4022 tcpOutRsts.
    """
    with suppress(OSError), open("/proc/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Tcp:"))
        return int(values[names.index("OutRsts")])
    return 0


def sysctl(name: str) -> str:
    """Read a kernel setting as text, ``?`` where it cannot be read. Sources: sysctl(8)."""
    with suppress(OSError), open(f"/proc/sys/{name.replace('.', '/')}") as file:
        return file.read().strip()
    return "?"


def ephemeral_ports() -> Ephemeral:
    """The ports for outgoing connections; from 0 to 0 where they cannot be read."""
    low, _, high = sysctl("net.ipv4.ip_local_port_range").partition("\t")
    if not high:
        return Ephemeral(0, 0)
    return Ephemeral(int(low), int(high), sysctl("net.ipv4.ip_local_reserved_ports").removeprefix("?"))


def kernel_version() -> tuple[int, int]:
    """The first two numbers of the running kernel's. Sources: uname(2)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def has_timewaits() -> bool:
    """Whether any connection may be in TIME_WAIT in this network namespace; quicker than looking for them.

    Sources: proc_pid_net(5) sockstat, ``tw``; before Linux 5.19 it counts those of all namespaces.
    """
    with suppress(OSError), open("/proc/net/sockstat") as file:
        return " tw 0 " not in file.read()
    return True


def has_routes() -> bool:
    """Whether this network namespace has a table of IPv4 routes; a new one has none until an interface is up.

    Sources: kernel ``net/ipv4/fib_frontend.c`` __inet_dev_addr_type: without one, any address may be bound.
    """
    with suppress(OSError), open("/proc/net/fib_trie") as file:
        return bool(file.read(1))
    return True


def environment(pid: int) -> dict[str, str]:
    """Read the environment with which a process was started; empty if it is gone or not readable.

    Sources: proc_pid_environ(5): what it has changed since does not show.
    """
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        pairs = (entry.partition(b"=") for entry in file.read().split(b"\0") if b"=" in entry)
        return {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}
    return {}


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone. Sources: proc_pid_cmdline(5)."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    return []


def age_s(pid: int) -> float:
    """Seconds since a process was started; 0 when it is gone.

    Sources: proc_pid_stat(5) starttime, in clock ticks since the machine was booted.
    """
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        started = int(file.read().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    return 0.0


def leaders_with(variable: str, value: str, uid: int) -> list[int]:
    """Processes of a user that lead a process group and were started with a variable in their environment.

    What they have forked since has the same environment, and is in their group.

    A process may write into its own environment, so whose it is matters where this process is root.

    Sources: proc_pid_environ(5); setpgid(2).
    """
    entry = os.fsencode(f"{variable}={value}")
    found = []
    for pid in _pids():
        with suppress(OSError):
            if os.getpgid(pid) == pid:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if entry in file.read().split(b"\0") and user_of(pid) == uid:
                        found.append(pid)
    return found


def group(leader: int) -> list[int]:
    """The processes of a process group. Sources: getpgid(2)."""
    found = []
    for pid in _pids():
        with suppress(OSError):
            if os.getpgid(pid) == leader:
                found.append(pid)
    return found


def listening(pid: int, inodes: Collection[int]) -> list[str]:
    """Find the addresses on which a process listens, among its stream sockets with these inodes.

    Sources: proc_pid_net(5): tcp and tcp6, state 0A, addresses as words of the machine; unix, flag ``__SO_ACCEPTCON``.
    """
    found = []
    for name in ("tcp", "tcp6"):
        for fields in _rows(pid, name):
            if fields[3] == "0A" and int(fields[9]) in inodes:
                host, port = fields[1].split(":")
                words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                address = ip_address(struct.pack(f"={len(words)}I", *words))
                shown = f"[{address}]" if address.version == 6 else f"{address}"
                found.append(f"tcp://{shown}:{int(port, 16)}")
    unix = (fields for fields in _rows(pid, "unix") if int(fields[3], 16) & _ACCEPTS and int(fields[6]) in inodes)
    return [*found, *(f"unix:{fields[7]}" if len(fields) > 7 else "unix:?" for fields in unix)]


def _rows(pid: int, name: str) -> Iterator[list[str]]:
    with suppress(OSError), open(f"/proc/{pid}/net/{name}", errors="surrogateescape") as file:
        next(file, "")
        for line in file:
            yield line.rstrip("\n").split(maxsplit=7 if name == "unix" else -1)  # a path may have blanks


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


def command(pid: int) -> str:
    """Describe how a process was started, in one short line; ``?`` when it is gone.

    Whoever started it has chosen the words: what would move the cursor of a terminal, or break the line, is left out.

    Sources: proc_pid_cmdline(5), which is empty for kernel threads and zombies; proc_pid_comm(5).
    """
    with suppress(OSError):
        for name in ("cmdline", "comm"):
            with open(f"/proc/{pid}/{name}", "rb") as file:
                program, blank, rest = file.read().partition(b"\0")
            words = _printable((program + blank + rest).decode(errors="replace"))
            if len(words) > _COMMAND_CHARS_MAX:  # what it runs says more than where its interpreter lies
                words = _printable((os.path.basename(program) + blank + rest).decode(errors="replace"))
            if words:
                return words if len(words) <= _COMMAND_CHARS_MAX else words[: _COMMAND_CHARS_MAX - 3] + "..."
    return "?"


def holders(inodes: Collection[int], *, cpu_s: float) -> tuple[dict[int, list[tuple[int, int]]], str]:
    """Find which processes hold which sockets, by inode.

    Looks at the first descriptors of every process first, where listeners are; then, until each inode has somebody,
    at those of processes that have many more. Other users' processes cannot be looked into without CAP_SYS_PTRACE.

    Args:
        cpu_s: Seconds of processor time after which what has been found must do; a descriptor takes about 4 us.

    Returns:
        For each inode that was found, pids and descriptors; and why there may be more: ``forbidden``, ``late`` or
        nothing.

    Sources: proc_pid_fd(5): descriptors are listed in order.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[tuple[int, int]]] = {}
    gap = ""
    later: list[int] = []
    deadline = time.process_time() + cpu_s
    for pid in _pids() if wanted else []:
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:  # it is the listing that takes long
                names = [entry.name for entry in islice(entries, _FIRST + 1)]
            _look(pid, names, wanted, found)
        except PermissionError:
            gap = "forbidden"
        except OSError:  # gone
            continue
        else:
            later += [pid] if len(names) > _FIRST else []
    for pid in later:
        with suppress(OSError):
            names = os.listdir(f"/proc/{pid}/fd")
            for at in range(_FIRST, len(names), _FIRST):
                if len(found) == len(wanted):
                    return found, gap
                if time.process_time() > deadline:
                    return found, "late"
                _look(pid, names[at : at + _FIRST], wanted, found)
    return found, gap


def _look(pid: int, names: list[str], wanted: dict[str, int], found: dict[int, list[tuple[int, int]]]) -> None:
    """Note which of these descriptors are among the wanted sockets.

    Raises:
        PermissionError: They may be listed (CAP_DAC_READ_SEARCH), but not be looked at.
    """
    for name in names:
        with suppress(FileNotFoundError):
            inode = wanted.get(os.readlink(f"/proc/{pid}/fd/{name}"))
            if inode is not None:
                found.setdefault(inode, []).append((pid, int(name)))


def has_socket(pid: int, inodes: Collection[int]) -> bool:
    """Whether a process has one of these sockets open; false where that is not readable. Sources: proc_pid_fd(5)."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in wanted:
                    return True
    return False


def sockets_of(pid: int) -> dict[int, tuple[int, bool]]:
    """List the sockets that a process has open; empty where that is not readable.

    Returns:
        By descriptor, the inode, and whether programs that it starts inherit it (it is not close-on-exec).

    Sources: proc_pid_fd(5); proc_pid_fdinfo(5), flags, in octal.
    """
    found = {}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                link = os.readlink(f"/proc/{pid}/fd/{name}")
                if link.startswith("socket:["):
                    with open(f"/proc/{pid}/fdinfo/{name}") as file:
                        flags = next(line for line in file if line.startswith("flags:"))
                    found[int(name)] = int(link[8:-1]), not int(flags.split()[1], 8) & os.O_CLOEXEC
    return found


def descriptor_use(pid: int) -> tuple[int, int] | None:
    """Count the open descriptors of a process, with its limit; None where that is not readable.

    Sources: proc_pid_limits(5): the soft limit comes first.
    """
    with suppress(OSError, ValueError), open(f"/proc/{pid}/limits") as file:
        for line in file:
            if line.startswith("Max open files"):
                return len(os.listdir(f"/proc/{pid}/fd")), int(line.split()[3])
    return None


def user_name(uid: int) -> str:
    """A user's name; the number where it has none, as in many containers."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def user_of(pid: int) -> int:
    """The user that a process runs as; -1 when it is gone, or if it may still change to another one.

    Sources: proc_pid_status(5) Uid. The owner of ``/proc/PID`` is root for a process that does not want to be traced.
    """
    with suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("Uid:"):
                ids = {int(text) for text in line.split()[1:]}
                return ids.pop() if len(ids) == 1 else -1
    return -1


def owner(pid: int) -> str:
    """The user that a process runs as; ``?`` when it is gone. Sources: proc_pid(5)."""
    with suppress(OSError):
        return user_name(os.stat(f"/proc/{pid}").st_uid)
    return "?"


def generation(pid: int) -> int:
    """Read the generation of a hotport worker; 0 for other processes, and where that is not readable.

    Sources: proc_pid_environ(5).
    """
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        if found := re.search(rb"(?:^|\0)HOTPORT_GENERATION=([0-9]{1,9})\0", file.read()):
            return int(found[1])
    return 0


def runtime_of(pid: int) -> str:
    """The runtime directory of the service of hotport's that a process works for or supervises.

    Empty if there is none, or where we may not look.

    Sources: proc_pid_environ(5), proc_pid_fd(5). A supervisor holds the directory, locked; a worker and what it has
        started have ``NOTIFY_SOCKET`` in there.
    """
    variables = environment(pid)
    named = re.fullmatch(r"(.+)/notify(-[0-9]+)?\.sock", variables.get("NOTIFY_SOCKET", ""), re.DOTALL)
    if "HOTPORT_GENERATION" in variables and named:
        return named[1]
    return next((named for named in _open_early(pid) if os.path.exists(f"{named}/control.sock")), "")


def supervises(pid: int, directory: str) -> bool:
    """Whether a process supervises the service with this runtime directory, also if that was removed meanwhile.

    Sources: proc_pid_fd(5): what was removed is called so.
    """
    return not {directory, f"{directory} (deleted)"}.isdisjoint(_open_early(pid))


def _open_early(pid: int) -> Iterator[str]:
    """List the paths of the first descriptors of a process."""
    for fd in range(_RUNTIME_FDS):
        with suppress(OSError):
            named = os.readlink(f"/proc/{pid}/fd/{fd}")
            if named.startswith("/"):
                yield named


def parent(pid: int) -> int:
    """Read the parent of a process; 0 when it is gone. Sources: proc_pid_stat(5), ppid."""
    return int(state[1]) if (state := _state(pid)) else 0


def comm(pid: int) -> str:
    """The name of a process; ``?`` when it is gone. Sources: proc_pid_comm(5)."""
    with suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        return _printable(file.read()) or "?"
    return "?"


def relations(pid: int) -> tuple[int, int, int, str]:
    """Read the parent, process group, session and controlling terminal of a process; zeros when it is gone.

    Sources: proc_pid_stat(5), tty_nr; devices.txt of the kernel: 136 to 143 are pseudo-terminals, 4 is a console.
    """
    state = _state(pid)
    if not state:
        return 0, 0, 0, ""
    device = int(state[4])
    major, minor = device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00
    terminal = f"pts/{minor + (major - 136) * 256}" if 136 <= major <= 143 else f"tty{minor}" if major == 4 else ""
    return int(state[1]), int(state[2]), int(state[3]), terminal


def is_suspended(pid: int) -> bool:
    """Whether a process was stopped by a signal or a debugger. Sources: proc_pid_stat(5), state."""
    state = _state(pid)
    return bool(state) and state[0] in ("T", "t")


def state_of(pid: int) -> str:
    """The letter of a process's state, as ``D`` for one that waits for a disk; empty when it is gone.

    Sources: proc_pid_stat(5), state.
    """
    return found[0] if (found := _state(pid)) else ""


def sleeps(pid: int) -> int:
    """How often a process's main thread has gone to sleep by itself; 0 when it is gone.

    Sources: proc_pid_status(5), voluntary_ctxt_switches.
    """
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"voluntary_ctxt_switches:"):
                return int(line.split()[1])
    return 0


def _state(pid: int) -> list[str]:
    """Read the fields of a process's stat after its name; empty when it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()
    return []


def has_capability(number: int) -> bool:
    """Whether this process has a capability now. Sources: proc_pid_status(5) CapEff; capabilities(7)."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def unit_of(pid: int) -> str:
    """The systemd unit or the container that a process belongs to, by its control group; empty if to none.

    Sources: proc_pid_cgroup(5); cgroups(7); systemd.resource-control(5) on the names.
    """
    with suppress(OSError), open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            if line.startswith("0::"):
                return _unit(line[3:].strip())
    return ""


def group_path(pid: int) -> str:
    """The path of a process's control group; empty when it is gone.

    Sources: proc_pid_cgroup(5): ``0::`` is version 2; of version 1 systemd's own hierarchy, or the longest path.
    """
    with suppress(OSError), open(f"/proc/{pid}/cgroup") as file:
        found = [line.rstrip("\n").split(":", 2) for line in file]
        best = max(found, key=lambda row: (row[0] == "0" and row[2] != "/", "systemd" in row[1], len(row[2])))
        return best[2]
    return ""


def control_group(inode: int) -> str:
    """The unit or container of a socket, by what the kernel says of its control group; empty if unknown.

    It is how a socket's service is known when its process may not be looked into.

    Sources: cgroups(7); an id is the inode of the group's directory.
    """
    directories = [_CGROUPS] if inode else []
    for seen, directory in enumerate(directories):
        with suppress(OSError):
            if os.stat(directory).st_ino == inode:
                return _unit(directory.removeprefix(_CGROUPS))
            if seen < _CGROUPS_MAX:
                directories += [entry.path for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    return ""


def _unit(path: str) -> str:
    """Return the innermost name that means something to a reader."""
    for name in reversed(path.split("/")):
        if re.search(r"\.(service|socket|scope)$|[0-9a-f]{64}", name):
            return _printable(name)
    return ""


def _printable(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
