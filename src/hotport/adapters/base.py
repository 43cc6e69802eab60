"""What a worker and the connections it serves agree on.

A worker accepts sockets and hands each one to a protocol object that an `Adapter` makes. The protocol object
reports its life to the `Connections` registry; the registry tells it when the worker leaves.
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

from hotport.kernel.fork import withhold
from hotport.model.fates import Fate
from hotport.wire.envelope import Envelope

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


#: Stands for any number of connections.
ROOM_MAX = 1 << 20

#: Connections that are told in one turn of the event loop that the worker leaves; meanwhile the others are served.
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
        """True from the moment at which the worker stopped accepting for good."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return when draining starts, at once if it has."""
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


#: A connection that holds less than this is not ended for want of memory.
HELD_BYTES_MIN: Final = 16 * 1024


class Offer(NamedTuple):
    """A connection at a safe point: its descriptor, which stays the connection's, and what has to travel with it."""

    fd: int
    envelope: Envelope


class NotAdopted(Exception):
    """Raised by an adapter that cannot go on with a connection; the text says why."""


class Connection(Protocol):
    """What the worker asks of every connection; the protocol objects implement it.

    A worker that leaves says either `drain` or `prepare_handoff`, and may change its mind. One that has only stopped
    accepting, and may be taken back, says `prepare_handoff` or `stay`. After `prepare_handoff` a connection calls what
    it was given whenever it comes to a *safe point*: the client waits for nothing, nothing that was written is still in
    this process, and what was read and not consumed is known byte by byte. Then the worker
    asks for an offer; the connection stands still from there to `keep`, `release` or `cut`.
    """

    #: What it is called in the status.
    kind: str
    #: Counted when it has moved.
    moved_fate: Fate
    #: The peer's address and ours, if they are known.
    endpoints: tuple[Any, Any] | None
    #: What was accepted; None before that is known. The transport owns it, and its descriptor is -1 once it is closed.
    sock: socket.socket | None

    @property
    def held_bytes(self) -> int:
        """About how much memory holds what waits on its behalf, for the application or for the client."""

    def abort(self) -> None:
        """End now: what was written and has not left is lost."""

    @property
    def will_move(self) -> bool:
        """After `prepare_handoff`: whether it comes to a safe point sooner or later, as far as is known."""

    def drain(self) -> None:
        """The worker leaves: finish what was begun, and let the next answer be the last.

        Must not close a connection on which the client may have begun to send. One that stands still stands on: it
        may be served elsewhere, and is told again if it is kept.
        """

    def stay(self) -> None:
        """The worker does not leave, or not yet, and nobody takes this one: go on as if nothing had been said.

        One that stands still stands on, as in `drain`.
        """

    def prepare_handoff(self, ready: Ready) -> bool:
        """The worker leaves or may leave, and others can go on with this connection: call `ready` at each safe point.

        Returns:
            False if it cannot move: nothing has changed. True also if it is ending by itself.
        """

    def offer(self) -> Offer | None:
        """Stand still at a safe point: read nothing, write nothing, wait for nothing.

        Returns:
            None if this is none; then `ready` is called at the next one, and nothing is read from that moment on.
        """

    def keep(self) -> None:
        """It was not taken: go on from the safe point."""

    def release(self) -> None:
        """It was taken: close the descriptor, and tell the application as far as it has to know."""

    def why_here(self) -> str:
        """What it is doing, or what it is, that it has not moved; a few words for the status."""

    def cut(self) -> Fate:
        """Close now, as politely as the protocol allows, and return the fate to count.

        `Fate.IDLE_CLOSED` if no request was lost by it, else the cut of the state that it was in. One that stands still
        writes nothing: `Fate.CUT_OFFERED`, since another process may have taken it.
        """


Ready = Callable[[Connection], None]


class Connections:
    """Every connection that was accepted here and has not ended.

    A protocol object calls `opened` when it is made, before any byte is read, and `closed` exactly once.
    """

    def __init__(self, *, maximum: int = 0, requests_max: int = 0) -> None:
        #: With the time at which each was taken in, by the event loop's clock.
        self.open: dict[Connection, float] = {}
        self.draining = Draining()
        self.fates: Counter[Fate] = Counter()
        #: Connections that were cut, by fate, since the start; `fates` has those of a drain.
        self.cuts: Counter[Fate] = Counter()
        #: One number: how many are open, for other workers to see (`hotport.kernel.loadpage`).
        self.gauge: list[int] | memoryview = [0]
        self.accepted = 0
        self.adopted = 0
        self.requests = 0
        #: Requests that failed: answers of 5xx, and those that were broken off.
        self.errors = 0
        self.maximum = maximum
        self.requests_max = requests_max
        self.on_full: Callable[[], None] | None = None
        self.on_room: Callable[[], None] | None = None
        self.on_requests_max: Callable[[], None] | None = None
        #: Connections move as soon as there is somebody who takes them, though the worker does not drain.
        self.moves_early = False
        #: Could move, but no successor has room for them; oldest first.
        self.crowded: dict[Connection, None] = {}
        #: Called when fewer connections are left to move.
        self.on_fewer: Callable[[], None] | None = None
        self._moving: set[Connection] = set()
        self._adopted: set[Connection] = set()
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
        """Of the sockets of all that are open: a forked child must not have them."""
        return (connection.sock.fileno() for connection in self.open if connection.sock is not None)

    def opened(self, connection: Connection) -> None:
        """Take a connection into the registry; it is told at once if the worker is already leaving."""
        self.open[connection] = self._now()
        self.gauge[0] = len(self.open)
        self.accepted += 1
        if self.is_leading:
            self.tell(connection)
        if self.maximum and self._is_over:
            self._see_full()

    def keep(self, whose: object, count: int) -> None:
        """Keep room for so many connections that come from another worker, `whose`; 0: none of them comes any more.

        Fewer are accepted meanwhile.
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
        """Accept nothing while memory is short."""
        self._is_pressed = is_pressed
        self._see_full()
        self._see_room()

    def shed(self, wanted_bytes: int) -> tuple[int, int]:
        """End the connections that hold most, as `Fate.CUT_MEMORY`, until about so much memory is free.

        Returns:
            How many were ended, and how many bytes they held. Those that hold next to nothing stay.
        """
        holders = sorted(((each.held_bytes, n, each) for n, each in enumerate(self.open)), reverse=True)
        count = freed_bytes = 0
        for held_bytes, _, connection in holders:
            if freed_bytes >= wanted_bytes or held_bytes < HELD_BYTES_MIN:
                break
            if connection.cut() is not Fate.CUT_OFFERED:  # that one is another worker's by now
                connection.abort()
                self.closed(connection, Fate.CUT_MEMORY)
                count, freed_bytes = count + 1, freed_bytes + held_bytes
        return count, freed_bytes

    @property
    def _is_over(self) -> bool:
        """There are as many as may be, or memory is short."""
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

    def count_adopted(self, connection: Connection) -> None:
        """A connection that was taken in was not accepted here: another worker has handed it off."""
        self.accepted -= 1
        self.adopted += 1
        self._adopted.add(connection)

    def count_own(self) -> None:
        """A connection that was taken in was not accepted: this process has both of its ends."""
        self.accepted -= 1

    def forget(self, connection: Connection) -> None:
        """A connection was not accepted here, and is not handed off either: another worker keeps it."""
        self.accepted -= 1
        self._let_go(connection)

    def replace(self, connection: Connection, successor: Connection) -> None:
        """A connection goes on as another object; it stays one connection, and is told if the worker is leaving."""
        self.open[successor] = self.open.pop(connection)
        if connection in self._adopted:
            self._adopted.remove(connection)
            self._adopted.add(successor)
        self._stops_moving(connection)
        if self.is_leading:
            self.tell(successor)

    def closed(self, connection: Connection, fate: Fate = Fate.FINISHED) -> None:
        """Let a connection go, and count its fate if the worker accepts no more, or if it was cut."""
        if not self._let_go(connection):
            return
        if self._is_counting:
            self.fates[fate] += 1
        if fate.is_cut:
            self.cuts[fate] += 1

    def _let_go(self, connection: Connection) -> bool:
        if self.open.pop(connection, None) is None:
            return False
        self.gauge[0] = len(self.open)
        self._adopted.discard(connection)
        self._stops_moving(connection)
        if self.maximum:
            self._see_room()
        if self._empty is not None and not self.open:
            self._empty.set()
            self._empty = None
        return True

    @property
    def is_full(self) -> bool:
        """Nothing should be accepted until `on_room` is called."""
        return self._is_full

    @property
    def is_leaving(self) -> bool:
        """The worker drains."""
        return self._is_draining

    @property
    def room(self) -> int:
        """How many more connections may come from other workers."""
        if self._is_draining:
            return 0
        return max(0, self.maximum - len(self.open)) if self.maximum else ROOM_MAX

    async def wait_freed(self) -> None:
        """Return when one more connection may come from another worker."""
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
        """One more request was taken up (for ``max_requests`` and the status)."""
        self.requests += 1
        if self.requests == self.requests_max:
            self.has_reached_requests_max()

    def has_reached_requests_max(self) -> None:
        """For those that add to `requests` themselves."""
        if self.on_requests_max is not None:
            self.on_requests_max()

    def count_fates(self, is_counting: bool) -> None:
        """Count what becomes of connections from now on, or forget what was counted."""
        self._is_counting = is_counting
        if not is_counting:
            self.fates.clear()

    def deadline(self, timeout_s: float) -> asyncio.Timeout:
        """The timeout of a drain, which `hurry` brings forward to now; also if that was called before."""
        self._deadline = asyncio.timeout(0.0 if self._is_hurried else timeout_s)
        return self._deadline

    def drain(self, timeout_s: float) -> None:
        """Tell the application, and every connection soon, that the worker leaves in `timeout_s` seconds."""
        self._is_counting = self._is_draining = True
        self.draining._start(timeout_s)
        self.lead(self._ready)

    def hurry(self) -> None:
        """End the drain now, or as soon as it begins: the server cuts what is open, and counts it."""
        self._is_hurried = True
        self.draining._hurry()
        if self._deadline is not None:
            with suppress(RuntimeError):  # that drain has ended
                self._deadline.reschedule(self._now())

    def resume(self) -> None:
        """The worker stays after all. Whoever was told that it leaves, leaves; nobody else is."""
        self._is_draining = self._is_hurried = False
        self._ready = None
        self._untold = []
        self._moving.clear()
        self.crowded.clear()
        self.draining._stop()

    def lead(self, ready: Ready | None) -> None:
        """From now on connections can be handed off to somebody, or to nobody any more.

        Args:
            ready: Called with each connection that is at a safe point; None if nobody takes them.
        """
        was_leading, self._ready = self.is_leading, ready
        chosen = [] if was_leading else list(self._moving)  # by `lead_some`
        self._moving.clear()
        self.crowded.clear()
        self._untold = list(self.open) if was_leading or self.is_leading else chosen
        self._tell_some()

    def lead_some(self, ready: Ready, count: int, stay_s: float) -> None:
        """Hand off about so many connections, chosen by chance, while the worker serves on; `lead` ends it.

        Args:
            ready: As for `lead`.
            stay_s: Those that came from another worker more recently than that stay.
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
        """Whether connections are told something: the worker leaves, or others can go on with them."""
        return self._is_draining or (self.moves_early and self._ready is not None)

    def tell(self, connection: Connection) -> None:
        """Be handed off, or drain if the worker leaves, or else stay."""
        if self._ready is None or not connection.prepare_handoff(self._ready):
            self.not_taken(connection)
        elif connection.will_move and connection in self.open:
            self.will_move(connection)

    def will_move(self, connection: Connection) -> None:
        """A connection comes to a safe point, or is at one."""
        self._moving.add(connection)

    def not_taken(self, connection: Connection) -> None:
        """Nobody goes on with this connection: it drains if the worker leaves, or else stays."""
        self._stops_moving(connection)
        if self._is_draining:
            connection.drain()
        else:
            connection.stay()

    def cut(self) -> None:
        """Close what is still open and count it by kind."""
        self._is_counting = True
        for connection in list(self.open):
            is_crowded = connection in self.crowded
            fate = connection.cut()
            self.closed(connection, Fate.CLOSED_NO_ROOM if is_crowded and fate is Fate.IDLE_CLOSED else fate)

    async def wait_empty(self) -> None:
        """Return when no connection is open."""
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
    """How an application of one kind meets a worker."""

    async def startup(self) -> None:
        """Make the application ready to serve.

        Raises:
            StartError: The application said, or showed, that it cannot start (HP5xx).
        """

    def connection(self) -> asyncio.BaseProtocol:
        """One protocol object for one accepted socket; it registers itself before it returns.

        Before ``connection_made`` its attribute ``sock`` is set to the socket, and ``endpoints`` to the peer's address
        and our own, as they are or as a trusted proxy has told them; in the second case ``is_proxied`` to True.
        """

    def adopt(self, envelope: Envelope) -> asyncio.BaseProtocol:
        """One protocol object that goes on with another worker's connection; otherwise as `connection`.

        Whatever can fail, fails here: the other worker lets go of the connection next.

        Raises:
            NotAdopted: It cannot go on here; nothing is registered.
        """

    async def finish(self) -> None:
        """Return when nothing runs on for connections that have ended; bounded by the caller, within the drain."""

    async def shutdown(self) -> None:
        """Cancel what still runs, and release what `startup` took; called when no connection is left."""
