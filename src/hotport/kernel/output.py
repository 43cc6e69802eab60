"""Write to a descriptor that others share, and never wait for its reader."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

__all__ = ["Sink", "open_sink"]


class Sink(NamedTuple):
    """A non-blocking way to write to the file that a descriptor is open on.

    Attributes:
        fd: What to poll for room.
        write: Writes a part or all of some bytes, and says how many. Raises BlockingIOError where it would wait.
        may_wait: There is no such way: `write` waits.
        close: Lets go of what was opened for it.
    """

    fd: int
    write: Callable[[bytes], int]
    may_wait: bool
    close: Callable[[], object]


def open_sink(fd: int) -> Sink:
    """Make a sink for the file that `fd` is open on; `fd` stays the caller's, and unchanged.

    O_NONBLOCK belongs to the open file description, which other processes share: set there, it would make their writes
    fail. So a pipe or terminal is opened once more, and a socket is told with each message. A file is not: it has a
    position, which a second description would not share, and no reader to wait for. A pipe that another user has made
    cannot be opened.

    Descriptors: one created, except for files.
    Sources: open(2) O_NONBLOCK; proc_pid_fd(5); pipe(7); send(2) MSG_DONTWAIT; tty(4).
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        return Sink(sock.fileno(), lambda data: sock.send(data, flags), False, sock.close)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return Sink(fd, partial(os.write, fd), True, _nothing)
        return Sink(own, partial(os.write, own), False, partial(os.close, own))
    return Sink(fd, partial(os.write, fd), False, _nothing)


def _nothing() -> None:
    pass
