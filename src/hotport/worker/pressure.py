"""A worker whose memory is short takes no new connections, and ends those that hold most, before the kernel ends it.

There is nothing to await that says how much memory a process has, so it is looked at now and then.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from typing import Final

from hotport.adapters.base import Connections
from hotport.kernel.process import rss_bytes, trim_memory
from hotport.observe.logs import get_shared_logger

__all__ = ["Pressure"]

#: Seconds between two looks.
LOOK_S: Final = 0.25

#: Connections are accepted again below this share of the limit.
RELIEVED: Final = 0.9


class Pressure:
    """Looks at the resident memory of this process until `close`.

    Args:
        limit_bytes: Above it memory is short.
        used: How much is used; asked at each look.
    """

    def __init__(
        self, connections: Connections, limit_bytes: int, used: Callable[[], int] = lambda: rss_bytes(os.getpid())
    ) -> None:
        self._connections = connections
        self._limit_bytes = limit_bytes
        self._used = used
        self._is_pressed = False
        self._may_be_garbage = True  # it takes too long to look for some at each look
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(LOOK_S, self._on_timer)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _on_timer(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._on_timer)
        self.look()

    def look(self) -> None:
        """Act on how much memory is used now."""
        used = self._used()
        if used > self._limit_bytes and self._may_be_garbage:
            gc.collect()
            trim_memory()
            used = self._used()
            self._may_be_garbage = False
        if used > self._limit_bytes:
            self._press(used)
        elif self._is_pressed and used < self._limit_bytes * RELIEVED:
            self._is_pressed, self._may_be_garbage = False, True
            get_shared_logger("hotport.worker").info("memory.relieved", used_mib=used >> 20)
            self._connections.press(False)

    def _press(self, used: int) -> None:
        was_pressed, self._is_pressed = self._is_pressed, True
        self._connections.press(True)
        count, freed_bytes = self._connections.shed(used - self._limit_bytes)
        self._may_be_garbage = count > 0
        if count or not was_pressed:
            get_shared_logger("hotport.worker").warning(
                "memory.short",
                used_mib=used >> 20,
                limit_mib=self._limit_bytes >> 20,
                connections_cut=count,
                held_mib=freed_bytes >> 20,
            )
