"""Many connections that may wait for too long, and one timer."""

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

#: So much of the shortest wait passes between two looks; a deadline may be that late, and is never early.
SHARE: Final = 4

TICK_MIN_S: Final = 0.005
TICK_MAX_S: Final = 1.0


class Member(Protocol):
    """Something that waits."""

    #: The tick at which its waiting ends; 0 if it waits for nothing.
    due: int

    def abort(self) -> None:
        """End it now; nobody will wait for it any more."""

    def expire(self) -> None:
        """It has waited long enough. `due` is 0 again."""


class Paused(Protocol):
    """A connection that is not read from, so that the event loop does not see how it ends."""

    sock: socket.socket | None

    def hung_up(self, *, is_gone: bool) -> None:
        """The client sends no more, or it `is_gone`: it has reset the connection. Called at each tick."""


M = TypeVar("M", bound=Member)


class Deadlines(Generic[M]):
    """Looks at every member once a tick.

    What a connection waits for changes twice with every request, and hardly ever is it waited for too long. So what
    happens often costs one assignment, ``member.due = deadlines.now + TICKS``, and the timer does the work: a look
    at 10,000 idle members takes half a millisecond.

    Args:
        shortest_s: The shortest wait, in seconds, that will be asked for; it sets the length of a tick.

    Attributes:
        now: Ticks since the beginning; 1 at first.
        paused: Members that are not read from now: once a tick the kernel is asked whether their clients have left,
            with one poll(2) for all of them. A pause that is over before the next tick costs nothing.
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
        """How many ticks from `now` are at least so many seconds."""
        return math.ceil(seconds / self._tick_s) + 1

    def left_s(self, member: M) -> float:
        """About how many seconds `member` may still wait, more than 0; 0 if it waits for nothing."""
        return max(1, member.due - self.now) * self._tick_s if member.due else 0.0

    def add(self, member: M) -> None:
        """Look at `member` from now on."""
        self._members.add(member)
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick_s, self._on_timer)

    def discard(self, member: M) -> None:
        """Look at `member` no more."""
        self._members.discard(member)
        if self._empty is not None and not self._members:
            self._empty.set()
            self._empty = None

    async def wait_empty(self) -> None:
        """Return when there are no members."""
        while self._members:
            if self._empty is None:
                self._empty = asyncio.Event()
            await self._empty.wait()

    def cancel(self) -> list[M]:
        """Let nothing expire any more, and return what was looked at."""
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
                log.exception("a deadline failed")  # the others have theirs all the same
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
    """A member of `Deadlines` that sees to it that something moves on: so many bytes within each period.

    It looks `SHARE` times a period, so it acts after a period without progress, or a quarter later. Of what goes on by
    itself within a tick it never hears.

    Args:
        period_s: Seconds in which `bytes_min` bytes have to move.
        moved_bytes: How many have moved since some beginning; None while nothing has to, which ends the watch.
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
        """Begin a period, whether or not one was under way."""
        self._seen = None
        self.due = self._deadlines.now + 1

    def stop(self) -> None:
        """End the watch until the next `start`."""
        self.due = 0

    def discard(self) -> None:
        """End it for good: what it belongs to has ended."""
        self._deadlines.discard(self)

    def abort(self) -> None:
        """It has nothing to end: what it belongs to is a member itself."""

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
