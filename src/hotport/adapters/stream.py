"""Applications that are an async function over a byte stream.

The stream is an `anyio.abc.ByteStream`, so everything that anyio builds on streams (buffered, text, TLS, object
streams) works with it. It is an object of our own rather than anyio's because the bytes that were received
and not consumed must be known exactly.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context as Variables
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute

from hotport.adapters.base import Context, Draining, NotAdopted, Offer, Ready
from hotport.adapters.handoff import (
    Handoff,
    bound,
    end_for_client,
    end_handoff,
    make_offer,
    prepare,
    reset_for_client,
    stands_still,
)
from hotport.model.fates import Fate
from hotport.wire.envelope import Envelope, StreamState, encode_state

__all__ = ["Stream", "StreamAdapter", "StreamAttribute", "StreamHandler", "hand_off", "restartable"]

log = logging.getLogger("hotport.stream")

#: Reading pauses while more than this waits for the application.
UNREAD_BYTES_MAX = 256 * 1024


class StreamAttribute(anyio.TypedAttributeSet):
    """The attributes of `Stream.extra` beside `anyio.abc.SocketAttribute`."""

    #: set when the worker leaves
    draining: Draining = anyio.typed_attribute()


StreamHandler = Callable[["Stream"], Awaitable[None]]

H = TypeVar("H", bound=StreamHandler)

_current: ContextVar[Stream] = ContextVar("hotport.stream")


def restartable(handler: H) -> H:
    """Declare that the next generation may restart a stream handler whenever it waits in ``receive()``.

    By then the handler must have processed everything that it has received, or noted it in ``stream.state``. Its task
    is cancelled there; the next generation's handler gets the same connection and the same ``stream.state``.
    """
    handler.is_restartable = True  # type: ignore[attr-defined]
    return handler


async def hand_off(state: Any = None) -> None:
    """Call `Stream.hand_off` of the stream whose handler calls this."""
    await _current.get().hand_off(state)


class StreamAdapter:
    """Runs one task of the handler for each connection."""

    def __init__(self, handler: StreamHandler, context: Context) -> None:
        self._handler = handler
        self._context = context
        self._moved: set[asyncio.Task[None]] = set()

    async def startup(self) -> None:
        """Do nothing: the handler was imported."""

    def connection(self) -> asyncio.BaseProtocol:
        """Make a stream; its handler starts in ``connection_made``."""
        return Stream(self._handler, self._context, self._moved)

    def adopt(self, envelope: Envelope) -> asyncio.BaseProtocol:
        """Make a stream that continues another worker's; its handler starts in ``connection_made``.

        Raises:
            NotAdopted: It is of another kind.
        """
        if not isinstance(envelope.state, StreamState):
            raise NotAdopted("a stream handler has no such connections")
        stream = Stream(self._handler, self._context, self._moved)
        stream.restore(envelope.state.application, envelope.unread)
        return stream

    async def finish(self) -> None:
        """Wait for the handlers of moved connections; all other handlers end before their connections."""
        while self._moved:
            await asyncio.wait(self._moved)

    async def shutdown(self) -> None:
        """Do nothing."""


class Stream(ByteStream, asyncio.Protocol):
    """One connection, as its handler sees it.

    Attributes:
        state: What the handler of the next worker needs if the connection moves: anything that JSON can hold, and
            bytes. None at first.

    When the handler returns, the stream is closed after everything sent has left. When it raises, the error is logged
    and the connection is reset, so that the client does not take a truncated answer for a complete one.
    """

    kind = "stream"
    moved_fate = Fate.MOVED_STREAM

    def __init__(self, handler: StreamHandler, context: Context, moved: set[asyncio.Task[None]]) -> None:
        self.state: Any = None
        self.endpoints: tuple[Any, Any] | None = None
        self.is_proxied = False
        self.sock: socket.socket | None = None
        self._handler = handler
        self._moved = moved
        self._connections = context.connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._unread = bytearray()
        self._is_paused = False
        self._is_at_eof = False
        self._is_lost = False
        self._is_closed = False
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._reader: asyncio.Future[None] | None = None
        self.handoff: Handoff | None = None
        #: While the handler waits in `hand_off`: resolved if the connection stays.
        self._stays: asyncio.Future[None] | None = None
        self._connections.opened(self)
        self._connections.count_request()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has classes of its own
        self._task = self._loop.create_task(self._run(), context=Variables())
        if self.handoff is not None:  # the worker began to leave before there was a transport
            self._connections.tell(self)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if len(self._unread) > UNREAD_BYTES_MAX and not self._is_paused:
            assert self._transport is not None
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._is_at_eof = True
        self._wake()
        return True  # the other direction stays open: half-closed clients still want their answer

    def connection_lost(self, exc: Exception | None) -> None:
        end_for_client(self, self.handoff)
        self._is_lost = True
        self._is_at_eof = self._is_at_eof or exc is None
        self._is_writable.set()
        self._wake()
        if self._task is None or self._task.done():
            self._connections.closed(self)

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()
        self._come_to_rest()

    # -- Connection ----------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        return len(self._unread) + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def drain(self) -> None:
        """Stay: the handler reads the drain from `StreamAttribute.draining`."""
        self.stay()

    def stay(self) -> None:
        if end_handoff(self) and self._stays is not None and not self._stays.done():
            self._stays.set_result(None)

    def cut(self) -> Fate:
        """Cancel the handler and close."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.close()
        if stands_still(self.handoff):
            self._is_lost = True  # write nothing more: another process may own the connection
            return Fate.CUT_OFFERED
        return Fate.CUT_STREAM

    # -- handing it off ------------------------------------------------------------------------------------

    @property
    def is_at_safe_point(self) -> bool:
        """Whether the handler waits in `hand_off`, or, if it is restartable, in `receive`."""
        if self._transport is None or self._is_at_eof or self._is_lost or self._is_closed:
            return False
        if self._stays is not None:
            return not self._stays.done()
        is_waiting = self._reader is not None and not self._reader.done()
        return is_waiting and getattr(self._handler, "is_restartable", False)

    @property
    def will_move(self) -> bool:
        """Whether the handler is restartable, or waits in `hand_off` now."""
        return self.handoff is not None and (self.is_at_safe_point or getattr(self._handler, "is_restartable", False))

    def prepare_handoff(self, ready: Ready) -> bool:
        """Prepare every stream but those whose TLS cannot move."""
        if self._transport is not None and bound(self._transport):
            return False
        prepare(self, self._connections, ready)
        return True

    def _come_to_rest(self) -> None:
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    def offer(self) -> Offer | None:
        if self.handoff is None or self._transport is None:
            return None
        return self.handoff.offer(self, self._transport)

    def hold(self) -> None:
        """Stop reading: what the client sends waits in the kernel."""
        assert self._transport is not None
        self._transport.pause_reading()

    def pack(self) -> Offer:
        """Pack the handler's state and the bytes that it has not received."""
        assert self._transport is not None
        encode_state(self.state)
        self._is_writable.clear()  # `send` waits
        return make_offer(
            self._transport, self.endpoints, self.is_proxied, StreamState(self.state), bytes(self._unread)
        )

    def keep(self) -> None:
        if self.handoff is not None and self._transport is not None and not self._is_lost:
            self.handoff.keep(self, self._transport)

    def resume(self, was_offered: bool) -> None:
        """Let the handler send again, and resume reading if there is room."""
        transport = self._transport
        if transport is None or self._is_lost:
            return
        if was_offered:
            self._is_writable.set()
        transport.set_write_buffer_limits()
        if not self._is_paused and not transport.is_closing():
            transport.resume_reading()

    def release(self) -> None:
        """Cancel the handler where it waits, and close the descriptor."""
        assert self._transport is not None
        self._is_closed = self._is_lost = True
        self._is_writable.set()
        if self._task is not None and not self._task.done():
            self._moved.add(self._task)
            self._task.add_done_callback(self._moved.discard)
            self._task.cancel()
        self._transport.abort()  # closes our descriptor only: another process owns the connection

    def why_here(self) -> str:
        if self._transport is not None and (why := bound(self._transport)):
            return why
        if self.is_at_safe_point:
            return "slow to read"
        return "its handler has not agreed to move"

    def restore(self, state: Any, unread: bytes) -> None:
        """Take over the state of another worker's stream; called before there is a transport."""
        self.state = state
        self._unread += unread

    async def hand_off(self, state: Any = None) -> None:
        """Agree that the connection moves to the next generation, if this worker leaves.

        Call it where the handler has processed everything that it has received. If the connection moves, the handler's
        task is cancelled here, and the next generation's handler is started with it. Otherwise this returns: at once
        while the worker stays, or when no worker can take the connection.

        Args:
            state: Becomes ``stream.state``, here and there.

        Raises:
            CancelledError: The connection has moved.
        """
        self.state = state
        await anyio.lowlevel.checkpoint()
        if self.handoff is None or self._stays is not None:
            return
        self._stays = self._loop.create_future()
        self._come_to_rest()
        try:
            await self._stays
        finally:
            self._stays = None

    # -- anyio.abc.ByteStream ------------------------------------------------------------------------------

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive at least one byte, at most `max_bytes`.

        Raises:
            EndOfStream: The client has sent everything.
            BrokenResourceError: The connection was lost.
            ClosedResourceError: The stream was closed here.
            BusyResourceError: Another task is receiving.
        """
        await anyio.lowlevel.checkpoint()
        if self._is_closed:
            raise anyio.ClosedResourceError
        if self._reader is not None:
            raise anyio.BusyResourceError("receiving from")
        if not self._unread and not self._is_at_eof and not self._is_lost:
            self._reader = self._loop.create_future()
            self._come_to_rest()
            try:
                await self._reader
            finally:
                self._reader = None
        if not self._unread:
            if self._is_closed:
                raise anyio.ClosedResourceError
            if self._is_at_eof:
                raise anyio.EndOfStream
            raise anyio.BrokenResourceError
        data = bytes(self._unread[:max_bytes])
        del self._unread[:max_bytes]
        if self._is_paused and len(self._unread) <= UNREAD_BYTES_MAX // 2 and not self._is_lost:
            assert self._transport is not None
            self._is_paused = False
            if not stands_still(self.handoff):  # else `resume` does it
                self._transport.resume_reading()
        return data

    async def send(self, item: bytes) -> None:
        """Send `item`; returns when the transport's buffer has room again.

        Raises:
            BrokenResourceError: The connection was lost.
            ClosedResourceError: The stream was closed here.
        """
        await anyio.lowlevel.checkpoint()
        await self._wait_writable()
        if self._is_closed:
            raise anyio.ClosedResourceError
        if self._is_lost:
            raise anyio.BrokenResourceError
        assert self._transport is not None
        self._transport.write(item)
        await self._is_writable.wait()

    async def _wait_writable(self) -> None:
        while not self._is_writable.is_set():  # the connection may stand still again before this runs
            await self._is_writable.wait()

    async def send_eof(self) -> None:
        """End the sending direction after everything sent; over TLS 1.2 this closes both directions."""
        assert self._transport is not None
        await self._wait_writable()
        if self._is_lost:
            return  # lost, or another process owns the connection
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close after everything sent has left."""
        self._close()
        await anyio.lowlevel.checkpoint()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The values of `anyio.abc.SocketAttribute` and `StreamAttribute`; a proxy's addresses if it has told any."""
        assert self._transport is not None
        transport = self._transport
        peer, own = self.endpoints or (transport.get_extra_info("peername"), transport.get_extra_info("sockname"))
        return {
            SocketAttribute.family: lambda: transport.get_extra_info("socket").family,
            SocketAttribute.local_address: lambda: own,
            SocketAttribute.remote_address: lambda: peer,
            SocketAttribute.raw_socket: lambda: transport.get_extra_info("socket"),
            StreamAttribute.draining: lambda: self._connections.draining,
        }

    # -- the handler's task --------------------------------------------------------------------------------

    async def _run(self) -> None:
        assert self._transport is not None
        token = _current.set(self)
        try:
            await self._handler(self)
        except Exception as error:
            if self._is_lost and isinstance(error, anyio.BrokenResourceError):
                log.debug("client left: %r", error)
            else:
                log.exception("stream handler failed")
                self._connections.errors += 1
            self._is_closed = True
            if stands_still(self.handoff):  # another process may serve it
                await self._wait_writable()
            if not self._is_lost:
                reset_for_client(self, self._transport)
        finally:
            _current.reset(token)  # break the cycle of stream, task and context
            self._close()
            if self._is_lost:
                self._connections.closed(self)

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._wake()
            if self._transport is not None:
                self._transport.close()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
