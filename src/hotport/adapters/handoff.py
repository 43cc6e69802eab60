"""Take connections to an offer and back, and end only connections that no other process may serve.

From `prepare` on a connection reports its *safe points*. The worker calls `offer` at one of them; then the connection
stands still until it is kept, released or cut. `Handoff` drives this for every kind of connection.
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
from hotport.wire.tlsrecords import NotMovable, Phase, TlsState

__all__ = [
    "Handoff",
    "Movable",
    "Stage",
    "abort_for_client",
    "bound",
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
    """The stages of a handoff; a connection has no `Handoff` before `prepare`."""

    PREPARED = "reports its safe points, and is served meanwhile"
    WANTED = "was asked for at no safe point: is held at the next one"
    OFFERED = "stands still: another process may serve it"


PREPARED: Final = Stage.PREPARED
WANTED: Final = Stage.WANTED
OFFERED: Final = Stage.OFFERED


class TlsLayer(Protocol):
    """The interface that a handoff needs of a connection's TLS: ``get_extra_info("tls_layer")`` of its transport."""

    phase: Phase

    @property
    def why_not(self) -> str:
        """Why it cannot move; empty if it can."""

    def export(self) -> TlsState:
        """Freeze it, and return its state.

        Raises:
            NotMovable: It stays as it is.
        """

    def keep(self) -> None:
        """Thaw it: its state was not taken."""


class Movable(Connection, Protocol):
    """The interface that a `Handoff` needs of its connection."""

    handoff: Handoff | None

    @property
    def is_at_safe_point(self) -> bool:
        """Whether the client waits for nothing, and every byte that was read and not consumed is known.

        `Handoff` itself checks that everything that was written has left.
        """

    def hold(self) -> None:
        """Stop reading, so that the connection stays at its safe point."""

    def pack(self) -> Offer | None:
        """Stop writing and waiting, and return the offer.

        Returns:
            None if the application declines for now; `resume` is called.

        Raises:
            Exception: The application failed, or its state cannot be encoded: the connection stays here.
        """

    def resume(self, was_offered: bool) -> None:
        """Read, write and wait again."""


class Handoff:
    """Drives one connection from its safe points to an offer, and back if no process takes it."""

    __slots__ = ("_connections", "ready", "stage")

    def __init__(self, connections: Connections, ready: Ready) -> None:
        self._connections = connections
        self.ready = ready
        self.stage = PREPARED

    def come_to_rest(self, connection: Movable) -> bool:
        """Report the connection if it is at a safe point; True if it is held there for an offer requested before."""
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
        self.stage = OFFERED  # before `pack`, in which the application must not report safe points
        try:
            offer = connection.pack()
        except NotMovable as error:
            log.info("a TLS connection stays: %s", error)
            self.keep(connection, transport)
            self._connections.not_taken(connection)
            return None
        except Exception:
            log.exception("the application could not export its state, and its connection stays: %s", connection)
            self.keep(connection, transport)
            self._connections.not_taken(connection)
            return None
        if offer is None:
            self.stage = PREPARED
            connection.resume(was_offered=False)
        return offer

    def keep(self, connection: Movable, transport: asyncio.BaseTransport) -> None:
        """See `Connection.keep`."""
        was_offered, self.stage = self.stage is OFFERED, PREPARED
        if (layer := _tls_layer(transport)) is not None and layer.phase is Phase.FROZEN:
            layer.keep()
        connection.resume(was_offered)


def prepare(connection: Movable, connections: Connections, ready: Ready) -> None:
    """Call `ready` at each safe point of a connection; at once if it is at one."""
    if connection.handoff is None:
        connection.handoff = Handoff(connections, ready)
    connection.handoff.ready = ready
    connection.handoff.come_to_rest(connection)


def end_handoff(connection: Movable) -> bool:
    """Stop reporting safe points and resume; False, and no change, if the connection stands still."""
    handoff = connection.handoff
    if stands_still(handoff):
        return False
    connection.handoff = None  # before `resume`, which would report safe points
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
    """Make the offer of a connection that stands still; see `Envelope`.

    Raises:
        NotMovable: Its TLS cannot move now.
    """
    peer, own = endpoints or (None, None)
    layer = _tls_layer(transport)
    tls = None if layer is None else layer.export()
    return Offer(transport.get_extra_info("socket").fileno(), Envelope(peer, own, is_proxied, unread, state, tls))


def bound(transport: asyncio.BaseTransport) -> str:
    """Why a connection's TLS cannot move; empty if it can, or if there is none."""
    if (layer := _tls_layer(transport)) is not None:
        return f"TLS: {layer.why_not}" if layer.why_not else ""
    return "" if transport.get_extra_info("ssl_object") is None else "TLS"


def _tls_layer(transport: asyncio.BaseTransport) -> TlsLayer | None:
    return transport.get_extra_info("tls_layer")  # type: ignore[no-any-return]


def end_for_client(connection: Connection, handoff: Handoff | None) -> None:
    """Shut the socket down in `connection_lost`, even if a forked child has a duplicate of its descriptor.

    Skips connections that another process may serve by now.
    """
    if has_forked() and connection.sock is not None and not stands_still(handoff):
        end(connection.sock)


def abort_for_client(connection: Connection, transport: asyncio.Transport, handoff: Handoff | None) -> None:
    """Close a connection at once, as `end_for_client` does, and drop unsent data.

    Data written in this turn of the event loop may still leave: uvloop before 0.22 writes it at the end of the turn.
    """
    if has_forked():  # after this turn, and before the transport's own callback closes the descriptor
        asyncio.get_running_loop().call_soon(end_for_client, connection, handoff)
    transport.abort()


def reset_for_client(connection: Connection, transport: asyncio.Transport) -> None:
    """Reset a connection that has not moved, so that its client does not see an orderly end."""
    if connection.sock is not None:
        reset(connection.sock, is_shared=has_forked())
    transport.abort()


def taken_bytes(transport: asyncio.Transport, sock: socket.socket | None) -> int:
    """How many written bytes the peer has taken, from an arbitrary origin.

    For TCP the peer's kernel acknowledges them. Otherwise the result is minus the unsent bytes, which grows alike while
    nothing more is written.
    """
    if sock is None:
        return -transport.get_write_buffer_size()
    return acknowledged_bytes(sock) or -transport.get_write_buffer_size() - unsent_bytes(sock)
