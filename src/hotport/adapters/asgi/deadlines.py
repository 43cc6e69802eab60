"""Many things that wait equally long, with one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Members expire `delay_s` seconds after they were added.

    They are kept in the order in which they came, which is the order in which they expire: a member costs two
    dict operations, and there is a timer only while there are members.
    """

    __slots__ = ("_delay_s", "_empty", "_expire", "_loop", "_members", "_timer")

    def __init__(self, delay_s: float, expire: Callable[[T], None], loop: asyncio.AbstractEventLoop) -> None:
        self._delay_s = delay_s
        self._expire = expire
        self._loop = loop
        self._members: dict[T, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: T) -> bool:
        return member in self._members

    def add(self, member: T) -> None:
        """Expire `member` in `delay_s` seconds; it must not be waiting yet."""
        self._members[member] = self._loop.time() + self._delay_s
        if self._timer is None:
            self._timer = self._loop.call_later(self._delay_s, self._on_timer)

    def discard(self, member: T) -> None:
        """Do not expire `member`, if it was going to."""
        self._members.pop(member, None)
        if self._empty is not None and not self._members:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Return when nothing waits here any more."""
        while self._members:
            self._empty = asyncio.Event()
            await self._empty.wait()

    def cancel(self) -> None:
        """Expire nothing more."""
        self._members.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        due = []
        for member, deadline in self._members.items():
            if deadline > now:
                self._timer = self._loop.call_at(deadline, self._on_timer)
                break
            due.append(member)
        for member in due:
            self.discard(member)
            self._expire(member)
