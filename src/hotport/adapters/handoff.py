"""Take connections to an offer and back, and end them only if no other process may serve them.

A connection reports its *safe points* from `prepare` on. The worker asks for an offer at one of them; then the
connection stands still until it is kept, released or cut. `Handoff` drives this for every kind of connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from enum import Enum
from typing import Any, Final, Protocol

from hotport.adapters.base import Connection, Connections, Offer, Ready
from hotport.kernel.fork import has_forked
from hotport.kernel.sockets import acknowledged_bytes, end, reset, unsent_bytes
from hotport.wire.envelope import Envelope, State

__all__ = [
    "Handoff",
    "Movable",
    "Stage",
    "abort_for_client",
    "end_for_client",
    "end_handoff",
    "make_offer",
    "prepare",
    "reset_for_client",
    "stands_still",
    "taken_bytes",
]

log = logging.getLogger("hotport.handoff")


class Stage(Enum):
    """How far a connection has come; it has no `Handoff` before its worker leaves."""

    PREPARED = "reports its safe points, and is served meanwhile"
    WANTED = "was asked for at no safe point: is held at the next one"
    OFFERED = "stands still: another process may serve it"


PREPARED: Final = Stage.PREPARED
WANTED: Final = Stage.WANTED
OFFERED: Final = Stage.OFFERED


class Movable(Connection, Protocol):
    """What a `Handoff` asks of its connection."""

    handoff: Handoff | None

    @property
    def is_at_safe_point(self) -> bool:
        """The client waits for nothing, and what was read and not consumed is known byte by byte.

        `Handoff` checks by itself whether everything that was written has left.
        """

    def hold(self) -> None:
        """Stop reading, so that the safe point does not pass."""

    def pack(self) -> Offer | None:
        """Stop writing and waiting, and return what travels.

        Returns:
            None if the application declines for now; `resume` is called.

        Raises:
            Exception: The application failed, or its state cannot be encoded: the connection stays here.
        """

    def resume(self, was_offered: bool) -> None:
        """Read, write and wait again."""


class Handoff:
    """Drives one connection from its safe points to an offer, and back if it is not taken."""

    __slots__ = ("_connections", "ready", "stage")

    def __init__(self, connections: Connections, ready: Ready) -> None:
        self._connections = connections
        self.ready = ready
        self.stage = PREPARED

    def come_to_rest(self, connection: Movable) -> bool:
        """Report the connection if it is at a safe point; True if it is held there, because it was asked for before."""
        if self.stage is OFFERED or not connection.is_at_safe_point:
            return False
        if self.stage is WANTED:
            connection.hold()
        self.ready(connection)
        return self.stage is WANTED

    def offer(self, connection: Movable, transport: asyncio.Transport) -> Offer | None:
        """See `Connection.offer`."""
        if self.stage is OFFERED:
            return None
        self.stage = WANTED
        if not connection.is_at_safe_point:
            return None
        connection.hold()
        if transport.is_closing():
            return None
        if transport.get_write_buffer_size():
            transport.set_write_buffer_limits(high=0)  # `resume_writing` is called when everything has left
            return None
        self.stage = OFFERED  # before `pack`: what the application does in it is no safe point
        try:
            offer = connection.pack()
        except Exception:
            log.exception("the application could not export its state, and its connection stays: %s", connection)
            self.keep(connection)
            self._connections.not_taken(connection)
            return None
        if offer is None:
            self.stage = PREPARED
            connection.resume(was_offered=False)
        return offer

    def keep(self, connection: Movable) -> None:
        """See `Connection.keep`."""
        was_offered, self.stage = self.stage is OFFERED, PREPARED
        connection.resume(was_offered)


def prepare(connection: Movable, connections: Connections, ready: Ready) -> None:
    """Call `ready` at each safe point of a connection, and now if this is one."""
    if connection.handoff is None:
        connection.handoff = Handoff(connections, ready)
    connection.handoff.ready = ready
    connection.handoff.come_to_rest(connection)


def end_handoff(connection: Movable) -> bool:
    """Stop reporting safe points and resume; False, and no change, if the connection stands still."""
    handoff = connection.handoff
    if stands_still(handoff):
        return False
    connection.handoff = None  # first: `resume` would report safe points
    if handoff is not None:
        handoff.stage = PREPARED
        connection.resume(was_offered=False)
    return True


def stands_still(handoff: Handoff | None) -> bool:
    """Whether a connection is offered, so that nothing may be read from it or written to it here."""
    return handoff is not None and handoff.stage is OFFERED


def make_offer(
    transport: asyncio.Transport, endpoints: tuple[Any, Any] | None, is_proxied: bool, state: State, unread: bytes = b""
) -> Offer:
    """What a connection offers that stands still; see `Envelope`."""
    peer, own = endpoints or (None, None)
    return Offer(transport.get_extra_info("socket").fileno(), Envelope(peer, own, is_proxied, unread, state))


def end_for_client(connection: Connection, handoff: Handoff | None) -> None:
    """In `connection_lost`: let the client see the end even if a forked child has a duplicate of the descriptor.

    Not of a connection that another process may serve by now. Of one that speaks TLS the descriptor is closed before
    that is called; its client was told the end by TLS, or by `abort`.
    """
    if has_forked() and connection.sock is not None and not stands_still(handoff):
        end(connection.sock)


def abort_for_client(connection: Connection, transport: asyncio.Transport, handoff: Handoff | None) -> None:
    """End a connection at once, for the client as in `end_for_client`: what was written and has not left is lost.

    What was written in this turn has its chance: uvloop before 0.22 hands it to the kernel at the end of the turn.
    """
    if has_forked():  # behind this turn, and before the descriptor is closed, which is one that is called soon, too
        asyncio.get_running_loop().call_soon(end_for_client, connection, handoff)
    transport.abort()


def reset_for_client(connection: Connection, transport: asyncio.Transport) -> None:
    """End a connection that has not moved at once, so that its client cannot take it for an orderly end."""
    if connection.sock is not None:
        reset(connection.sock, is_shared=has_forked())
    transport.abort()


def taken_bytes(transport: asyncio.Transport, sock: socket.socket | None) -> int:
    """How much the peer has taken of what was written, from some beginning on.

    Its kernel says so for TCP. Otherwise it is what is left, which says as much while nothing more is written.
    """
    if sock is None:
        return -transport.get_write_buffer_size()
    return acknowledged_bytes(sock) or -transport.get_write_buffer_size() - unsent_bytes(sock)
