"""How workers share what comes to their accept queue: decisions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["Deferral", "is_ahead", "plan_moves"]

#: A worker is ahead if it has more connections than the mean by this ratio and this number. The number lets small
#: counts differ: leaving the queue to others costs a wake-up and, at worst, a deferral.
AHEAD_RATIO: Final = 0.03
AHEAD_MIN: Final = 1

#: The longest that a connection waits in the accept queue for a worker that has fewer.
DEFER_S: Final = 0.001

#: How many connections a worker takes at most before it leaves the queue to others again that have not taken from it.
INSIST_MAX: Final = 16


#: Connections that are open move from a worker that has more than the mean by this ratio and this number: what comes
#: evens out smaller differences.
DRIFT_RATIO: Final = 0.05
DRIFT_MIN: Final = 8

#: How often a worker looks, and how many connections it moves then at most.
BALANCE_S: Final = 1.0
MOVES_MAX: Final = 500

#: A connection that came from another worker stays for so long.
STAY_S: Final = 10.0


def is_ahead(mine: int, others: Sequence[int]) -> bool:
    """Whether a worker has clearly more connections than those that take from the same accept queue, on average."""
    if not others:
        return False
    mean = (mine + sum(others)) / (1 + len(others))
    return mine > mean * (1 + AHEAD_RATIO) + AHEAD_MIN


def plan_moves(mine: int, counts: Mapping[int, int]) -> dict[int, int]:
    """How many connections a worker hands to which others; empty if it keeps those that it has.

    Each decides for itself: the one with the most hands to the one with the fewest, the second to where room is left,
    and so on. From the same counts all of them plan the same moves.

    Args:
        mine: The worker's own key in `counts`.
    """
    mean = sum(counts.values()) / len(counts)
    if counts[mine] <= mean * (1 + DRIFT_RATIO) + DRIFT_MIN:
        return {}
    givers = sorted(((int(count - mean), key) for key, count in counts.items() if count > mean), reverse=True)
    takers = sorted(((int(mean - count), key) for key, count in counts.items() if count < mean), reverse=True)
    skipped = sum(surplus for surplus, _ in givers[: [key for _, key in givers].index(mine)])
    left = min(int(counts[mine] - mean), MOVES_MAX)
    moves: dict[int, int] = {}
    for room, key in takers:
        given = min(left, max(0, room - skipped))
        skipped = max(0, skipped - room)
        if given:
            moves[key] = given
            left -= given
    return moves


class Deferral:
    """How often a worker that is ahead leaves the accept queue to others that may not take from it.

    They may hang, or be without a processor. So each time in a row that they have left a connection, this worker takes
    twice as many before it defers again: 1, 2, 4, up to `INSIST_MAX`.
    """

    __slots__ = ("_left", "_next")

    def __init__(self) -> None:
        self._left = 0
        self._next = 1

    def is_due(self) -> bool:
        """Whether to leave the next connection to others; asked once for each."""
        if self._left:
            self._left -= 1
            return False
        return True

    def ended(self, *, was_taken: bool) -> None:
        """They have taken what was left to them, or this worker has had to take a connection itself."""
        if was_taken:
            self._left, self._next = 0, 1
        else:
            self._left, self._next = self._next - 1, min(2 * self._next, INSIST_MAX)
