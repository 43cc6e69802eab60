"""Notification datagrams, with their senders as the kernel names them (sd_notify(3), unix(7))."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Final

from hotport.kernel.abstract import sockaddr
from hotport.kernel.scm import DESCRIPTORS_MAX, send_descriptors
from hotport.wire.sdnotify import BARRIER, NOTIFICATION_BYTES_MAX

__all__ = ["notify", "notify_barrier", "open_notify", "receive_notification", "send_notification"]

_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_INT_BYTES: Final = array.array("i").itemsize
_CONTROL_BYTES: Final = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(DESCRIPTORS_MAX * _INT_BYTES)


def receive_notification(sock: socket.socket) -> tuple[int, int, bytes] | None:
    """Receive one datagram, if there is one; never blocks.

    Descriptors that come with it (``FDSTORE=1`` is not for us) are closed at once. A datagram longer than
    `NOTIFICATION_BYTES_MAX` is returned empty: half a message could say the opposite of the whole.

    Args:
        sock: From `hotport.kernel.sockets.bind_notify`, so that the kernel attaches credentials.

    Returns:
        The sender's pid and uid, checked by the kernel, and the payload; None when nothing waits. The pid is
        0 for a process that this pid namespace cannot see.

    Sources: unix(7) SO_PASSCRED, SCM_CREDENTIALS; recvmsg(2) MSG_TRUNC, MSG_CTRUNC, MSG_CMSG_CLOEXEC.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        payload, ancillary, answer, _ = sock.recvmsg(NOTIFICATION_BYTES_MAX, _CONTROL_BYTES, flags)
    except (BlockingIOError, InterruptedError):
        return None
    pid, uid = 0, -1
    for level, kind, data in ancillary:
        assert level == socket.SOL_SOCKET, "AF_UNIX has no other"
        if kind == socket.SCM_RIGHTS:
            fds = array.array("i", data[: len(data) - len(data) % _INT_BYTES])
            for fd in fds:
                os.close(fd)
        elif kind == socket.SCM_CREDENTIALS:
            pid, uid, _ = _UCRED.unpack(data)
    return pid, uid, b"" if answer & socket.MSG_TRUNC else payload


def notify(path: str, payload: bytes, *, timeout_s: float = 1.0) -> bool:
    """Send one notification; never raises, because the receiver may be gone.

    Args:
        path: What ``NOTIFY_SOCKET`` says: a path, or ``@name`` for an abstract socket.
        timeout_s: How long to wait while the receiver's queue is full (ten datagrams on many machines).

    Returns:
        Whether the kernel took it.

    Sources: sd_notify(3), NOTES; unix(7) on abstract addresses; sysctl net.unix.max_dgram_qlen.
    """
    sock = open_notify(path)
    if sock is None:
        return False
    with sock:
        sock.settimeout(timeout_s)
        try:
            return send_notification(sock, payload)
        except OSError:
            return False


def open_notify(path: str) -> socket.socket | None:
    """Open a non-blocking socket for many notifications; None if `path` has no listener, or no descriptor is left.

    The caller closes it. It is connected: another one polls writable even while the receiver's queue is full.
    """
    sock = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(sockaddr(path))
    except (OSError, ValueError):  # ValueError: a path with a NUL
        if sock is not None:
            sock.close()
        return None
    return sock


def send_notification(sock: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> bool:
    """Send one notification, and descriptors with it; they stay open here.

    Returns:
        Whether the kernel took it; False if the receiver's queue is full (for as long as the socket's timeout).

    Raises:
        OSError: The receiver is gone.

    Sources: unix(7) SCM_RIGHTS; sd_pid_notify_with_fds(3).
    """
    try:
        send_descriptors(sock, payload, descriptors)
    except (BlockingIOError, TimeoutError):
        return False
    return True


def notify_barrier(sock: socket.socket, *, timeout_s: float) -> bool:
    """Wait until the receiver has carried out everything that was sent before; blocks, and leaves `sock` non-blocking.

    Returns:
        Whether it has said so within `timeout_s` seconds.

    Sources: sd_notify_barrier(3): the receiver closes the descriptor that comes with ``BARRIER=1``.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        try:
            is_sent = send_notification(sock, BARRIER, [write])
        finally:
            sock.setblocking(False)
            os.close(write)
        if not is_sent:
            return False
        poll = select.poll()
        poll.register(read, 0)  # POLLHUP comes unasked
        return bool(poll.poll(timeout_s * 1000))
    except OSError:
        return False
    finally:
        os.close(read)
