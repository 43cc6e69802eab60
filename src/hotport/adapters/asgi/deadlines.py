"""Deadlines of many connections, on one timer."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from hotport.kernel.sockets import ended_by_peer

__all__ = ["Deadlines", "Member", "Pace", "Paused"]

log = logging.getLogger("hotport.error")

#: Ticks in the shortest wait; a deadline may be one tick late, and is never early.
SHARE: Final = 4

TICK_MIN_S: Final = 0.005
TICK_MAX_S: Final = 1.0


class Member(Protocol):
    """An object with a deadline."""

    #: The tick at which it expires; 0 if it waits for nothing.
    due: int

    def abort(self) -> None:
        """End it now, without waiting."""

    def expire(self) -> None:
        """Handle the end of the wait; `due` is 0 again."""


class Paused(Protocol):
    """A connection whose reading is paused, so that the event loop does not see its end."""

    sock: socket.socket | None

    def hung_up(self, *, is_gone: bool) -> None:
        """Handle, at each tick, that the client has ended its sending side, or reset the connection (`is_gone`)."""


M = TypeVar("M", bound=Member)


class Deadlines(Generic[M]):
    """Checks every member once a tick.

    A connection's wait changes twice with every request, and hardly ever expires. So a change costs one assignment,
    ``member.due = deadlines.now + TICKS``, and the timer does the work: checking 10,000 idle members takes half a
    millisecond.

    Args:
        shortest_s: The shortest wait that members use, in seconds; it sets the length of a tick.

    Attributes:
        now: The current tick; 1 at first.
        paused: Members whose reading is paused: once a tick, one poll(2) for all of them asks the kernel whether their
            clients have left. A pause that ends before the next tick costs nothing.
    """

    __slots__ = ("_empty", "_loop", "_members", "_tick_s", "_timer", "now", "paused")

    def __init__(self, shortest_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 1
        self._tick_s = min(max(shortest_s / SHARE, TICK_MIN_S), TICK_MAX_S)
        self._loop = loop
        self._members: set[M] = set()
        self.paused: set[Paused] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None

    def ticks(self, seconds: float) -> int:
        """Convert seconds to ticks from `now`, rounded up."""
        return math.ceil(seconds / self._tick_s) + 1

    def left_s(self, member: M) -> float:
        """About how many seconds, more than 0, `member` may still wait; 0 if it waits for nothing."""
        return max(1, member.due - self.now) * self._tick_s if member.due else 0.0

    def add(self, member: M) -> None:
        """Check `member` from now on."""
        self._members.add(member)
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick_s, self._on_timer)

    def discard(self, member: M) -> None:
        """Stop checking `member`."""
        self._members.discard(member)
        if self._empty is not None and not self._members:
            self._empty.set()
            self._empty = None

    async def wait_empty(self) -> None:
        """Wait until there are no members."""
        while self._members:
            if self._empty is None:
                self._empty = asyncio.Event()
            await self._empty.wait()

    def cancel(self) -> list[M]:
        """Stop the timer, and remove and return all members."""
        left = list(self._members)
        self._members.clear()
        self.paused.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return left

    def _on_timer(self) -> None:
        self.now = now = self.now + 1
        for member in [member for member in self._members if 0 < member.due <= now]:
            member.due = 0
            try:
                member.expire()
            except Exception:
                log.exception("a deadline failed")  # the other members are still checked
        if self.paused:
            self._see_hangups()
        self._timer = self._loop.call_later(self._tick_s, self._on_timer) if self._members else None

    def _see_hangups(self) -> None:
        members = {member.sock.fileno(): member for member in self.paused if member.sock is not None}
        members.pop(-1, None)  # closed
        for fd, is_gone in ended_by_peer(members).items():
            try:
                members[fd].hung_up(is_gone=is_gone)
            except Exception:
                log.exception("the end of a connection was not dealt with")


class Pace:
    """A member of `Deadlines` that enforces a minimum rate: so many bytes within each period.

    It checks `SHARE` times a period, so it acts after a period without progress, or a quarter later.

    Args:
        period_s: Seconds in which `bytes_min` bytes have to move.
        moved_bytes: Returns how many bytes have moved, from an arbitrary origin; None ends the watch.
        on_slow: Called when fewer have moved; the watch has ended.
    """

    __slots__ = ("_bytes_min", "_deadlines", "_moved_bytes", "_on_slow", "_seen", "_since", "_ticks", "due")

    def __init__(
        self,
        deadlines: Deadlines[Member],
        period_s: float,
        bytes_min: float,
        moved_bytes: Callable[[], int | None],
        on_slow: Callable[[], None],
    ) -> None:
        self.due = 0
        self._deadlines = deadlines
        self._ticks = deadlines.ticks(period_s)
        self._bytes_min = max(1, bytes_min)
        self._moved_bytes = moved_bytes
        self._on_slow = on_slow
        self._seen: int | None = None
        self._since = 0
        deadlines.add(self)

    def start(self) -> None:
        """Begin a new period."""
        self._seen = None
        self.due = self._deadlines.now + 1

    def stop(self) -> None:
        """End the watch until the next `start`."""
        self.due = 0

    def discard(self) -> None:
        """End the watch for good: its connection has ended."""
        self._deadlines.discard(self)

    def abort(self) -> None:
        """Do nothing: its connection is a member itself."""

    def expire(self) -> None:
        moved, now = self._moved_bytes(), self._deadlines.now
        if moved is None:
            return
        if self._seen is None or moved - self._seen >= self._bytes_min:
            self._seen, self._since = moved, now
        elif now - self._since >= self._ticks:
            self._on_slow()
            return
        self.due = now + max(1, self._ticks // SHARE)
