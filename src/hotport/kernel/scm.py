"""Descriptors that travel between processes over a unix socket."""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = [
    "DESCRIPTORS_MAX",
    "Received",
    "receive_descriptors",
    "send_descriptors",
]

#: SCM_MAX_FD (include/net/scm.h): one more is EINVAL.
DESCRIPTORS_MAX: Final = 253

_INT_BYTES: Final = array.array("i").itemsize


class Received(NamedTuple):
    """Bytes and the descriptors that came with them; `is_whole` is False if others could not be installed here."""

    data: bytes
    descriptors: list[int]
    is_whole: bool


def send_descriptors(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
    """Send bytes, and descriptors with the first of them.

    Args:
        sock: A connected socket of the unix family.
        data: At least one byte: descriptors do not travel alone.
        descriptors: At most `DESCRIPTORS_MAX`; they stay open here, the receiver gets duplicates.

    Returns:
        How many bytes were sent; if any, all of the descriptors.

    Raises:
        BlockingIOError: Nothing was sent: the receiver's queue is full.
        OSError: ETOOMANYREFS: too many descriptors of this user are under way. EPIPE: the peer has closed.

    Sources: unix(7) SCM_RIGHTS; sendmsg(2).
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return sock.sendmsg([data], ancillary)


def receive_descriptors(sock: socket.socket, size: int) -> Received:
    """Receive up to `size` bytes, and as many of the descriptors that came with them as this process has room for.

    Returns:
        No bytes at the end of the stream. The descriptors are close-on-exec, the caller's to close, and the first ones
        of the message, in its order.

    Raises:
        BlockingIOError: There is nothing yet.

    Sources: unix(7) SCM_RIGHTS: what does not fit is closed, without an error; recvmsg(2) MSG_CTRUNC,
        MSG_CMSG_CLOEXEC. A stream never merges two messages that carry descriptors. scm_detach_fds() in net/core/scm.c
        installs them in order, up to the first one that fails.
    """
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * _INT_BYTES)
    data, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received = array.array("i")
            received.frombytes(raw[: len(raw) - len(raw) % _INT_BYTES])
            descriptors.extend(received)
    return Received(data, descriptors, not flags & socket.MSG_CTRUNC)
