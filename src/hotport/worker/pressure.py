"""Stop accepting and cut the largest connections when memory is short, before the kernel kills the worker.

Linux has no event for a process's memory use, so it is polled.
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

#: Seconds between two checks.
LOOK_S: Final = 0.25

#: Connections are accepted again below this share of the limit.
RELIEVED: Final = 0.9


class Pressure:
    """Checks the resident memory of this process until `close`.

    Args:
        limit_bytes: The limit above which memory is short.
        used: Returns the bytes in use; called at each check.
    """

    def __init__(
        self, connections: Connections, limit_bytes: int, used: Callable[[], int] = lambda: rss_bytes(os.getpid())
    ) -> None:
        self._connections = connections
        self._limit_bytes = limit_bytes
        self._used = used
        self._is_pressed = False
        self._may_be_garbage = True  # collecting at each check would take too long
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(LOOK_S, self._on_timer)

    def close(self) -> None:
        """Stop checking."""
        self._timer.cancel()

    def _on_timer(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._on_timer)
        self.look()

    def look(self) -> None:
        """Check the memory in use, and act on it."""
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
