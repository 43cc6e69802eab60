"""HTTP/1.1 connections: what one is doing, and what it does when its worker leaves.

Parsing is httptools' (llhttp). Here is the life of a connection, which is always in exactly one `State`:

=========== ================================================ ====================== =============================
state       the client is waiting for ...                    drain                  cut: manner, fate
=========== ================================================ ====================== =============================
FRESH       nothing: it has not sent a byte                  stays; serves one more closed, ``cut_fresh``
HALF_HEAD   the rest of its own request                      stays; serves it       503, ``cut_half_head``
BODY        as above; the application is running             stays; answers it      503, ``cut_body``
IN_FLIGHT   an answer; not a byte of it was sent             stays; answers it      503, ``cut_in_flight``
STREAMING   the rest of an answer                            stays; serves one more truncated, ``cut_streaming``
SURPLUS     nothing: it is sending a body nobody will read   stays; serves one more closed, ``idle_closed``
IDLE        nothing; its keep-alive timer runs               stays; serves one more closed, ``idle_closed``
CLOSING     nothing: it has its last answer, and must close  nothing                closed, as it would have been
CLOSED      nothing
=========== ================================================ ====================== =============================

Drain closes nothing: a connection that is closed without notice may be one on which the client has just begun to
send. Instead, the next head that is written *and has no request behind it* says ``Connection: close``, and the
connection is closed after that answer (``told_to_close``). Pipelined requests are thus all answered, in order.
"""

from __future__ import annotations

import asyncio
import contextvars
import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Mapping
from email.utils import formatdate
from enum import Enum
from typing import Any, Final
from urllib.parse import unquote

import httptools

from hotport.adapters.asgi.deadlines import Deadlines
from hotport.adapters.asgi.exchange import STATUS_LINES, STREAMING, Exchange
from hotport.adapters.asgi.session import Session
from hotport.adapters.asgi.spec import Application
from hotport.adapters.asgi.websocket import WebSocketConnection, WebSockets, WebSocketSettings, is_handshake
from hotport.adapters.base import Context

__all__ = ["HttpConnection", "Shared", "State"]

log = logging.getLogger("hotport.error")

END_OF_HEAD: Final = b"\r\n\r\n"

#: A request head above this is answered with 431.
HEAD_BYTES_MAX: Final = 64 * 1024

#: Reading pauses while more of a request's body than this waits for the application.
BODY_HIGH_WATER_BYTES: Final = 64 * 1024

#: Reading pauses while more pipelined requests than this wait for their turn.
PIPELINE_MAX: Final = 64

#: How long a connection stays half-closed after its last answer. What a client still sends to a closed socket
#: comes back as a reset, which destroys what it has not read yet (RFC 9112 section 9.6).
LINGER_S: Final = 2.0

#: Stands for the length of a chunked body.
CHUNKED: Final = -1

#: llhttp knows a fixed set of methods; these are the usual ones.
METHODS: Final = {m.encode(): m for m in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}


class State(Enum):
    """What a connection is doing; see the table at the top of the module."""

    FRESH = "fresh"
    HALF_HEAD = "half_head"
    BODY = "body"
    IN_FLIGHT = "in_flight"
    STREAMING = "streaming"
    SURPLUS = "surplus"
    IDLE = "idle"
    CLOSING = "closing"
    CLOSED = "closed"


class _Manner(Enum):
    """How to end a connection at the deadline: as politely as its state allows."""

    CLOSE = "what is written is still flushed"
    REFUSE = "503, so that the client knows that it may ask again"
    TRUNCATE = "the answer must not look whole"


CUTS: Final[Mapping[State, tuple[_Manner, str]]] = {
    State.FRESH: (_Manner.CLOSE, "cut_fresh"),
    State.HALF_HEAD: (_Manner.REFUSE, "cut_half_head"),
    State.BODY: (_Manner.REFUSE, "cut_body"),
    State.IN_FLIGHT: (_Manner.REFUSE, "cut_in_flight"),
    State.STREAMING: (_Manner.TRUNCATE, "cut_streaming"),
    State.SURPLUS: (_Manner.CLOSE, "idle_closed"),
    State.IDLE: (_Manner.CLOSE, "idle_closed"),
}


class _Refused(Exception):
    """Raised in a parser callback: this request gets a status from us and is the last one read."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        self.why = why


class Shared:
    """What all connections of one adapter have in common."""

    __slots__ = (
        "_date_and_server",
        "_second",
        "application",
        "context",
        "idle",
        "lingering",
        "loop",
        "running",
        "state",
        "variables",
        "websockets",
    )

    def __init__(
        self,
        application: Application,
        context: Context,
        state: dict[str, Any],
        *,
        keep_alive_s: float,
        websocket: WebSocketSettings,
    ) -> None:
        self.application = application
        self.context = context
        self.state = state
        self.loop = asyncio.get_running_loop()
        self.idle: Deadlines[HttpConnection] = Deadlines(keep_alive_s, HttpConnection.expire_idle, self.loop)
        self.lingering: Deadlines[HttpConnection | WebSocketConnection] = Deadlines(
            LINGER_S, lambda connection: connection.expire_lingering(), self.loop
        )
        self.websockets = WebSockets(websocket, self.loop)
        #: Applications may run on after their answer, or after the client has left.
        self.running: set[Exchange | Session] = set()
        #: Each request gets a copy. Callbacks run in the context in which their connection was accepted, and
        #: what one request sets must not show up in the next (python/cpython#140947).
        self.variables = contextvars.copy_context()
        self._second = -1
        self._date_and_server = b""

    def date_and_server(self) -> bytes:
        """The two header lines that every answer has by default; made once a second."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._date_and_server = f"date: {formatdate(now, usegmt=True)}\r\nserver: hotport\r\n".encode("ascii")
        return self._date_and_server


class HttpConnection(asyncio.Protocol):
    """One accepted connection; implements `hotport.adapters.base.Connection`."""

    __slots__ = (
        "_arriving",
        "_client",
        "_current",
        "_fate",
        "_has_announced_close",
        "_has_said_goodbye",
        "_has_served",
        "_head",
        "_headers",
        "_is_attached",
        "_is_closed",
        "_is_deaf",
        "_is_draining",
        "_is_reading_paused",
        "_is_upgrade",
        "_parser",
        "_pipeline",
        "_refusal",
        "_scheme",
        "_server",
        "_tail",
        "_url",
        "has_eof",
        "shared",
        "transport",
        "writable",
    )

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.transport: asyncio.Transport  # from connection_made on
        #: There while the transport's write buffer is too full; set when it is not.
        self.writable: asyncio.Event | None = None
        self.has_eof = False

        self._parser = self._new_parser()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_upgrade = False
        self._head = b""  # of a request whose head has not arrived whole, raw
        self._tail = b""  # the last bytes of a chunked body that has not arrived whole

        #: The oldest request without a whole answer; its application runs.
        self._current: Exchange | None = None
        #: Requests behind it, in order.
        self._pipeline: deque[Exchange] = deque()
        #: The newest request while its body arrives: the current one, the last of the pipeline, or one that was
        #: answered before it had arrived.
        self._arriving: Exchange | None = None
        #: Status and reason for input that is no request; its turn comes after everything that was one.
        self._refusal: tuple[int, str] | None = None

        self._is_attached = False  # there is a transport
        self._has_served = False
        self._is_reading_paused = False
        self._is_draining = False
        self._is_deaf = False  # no other request will be read
        self._has_announced_close = False  # the head of the last answer is written
        self._has_said_goodbye = False  # all of the last answer is written
        self._is_closed = False
        self._fate = "finished"
        shared.context.connections.opened(self)

    # -- what the worker asks ------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the connection is doing; read off the facts, so that it cannot disagree with them."""
        if self._is_closed:
            return State.CLOSED
        if self._has_said_goodbye:
            return State.CLOSING
        current = self._current
        if current is not None:
            if current.stage == STREAMING:
                return State.STREAMING
            return State.BODY if self._arriving is current else State.IN_FLIGHT
        if self._arriving is not None:
            return State.SURPLUS
        if self._head:
            return State.HALF_HEAD
        return State.IDLE if self._has_served else State.FRESH

    @property
    def unconsumed(self) -> bytes:
        """The raw bytes of a request head that has not arrived whole; a parser that is fed them is where ours is."""
        return self._head

    def drain(self) -> None:
        """Let the next answer that has no request behind it be the last."""
        self._is_draining = True

    def cut(self) -> str:
        """Close now, as the table at the top of the module says. Cancels the application; waits for nothing."""
        state = self.state
        if state is State.CLOSED:
            return self._fate
        if state in (State.FRESH, State.IDLE) and self._has_unread():
            state = State.HALF_HEAD
        manner, fate = CUTS.get(state, (_Manner.CLOSE, self._fate))
        if manner is _Manner.CLOSE and self._is_attached and self.transport.get_write_buffer_size():
            fate = "cut_streaming"  # the answer is whole for us, but not yet for the client

        for exchange in (self._current, *self._pipeline):
            if exchange is not None:
                exchange.leave()
                if exchange.task is not None:
                    exchange.task.cancel()
        if not self._is_attached:
            self._is_closed = True  # connection_made sees to it
        elif manner is _Manner.REFUSE:
            self._answer_refusal(503, "")
        elif manner is _Manner.TRUNCATE:
            self.truncate()
        else:
            self._close()
        return fate

    # -- what the transport says ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a full one: it was made for a stream socket
        self._is_attached = True
        if self._is_closed:  # cut before it was attached
            self.transport.abort()
            return
        info = transport.get_extra_info
        self._scheme = "http" if info("sslcontext") is None else "https"
        self._client = _client_address(info("peername"))
        self._server = _server_address(info("sockname"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self.shared.idle.discard(self)
        self.shared.lingering.discard(self)
        self._forget_requests()
        self._parser = None  # it holds our methods, and a cycle would keep both until the collector comes by
        self.resume_writing()
        self.shared.context.connections.closed(self, self._fate)

    def pause_writing(self) -> None:
        self.writable = asyncio.Event()

    def resume_writing(self) -> None:
        if self.writable is not None:
            self.writable.set()
            self.writable = None

    def eof_received(self) -> bool:
        """The client sends no more. It may still read (shutdown(2), SHUT_WR), so whole requests are answered."""
        self.has_eof = True
        self._head = b""
        if self._pipeline and self._arriving is self._pipeline[-1]:
            self._pipeline.pop()
            self._arriving = None
        if self._current is None or self._arriving is not None or self._has_said_goodbye:
            return False
        self._current.wake()
        return self._scheme == "http"  # TLS transports cannot stay half open

    def data_received(self, data: bytes) -> None:
        self.shared.idle.discard(self)
        if self._is_deaf and self._arriving is None:
            return
        # Nearly all requests come like this: one read, which ends where a head ends. Then nothing half-read can
        # be left behind it, so it may go through the parser in one piece.
        if data.endswith(END_OF_HEAD) and self._arriving is None and not self._head and len(data) <= HEAD_BYTES_MAX:
            self._parse(data)
        else:
            self._parse_in_pieces(data)
        if self._current is None and not self._head and not self._has_said_goodbye:
            self.shared.idle.add(self)  # empty lines, or a body that nobody reads

    # -- parsing -------------------------------------------------------------------------------------------

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # Bytes behind a request that said `Connection: close` are dropped; as an error they would cost it its answer.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _parse_in_pieces(self, data: bytes) -> None:
        """Parse, and know at any time which bytes belong to a head that has not arrived whole.

        The parser does not say where a request ended. But one can end only behind an empty line (a head, a
        chunked body) or where its content-length says, so the input is cut in those places.
        """
        view = memoryview(data)
        start, size = 0, len(data)
        while start < size and not (self._is_deaf and self._arriving is None):
            arriving = self._arriving
            if arriving is None:
                end = _end_of_piece(data, start, self._head[-3:])
                piece = data[start:end]
                # Empty lines in front of a request belong to nothing (RFC 9112 section 2.2).
                head = self._head + piece if self._head else piece.lstrip(b"\r\n")
                if len(head) > HEAD_BYTES_MAX:
                    self._refuse(431, "the request head is too large")
                    return
                self._head = b"" if head.endswith(END_OF_HEAD) else head
                self._parse(piece)
                if self._is_closed:  # it goes on as a WebSocket
                    if end < size:
                        self.transport.get_protocol().data_received(data[end:])  # type: ignore[attr-defined]
                    return
            elif arriving.length == CHUNKED:
                end = _end_of_piece(data, start, self._tail)
                tail = (self._tail + data[max(start, end - 4) : end])[-4:]
                self._tail = b"" if tail == END_OF_HEAD else tail[-3:]
                self._parse(view[start:end])
            else:
                assert arriving.length is not None  # noted when its head was parsed
                end = min(size, start + arriving.length - arriving.received)
                self._parse(view[start:end])
            start = end

    def _parse(self, piece: bytes | memoryview) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(bytes(piece[upgrade.args[0] :]))
        except httptools.HttpParserError as error:
            self._on_parser_error(error)
        arriving = self._arriving
        if arriving is not None and arriving.length is None:
            self._note_framing(arriving)

    def _on_parser_error(self, error: httptools.HttpParserError) -> None:
        match error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error:
            case _Refused(status=status, why=why):
                self._refuse(status, why)
            case httptools.HttpParserError() as malformed:
                self._refuse(400, str(malformed))
            case bug:
                log.error("a parser callback raised", exc_info=bug)
                self._refuse(500, "")

    def _note_framing(self, exchange: Exchange) -> None:
        """What is known of a body that has not arrived with its head."""
        exchange.length = CHUNKED
        for name, value in exchange.scope["headers"]:
            if name == b"content-length":
                exchange.length = int(value)
            elif name == b"expect" and value.lower() == b"100-continue":
                exchange.expects_continue = exchange.scope["http_version"] != "1.0" and not exchange.received

    def _upgrade(self, rest: bytes) -> None:
        """A request to speak something else from here on: a WebSocket, if no other request waits for its answer.

        Anything else is declined by answering as if it had not been asked (RFC 9110 section 7.8). llhttp stops
        behind the head of such a request, body or not: its body goes through a parser that has seen a head
        with the same framing and no upgrade.
        """
        self._is_upgrade = False
        exchange = self._arriving
        assert exchange is not None
        if self._current is None:
            self._arriving = self._parser = None
            self._is_closed = self._is_deaf = self._has_said_goodbye = True  # here; it goes on as another object
            WebSocketConnection(self, exchange, rest)
            return
        self._parser = httptools.HttpRequestParser(_BodyOnly(self))
        framing = (f for f in exchange.scope["headers"] if f[0] in (b"content-length", b"transfer-encoding"))
        lines = b"".join(b"%b: %b\r\n" % field for field in framing)
        self._parse(b"POST / HTTP/1.1\r\n" + lines + b"\r\n")
        if rest:
            self._parse_in_pieces(rest)

    def end_body_only(self) -> None:
        """The body of a declined upgrade request has arrived."""
        self._parser = self._new_parser()
        self.on_message_complete()

    # -- what the parser says ------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        shared = self.shared
        headers, self._headers = self._headers, []
        url, self._url = self._url, b""
        method = parser.get_method()
        version = parser.get_http_version()
        is_http10 = version == "1.0"
        if is_http10:
            # "MUST treat the message as if the framing is faulty": RFC 9112 section 6.1
            if any(name == b"transfer-encoding" for name, _ in headers):
                raise _Refused(400, "HTTP/1.0 has no transfer-encoding")
        elif version != "1.1":
            raise _Refused(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        if parser.should_upgrade():
            if method == b"CONNECT":
                raise _Refused(501, "this is not a proxy")
            self._is_upgrade = True
        target = httptools.parse_url(url)
        raw_path = target.path or b"/"
        path = raw_path.decode("ascii")
        exchange = Exchange(
            self,
            {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.4"},
                "http_version": version,
                "method": METHODS.get(method) or method.decode("ascii"),
                "scheme": self._scheme,
                "path": unquote(path) if "%" in path else path,
                "raw_path": raw_path,
                "query_string": target.query or b"",
                "root_path": "",
                "headers": headers,
                "client": self._client,
                "server": self._server,
                "state": shared.state.copy(),
                "extensions": {"hotport": shared.context.extension},
            },
            parser.should_keep_alive(),
            is_http10,
        )
        self._arriving = exchange
        if self._current is None:
            if not (self._is_upgrade and is_handshake(exchange.scope)):  # else `_upgrade` goes on with it
                self._begin(exchange)
        else:
            self._pipeline.append(exchange)
            if len(self._pipeline) > PIPELINE_MAX:
                self._pause_reading()

    def on_body(self, body: bytes) -> None:
        exchange = self._arriving
        assert exchange is not None
        exchange.add_body(body)
        if len(exchange.body) > BODY_HIGH_WATER_BYTES:
            self._pause_reading()

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return  # llhttp's idea of it: what follows the head is not HTTP
        if self._headers:
            self._headers = []  # trailers
        exchange, self._arriving = self._arriving, None
        assert exchange is not None
        exchange.complete()

    # -- requests and answers ------------------------------------------------------------------------------

    def _begin(self, exchange: Exchange) -> None:
        self._current = exchange
        shared = self.shared
        shared.context.connections.count_request()
        shared.running.add(exchange)
        exchange.task = shared.loop.create_task(exchange.run(), context=shared.variables.copy())

    def announce_close(self, exchange: Exchange) -> bool:
        """Whether the head of this answer, which is about to be written, must say that it is the last."""
        if exchange.keeps_alive and not (
            (self._is_draining or self.has_eof) and not self._has_request_behind(exchange)
        ):
            return False
        self._has_announced_close = self._is_deaf = True
        return True

    def _has_request_behind(self, exchange: Exchange) -> bool:
        if self._pipeline or self._head or self._refusal is not None:
            return True
        return self._arriving is None and not self.has_eof and self._has_unread()

    def answered(self, exchange: Exchange) -> None:
        """The current answer is written whole: go on to what is next."""
        self._current = None
        self._has_served = True
        if self._has_announced_close:
            if self._is_draining and exchange.keeps_alive and not self.has_eof:
                self._fate = "told_to_close"
            if exchange.client_keeps_alive or self._arriving is not None:
                self._linger()
            else:
                self._close()  # the client has sent its last byte, and said so
        elif self._pipeline:
            self._begin(self._pipeline.popleft())
            self.resume_reading_if_room()
        elif self._refusal is not None:
            self._answer_refusal(*self._refusal)
        elif self.has_eof:
            self._close()
        else:
            if not self._head:
                self.shared.idle.add(self)
            self.resume_reading_if_room()

    def _refuse(self, status: int, why: str) -> None:
        """Read no further; say why when everything before it is answered."""
        log.info("refused with %d: %s", status, why)
        self._is_deaf = True
        self._head = self._tail = b""
        broken, self._arriving = self._arriving, None
        if broken is not None:  # its body; otherwise it has not become an exchange
            broken.leave()
            if self._pipeline:
                self._pipeline.pop()
            elif broken.stage == STREAMING:
                self.truncate()
                return
            elif broken is self._current:
                self._current = None
        if self._current is None:
            self._answer_refusal(status, why)
        else:
            self._refusal = (status, why)

    def _answer_refusal(self, status: int, why: str) -> None:
        body = f"{why}\n".encode() if why else b""
        self.transport.write(
            b"%b%bcontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINES[status], self.shared.date_and_server(), len(body), body)
        )
        self._linger()

    # -- flow ----------------------------------------------------------------------------------------------

    def _pause_reading(self) -> None:
        if not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()

    def resume_reading_if_room(self) -> None:
        """Read on if neither a body nor the pipeline is too full."""
        if not self._is_reading_paused or len(self._pipeline) > PIPELINE_MAX:
            return
        if self._arriving is None or len(self._arriving.body) <= BODY_HIGH_WATER_BYTES:
            self._resume_reading()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and not self.transport.is_closing():
            self._is_reading_paused = False
            self.transport.resume_reading()

    def _has_unread(self) -> bool:
        """Whether bytes of the client wait in the kernel (tcp(7), SIOCINQ)."""
        sock = self.transport.get_extra_info("socket") if self._is_attached else None
        if sock is None:
            return False
        try:
            return bool(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)) != bytes(4))
        except OSError:
            return False

    # -- endings -------------------------------------------------------------------------------------------

    def expire_idle(self) -> None:
        """The keep-alive time is over; but not while an answer is on its way, or a request has come just now."""
        if self.transport.get_write_buffer_size() or self._has_unread():
            self.shared.idle.add(self)
        else:
            self._fate = "idle_closed"
            self._close()

    def expire_lingering(self) -> None:
        """The client has not closed; it had the time, unless it is still reading."""
        if self.transport.get_write_buffer_size():
            self.shared.lingering.add(self)
        else:
            self.transport.close()

    def truncate(self) -> None:
        """End so that the answer that has begun does not look whole."""
        current = self._current
        if current is not None and not current.is_delimited:
            # A close would be its regular end; only a reset is not (socket(7), SO_LINGER).
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._has_said_goodbye = self._is_deaf = True
        self._forget_requests()
        self.transport.abort()

    def _close(self) -> None:
        """Close when everything written is flushed."""
        self._has_said_goodbye = self._is_deaf = True
        self._forget_requests()
        self.transport.close()

    def _linger(self) -> None:
        """Say the end of our side, and throw away what comes until the client closes; it has `LINGER_S` for that."""
        can_end = self.transport.can_write_eof()
        if self.has_eof or (not can_end and self._arriving is None):
            self._close()  # TLS cannot end one side; its own goodbye will do unless a body is on its way
            return
        if can_end:
            try:
                self.transport.write_eof()
            except OSError:  # the stock event loop shuts the socket down at once, and the client may be gone
                self._close()
                return
        self._has_said_goodbye = self._is_deaf = True
        self._forget_requests()
        self._resume_reading()
        self.shared.lingering.add(self)

    def _forget_requests(self) -> None:
        for exchange in (self._current, *self._pipeline):
            if exchange is not None:
                exchange.leave()
        self._pipeline.clear()
        self._current = self._arriving = self._refusal = None
        self._head = self._tail = b""


class _BodyOnly:
    """Passes the body of one request on, and gives the parser back at its end."""

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection
        self.on_body = connection.on_body

    def on_message_complete(self) -> None:
        self._connection.end_body_only()


def _end_of_piece(data: bytes, start: int, before: bytes) -> int:
    """Where the next `END_OF_HEAD` ends, which may have begun in `before`; else the end of `data`."""
    if before:
        across = (before + data[start : start + 3]).find(END_OF_HEAD)
        if across >= 0:
            return start + across + 4 - len(before)
    found = data.find(END_OF_HEAD, start)
    return len(data) if found < 0 else found + 4


def _client_address(peername: Any) -> tuple[str, int] | None:
    return (peername[0], peername[1]) if isinstance(peername, tuple) else None


def _server_address(sockname: Any) -> tuple[str, int | None] | None:
    if isinstance(sockname, tuple):
        return (sockname[0], sockname[1])
    return (os.fsdecode(sockname), None) if sockname else None
