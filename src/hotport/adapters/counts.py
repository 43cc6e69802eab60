"""Count requests and connections in cells that outlive this process; see `hotport.wire.counters`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final, Protocol, TypeVar

from hotport.model.fates import Fate
from hotport.wire import counters

__all__ = ["NO_ANSWER", "Counts"]

Number = TypeVar("Number", int, float)

#: In place of a status: the request got no complete answer.
NO_ANSWER: Final = 0

_CLOSED: Final = {
    Fate(name): counters.CLOSED.start + place for place, name in enumerate(counters.FATES) if name != counters.KILLED
}
_OPEN: Final = {kind: counters.OPEN.start + place for place, kind in enumerate(counters.KINDS)}


class Numbers(Protocol[Number]):
    """A list, or mapped memory."""

    def __getitem__(self, cell: int, /) -> Number: ...

    def __setitem__(self, cell: int, value: Number, /) -> None: ...


class Counts:
    """Counts for a worker.

    Args:
        cells: A page of counters, or a list of as many numbers.
        seconds: The same for cells that hold seconds.

    Attributes:
        request: Counts a request, once: its method, its status or `NO_ANSWER`, and when it began (`perf_counter`).
            To be called before the end of the answer is written, so that no client has more answers than were counted.
    """

    __slots__ = ("cells", "request")

    def __init__(self, cells: Numbers[int], seconds: Numbers[float]) -> None:
        self.cells = cells
        self.request = _request_counter(cells, seconds)

    def accepted(self) -> None:
        """Count a connection that was accepted."""
        self.cells[counters.ACCEPTED.start] += 1

    def adopted(self) -> None:
        """Count a connection that another worker has handed over."""
        self.cells[counters.ADOPTED.start] += 1

    def opened(self, kind: str) -> None:
        """Count an open connection."""
        self.cells[_OPEN[kind]] += 1

    def let_go(self, kind: str) -> None:
        """Count an open connection no more."""
        self.cells[_OPEN[kind]] -= 1

    def closed(self, fate: Fate) -> None:
        """Count a connection by its fate."""
        self.cells[_CLOSED[fate]] += 1

    def certificates(self, expire_at: Sequence[float]) -> None:
        """Say when the certificates in use expire, in seconds since the epoch, in the order of the option."""
        section = counters.CERTIFICATES
        for place in range(section.size):
            self.cells[section.start + place] = max(0, int(expire_at[place])) if place < len(expire_at) else 0

    def timed_out(self) -> None:
        """Count a request that has taken longer than `Options.request_timeout_s`."""
        self.cells[counters.TIMEOUTS.start] += 1


def _request_counter(cells: Numbers[int], seconds: Numbers[float]) -> Callable[[str, int, float], None]:
    """Make `Counts.request`: it is called for each request, so it looks up nothing that it could know."""
    bounds = counters.BOUNDS_S
    shortest = bounds[0]
    rows = {
        method: tuple(counters.request_cell(place, status) for status in range(len(counters.STATUSES)))
        for place, method in enumerate(counters.METHODS)
    }
    other = rows[counters.METHODS[-1]]
    # Most requests are like this one. Their cells are written, not read: no other process changes them.
    usual = rows["GET"][2]
    usual_s, usual_count, usual_cell = seconds[usual], cells[usual + 1], usual + 1

    def request(method: str, status: int, began: float) -> None:
        nonlocal usual_s, usual_count
        took_s = perf_counter() - began
        if took_s <= shortest and status == 200 and method == "GET":
            usual_s += took_s
            seconds[usual] = usual_s
            usual_count += 1
            cells[usual_cell] = usual_count
            return
        cell = rows.get(method, other)[status // 100]
        if cell == usual:
            usual_s += took_s
        seconds[cell] += took_s
        cells[cell + 1 + bisect_left(bounds, took_s)] += 1

    return request
