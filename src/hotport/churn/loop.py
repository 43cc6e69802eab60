"""One epoll loop with timers, for one process with very many sockets."""

from __future__ import annotations

import heapq
import select
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Loop"]

_BATCH: Final = 32
_READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_EVENTS: Final = _READABLE | select.EPOLLOUT
_LEAVE_NS: Final = 1_000_000_000


class Loop:
    """An epoll loop, edge-triggered (handlers read until EAGAIN), with timers.

    Attributes:
        seen_ns: Whatever had arrived by then has been handled. Only what was due by then may be called overdue: an
            engine that was held up must not find that its answers are missing before it has looked for them.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._numbers = 0
        self._closing: list[socket.socket] = []
        self._leaving: OrderedDict[_Leaving, int] = OrderedDict()
        self._until_ns = 0
        self.seen_ns = time.monotonic_ns()

    def watch(self, fd: int, handler: Callable[[int], None], *, can_send: bool = False) -> None:
        """Watch a socket; if it can already send, for arriving data only."""
        self._handlers[fd] = handler
        self._epoll.register(fd, _READABLE if can_send else _EVENTS)

    def watch_sending(self, fd: int) -> None:
        """Watch for room to send as well."""
        self._epoll.modify(fd, _EVENTS)

    def rewatch(self, fd: int, handler: Callable[[int], None]) -> None:
        """Change the callback of a socket."""
        self._handlers[fd] = handler

    def close(self, sock: socket.socket) -> None:
        """Close a socket that is watched; its number is not used again before the events at hand are handled."""
        self._handlers.pop(sock.fileno(), None)
        self._closing.append(sock)

    def leave(self, sock: socket.socket) -> None:
        """Close a socket when the other side has, which then bears TIME_WAIT; or after a second."""
        if _has_ended(sock):
            self.close(sock)
            return
        leaving = _Leaving(self, sock)
        self._leaving[leaving] = self.seen_ns + _LEAVE_NS
        self._handlers[sock.fileno()] = leaving.on_event

    def left(self, leaving: _Leaving) -> None:
        """Close a socket whose other side has closed."""
        del self._leaving[leaving]
        self.close(leaving.sock)

    def call_at(self, when_ns: int, call: Callable[[Any], None], argument: Any) -> None:
        """Schedule a call at a time of CLOCK_MONOTONIC; the callee checks whether it is still needed."""
        self._numbers += 1
        heapq.heappush(self._timers, (when_ns, self._numbers, call, argument))

    def has_timer_by(self, when_ns: int) -> bool:
        """Whether a timer is due by then."""
        return bool(self._timers) and self._timers[0][0] <= when_ns

    def run(self, until_ns: int) -> None:
        """Run until then, or until `interrupt`."""
        self._until_ns = until_ns
        while self.turn(self._until_ns) < self._until_ns:
            pass

    def interrupt(self) -> None:
        """Let `run` return after the current turn."""
        self._until_ns = 0

    def turn(self, until_ns: int) -> int:
        """Run one turn; wait until then at most if nothing is ready.

        Returns:
            When it has looked.
        """
        now = time.monotonic_ns()
        due = self._timers[0][0] if self._timers else until_ns
        wait_ns = min(due, until_ns) - now
        if wait_ns > 0:
            events = self._epoll.poll(0, _BATCH)
            if not events:
                # epoll waits for whole milliseconds, select for microseconds.
                select.select([self._epoll], [], [], wait_ns / 1e9)
                now = time.monotonic_ns()
                events = self._epoll.poll(0, _BATCH)
        else:
            events = self._epoll.poll(0, _BATCH)
        handlers = self._handlers
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is not None:
                handler(mask)
        if len(events) < _BATCH:
            self.seen_ns = now
        self._call_timers()
        if self._leaving:
            self._leave_overdue(now)
        if self._closing:
            self._close()
        return now

    def end(self) -> None:
        """Close the remaining sockets, and the epoll instance."""
        for leaving in list(self._leaving):
            self.left(leaving)
        self._close()
        self._epoll.close()

    def _leave_overdue(self, now: int) -> None:
        while self._leaving:
            leaving, deadline = next(iter(self._leaving.items()))
            if deadline > now:
                break
            self.left(leaving)

    def _close(self) -> None:
        for sock in self._closing:
            sock.close()
        self._closing.clear()

    def _call_timers(self) -> None:
        timers = self._timers
        now = time.monotonic_ns()
        for _ in range(_BATCH):
            if not timers or timers[0][0] > now:
                break
            _, _, call, argument = heapq.heappop(timers)
            call(argument)


class _Leaving:
    """A finished connection that waits for the other side to close first."""

    __slots__ = ("_loop", "sock")

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop = loop
        self.sock = sock

    def on_event(self, _: int) -> None:
        if _has_ended(self.sock):
            self._loop.left(self)


def _has_ended(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        pass
    return True
