"""Networks of their own, full of connections in TIME_WAIT, that end with the process which measures in them."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

__all__ = ["fill", "is_permitted", "isolated", "sysctl", "timers", "timewaits"]

CLONE_NEWNET: Final = 0x40000000
CLONE_NEWUSER: Final = 0x10000000

SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 0x1

#: Client ports, one after the other: the kernel's choice would hit an old pair again and again, which replaces its
#: entry. They lie below the ports that the kernel gives to listeners.
PORTS: Final = range(10_000, 30_000)

TIME_WAIT: Final = "06"


def isolated(measure: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a child process; where it is permitted, in a network namespace of its own.

    The namespace, with everything in TIME_WAIT, goes when the child does.

    Returns:
        What the function returned, by way of JSON.

    Raises:
        RuntimeError: It raised; the traceback is on stderr.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            _unshare()
            with open(write, "w") as result:
                json.dump(measure(*args), result)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with open(read) as result:
        text = result.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError(f"{measure.__name__}{args} failed")
    return json.loads(text)


@cache
def is_permitted() -> bool:
    """Whether this process may make network namespaces, as root or in a user namespace."""
    theirs: str = isolated(os.readlink, "/proc/self/ns/net")
    return theirs != os.readlink("/proc/self/ns/net")


def fill(listener: socket.socket, count: int, *, server_first: bool = True) -> None:
    """Open and close connections, one after the other, until so many are in TIME_WAIT; who closes first has them."""
    port = listener.getsockname()[1]
    for number in range(count):
        with socket.socket() as client:
            client.bind((f"127.0.1.{1 + number // len(PORTS)}", PORTS[number % len(PORTS)]))
            client.connect(("127.0.0.1", port))
            with listener.accept()[0] as accepted:
                (accepted if server_first else client).close()


def timewaits() -> int:
    """How many connections in this network are in TIME_WAIT."""
    fields = next(
        line for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP:")
    ).split()
    return int(fields[fields.index("tw") + 1])


def timers(port: int) -> list[float]:
    """Seconds until each connection in TIME_WAIT on a local port is gone.

    Sources: proc_pid_net(5): local address, state, and ``tr:tm->when``, a timer in clock ticks.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    ending = f":{port:04X}"
    return [
        int(row[5].partition(":")[2], 16) / ticks for row in rows if row[1].endswith(ending) and row[3] == TIME_WAIT
    ]


def sysctl(name: str, value: str) -> bool:
    """Set a sysctl of this network; false where there is none, or it is not ours to set."""
    try:
        Path("/proc/sys", name.replace(".", "/")).write_text(value)
    except OSError:
        return False
    return True


def _unshare() -> None:
    """Leave for a new network whose loopback interface is up; stay if that is not permitted."""
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    uid = os.getuid()
    if unshare(CLONE_NEWNET) != 0:
        if uid == 0 or unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:  # a root without rights cannot map itself
            return
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
