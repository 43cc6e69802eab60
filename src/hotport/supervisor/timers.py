"""The model's timers, as tasks that sleep."""

from __future__ import annotations

from collections.abc import Callable, Container

import anyio
import anyio.abc

from hotport.model.inputs import Clock, Timer
from hotport.supervisor.contain import retried

__all__ = ["Timers"]


class Timers:
    """Starts, replaces and stops timers; calls `elapsed` with each one that comes to its end."""

    def __init__(self, tasks: anyio.abc.TaskGroup, elapsed: Callable[[Timer], None]) -> None:
        self._tasks = tasks
        self._elapsed = elapsed
        self._running: dict[Timer, tuple[anyio.CancelScope, float]] = {}  # with when it ends

    def start(self, timer: Timer, seconds: float) -> None:
        """Start a timer; one that runs under the same name is replaced."""
        self.stop(timer)
        scope = anyio.CancelScope()
        end = anyio.current_time() + seconds
        self._running[timer] = scope, end
        self._tasks.start_soon(self._run, timer, end, scope)

    def extend(self, timer: Timer, seconds: float) -> None:
        """Let a timer that runs end in `seconds` from now, unless it ends later anyway."""
        if timer in self._running and self._running[timer][1] < anyio.current_time() + seconds:
            self.start(timer, seconds)

    def stop(self, timer: Timer) -> None:
        """Forget a timer; nothing happens if it does not run."""
        if timer in self._running:
            scope, _ = self._running.pop(timer)
            scope.cancel()

    def left_s(self, timer: Timer) -> float | None:
        """Seconds until a timer ends; None if it does not run."""
        return max(0.0, self._running[timer][1] - anyio.current_time()) if timer in self._running else None

    def latest(self, ignored: Container[Clock] = ()) -> float | None:
        """When the last of those that run ends, on the event loop's clock; None if none does.

        Args:
            ignored: Kinds of timer that do not count.
        """
        return max((end for timer, (_, end) in self._running.items() if timer.clock not in ignored), default=None)

    async def _run(self, timer: Timer, end: float, scope: anyio.CancelScope) -> None:
        with scope:
            await retried("timer", anyio.sleep_until, end)
            if self._running.get(timer, (None,))[0] is scope:  # not replaced in the moment in which it ended
                del self._running[timer]
                self._elapsed(timer)
