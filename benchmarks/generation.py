"""One generation of a server whose port is handed on: it takes the port, serves it, and passes it on.

A process of its own that imports what a server on uvloop imports, and next to nothing else: the time in which it
starts is what *rebind cold* is about. It listens at a door, a Unix socket, where its successor knocks. When the
successor has said that it is ready, the generation stops, prints the moments that matter, and ends.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Final

__all__ = ["OPTIONS", "bound", "rebound"]

BACKLOG: Final = 4096

#: asm-generic/socket.h; Python has no name for it.
SO_ATTACH_REUSEPORT_CBPF: Final = 51

#: linux/filter.h: ``BPF_RET | BPF_K``, return a constant: the index of a socket in its group. The newcomer is second.
TO_SECOND: Final = struct.pack("=HBBI", 0x06, 0, 0, 1)

#: The socket option by the first word of a way.
OPTIONS: Final = {
    "inherit": socket.SO_REUSEADDR,
    "overlap": socket.SO_REUSEPORT,
    "rebind": socket.SO_REUSEADDR,
    "plain": 0,
}


def bound(port: int, option: int) -> socket.socket:
    """A listener on every IPv4 address, with this option (or none)."""
    listener = socket.socket()
    if option:
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(BACKLOG)
    return listener


def rebound(listener: socket.socket, port: int, option: int) -> socket.socket:
    """The floor: what the kernel needs to close a port and to listen on it again, in one process without clients."""
    listener.close()
    return bound(port, option)


def steer(listener: socket.socket) -> None:
    """Let every new connection of a SO_REUSEPORT group come to its second socket.

    Sources: socket(7) SO_ATTACH_REUSEPORT_CBPF; the argument is a struct sock_fprog.
    """
    program = array.array("B", TO_SECOND)
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 1, program.buffer_info()[0]))


class Generation:
    """Serves until its successor is ready."""

    def __init__(self, way: str, port: int, directory: str, number: int, fd: int | None) -> None:
        self.is_drained = "drained" in way or "steered" in way
        self.is_inherited = way == "inherit"
        self.link: socket.socket | None = None  # to the predecessor, if that lives
        self.listening: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.listener = self._take(way, port, f"{directory}/{number - 1}") if fd is None else socket.socket(fileno=fd)
        self.listener.setblocking(False)
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(f"{directory}/{number}")
        self.door.listen()

    def run(self) -> dict[str, float | None]:
        """Serve, and pass the port on; when that was."""
        self._serve_until(self.door)
        link, _ = self.door.accept()
        if self.is_inherited:
            socket.send_fds(link, [b"l"], [self.listener.fileno()])
        self._serve_until(link)
        link.recv(1)  # it is ready
        if self.is_drained:
            self._accept()
        closed = time.monotonic()
        self.listener.close()
        link.send(b"c")
        link.recv(1)  # the successor has accepted: to end before would take the processor from it
        return {"listening": self.listening, "first": self.first, "last": self.last, "closed": closed}

    def _take(self, way: str, port: int, door: str) -> socket.socket:
        option = OPTIONS[way.split()[0]]
        if way == "rebind cold":
            listener = bound(port, option)
            self.listening = time.monotonic()
            return listener
        self.link = socket.socket(socket.AF_UNIX)
        self.link.connect(door)
        if self.is_inherited:
            listener = socket.socket(fileno=socket.recv_fds(self.link, 1, 1)[1][0])
        elif option == socket.SO_REUSEPORT:
            listener = bound(port, option)
            if "steered" in way:
                steer(listener)
        self.link.send(b"r")
        if option != socket.SO_REUSEPORT and not self.is_inherited:
            self.link.recv(1)
            listener = bound(port, option)
            self.listening = time.monotonic()
        return listener

    def _serve_until(self, other: socket.socket) -> None:
        """Accept until there is something to read elsewhere, but at least once in a lifetime."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(other, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self.listener.fileno() in ready:
                self._accept()
            if other.fileno() in ready and self.first is not None:
                return

    def _accept(self) -> None:
        """Answer everybody in the queue."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            self.last = time.monotonic()
            if self.first is None:
                self.first = self.last
                if self.link is not None:
                    self.link.send(b"a")
            with sock, suppress(ConnectionError):
                sock.send(b"1")


if __name__ == "__main__":
    import asyncio  # noqa: F401

    import uvloop  # noqa: F401

    print(json.dumps(Generation(**json.loads(sys.argv[1])).run()), flush=True)
    os._exit(0)
