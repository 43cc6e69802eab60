"""How long connections that have sent much may work before others have their turn."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Final

__all__ = ["LONG_READ_BYTES", "TURN_S", "Turns"]

log = logging.getLogger("hotport.error")

#: Seconds of parsing, inflating and delivering for one connection in one turn of the event loop. What was read and not
#: parsed by then waits in `Turns`. It is looked at between two pieces of work, so each piece has to be short by itself.
TURN_S: Final = 0.00025

#: A read of so many bytes ends a turn, too: libuv reads up to 32 times in a row while a client fills its buffer of
#: 256,000 bytes each time (``uv__read``), unless reading is paused meanwhile.
LONG_READ_BYTES: Final = 128 * 1024


class Turns:
    """Continues connections that have more to do than fits a turn, one after the other.

    In each turn of the event loop all of them together have `TURN_S`, so a client waits as long for the answer to a
    request whether one or a hundred others send more than can be served.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, work: Callable[[], None]) -> None:
        """Call `work` once, in its turn, behind those that wait already."""
        if not self._waiting:
            self._loop.call_soon(self._take)
        self._waiting.append(work)

    def _take(self) -> None:
        ends = perf_counter() + TURN_S
        for _ in range(len(self._waiting)):  # one that waits again meanwhile comes after the others
            try:
                self._waiting[0]()
            except Exception:
                log.exception("a connection failed in its turn")  # the others have theirs all the same
            self._waiting.popleft()  # now: it may have waited again, for which there must be no second call
            if perf_counter() >= ends:
                break
        if self._waiting:
            self._loop.call_soon(self._take)
