"""Measure how long an event loop is blocked, while its lag is being read."""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["LagMeter"]

#: Seconds between two looks, by which a blocking is seen shorter at most: a tenth of the time between two readings.
TICK_S: Final = 0.05
TICK_MAX_S: Final = 0.1
TICKS: Final = 10

#: Seconds after the last reading at which measuring stops, so that an idle worker can sleep.
READ_AGAIN_S: Final = 5.0


class LagMeter:
    """Measures how late a repeated timer of the event loop fires."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worst_s = 0.0
        self._due = self._until = self._read_at = 0.0
        self._tick_s = TICK_S
        self._timer: asyncio.TimerHandle | None = None

    def read(self) -> float:
        """Return the longest time, in seconds, that the loop was blocked since the last reading; 0 at the first."""
        now = self._loop.time()
        self._until = now + READ_AGAIN_S
        self._tick_s = min(TICK_MAX_S, max(TICK_S, (now - self._read_at) / TICKS))
        self._read_at = now
        if self._timer is None:
            self._wait(now)
        worst_s, self._worst_s = max(self._worst_s, now - self._due), 0.0
        return max(0.0, worst_s)

    def close(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, now: float) -> None:
        self._due = now + self._tick_s
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        self._worst_s = max(self._worst_s, now - self._due)
        if self._due < self._until:  # not `now`: nothing is read while the loop is blocked
            self._wait(now)
        else:
            self._timer, self._worst_s = None, 0.0
