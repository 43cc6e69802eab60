"""Choose the listener of each new connection: one-instruction classic BPF programs.

Neither needs a privilege.

Sources: socket(7) SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_FILTER; struct sock_fprog and struct sock_filter in
linux/filter.h; kernel ``reuseport_select_sock``: an index that is not there falls back to the hash.
"""

from __future__ import annotations

import array
import socket
import struct
from contextlib import suppress
from functools import cache
from typing import Final

__all__ = ["can_steer", "deafen", "share_port", "steer", "unsteer"]

#: asm-generic/socket.h; Python has no names for these.
SO_ATTACH_FILTER: Final = 26
SO_ATTACH_REUSEPORT_CBPF: Final = 51
SO_DETACH_REUSEPORT_BPF: Final = 68

#: linux/bpf_common.h: return a constant.
BPF_RET_K: Final = 0x06


def share_port(listener: socket.socket) -> None:
    """Let other sockets of this user listen on the same address; also after it has begun to listen itself.

    Sources: socket(7) SO_REUSEPORT; kernel ``inet_reuseport_add_sock`` makes the group when the second one listens.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def steer(listener: socket.socket, index: int) -> None:
    """Send every new connection of a SO_REUSEPORT group to one of its sockets, in the order in which they listened.

    Args:
        listener: Any socket of the group.

    Raises:
        OSError: The kernel refuses; nothing has changed.
    """
    _attach(listener, SO_ATTACH_REUSEPORT_CBPF, index)


def unsteer(listener: socket.socket) -> None:
    """Let the kernel choose by hash again; nothing happens where nothing is steered (ENOENT).

    Raises:
        OSError: The kernel refuses for another reason.
    """
    with suppress(FileNotFoundError):
        listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)


@cache
def can_steer() -> bool:
    """Whether this kernel supports `steer`: tried once, on a free port of the loopback interface."""
    with socket.socket() as sock:
        try:
            share_port(sock)
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            steer(sock, 0)
            unsteer(sock)
        except OSError:
            return False
    return True


def deafen(listener: socket.socket) -> None:
    """Drop new connections of a listener, so that its accept queue can be emptied completely.

    A SYN that is dropped is sent again after a second (RFC 6298, 2.1), by when another socket listens. Without this it
    would make a connection that is reset when the listener closes.

    Raises:
        OSError: The kernel refuses.
    """
    _attach(listener, SO_ATTACH_FILTER, 0)


def _attach(listener: socket.socket, option: int, value: int) -> None:
    program = array.array("B", struct.pack("=HBBI", BPF_RET_K, 0, 0, value))
    listener.setsockopt(socket.SOL_SOCKET, option, struct.pack("@HP", 1, program.buffer_info()[0]))
