"""Applications that are an `asyncio.Protocol` factory.

The bytes go from the transport to the application's own object without a detour: the tracking wrapper lends the
event loop the application's bound methods and keeps only the two ends of the connection's life for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from hotport.adapters.base import Context

__all__ = ["ProtocolAdapter"]


class ProtocolAdapter:
    """Makes one application protocol for each connection, and tracks it.

    An application protocol may have ``drain_started(draining)``: it is called once when its worker leaves, with
    a `hotport.Draining`. Without it the connection goes on until one side closes it, or the deadline cuts it.

    It may have ``proxied(source, destination)``: called before ``connection_made`` if a PROXY header has told these
    addresses; what the transport knows is the connection to the proxy.
    """

    def __init__(
        self,
        factory: Callable[[], asyncio.Protocol | asyncio.BufferedProtocol],
        context: Context,
    ) -> None:
        self._factory = factory
        self._context = context

    async def startup(self) -> None:
        """Nothing to do: the factory was imported."""

    def connection(self) -> asyncio.BaseProtocol:
        """One tracked protocol."""
        application = self._factory()
        if isinstance(application, asyncio.BufferedProtocol):
            return _TrackedBuffered(application, self._context)
        return _Tracked(application, self._context)

    async def finish(self) -> None:
        """Nothing outlives its connection."""

    async def shutdown(self) -> None:
        """Nothing to do."""


class _TrackedBase(asyncio.BaseProtocol):
    """Stands between a transport and an application protocol; forwards what the loop asks for."""

    def __init__(self, application: Any, context: Context) -> None:
        self.endpoints: tuple[Any, Any] | None = None
        self.is_proxied = False
        self._application = application
        self._connections = context.connections
        self._transport: asyncio.Transport | None = None
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
        if self._connections.draining.is_set():
            self.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        self._application.connection_lost(exc)

    def drain(self) -> None:
        """Tell the application, if it wants to know."""
        notice = getattr(self._application, "drain_started", None)
        if notice is not None and self._transport is not None:
            notice(self._connections.draining)

    def cut(self) -> str:
        """Close; what the application has written is still sent as far as the peer takes it at once."""
        if self._transport is not None:
            self._transport.close()
        return "cut_protocol"


class _Tracked(_TrackedBase, asyncio.Protocol):
    def __init__(self, application: asyncio.Protocol, context: Context) -> None:
        super().__init__(application, context)
        self.data_received = application.data_received  # type: ignore[method-assign]


class _TrackedBuffered(_TrackedBase, asyncio.BufferedProtocol):
    def __init__(self, application: asyncio.BufferedProtocol, context: Context) -> None:
        super().__init__(application, context)
        self.get_buffer = application.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = application.buffer_updated  # type: ignore[method-assign]
