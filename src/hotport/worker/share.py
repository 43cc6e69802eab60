"""A worker's share of the connections in an accept queue that several workers take from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence, Set
from time import monotonic
from typing import Final, NamedTuple, Protocol

from hotport.kernel.process import run_delay_s
from hotport.model.balance import LOOK_S, STAY_S, Deferral, Lateness, is_ahead, plan_moves, unable
from hotport.wire.messages import worker_socket

__all__ = ["Moves", "Share"]

#: Seconds for which the list of the other workers on the queue is cached.
OTHERS_S: Final = 0.01


class Page(Protocol):
    """The interface needed of `hotport.kernel.loadpage.LoadPage`."""

    @property
    def slot(self) -> int: ...

    @property
    def gauge(self) -> list[int] | memoryview: ...

    def join(self, group: int, *, takes: bool = True) -> None: ...

    def others(self) -> list[int]: ...

    def takes(self, slot: int) -> bool: ...

    def counts(self, slots: list[int]) -> Sequence[int]: ...

    def worker(self, slot: int) -> int: ...

    def promise(self, due_s: float) -> None: ...

    def due_s(self, slot: int) -> float: ...

    def forget_dead(self, slots: list[int]) -> None: ...


class Moves(NamedTuple):
    """A plan to hand off connections.

    Attributes:
        paths: Control sockets of the workers that take them.
        most: How many connections at most, to all of these workers.
        stay_s: Connections that were adopted less than so many seconds ago stay.
    """

    paths: list[str]
    most: int
    stay_s: float


class Share:
    """Decides whether this worker leaves its accept queue to workers with fewer connections.

    Args:
        page: The page with all workers' loads; owned by the caller.
        generation: The generation whose workers share the queues; not 0.
        directory: The directory of their control sockets.
    """

    def __init__(self, page: Page, generation: int, directory: str) -> None:
        self._page = page
        self._generation = generation
        self._directory = directory
        self._gauge = page.gauge
        self._deferral = Deferral()
        self._others: list[int] = []
        self._look_s = 0.0
        self._due_s = math.inf
        self._delay_s = 0.0
        self._lateness = Lateness()
        self._is_late = self._takes_part = False

    def take_part(self, takes_part: bool, *, is_full: bool = False) -> None:
        """Show the others whether this worker takes connections from the queue.

        Args:
            is_full: It takes none at present; its own may still move to others.
        """
        if takes_part is not self._takes_part:
            self._takes_part, self._due_s = takes_part, math.inf
            self.look()
        self._page.join(self._generation if takes_part else 0, takes=not is_full)

    def look(self) -> None:
        """Show the others that this event loop runs, or was blocked; call it every `LOOK_S`."""
        now_s, delay_s = monotonic(), run_delay_s()
        is_late = self._lateness.see(now_s, now_s - self._due_s - (delay_s - self._delay_s))
        self._due_s, self._delay_s = now_s + LOOK_S, delay_s
        self._page.promise(0.0 if is_late else self._due_s)

    def _unable(self, slots: list[int], now_s: float) -> Set[int]:
        return unable({slot: self._page.due_s(slot) for slot in slots}, now_s)

    def is_ahead(self) -> bool:
        """Whether to leave the queue to others for `hotport.model.balance.DEFER_S`."""
        now_s = monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + OTHERS_S
            slots = [self._page.slot, *self._page.others()]
            late = self._unable(slots, now_s)
            self._is_late = self._page.slot in late
            self._others = [slot for slot in slots[1:] if slot not in late and self._page.takes(slot)]
        others = self._others
        if not others:
            return False
        return (self._is_late or is_ahead(self._gauge[0], self._page.counts(others))) and self._deferral.is_due()

    def deferred(self, *, was_taken: bool) -> None:
        """Note whether another worker took the connection that was left in the queue."""
        self._deferral.ended(was_taken=was_taken)
        if not was_taken:
            self._page.forget_dead(self._others)
            self._look_s = 0.0

    def plan_moves(self, *, is_asked: bool = False) -> Moves | None:
        """Plan which connections to hand off now; `is_asked` plans for shares as even as possible."""
        page = self._page
        while True:
            slots = [page.slot, *page.others()]
            late = self._unable(slots, monotonic())
            full = [slot for slot in slots if not page.takes(slot)]
            counts = dict(zip(slots, page.counts(slots), strict=True))
            moves = plan_moves(page.slot, counts, late, full=full, is_asked=is_asked)
            if not moves:
                return None
            page.forget_dead(list(moves))
            if moves.keys() <= set(page.others()):
                break  # else one was planned with that has ended: the others' shares are different
        names = [worker_socket(self._generation, page.worker(slot)) for slot in moves]
        paths = [os.path.join(self._directory, name) for name in names]
        return Moves(paths, sum(moves.values()), 0.0 if is_asked or page.slot in late else STAY_S)
