"""The interface between a worker and the connections it serves.

A worker accepts sockets and hands each one to a protocol object that an `Adapter` makes. The protocol object
registers with `Connections` and reports its end there; the registry tells it when the worker leaves.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from hotport.adapters.counts import Counts
from hotport.kernel.fork import withhold
from hotport.model.fates import Fate
from hotport.wire.envelope import Envelope
from hotport.wire.messages import Move

__all__ = [
    "Adapter",
    "Connection",
    "Connections",
    "Context",
    "Draining",
    "NotAdopted",
    "Offer",
    "Ready",
]


#: The room of a worker that has no limit on connections.
ROOM_MAX = 1 << 20

#: Connections notified of a drain in one turn of the event loop; the others are served meanwhile.
TOLD_AT_ONCE = 256


class Draining:
    """Tells an application that its worker is leaving, and by when.

    Read it anywhere in the worker's event loop: `is_set`, ``await wait()``, `remaining_s`.
    """

    __slots__ = ("_deadline", "_event")

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._deadline = math.inf

    def is_set(self) -> bool:
        """Whether the worker drains: it has stopped accepting for good."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until draining starts; return at once if it has."""
        await self._event.wait()

    def remaining_s(self) -> float:
        """Seconds until connections that are still open are cut; infinite before draining starts."""
        if self._deadline == math.inf:
            return math.inf
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _start(self, timeout_s: float) -> None:
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._event.set()

    def _hurry(self) -> None:
        if self.is_set():
            self._deadline = asyncio.get_running_loop().time()

    def _stop(self) -> None:
        self._deadline = math.inf
        self._event.clear()


#: A connection that holds less than this is not cut to free memory.
HELD_BYTES_MIN: Final = 16 * 1024


class Offer(NamedTuple):
    """A connection at a safe point: its descriptor, still owned by the connection, and its envelope."""

    fd: int
    envelope: Envelope


class NotAdopted(Exception):
    """Raised by an adapter that cannot adopt a connection; the text says why."""


class Connection(Protocol):
    """The interface that a worker needs of every connection; protocol objects implement it.

    A draining worker calls either `drain` or `prepare_handoff`, and may change its mind. A quiesced worker, which may
    be taken back, calls `prepare_handoff` or `stay`. After `prepare_handoff` a connection calls `ready` at each *safe
    point*: the client waits for nothing, everything that was written has left this process, and every byte that was
    read and not consumed is known. Then the worker calls `offer`; the connection stands still until `keep`, `release`
    or `cut`.
    """

    #: The connection's kind, for the status.
    kind: str
    #: The fate to count when the connection has moved.
    moved_fate: Fate
    #: The peer's address and ours, if they are known.
    endpoints: tuple[Any, Any] | None
    #: The accepted socket, owned by the transport; None before it is known. Once closed, its descriptor is -1.
    sock: socket.socket | None

    @property
    def held_bytes(self) -> int:
        """About how many bytes of memory are buffered, for the application and for the client."""

    def abort(self) -> None:
        """Close at once, and drop unsent data."""

    @property
    def will_move(self) -> bool:
        """After `prepare_handoff`: whether the connection is expected to reach a safe point."""

    def drain(self) -> None:
        """Finish what was begun, and make the next answer the last: the worker leaves.

        Must not close a connection on which the client may have begun to send. Does nothing while the connection
        stands still: another process may serve it. It is called again if the connection is kept.
        """

    def stay(self) -> None:
        """Serve as before: the worker does not leave, or not yet, and no other worker takes this connection.

        Does nothing while the connection stands still, as in `drain`.
        """

    def prepare_handoff(self, ready: Ready) -> bool:
        """Call `ready` at each safe point from now on: other workers can take this connection.

        Returns:
            False, and no change, if the connection cannot move. True also if it is ending by itself.
        """

    def offer(self) -> Offer | None:
        """Stand still at a safe point: read nothing, write nothing, wait for nothing.

        Returns:
            None if this is no safe point; then the connection stops reading at the next one, and calls `ready`.
        """

    def keep(self) -> None:
        """Continue from the safe point: no other process took the connection."""

    def release(self) -> None:
        """Close the descriptor, and tell the application if needed: another process took the connection."""

    def why_here(self) -> str:
        """Why the connection has not moved: a few words for the status."""

    def cut(self) -> Fate:
        """Close now, as politely as the protocol allows, and return the fate to count.

        `Fate.IDLE_CLOSED` if no request was lost, else the cut of the connection's state. A connection that stands
        still writes nothing, and returns `Fate.CUT_OFFERED`: another process may have taken it.
        """


Ready = Callable[[Connection], None]


class Connections:
    """The registry of a worker's open connections.

    A protocol object calls `opened` when it is made, before any byte is read, and `closed` exactly once.
    """

    def __init__(self, *, maximum: int = 0, requests_max: int = 0) -> None:
        #: Open connections, each with the event loop's time at which it was registered.
        self.open: dict[Connection, float] = {}
        self.draining = Draining()
        self.fates: Counter[Fate] = Counter()
        #: Connections that were cut, by fate, since the start; `fates` has those of a drain.
        self.cuts: Counter[Fate] = Counter()
        #: When connections moved to the workers that follow this one.
        self.moves: list[Move] = []
        #: One element, the number of open connections; other workers read it (`hotport.kernel.loadpage`).
        self.gauge: list[int] | memoryview = [0]
        #: For metrics; None if nobody reads them.
        self.counts: Counts | None = None
        self.accepted = 0
        self.adopted = 0
        self.requests = 0
        #: Requests that failed: answers of 5xx, and those that were broken off.
        self.errors = 0
        #: Those of them that have taken longer than `Options.request_timeout_s`.
        self.timeouts = 0
        self.maximum = maximum
        self.requests_max = requests_max
        self.on_full: Callable[[], None] | None = None
        self.on_room: Callable[[], None] | None = None
        self.on_requests_max: Callable[[], None] | None = None
        #: Whether connections move as soon as another worker can take them, without a drain.
        self.moves_early = False
        #: Connections that could move, but for which no successor has room; oldest first.
        self.crowded: dict[Connection, None] = {}
        #: Called when the number of connections that may still move has dropped.
        self.on_fewer: Callable[[], None] | None = None
        self._moving: set[Connection] = set()
        self._adopted: set[Connection] = set()
        self._own: set[Connection] = set()
        self._kept: dict[object, int] = {}
        self._kept_sum = 0
        self._freed: asyncio.Event | None = None
        self._is_counting = False
        self._is_full = False
        self._is_pressed = False
        self._is_draining = False
        self._is_hurried = False
        self._deadline: asyncio.Timeout | None = None
        self._ready: Ready | None = None
        self._untold: list[Connection] = []
        self._empty: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        withhold(self)

    def descriptors(self) -> Iterator[int]:
        """The descriptors of all open connections; a forked child must not have them."""
        return (connection.sock.fileno() for connection in self.open if connection.sock is not None)

    def opened(self, connection: Connection) -> None:
        """Register a connection, and notify it at once if the worker is already leaving."""
        self.open[connection] = self._now()
        self.gauge[0] = len(self.open)
        self.accepted += 1
        if self.counts is not None:
            self.counts.opened(connection.kind)
        if (self._is_draining or self.moves_early) and self.is_leading:
            self.tell(connection)
        if self.maximum and self._is_over:
            self._see_full()

    def keep(self, whose: object, count: int) -> None:
        """Reserve room for `count` connections from the worker `whose`; 0 ends the reservation.

        The limit on accepted connections is lower meanwhile.
        """
        if count:
            self._kept[whose] = count
        else:
            self._kept.pop(whose, None)
        self._kept_sum = sum(self._kept.values())
        if self.maximum:
            self._see_full()
            self._see_room()

    def press(self, is_pressed: bool) -> None:
        """Stop accepting while memory is short, or start again."""
        self._is_pressed = is_pressed
        self._see_full()
        self._see_room()

    def shed(self, wanted_bytes: int) -> tuple[int, int]:
        """Cut the connections that hold most memory, as `Fate.CUT_MEMORY`, until about `wanted_bytes` are free.

        Returns:
            How many were cut, and how many bytes they held. Connections below `HELD_BYTES_MIN` stay.
        """
        holders = sorted(((each.held_bytes, n, each) for n, each in enumerate(self.open)), reverse=True)
        count = freed_bytes = 0
        for held_bytes, _, connection in holders:
            if freed_bytes >= wanted_bytes or held_bytes < HELD_BYTES_MIN:
                break
            if connection.cut() is not Fate.CUT_OFFERED:  # another worker may serve it by now
                connection.abort()
                self.closed(connection, Fate.CUT_MEMORY)
                count, freed_bytes = count + 1, freed_bytes + held_bytes
        return count, freed_bytes

    @property
    def _is_over(self) -> bool:
        """Whether the limit on connections is reached, or memory is short."""
        return self._is_pressed or bool(self.maximum and len(self.open) + self._kept_sum >= self.maximum)

    def _see_full(self) -> None:
        if not self._is_full and self._is_over:
            self._is_full = True
            if self.on_full is not None:
                self.on_full()

    def _see_room(self) -> None:
        if self._is_full and not self._is_over:
            self._is_full = False
            if self.on_room is not None:
                self.on_room()
        if self._freed is not None and len(self.open) < self.maximum:
            self._freed.set()
            self._freed = None

    def count_accepted(self) -> None:
        """Count a registered connection as accepted in the metrics: `opened` does not know yet whether it was."""
        if self.counts is not None:
            self.counts.accepted()

    def count_adopted(self, connection: Connection) -> None:
        """Count a registered connection as adopted from another worker, not as accepted."""
        self.accepted -= 1
        self.adopted += 1
        if self.counts is not None:
            self.counts.adopted()
        self._adopted.add(connection)

    def count_own(self, connection: Connection) -> None:
        """Do not count a registered connection as accepted: this process has both of its ends."""
        self.accepted -= 1
        self._own.add(connection)

    def forget(self, connection: Connection) -> None:
        """Remove a connection, and do not count it: another worker keeps it."""
        self.accepted -= 1
        self._let_go(connection)

    def replace(self, connection: Connection, successor: Connection) -> None:
        """Put `successor` in the place of a connection's object, and notify it if the worker is leaving."""
        self.open[successor] = self.open.pop(connection)
        if self.counts is not None:
            self.counts.let_go(connection.kind)
            self.counts.opened(successor.kind)
        if connection in self._adopted:
            self._adopted.remove(connection)
            self._adopted.add(successor)
        self._stops_moving(connection)
        if self.is_leading:
            self.tell(successor)

    def closed(self, connection: Connection, fate: Fate = Fate.FINISHED) -> None:
        """Remove a connection; count its fate if the worker has stopped accepting, or if it was cut."""
        if not self._let_go(connection):
            return
        if self._is_counting:
            self.fates[fate] += 1
        if connection in self._own:
            self._own.discard(connection)
        elif self.counts is not None:
            self.counts.closed(fate)
        if fate.is_cut:
            self.cuts[fate] += 1

    def _let_go(self, connection: Connection) -> bool:
        if self.open.pop(connection, None) is None:
            return False
        self.gauge[0] = len(self.open)
        if self.counts is not None:
            self.counts.let_go(connection.kind)
        self._adopted.discard(connection)
        if self._moving:
            self._stops_moving(connection)
        if self.maximum:
            self._see_room()
        if self._empty is not None and not self.open:
            self._empty.set()
            self._empty = None
        return True

    @property
    def is_full(self) -> bool:
        """Whether to accept nothing until `on_room` is called."""
        return self._is_full

    @property
    def is_leaving(self) -> bool:
        """Whether the worker drains."""
        return self._is_draining

    @property
    def room(self) -> int:
        """How many more connections can be adopted from other workers."""
        if self._is_draining:
            return 0
        return max(0, self.maximum - len(self.open)) if self.maximum else ROOM_MAX

    async def wait_freed(self) -> None:
        """Wait until one more connection can be adopted from another worker."""
        while self.maximum and len(self.open) >= self.maximum:
            if self._freed is None:
                self._freed = asyncio.Event()
            await self._freed.wait()

    @property
    def moving(self) -> int:
        """How many connections may still move to other workers."""
        return len(self._moving) + len(self._untold) if self._ready is not None else 0

    def _stops_moving(self, connection: Connection) -> None:
        if connection in self._moving:
            self._moving.discard(connection)
            self.crowded.pop(connection, None)
            if self.on_fewer is not None:
                self.on_fewer()

    def count_request(self) -> None:
        """Count one more request (for ``max_requests`` and the status)."""
        self.requests += 1
        if self.requests == self.requests_max:
            self.has_reached_requests_max()

    def has_reached_requests_max(self) -> None:
        """Call `on_requests_max`; for callers that add to `requests` themselves."""
        if self.on_requests_max is not None:
            self.on_requests_max()

    def count_fates(self, is_counting: bool) -> None:
        """Count the fates of connections from now on, or stop and clear the counts."""
        self._is_counting = is_counting
        if not is_counting:
            self.fates.clear()

    def deadline(self, timeout_s: float) -> asyncio.Timeout:
        """The timeout of a drain; `hurry` ends it at once, whether called before or after this."""
        self._deadline = asyncio.timeout(0.0 if self._is_hurried else timeout_s)
        return self._deadline

    def drain(self, timeout_s: float) -> None:
        """Notify the application, and soon every connection, that the worker leaves in `timeout_s` seconds."""
        self._is_counting = self._is_draining = True
        self.draining._start(timeout_s)
        self.lead(self._ready)

    def hurry(self) -> None:
        """End the drain now, or as soon as it begins: the server cuts and counts open connections."""
        self._is_hurried = True
        self.draining._hurry()
        if self._deadline is not None:
            with suppress(RuntimeError):  # that drain has ended
                self._deadline.reschedule(self._now())

    def resume(self) -> None:
        """End the drain and notify no more connections; those already notified still leave."""
        self._is_draining = self._is_hurried = False
        self._ready = None
        self._untold = []
        self._moving.clear()
        self.crowded.clear()
        self.draining._stop()

    def lead(self, ready: Ready | None) -> None:
        """Hand off connections from now on, or stop.

        Args:
            ready: Called with each connection that is at a safe point; None if no worker takes them.
        """
        was_leading, self._ready = self.is_leading, ready
        chosen = [] if was_leading else list(self._moving)  # by `lead_some`
        self._moving.clear()
        self.crowded.clear()
        self._untold = list(self.open) if was_leading or self.is_leading else chosen
        self._tell_some()

    def lead_some(self, ready: Ready, count: int, stay_s: float) -> None:
        """Hand off about `count` random connections while the worker continues to serve; `lead` ends it.

        Args:
            ready: As for `lead`.
            stay_s: Connections that were adopted less than so many seconds ago stay.
        """
        self._ready = ready
        came_s = self._now() - stay_s
        able = [each for each, since in self.open.items() if since < came_s or each not in self._adopted]
        for connection in random.sample(able, min(len(able), 2 * count)):
            if len(self._moving) >= count:
                break
            self.tell(connection)

    def _tell_some(self) -> None:
        some, self._untold = self._untold[:TOLD_AT_ONCE], self._untold[TOLD_AT_ONCE:]
        for connection in some:
            if connection in self.open:
                self.tell(connection)
        if self._untold:
            self._loop.call_soon(self._tell_some)

    @property
    def is_leading(self) -> bool:
        """Whether connections are notified: the worker drains, or other workers can take them."""
        return self._is_draining or (self.moves_early and self._ready is not None)

    def tell(self, connection: Connection) -> None:
        """Prepare a connection for handoff; if it cannot move, let it drain or stay."""
        if self._ready is None or not connection.prepare_handoff(self._ready):
            self.not_taken(connection)
        elif connection.will_move and connection in self.open:
            self.will_move(connection)

    def will_move(self, connection: Connection) -> None:
        """Note that a connection is at a safe point, or is expected to reach one."""
        self._moving.add(connection)

    def not_taken(self, connection: Connection) -> None:
        """Let a connection drain if the worker leaves, else stay: no other worker takes it."""
        self._stops_moving(connection)
        if self._is_draining:
            connection.drain()
        else:
            connection.stay()

    def cut(self) -> None:
        """Cut all open connections, and count their fates."""
        self._is_counting = True
        for connection in list(self.open):
            is_crowded = connection in self.crowded
            fate = connection.cut()
            self.closed(connection, Fate.CLOSED_NO_ROOM if is_crowded and fate is Fate.IDLE_CLOSED else fate)

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self.open:
            if self._empty is None:
                self._empty = asyncio.Event()
            await self._empty.wait()


@dataclass(frozen=True, slots=True)
class Context:
    """Where an adapter runs: the worker's identity and its connections."""

    connections: Connections
    service: str = "embedded"
    generation: int = 1
    worker: int = 1
    extension: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "extension",
            {
                "generation": self.generation,
                "worker": self.worker,
                "draining": self.connections.draining,
            },
        )


class Adapter(Protocol):
    """Serves applications of one kind in a worker."""

    async def startup(self) -> None:
        """Make the application ready to serve.

        Raises:
            StartError: The application said, or showed, that it cannot start (HP5xx).
        """

    def connection(self) -> asyncio.BaseProtocol:
        """Make and register the protocol object for one accepted socket.

        Before ``connection_made`` its attribute ``sock`` is set to the socket, and ``endpoints`` to the peer's address
        and our own. If a trusted proxy has told these addresses, ``is_proxied`` is set to True.
        """

    def adopt(self, envelope: Envelope) -> asyncio.BaseProtocol:
        """Make the protocol object that continues another worker's connection; otherwise as `connection`.

        Everything that can fail must fail here: the other worker releases the connection next.

        Raises:
            NotAdopted: It cannot be continued here; nothing is registered.
        """

    async def finish(self) -> None:
        """Wait for the tasks of connections that have ended; the caller bounds this by the drain."""

    async def shutdown(self) -> None:
        """Cancel remaining tasks, and release what `startup` took; called when no connection is open."""
