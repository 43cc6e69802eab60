"""Keep the figures of the last ten minutes and the last bad news, for the live page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Final

import anyio
import msgspec

from hotport.model.effects import Announce
from hotport.supervisor.news import BAD
from hotport.supervisor.process import WorkerProcess
from hotport.wire.messages import Inspection, InspectOrder, Mishap, Report

__all__ = ["History", "Point"]

#: Seconds between two points, and how far back they reach.
STEP_S: Final = 2.5
SPAN_S: Final = 600.0

#: Seconds that a worker has to tell its figures; if it does not, the last ones count.
ANSWER_TIMEOUT_S: Final = 0.5

MISHAPS_MAX: Final = 20


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of all workers at one time (``time.time()``); requests, and failed ones, are per second."""

    at: float
    connections: int
    requests: float
    errors: float


class History:
    """Keeps the figures of the last `SPAN_S` seconds, and the last bad news.

    Args:
        processes: The workers, by number; owned by the fleet.
    """

    def __init__(self, processes: Mapping[int, WorkerProcess]) -> None:
        self._processes = processes
        self._seen: dict[int, tuple[int, int]] = {}
        self._at_s = time.monotonic()
        self.points: deque[Point] = deque(maxlen=round(SPAN_S / STEP_S))
        self.mishaps: deque[Mishap] = deque(maxlen=MISHAPS_MAX)

    async def keep(self) -> None:
        """Add a point every `STEP_S`, until cancelled."""
        while True:
            began = anyio.current_time()
            async with anyio.create_task_group() as tasks:  # all at once: connections move from one to another
                for process in self._processes.values():
                    tasks.start_soon(process.ask, InspectOrder(is_watched=True), Inspection, ANSWER_TIMEOUT_S)
            self.take(time.time(), time.monotonic())
            await anyio.sleep_until(began + STEP_S)

    def take(self, now: float, now_s: float) -> None:
        """Add a point: `now` on the clock on the wall, `now_s` on the monotonic one."""
        took_s = max(now_s - self._at_s, 0.001)
        self._at_s = now_s
        connections = requests = errors = 0
        seen: dict[int, tuple[int, int]] = {}
        for number, process in self._processes.items():
            if (told := process.inspection) is None:
                continue
            # What an adopted worker has served before is no news; what a new one has served at once is.
            before = self._seen.get(number, (0, 0) if process.started_at >= now_s - 2 * took_s else None)
            connections += told.connections
            seen[number] = told.requests, told.errors
            if before is not None:
                requests += max(0, told.requests - before[0])
                errors += max(0, told.errors - before[1])
        self._seen = seen
        self.points.append(
            Point(
                at=round(now, 1),
                connections=connections,
                requests=round(requests / took_s, 1),
                errors=round(errors / took_s, 2),
            )
        )

    def hear(self, news: Announce | Report) -> None:
        """Note bad news."""
        if isinstance(news, Announce) and news.news in BAD:
            self.mishaps.append(
                Mishap(
                    at=round(time.time(), 1),
                    event=news.news.value,
                    generation=news.generation,
                    worker=news.worker,
                    why=news.why,
                )
            )
