"""The layout of counters in memory that processes of a service share: which cell counts what.

A page is an array of 64-bit numbers. Pages outlive the process that has written them, and the version of hotport. So
the layout only ever grows: a new section takes cells behind the others, a name is added at the end of its list, and the
number of each list's places is fixed. Anything else needs another `MAGIC`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

__all__ = [
    "ACCEPTED",
    "ADOPTED",
    "BOUNDS_S",
    "BUCKETS",
    "CELLS",
    "CERTIFICATES",
    "CLOSED",
    "FATES",
    "GAP",
    "KILLED",
    "KINDS",
    "LOG_DROPPED",
    "MAGIC",
    "METHODS",
    "OPEN",
    "OUTCOMES",
    "PHASES",
    "PHASE_COUNT",
    "PHASE_NS",
    "REQUESTS",
    "RESTARTS",
    "SECONDS",
    "STATE",
    "STATUSES",
    "TIMEOUTS",
    "WORKERS",
    "WORKER_EVENTS",
    "Section",
    "fold",
    "request_cell",
]

#: The first cell of every page: its format.
MAGIC: Final = int.from_bytes(b"hotport1", "little")

#: HTTP methods; the last one is any other.
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "other")

#: Classes of answers by the first digit of their status; ``none``: the request had no complete answer.
STATUSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")

#: Upper bounds, inclusive, of the buckets of durations, in seconds; the last bucket has none.
BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BUCKETS: Final = len(BOUNDS_S) + 1

#: What became of a connection: every `hotport.model.fates.Fate` of one. `KILLED`: its worker ended without closing it.
KILLED: Final = "cut_killed"
FATES: Final = (
    "finished",
    "idle_closed",
    "closed_no_room",
    "told_to_close",
    "server_finished",
    "moved_http",
    "moved_websocket",
    "moved_stream",
    "moved_protocol",
    "cut_offered",
    "cut_unaccepted",
    "cut_fresh",
    "cut_half_head",
    "cut_body",
    "cut_in_flight",
    "cut_streaming",
    "cut_slow_body",
    "cut_slow_reader",
    "cut_websocket",
    "cut_memory",
    "cut_stream",
    "cut_protocol",
    "cut_datagram",
    "cut_server",
    KILLED,
)

#: Kinds of connections, by `hotport.adapters.base.Connection.kind`.
KINDS: Final = ("http", "websocket", "stream", "protocol")

#: How restarts end, by `hotport.wire.messages.Report.outcome`.
OUTCOMES: Final = ("done", "aborted", "undone")

#: Phases of a restart, by `hotport.wire.messages.PhaseTime.name`.
PHASES: Final = (
    "prepared",
    "ready",
    "committed",
    "quiesced",
    "draining",
    "watching",
    "retired",
    "baking",
    "undoing",
    "undone",
    "aborted",
    "quiesce overdue",
)

#: What happens to workers.
WORKER_EVENTS: Final = ("started", "lost", "hung", "given_up", "expired")


class Section(NamedTuple):
    """A run of cells.

    Attributes:
        is_gauge: They say how things are, and mean nothing once the process has ended.
    """

    start: int
    size: int
    is_gauge: bool = False

    @property
    def end(self) -> int:
        """The first cell behind it."""
        return self.start + self.size

    def of(self, cells: Sequence[int]) -> Sequence[int]:
        """Its cells in a page."""
        return cells[self.start : self.end]


#: 0: the page belongs to no process yet; 1: it does, or did.
STATE: Final = Section(1, 1, is_gauge=True)
#: By method and status: the time of all requests, and how many there are in each bucket. See `request_cell`.
REQUESTS: Final = Section(8, len(METHODS) * len(STATUSES) * (1 + BUCKETS))
TIMEOUTS: Final = Section(REQUESTS.end, 1)
ACCEPTED: Final = Section(TIMEOUTS.end, 1)
ADOPTED: Final = Section(ACCEPTED.end, 1)
LOG_DROPPED: Final = Section(ADOPTED.end, 1)
#: By fate.
CLOSED: Final = Section(LOG_DROPPED.end, 48)
#: Open connections by kind.
OPEN: Final = Section(CLOSED.end, 16, is_gauge=True)
#: When the certificates expire, in the order of the option, in seconds since the epoch; 0: unknown.
CERTIFICATES: Final = Section(OPEN.end, 16, is_gauge=True)
# The supervisor's:
#: Restarts by outcome.
RESTARTS: Final = Section(CERTIFICATES.end, 8)
#: Nanoseconds and number of the phases of restarts.
PHASE_NS: Final = Section(RESTARTS.end, 32)
PHASE_COUNT: Final = Section(PHASE_NS.end, 32)
#: Nanoseconds without an acceptor, and of how many restarts.
GAP: Final = Section(PHASE_COUNT.end, 2)
#: By `WORKER_EVENTS`.
WORKERS: Final = Section(GAP.end, 16)

#: How many cells a page has; those behind the sections are for later ones.
CELLS: Final = 2048


def request_cell(method: int, status: int) -> int:
    """The cell with the time of requests, by the places of their method and status; the buckets follow it."""
    return REQUESTS.start + (method * len(STATUSES) + status) * (1 + BUCKETS)


#: Cells that hold seconds, as a double, in a worker's page, since it counts each request there; nanoseconds elsewhere.
SECONDS: Final = tuple(
    request_cell(method, status) for method in range(len(METHODS)) for status in range(len(STATUSES))
)

_MASK: Final = (1 << 64) - 1

_GAUGES: Final = (STATE, OPEN, CERTIFICATES)


def fold(total: Sequence[int], pages: Iterable[Sequence[int]]) -> list[int]:
    """Add the pages of processes that have ended to a total; their open connections count as killed."""
    result = [*total, *([0] * (CELLS - len(total)))][:CELLS]
    for page in pages:
        for cell, value in enumerate(page[:CELLS]):
            if value:
                result[cell] += value
        result[CLOSED.start + FATES.index(KILLED)] += sum(OPEN.of(page))
    for section in _GAUGES:
        result[section.start : section.end] = [0] * section.size
    result[0] = MAGIC
    return [value & _MASK for value in result]
