"""A worker's part of what comes to an accept queue that several take from."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Final, Protocol

from hotport.model.balance import Deferral, is_ahead

__all__ = ["Share"]

#: How old the knowledge may be who else takes from the queue.
OTHERS_S: Final = 0.01


class Page(Protocol):
    """What is asked of `hotport.kernel.loadpage.LoadPage`."""

    @property
    def gauge(self) -> list[int] | memoryview: ...

    def join(self, group: int) -> None: ...

    def others(self) -> list[int]: ...

    def counts(self, slots: list[int]) -> Sequence[int]: ...

    def forget_dead(self, slots: list[int]) -> None: ...


class Share:
    """Whether this worker leaves its accept queue to others that have fewer connections.

    Args:
        page: Where they see each other's; the caller's.
        group: Workers with the same number take from the same queues; not 0.
    """

    def __init__(self, page: Page, group: int) -> None:
        self._page = page
        self._group = group
        self._gauge = page.gauge
        self._deferral = Deferral()
        self._others: list[int] = []
        self._look_s = 0.0

    def take_part(self, takes_part: bool) -> None:
        """Let others count on this worker, or not any more: it does not accept, or has no room."""
        self._page.join(self._group if takes_part else 0)

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
