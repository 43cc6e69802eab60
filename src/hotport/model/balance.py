"""How workers share what comes to their accept queue: decisions only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Final

__all__ = ["Deferral", "Lateness", "is_ahead", "plan_moves", "unable"]

#: A worker is ahead if it has more connections than the mean by this ratio and this number. The number lets small
#: counts differ: leaving the queue to others costs a wake-up and, at worst, a deferral.
AHEAD_RATIO: Final = 0.03
AHEAD_MIN: Final = 2

#: The longest that a connection waits in the accept queue for a worker that has fewer.
DEFER_S: Final = 0.001

#: How many connections a worker takes at most before it leaves the queue to others again that have not taken from it.
INSIST_MAX: Final = 16


#: Connections that are open move from a worker that has more than the mean by this ratio and this number: what comes
#: evens out smaller differences.
DRIFT_RATIO: Final = 0.05
DRIFT_MIN: Final = 8

#: How often a worker looks, and how many connections it moves then at most.
LOOK_S: Final = 0.25
MOVES_MAX: Final = 125

#: A worker whose event loop looks later than that, and not for want of a processor, twice within so many seconds, is
#: held up: it gets no connections, and hands on those that it has. One long request is no reason for that.
LATE_S: Final = 0.1
LATE_WITHIN_S: Final = 2.0

#: It gets connections again when it has been on time for so long: twice as long each time that it is held up once more,
#: up to a maximum, or else connections would come and go all day; and as at first when it was not for so long.
LATE_HOLD_S: Final = 5.0
LATE_HOLD_MAX_S: Final = 320.0
LATE_FORGET_S: Final = 600.0

#: One that has not looked for so long beyond its time hangs; it cannot say so itself.
HUNG_S: Final = 1.0

#: So many of them travel at once: each batch holds up two event loops for a moment.
BATCH_MAX: Final = 2

#: A connection that came from another worker stays for so long. Workers that scale brings come one after the other:
#: the first of them gets more than its share at first.
STAY_S: Final = 1.0


def is_ahead(mine: int, others: Sequence[int]) -> bool:
    """Whether a worker has clearly more connections than those that take from the same accept queue, on average."""
    if not others:
        return False
    mean = (mine + sum(others)) / (1 + len(others))
    return mine > mean * (1 + AHEAD_RATIO) + AHEAD_MIN


class Lateness:
    """Whether a worker's event loop is held up, by how late it has been."""

    __slots__ = ("_hold_s", "_late_s", "_until_s")

    def __init__(self) -> None:
        self._hold_s = LATE_HOLD_S
        self._late_s = self._until_s = -math.inf

    def see(self, now_s: float, late_s: float) -> bool:
        """Whether it is held up, now that it has looked `late_s` later than it should have."""
        if late_s > LATE_S:
            if now_s < self._until_s:
                self._until_s = now_s + self._hold_s
            elif now_s - late_s - self._late_s <= LATE_WITHIN_S:
                is_first = now_s - self._until_s > LATE_FORGET_S
                self._hold_s = LATE_HOLD_S if is_first else min(2 * self._hold_s, LATE_HOLD_MAX_S)
                self._until_s = now_s + self._hold_s
            self._late_s = now_s
        return now_s < self._until_s


def unable(dues_s: Mapping[int, float], now_s: float) -> Set[int]:
    """Which workers are to have no connections: those that are held up, and those that hang.

    If more than half of those that do not hang are held up, it is the machine, or the application, and that does not
    count. If all hang, all are able.

    Args:
        dues_s: When each looks again, as it has said; 0: it is held up.
    """
    hung = {key for key, due_s in dues_s.items() if due_s and due_s + HUNG_S < now_s}
    late = {key for key, due_s in dues_s.items() if not due_s}
    if len(hung) == len(dues_s):
        return set()
    return hung if 2 * len(late) > len(dues_s) - len(hung) else hung | late


def plan_moves(
    mine: int,
    counts: Mapping[int, int],
    late: Collection[int] = (),
    *,
    full: Collection[int] = (),
    is_asked: bool = False,
) -> dict[int, int]:
    """How many connections a worker hands to which others; empty if it keeps those that it has.

    Each decides for itself: the one with the most hands to the one with the fewest, the second to where room is left,
    and so on. From the same counts all of them plan the same moves.

    Args:
        mine: The worker's own key in `counts`.
        late: Those whose event loops are held up: they are to have none, if there are others.
        full: Those that take none at present, as they have as many as they may, or are short of memory.
        is_asked: Somebody wants shares that are as even as can be: small differences count.
    """
    wanted = _wanted(counts, late, full)
    surplus = {key: math.floor(count - wanted[key]) for key, count in counts.items()}  # so that all can be taken
    slack = 0.0 if is_asked or not wanted[mine] else wanted[mine] * DRIFT_RATIO + DRIFT_MIN
    if surplus[mine] <= 0 or counts[mine] - wanted[mine] <= slack:
        return {}
    givers = sorted(((most, key) for key, most in surplus.items() if most > 0), reverse=True)
    takers = sorted(((-most, key) for key, most in surplus.items() if most < 0), reverse=True)
    skipped = sum(most for most, _ in givers[: givers.index((surplus[mine], mine))])
    left = surplus[mine] if is_asked else min(surplus[mine], MOVES_MAX)
    moves: dict[int, int] = {}
    for room, key in takers:
        given = min(left, max(0, room - skipped))
        skipped = max(0, skipped - room)
        if given:
            moves[key] = given
            left -= given
    return moves


def _wanted(counts: Mapping[int, int], late: Collection[int], full: Collection[int]) -> dict[int, float]:
    """How many connections each should have: the same, but none if it is late, and no more than now if it is full."""
    sharing = {key for key in counts if key not in late} or set(counts)
    wanted = dict.fromkeys(counts, 0.0)
    left = float(sum(counts.values()))
    while sharing:
        share = left / len(sharing)
        few = {key for key in sharing if key in full and counts[key] < share}
        wanted |= {key: counts[key] if key in few else share for key in sharing}
        if not few:
            break
        left -= sum(counts[key] for key in few)
        sharing -= few
    return wanted


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
