"""Many connections that may wait for too long, and one timer."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["Deadlines", "Member"]

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
    """

    __slots__ = ("_empty", "_loop", "_members", "_tick_s", "_timer", "now")

    def __init__(self, shortest_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 1
        self._tick_s = min(max(shortest_s / SHARE, TICK_MIN_S), TICK_MAX_S)
        self._loop = loop
        self._members: set[M] = set()
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
        self._timer = self._loop.call_later(self._tick_s, self._on_timer) if self._members else None
