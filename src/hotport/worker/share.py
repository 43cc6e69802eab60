"""A worker's part of what comes to an accept queue that several take from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import monotonic
from typing import Final, Protocol

from hotport.model.balance import Deferral, is_ahead, plan_moves
from hotport.wire.messages import worker_socket

__all__ = ["Share"]

#: How old the knowledge may be who else takes from the queue.
OTHERS_S: Final = 0.01


class Page(Protocol):
    """What is asked of `hotport.kernel.loadpage.LoadPage`."""

    @property
    def slot(self) -> int: ...

    @property
    def gauge(self) -> list[int] | memoryview: ...

    def join(self, group: int) -> None: ...

    def others(self) -> list[int]: ...

    def counts(self, slots: list[int]) -> Sequence[int]: ...

    def worker(self, slot: int) -> int: ...

    def forget_dead(self, slots: list[int]) -> None: ...


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

    def take_part(self, takes_part: bool) -> None:
        """Let others count on this worker, or not any more: it does not accept, or has no room."""
        self._page.join(self._generation if takes_part else 0)

    def is_ahead(self) -> bool:
        """Whether to leave the queue to others for `hotport.model.balance.DEFER_S`."""
        now_s = monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + OTHERS_S
            self._others = self._page.others()
        others = self._others
        return bool(others) and is_ahead(self._gauge[0], self._page.counts(others)) and self._deferral.is_due()

    def deferred(self, *, was_taken: bool) -> None:
        """Learn from what came of having left the queue to others."""
        self._deferral.ended(was_taken=was_taken)
        if not was_taken:
            self._page.forget_dead(self._others)
            self._look_s = 0.0

    def plan_moves(self) -> tuple[list[str], int]:
        """The control sockets of workers with clearly fewer connections, and how many to hand to them in all."""
        page = self._page
        others = page.others()
        moves = plan_moves(page.slot, dict(zip((page.slot, *others), page.counts([page.slot, *others]), strict=True)))
        if not moves:
            return [], 0
        page.forget_dead(list(moves))
        alive = moves.keys() & page.others()
        names = [worker_socket(self._generation, page.worker(slot)) for slot in alive]
        return [os.path.join(self._directory, name) for name in names], sum(moves[slot] for slot in alive)
