"""The lag of a worker's event loop, as its answers tell it."""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["WINDOW_S", "Lags"]

#: Seconds for which an answer is remembered.
WINDOW_S: Final = 60.0

#: Answers that are remembered at most.
ANSWERS_MAX: Final = 512


class Lags:
    """Remembers the longest blockings: of those in the window, each that no later one has exceeded."""

    def __init__(self) -> None:
        self._answers: deque[tuple[float, float]] = deque(maxlen=ANSWERS_MAX)

    def note(self, now_s: float, lag_s: float) -> None:
        """Remember an answer that has come now."""
        while self._answers and (self._answers[-1][1] <= lag_s):
            self._answers.pop()
        self._answers.append((now_s, lag_s))
        while self._answers[0][0] < now_s - WINDOW_S:
            self._answers.popleft()

    def worst_s(self, since_s: float) -> float | None:
        """The longest blocking in answers that came since then; None if none came."""
        return next((lag_s for at_s, lag_s in self._answers if at_s >= since_s), None)
