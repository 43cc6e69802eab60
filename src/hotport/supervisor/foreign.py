"""Find foreign programs below a wrapper, which open their own listeners instead of hotport's."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from typing import NamedTuple

from hotport.kernel import procfs

__all__ = ["Unaware", "find_unaware"]


class Unaware(NamedTuple):
    """A descendant of a worker's first process, and the addresses of its own listeners."""

    pid: int
    command: str
    addresses: tuple[str, ...]


def find_unaware(leader: int, given: Collection[socket.socket]) -> Unaware | None:
    """Find a program that a worker's first process has started, and that listens on sockets that are not `given`.

    ``LISTEN_PID`` names the first process, so other programs ignore ``LISTEN_FDS`` (sd_listen_fds(3)). Forks of the
    first program have the same command line, and are skipped.
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
