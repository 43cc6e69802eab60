"""A TLS transport over a plain one, of asyncio's event loop or uvloop's.

Those of the event loops are not used: they end both directions when the client has ended its own, they know less of
what is unsent than `asyncio.Transport.get_write_buffer_size` promises, and what they do cannot move to another process.
"""

from __future__ import annotations

import asyncio
from asyncio import constants, transports
from collections.abc import Iterable
from enum import Enum
from typing import Any, Final, Protocol

from hotport.wire.tlsrecords import IllegalTransition, Phase

__all__ = ["Layer", "TlsTransport"]


#: Bytes encrypted at once.
PIECE_BYTES: Final = 1 << 16


class Stage(Enum):
    """The stages of a connection."""

    SHAKING = "the protocol above does not know it"
    OPEN = "data is delivered"
    CLOSING = "the protocol above has closed it, or it has failed: what comes is dropped"


SHAKING: Final = Stage.SHAKING
OPEN: Final = Stage.OPEN
CLOSING: Final = Stage.CLOSING

LIVE: Final = Phase.LIVE
CLOSED: Final = Phase.CLOSED
BROKEN: Final = Phase.BROKEN


class Layer(Protocol):
    """What turns data into records and back: `hotport.worker.tlssession.Session`, or `hotport.worker.tlsadopted`."""

    phase: Phase
    #: What has come and is not decrypted.
    pending: bytes

    @property
    def error(self) -> Exception | None:
        """What has ended the connection."""

    @property
    def is_shaking(self) -> bool:
        """Whether the handshake is not done yet."""

    @property
    def can_half_close(self) -> bool:
        """Whether one direction may end before the other."""

    def extra(self, name: str, default: Any) -> Any:
        """See `asyncio.BaseTransport.get_extra_info`."""

    def receive(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """Decrypt; return data, and what to send."""

    def send(self, data: bytes | memoryview) -> bytes:
        """Encrypt."""

    def close(self) -> bytes:
        """Say close_notify; return what to send."""

    def leave(self) -> None:
        """Note that another process has the connection."""


class TlsTransport(asyncio.Protocol, transports._FlowControlMixin):  # the class that ``loop.sendfile`` wants
    """The protocol of the plain transport below, and the transport of the protocol above.

    What the protocol above writes is encrypted at once: the buffer of the transport below has all that is unsent, and
    its limits are those of this one.

    Args:
        handshake_timeout_s: Seconds from the connection to the end of its handshake.
        goodbye_timeout_s: Seconds from `close` to the client's close_notify; includes flushing, so clients may be slow.

    Attributes:
        handshake: Done when the handshake is. It has an OSError when the connection has ended before: then the protocol
            above never learns of it.
    """

    __slots__ = (
        "_above",
        "_below",
        "_deliver",
        "_error",
        "_goodbye_timeout_s",
        "_handshake_timeout_s",
        "_has_ended",
        "_is_known",
        "_is_lost",
        "_is_paused",
        "_layer",
        "_stage",
        "_timer",
        "handshake",
    )

    _sendfile_compatible = constants._SendfileMode.FALLBACK

    def __init__(
        self, protocol: asyncio.BaseProtocol, layer: Layer, *, handshake_timeout_s: float, goodbye_timeout_s: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._layer = layer
        self._above: Any = None
        self._deliver: Any = None
        self._below: Any = None
        self._stage = SHAKING
        self._is_known = False  # to the protocol above
        self._is_paused = False  # by the protocol above
        self._is_lost = False
        self._has_ended = False  # the client's direction, and the protocol above knows
        self._protocol_paused = False  # asyncio's name: whether the protocol above must not write
        self._error: Exception | None = None
        self._handshake_timeout_s = handshake_timeout_s
        self._goodbye_timeout_s = goodbye_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self.handshake: asyncio.Future[None] = self._loop.create_future()
        self.set_protocol(protocol)

    # -- called by the transport below ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._below = transport
        if self._stage is CLOSING:
            self._below.abort()
        elif self._layer.is_shaking:
            self._bound(self._handshake_timeout_s, "handshake")
        else:
            self._open()
            if self._is_paused:  # uvloop begins to read behind this, whatever was said meanwhile
                self._loop.call_soon(self._pause_below)

    def _pause_below(self) -> None:
        if self._is_paused and not self._below.is_closing():
            self._below.pause_reading()

    def data_received(self, data: bytes) -> None:
        layer = self._layer
        if self._is_paused and self._stage is OPEN:
            if layer.phase is Phase.FROZEN:
                raise IllegalTransition("received in frozen: another process would not have it")
            layer.pending += data
            return
        plain, written = layer.receive(data)
        if written:
            self._below.write(written)
        if plain and self._stage is OPEN:
            self._deliver(plain)
        if layer.phase is not LIVE or self._stage is SHAKING:
            self._see_change()

    def eof_received(self) -> bool:
        """End the connection, unless the client has said goodbye before and still wants an answer."""
        if self._stage is OPEN and self._layer.pending:
            self.data_received(b"")
        if self._stage is OPEN and not self._has_ended:
            self._has_ended = True
            self._above.eof_received()
            self.close()
        return self._stage is OPEN

    def connection_lost(self, exc: Exception | None) -> None:
        error = exc or self._error
        self._stage, self._is_lost = CLOSING, True
        if self._timer is not None:
            self._timer.cancel()
        above, self._above, self._deliver = self._above, None, None
        if not self.handshake.done():
            self.handshake.set_exception(error or ConnectionAbortedError("it has ended during the TLS handshake"))
        if self._is_known:
            above.connection_lost(error)

    def pause_writing(self) -> None:
        self._protocol_paused = True
        if self._is_known:
            self._above.pause_writing()

    def resume_writing(self) -> None:
        self._protocol_paused = False
        if self._is_known:
            self._above.resume_writing()

    def not_attached(self, error: BaseException) -> None:
        """Called in place of `connection_made`, or if that has failed."""
        self.connection_lost(error if isinstance(error, Exception) else None)

    # -- stages --------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._stage = OPEN
        if self._timer is not None:
            self._timer.cancel()
        self._is_known = True
        self.handshake.set_result(None)
        self._above.connection_made(self)
        if self._protocol_paused and self._above is not None:
            self._above.pause_writing()
        self._continue()

    def _continue(self) -> None:
        """Decrypt what waits: behind the handshake, or since reading was paused."""
        if self._layer.pending or self._layer.phase is not LIVE:
            self.data_received(b"")

    def _see_change(self) -> None:
        """Act on what the client has sent besides data."""
        layer = self._layer
        if layer.phase is BROKEN:
            self._fail(layer.error)
        elif self._stage is SHAKING:
            if not layer.is_shaking:
                self._open()
        elif self._stage is CLOSING:
            if layer.phase is CLOSED:
                self._below.close()
        elif layer.phase is not Phase.CLOSING and not self._has_ended and not self._is_paused:
            self._has_ended = True
            stays_open = self._above.eof_received()
            if not stays_open or layer.phase is CLOSED or not layer.can_half_close:
                self.close()

    def _fail(self, error: Exception | None) -> None:
        """End the connection; a last alert may still leave."""
        self._error = self._error or error
        self._stage = CLOSING
        self._below.close()
        self._bound(self._goodbye_timeout_s, "shutdown")

    def _bound(self, timeout_s: float, what: str) -> None:
        """Abort the connection unless it is another stage in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(timeout_s, self._expire, f"the TLS {what} takes more than {timeout_s:g} s")

    def _expire(self, why: str) -> None:
        self._error = self._error or TimeoutError(why)
        self.abort()

    # -- called by the protocol above ----------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._above = protocol
        is_buffered = isinstance(protocol, asyncio.BufferedProtocol)
        self._deliver = self._deliver_into_buffers if is_buffered else protocol.data_received  # type: ignore[attr-defined]

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._above  # type: ignore[no-any-return]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        found = self._layer.extra(name, self)
        return self._below.get_extra_info(name, default) if found is self else found

    def is_closing(self) -> bool:
        return self._stage is CLOSING or bool(self._below.is_closing())

    def is_reading(self) -> bool:
        return not self._is_paused and not self._has_ended and not self.is_closing()

    def pause_reading(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            if self._stage is OPEN:
                self._below.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if self._stage is OPEN:
                self._below.resume_reading()
                if self._layer.pending or self._layer.phase is not LIVE:
                    self._loop.call_soon(self._continue)

    def get_write_buffer_size(self) -> int:
        return self._below.get_write_buffer_size()  # type: ignore[no-any-return]

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._below.get_write_buffer_limits()  # type: ignore[no-any-return]

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._below.set_write_buffer_limits(high, low)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if type(data) is not bytes or len(data) > PIECE_BYTES:
            self.writelines((data,))
        elif data and self._stage is OPEN:
            try:
                self._below.write(self._layer.send(data))
            except (OSError, IllegalTransition) as error:
                self._not_sent(error)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Encrypt `PIECE_BYTES` at a time: OpenSSL's buffer keeps the size of the largest."""
        if self._stage is not OPEN:
            return
        views = [memoryview(data).cast("B") for data in list_of_data]
        try:
            for view in views:  # not with ``writelines``: asyncio's does not pause the protocol (Python 3.12)
                for at in range(0, len(view), PIECE_BYTES):
                    self._below.write(self._layer.send(view[at : at + PIECE_BYTES]))
        except (OSError, IllegalTransition) as error:
            self._not_sent(error)

    def _not_sent(self, error: Exception) -> None:
        if isinstance(error, OSError):  # ssl.SSLError is one
            self._fail(error)
        elif self._layer.phase is Phase.CLOSING or self._layer.phase is CLOSED:
            raise RuntimeError("write() is called after write_eof()") from None
        else:
            raise error

    def can_write_eof(self) -> bool:
        """Whether the client may still send after our close_notify: in TLS 1.3 (RFC 8446 section 6.1)."""
        return self._layer.can_half_close

    def write_eof(self) -> None:
        """Say close_notify; the client may still send."""
        if not self._layer.can_half_close:
            raise NotImplementedError("TLS 1.2 ends both directions at once")
        if self._stage is OPEN:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if goodbye := self._layer.close():
            self._below.write(goodbye)

    def close(self) -> None:
        """Flush, say close_notify, and drop what comes until the client has said it, too.

        A client that has ended without it gets none: hardly any reads on.
        """
        if self._stage is CLOSING:
            return
        if self._stage is SHAKING:
            self.abort()
            return
        self._stage = CLOSING
        if not self._has_ended or self._layer.phase is not LIVE:
            self._say_goodbye()
        if self._layer.phase is not Phase.CLOSING or self._has_ended:
            self._below.close()
        elif self._is_paused:
            self._below.resume_reading()
        self._bound(self._goodbye_timeout_s, "shutdown")

    def abort(self) -> None:
        """Close at once; if the connection was exported, only our descriptor, and for good."""
        if self._layer.phase is Phase.FROZEN:
            self._layer.leave()
        self._stage = CLOSING
        if self._below is not None and not self._is_lost:  # asyncio's fails if it is called too late
            self._below.abort()

    def _deliver_into_buffers(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            buffer = memoryview(self._above.get_buffer(len(view))).cast("B")
            size = min(len(view), len(buffer))
            if not size:
                raise RuntimeError("get_buffer() has returned an empty buffer")
            buffer[:size] = view[:size]
            self._above.buffer_updated(size)
            view = view[size:]
