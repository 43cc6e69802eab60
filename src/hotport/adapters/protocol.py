"""Applications that are an `asyncio.Protocol` factory.

The transport calls the application's own object directly: the tracking wrapper gives the event loop the application's
bound methods, and intercepts only ``connection_made`` and ``connection_lost``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

from hotport.adapters.base import Context, NotAdopted, Offer, Ready
from hotport.adapters.handoff import (
    Handoff,
    bound,
    end_for_client,
    end_handoff,
    make_offer,
    prepare,
    stands_still,
)
from hotport.model.fates import Fate
from hotport.wire.envelope import Envelope, ProtocolState, encode_state

__all__ = ["ProtocolAdapter", "Transferable"]

log = logging.getLogger("hotport.protocol")


@runtime_checkable
class Transferable(Protocol):
    """The two methods of an `asyncio.Protocol` whose connection can move to the next generation.

    It may have a third, ``transfer_wanted(ask)``, called when its worker leaves. A protocol that declines for reasons
    other than what its client sends calls ``ask()`` when it has become ready.
    """

    def export_state(self) -> Any:
        """Return the state that the next process's protocol needs: anything that JSON can hold, and bytes.

        Called while the worker leaves, when everything that was written has left. Nothing is read, and nothing may be
        written after the ``pause_writing()`` that comes before. It must change nothing: if no process takes the
        connection, this protocol continues after ``resume_writing()``, else ``connection_lost(None)`` is called.

        Returns:
            None to decline now; it is asked again when the client has sent more.
        """

    def import_state(self, state: Any) -> None:
        """Restore an exported `state`; called on a new object, before ``connection_made``."""


class ProtocolAdapter:
    """Makes one application protocol for each connection, and tracks it.

    An application protocol may have ``drain_started(draining)``: it is called once when its worker leaves, with
    a `hotport.Draining`. Without it the connection is served until one side closes it, or the deadline cuts it.

    It may have ``proxied(source, destination)``: called before ``connection_made`` if a PROXY header has told these
    addresses; the transport's addresses are those of the connection to the proxy.
    """

    def __init__(
        self,
        factory: Callable[[], asyncio.Protocol | asyncio.BufferedProtocol],
        context: Context,
    ) -> None:
        self._factory = factory
        self._context = context

    async def startup(self) -> None:
        """Do nothing: the factory was imported."""

    def connection(self) -> asyncio.BaseProtocol:
        """Make a tracked protocol."""
        return self._tracked(self._factory())

    def adopt(self, envelope: Envelope) -> asyncio.BaseProtocol:
        """Make a tracked protocol that has imported the state of another worker's.

        Raises:
            NotAdopted: The import failed, or the connection is of another kind.
        """
        if not isinstance(envelope.state, ProtocolState):
            raise NotAdopted("a protocol has no such connections")
        application = self._factory()
        if not isinstance(application, Transferable):
            raise NotAdopted(f"{type(application).__name__} has no import_state()")
        try:
            application.import_state(envelope.state.application)
        except Exception as error:
            log.exception("the application could not import the state of a connection")
            raise NotAdopted(f"import_state() raised {error!r}") from None
        return self._tracked(application)

    def _tracked(self, application: Any) -> asyncio.BaseProtocol:
        if isinstance(application, asyncio.BufferedProtocol):
            return _TrackedBuffered(application, self._context)
        return _Tracked(application, self._context)

    async def finish(self) -> None:
        """Do nothing: no task outlives its connection."""

    async def shutdown(self) -> None:
        """Do nothing."""


class _TrackedBase(asyncio.BaseProtocol):
    """Tracks an application protocol's connection, and forwards the loop's calls to it."""

    kind = "protocol"
    moved_fate = Fate.MOVED_PROTOCOL

    def __init__(self, application: Any, context: Context) -> None:
        self.endpoints: tuple[Any, Any] | None = None
        self.is_proxied = False
        self.sock: socket.socket | None = None
        self._application = application
        self._connections = context.connections
        self._transport: asyncio.Transport | None = None
        self.handoff: Handoff | None = None
        #: Whether the transport was reading when `pack` paused it; None while the application may write.
        self._was_reading: bool | None = None
        self._is_told = False
        # Instance attributes: event loops look these up on the protocol and then call the application directly.
        self.pause_writing = application.pause_writing  # type: ignore[method-assign]
        self.resume_writing = application.resume_writing  # type: ignore[method-assign]
        self.eof_received = application.eof_received
        self._connections.opened(self)
        self._connections.count_request()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has classes of its own
        if self.is_proxied and self.endpoints and (notice := getattr(self._application, "proxied", None)) is not None:
            notice(*self.endpoints)
        self._application.connection_made(transport)
        if self._connections.is_leading:
            self._connections.tell(self)

    def connection_lost(self, exc: Exception | None) -> None:
        end_for_client(self, self.handoff)
        self._connections.closed(self)
        self._application.connection_lost(exc)

    def drain(self) -> None:
        """Call the application's ``drain_started`` once, if there is one."""
        if not end_handoff(self):
            return
        notice = getattr(self._application, "drain_started", None)
        if notice is not None and self._transport is not None and not self._is_told:
            self._is_told = True
            self._tell_application(notice, self._connections.draining)

    def stay(self) -> None:
        end_handoff(self)

    def cut(self) -> Fate:
        """Close; the transport still tries to flush what the application has written."""
        if self._transport is not None:
            self._transport.close()
        return Fate.CUT_OFFERED if stands_still(self.handoff) else Fate.CUT_PROTOCOL

    @property
    def held_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- handing it off ------------------------------------------------------------------------------------

    @property
    def will_move(self) -> bool:
        return self.handoff is not None

    def prepare_handoff(self, ready: Ready) -> bool:
        """Prepare a `Transferable`, unless its TLS cannot move."""
        transport = self._transport
        if transport is None:
            return True  # `connection_made` calls this again
        if not isinstance(self._application, Transferable) or bound(transport):
            return False
        if self.handoff is None:
            self._look_on()
            transport.set_protocol(self)  # makes the loop look up the wrapped methods
            if (notice := getattr(self._application, "transfer_wanted", None)) is not None:
                self._tell_application(notice, self._ask)
        prepare(self, self._connections, ready)
        return True

    def _tell_application(self, notice: Callable[[Any], object], what: object) -> None:
        """Call an application's method; log its failure, so that other connections are still notified."""
        try:
            notice(what)
        except Exception:
            log.exception("the application failed in %s", getattr(notice, "__qualname__", notice))

    def _look_on(self) -> None:
        """Wrap the application's methods, to check for a safe point after each receive and send."""
        application = self._application

        def resume_writing() -> None:
            application.resume_writing()
            self._ask()

        self.resume_writing = resume_writing  # type: ignore[method-assign]

    def _ask(self) -> None:
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    @property
    def is_at_safe_point(self) -> bool:
        """True once attached: only the application knows its safe points, and `pack` asks it."""
        return self._transport is not None

    def offer(self) -> Offer | None:
        if self.handoff is None or self._transport is None:
            return None
        return self.handoff.offer(self, self._transport)

    def hold(self) -> None:
        """Do nothing: the application continues to read until `pack`."""

    def pack(self) -> Offer | None:
        """Export the application's state, after telling it to write no more."""
        transport = self._transport
        assert transport is not None
        self._was_reading = transport.is_reading()
        if self._was_reading:
            transport.pause_reading()
        self._application.pause_writing()
        state = self._application.export_state()
        encode_state(state)
        return None if state is None else make_offer(transport, self.endpoints, self.is_proxied, ProtocolState(state))

    def keep(self) -> None:
        if self.handoff is not None and self._transport is not None:
            self.handoff.keep(self, self._transport)

    def resume(self, was_offered: bool) -> None:
        """Let the application write again."""
        transport, was_reading = self._transport, self._was_reading
        if transport is None:
            return
        transport.set_write_buffer_limits()
        self._was_reading = None
        if was_reading is not None and not transport.is_closing():
            self._application.resume_writing()
            if was_reading:
                transport.resume_reading()

    def release(self) -> None:
        """Close the descriptor; the application's ``connection_lost(None)`` is called."""
        assert self._transport is not None
        self._transport.abort()  # closes our descriptor only: another process owns the connection

    def why_here(self) -> str:
        if not isinstance(self._application, Transferable):
            return "its protocol has no export_state()"
        if self._transport is not None and (why := bound(self._transport)):
            return why
        return "its protocol has declined to move, or its client is slow to read"


class _Tracked(_TrackedBase, asyncio.Protocol):
    def __init__(self, application: asyncio.Protocol, context: Context) -> None:
        super().__init__(application, context)
        self.data_received = application.data_received  # type: ignore[method-assign]

    def _look_on(self) -> None:
        super()._look_on()
        received = self._application.data_received

        def data_received(data: bytes) -> None:
            received(data)
            self._ask()

        self.data_received = data_received  # type: ignore[method-assign]


class _TrackedBuffered(_TrackedBase, asyncio.BufferedProtocol):
    def __init__(self, application: asyncio.BufferedProtocol, context: Context) -> None:
        super().__init__(application, context)
        self.get_buffer = application.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = application.buffer_updated  # type: ignore[method-assign]

    def _look_on(self) -> None:
        super()._look_on()
        updated = self._application.buffer_updated

        def buffer_updated(nbytes: int) -> None:
            updated(nbytes)
            self._ask()

        self.buffer_updated = buffer_updated  # type: ignore[method-assign]
