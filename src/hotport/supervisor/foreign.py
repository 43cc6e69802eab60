"""A foreign program that takes no listener from hotport and opens its own: it runs below a wrapper."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from typing import NamedTuple

from hotport.kernel import procfs

__all__ = ["Unaware", "find_unaware"]


class Unaware(NamedTuple):
    """A process below a worker's first one, and where it listens by itself."""

    pid: int
    command: str
    addresses: tuple[str, ...]


def find_unaware(leader: int, given: Collection[socket.socket]) -> Unaware | None:
    """The program that a worker's first process has started, and that listens on sockets which it was not given.

    ``LISTEN_PID`` names the first process, so another program takes nothing from ``LISTEN_FDS`` (sd_listen_fds(3)).
    What the first program has forked is itself: it has the same command line.
    """
    known = {os.fstat(sock.fileno()).st_ino for sock in given if sock.fileno() >= 0}
    wrapper = procfs.arguments(leader)
    for pid in procfs.group(leader):
        if pid == leader or procfs.arguments(pid) == wrapper:
            continue
        inodes = {inode for inode, _ in procfs.sockets_of(pid).values()} - known
        if addresses := procfs.listening(pid, inodes):
            return Unaware(pid, procfs.command(pid), tuple(addresses))
    return None
