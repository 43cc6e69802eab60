"""What a worker and the connections it serves agree on.

A worker accepts sockets and hands each one to a protocol object that an `Adapter` makes. The protocol object
reports its life to the `Connections` registry; the registry tells it when the worker leaves.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Adapter", "Connection", "Connections", "Context", "Draining"]


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


class Connection(Protocol):
    """What the worker asks of every connection; the protocol objects implement it."""

    def drain(self) -> None:
        """The worker leaves: finish what was begun, and let the next answer be the last.

        Must not close a connection on which the client may have begun to send.
        """

    def cut(self) -> str:
        """Close now, as politely as the protocol allows, and return the fate to count.

        ``"idle_closed"`` if no request was lost by it, else ``"cut_"`` and the state it was in.
        """


class Connections:
    """Every connection that was accepted here and has not ended.

    A protocol object calls `opened` when it is made, before any byte is read, and `closed` exactly once.
    """

    def __init__(self, *, maximum: int = 0, requests_max: int = 0) -> None:
        self.open: set[Connection] = set()
        self.draining = Draining()
        self.fates: Counter[str] = Counter()
        self.accepted = 0
        self.requests = 0
        self.maximum = maximum
        self.requests_max = requests_max
        self.on_full: Callable[[], None] | None = None
        self.on_room: Callable[[], None] | None = None
        self.on_requests_max: Callable[[], None] | None = None
        self._is_counting = False
        self._is_full = False
        self._is_draining = False
        self._empty: asyncio.Event | None = None

    def opened(self, connection: Connection) -> None:
        """Take a connection into the registry; it is told at once if the worker is already leaving."""
        self.open.add(connection)
        self.accepted += 1
        if self._is_draining:
            connection.drain()
        if self.maximum and len(self.open) >= self.maximum and not self._is_full:
            self._is_full = True
            if self.on_full is not None:
                self.on_full()

    def replace(self, connection: Connection, successor: Connection) -> None:
        """A connection goes on as another object; it stays one connection, and is told if the worker is leaving."""
        self.open.remove(connection)
        self.open.add(successor)
        if self._is_draining:
            successor.drain()

    def closed(self, connection: Connection, fate: str = "finished") -> None:
        """Let a connection go, and count its fate if the worker accepts no more."""
        if connection not in self.open:
            return
        self.open.discard(connection)
        if self._is_counting:
            self.fates[fate] += 1
        if self._is_full and len(self.open) < self.maximum:
            self._is_full = False
            if self.on_room is not None:
                self.on_room()
        if self._empty is not None and not self.open:
            self._empty.set()
            self._empty = None

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

    def drain(self, timeout_s: float) -> None:
        """Tell the application and every connection that the worker leaves in `timeout_s` seconds."""
        self._is_counting = self._is_draining = True
        self.draining._start(timeout_s)
        for connection in list(self.open):
            connection.drain()

    def cut(self) -> None:
        """Close what is still open and count it by kind."""
        for connection in list(self.open):
            self.closed(connection, connection.cut())

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

        Before ``connection_made`` its attribute ``endpoints`` is set to the peer's address and our own, as they are or
        as a trusted proxy has told them; in the second case ``is_proxied`` to True.
        """

    async def finish(self) -> None:
        """Return when nothing runs on for connections that have ended; bounded by the caller, within the drain."""

    async def shutdown(self) -> None:
        """Cancel what still runs, and release what `startup` took; called when no connection is left."""
