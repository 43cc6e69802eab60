"""The model's timers, each a sleeping task."""

from __future__ import annotations

from collections.abc import Callable, Container

import anyio
import anyio.abc

from hotport.model.inputs import Clock, Timer
from hotport.supervisor.contain import retried

__all__ = ["Timers"]


class Timers:
    """Starts, replaces and stops timers; calls `elapsed` with each that ends."""

    def __init__(self, tasks: anyio.abc.TaskGroup, elapsed: Callable[[Timer], None]) -> None:
        self._tasks = tasks
        self._elapsed = elapsed
        self._running: dict[Timer, tuple[anyio.CancelScope, float]] = {}  # with its end

    def start(self, timer: Timer, seconds: float) -> None:
        """Start a timer; replace the same timer if it runs."""
        self.stop(timer)
        scope = anyio.CancelScope()
        end = anyio.current_time() + seconds
        self._running[timer] = scope, end
        self._tasks.start_soon(self._run, timer, end, scope)

    def extend(self, timer: Timer, seconds: float) -> None:
        """Extend a running timer to `seconds` from now, unless it ends later anyway."""
        if timer in self._running and self._running[timer][1] < anyio.current_time() + seconds:
            self.start(timer, seconds)

    def stop(self, timer: Timer) -> None:
        """Stop a timer if it runs."""
        if timer in self._running:
            scope, _ = self._running.pop(timer)
            scope.cancel()

    def left_s(self, timer: Timer) -> float | None:
        """Seconds until a timer ends; None if it does not run."""
        return max(0.0, self._running[timer][1] - anyio.current_time()) if timer in self._running else None

    def latest(self, ignored: Container[Clock] = ()) -> float | None:
        """The latest end of a running timer, on the event loop's clock; None if none runs.

        Args:
            ignored: Kinds of timers to ignore.
        """
        return max((end for timer, (_, end) in self._running.items() if timer.clock not in ignored), default=None)

    async def _run(self, timer: Timer, end: float, scope: anyio.CancelScope) -> None:
        with scope:
            await retried("timer", anyio.sleep_until, end)
            if self._running.get(timer, (None,))[0] is scope:  # not replaced at the moment of its end
                del self._running[timer]
                self._elapsed(timer)
