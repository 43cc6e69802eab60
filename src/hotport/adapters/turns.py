"""Limit the work for busy connections in one turn of the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Final

__all__ = ["LONG_READ_BYTES", "TURN_S", "Turns"]

log = logging.getLogger("hotport.error")

#: Seconds of parsing, inflating and delivering for one connection in one turn of the event loop. Bytes not parsed by
#: then wait for `Turns`. The limit is checked between two pieces of work, so each piece must be short.
TURN_S: Final = 0.00015

#: A read of so many bytes also ends a turn: unless reading is paused, libuv reads up to 32 times in a row while a
#: client fills its buffer of 256,000 bytes each time (``uv__read``).
LONG_READ_BYTES: Final = 128 * 1024


class Turns:
    """Continues, one after the other, connections whose work does not fit a turn.

    All of them share `TURN_S` in each turn of the event loop, so a request's latency does not depend on how many other
    clients send more than can be served.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], object]] = deque()

    def wait(self, work: Callable[[], object]) -> None:
        """Queue `work` to be called once; if it returns True, it has used up the turn of the event loop."""
        if not self._waiting:
            self._loop.call_soon(self._take)
        self._waiting.append(work)

    async def turn(self) -> None:
        """Let others have their turn; then one application that waits here continues in each turn of the event loop."""
        future = self._loop.create_future()
        self.wait(partial(_release, future))
        await future

    def _take(self) -> None:
        ends = perf_counter() + TURN_S
        for _ in range(len(self._waiting)):  # work that is queued meanwhile comes after the others
            is_used_up: object = False
            try:
                is_used_up = self._waiting[0]()
            except Exception:
                log.exception("a connection failed in its turn")  # the others still get their turn
            self._waiting.popleft()  # only now: while the queue is not empty, `wait` schedules no second `_take`
            if is_used_up is True or perf_counter() >= ends:
                break
        if self._waiting:
            self._loop.call_soon(self._take)


def _release(future: asyncio.Future[None]) -> bool:
    if future.done():  # cancelled
        return False
    future.set_result(None)
    return True
