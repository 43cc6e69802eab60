"""A worker's part of what comes to an accept queue that several take from."""

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

#: How old the knowledge may be who else takes from the queue.
OTHERS_S: Final = 0.01


class Page(Protocol):
    """What is asked of `hotport.kernel.loadpage.LoadPage`."""

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
    """Connections to hand over.

    Attributes:
        paths: Control sockets of those who take them.
        most: How many, to all of them.
        stay_s: Those that came from another worker more recently than that stay.
    """

    paths: list[str]
    most: int
    stay_s: float


class Share:
    """Whether this worker leaves its accept queue to others that have fewer connections.

    Args:
        page: Where they see each other's; the caller's.
        generation: Not 0. Its workers take from the same queues.
        directory: Where they have their control sockets.
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
        """Let others count on this worker, or not any more: it does not accept.

        Args:
            is_full: It takes none at present; those that it has may still move to others.
        """
        if takes_part is not self._takes_part:
            self._takes_part, self._due_s = takes_part, math.inf
            self.look()
        self._page.join(self._generation if takes_part else 0, takes=not is_full)

    def look(self) -> None:
        """Show that the event loop runs, each `LOOK_S`, or that it is held up."""
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
        """Learn from what came of having left the queue to others."""
        self._deferral.ended(was_taken=was_taken)
        if not was_taken:
            self._page.forget_dead(self._others)
            self._look_s = 0.0

    def plan_moves(self, *, is_asked: bool = False) -> Moves | None:
        """What to hand over now; `is_asked`: for shares that are as even as can be."""
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
