"""Connections that stand still: clients that leave while nothing is read from them, and clients that take nothing.

An event loop does not look at a connection that it neither reads from nor has something to write to: its client's end
and even its reset stay unseen (asyncio and libuv take the descriptor out of their epoll set, or ask it for nothing).
So these few are looked at by a timer, all of them with one system call. A connection that is read from costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

from hotport.kernel.sockets import ended_by_peer, unsent_bytes

__all__ = ["LOOK_S", "Member", "Stalls"]

log = logging.getLogger("hotport.error")

#: Seconds between two looks.
LOOK_S: Final = 0.5


class Member(Protocol):
    """A connection that may stand still."""

    transport: asyncio.Transport
    #: None if it is not known, or if there is none; the transport owns it.
    sock: socket.socket | None

    def client_gone(self) -> None:
        """Nothing is read from it, and its client has ended its side; called at each look while that is so."""

    def client_stuck(self) -> None:
        """Its client has taken nothing of what was sent for the whole timeout; called once."""


class Stalls:
    """Looks at all connections of one adapter that stand still.

    Args:
        send_timeout_s: Seconds in which a client must take something of what is sent; 0: any.
    """

    __slots__ = ("_loop", "_send_timeout_s", "_timer", "_unread", "_unsent")

    def __init__(self, loop: asyncio.AbstractEventLoop, send_timeout_s: float) -> None:
        self._loop = loop
        self._send_timeout_s = send_timeout_s
        self._unread: set[Member] = set()
        #: With the least that was unsent, in bytes, and since when.
        self._unsent: dict[Member, tuple[int, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def pauses_reading(self, member: Member) -> None:
        """Nothing is read from it from now on."""
        self._unread.add(member)
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def resumes_reading(self, member: Member) -> None:
        """It is read from again."""
        self._unread.discard(member)

    def pauses_writing(self, member: Member) -> None:
        """More was written than its client takes."""
        if self._send_timeout_s:
            self._unsent[member] = (_unsent(member), self._loop.time())
            if self._timer is None:
                self._timer = self._loop.call_later(LOOK_S, self._look)

    def resumes_writing(self, member: Member) -> None:
        """Its client has taken enough."""
        self._unsent.pop(member, None)

    def forget(self, member: Any) -> None:
        """It has ended, or goes on as another object."""
        self._unread.discard(member)
        self._unsent.pop(member, None)

    def cancel(self) -> None:
        """Look at nothing any more."""
        self._unread.clear()
        self._unsent.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        for call in (*self._gone(), *self._stuck()):
            try:
                call()
            except Exception:
                log.exception("a look at a connection that stands still failed")  # the others are looked at
        is_over = not self._unread and not self._unsent
        self._timer = None if is_over else self._loop.call_later(LOOK_S, self._look)

    def _gone(self) -> list[Callable[[], None]]:
        paused = {m.sock.fileno(): m for m in self._unread if m.sock is not None}
        paused.pop(-1, None)  # closed
        return [paused[fd].client_gone for fd in ended_by_peer(paused)] if paused else []

    def _stuck(self) -> list[Callable[[], None]]:
        now = self._loop.time()
        stuck = []
        for member, (least, since) in list(self._unsent.items()):
            unsent = _unsent(member)
            if unsent < least:
                self._unsent[member] = (unsent, now)
            elif now - since >= self._send_timeout_s:
                del self._unsent[member]
                stuck.append(member.client_stuck)
        return stuck


def _unsent(member: Member) -> int:
    """Bytes that its client has not acknowledged."""
    in_kernel = 0 if member.sock is None else unsent_bytes(member.sock)
    return member.transport.get_write_buffer_size() + in_kernel
