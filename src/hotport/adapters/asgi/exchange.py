"""One HTTP request and its answer, as an ASGI application sees them."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from hotport.adapters.asgi.spec import Message, Scope

if TYPE_CHECKING:
    from hotport.adapters.asgi.http import HttpConnection
    from hotport.adapters.asgi.websocket import WebSocketConnection

__all__ = ["ANSWERED", "HELD", "STATUS_LINES", "STREAMING", "WAITING", "ClientLeft", "Exchange"]

log = logging.getLogger("hotport.error")

# How far an answer has come. Plain integers: they are compared for every message.
WAITING: Final = 0  # the application has not said anything
HELD: Final = 1  # it has given status and headers; ASGI wants them held until the first body event
STREAMING: Final = 2  # the head is written
ANSWERED: Final = 3  # everything is written

# How the client learns where the body ends (RFC 9112 section 6).
BODYLESS: Final = 0
LENGTH: Final = 1
CHUNKED: Final = 2
UNTIL_CLOSE: Final = 3

#: Larger bodies are handed to the transport beside their head or chunk size instead of being copied behind it.
JOIN_BYTES_MAX: Final = 16 * 1024

#: Header fields of an answer that need a look before they are passed on.
NOTED: Final = frozenset({b"connection", b"content-length", b"date", b"server", b"transfer-encoding"})


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


#: Final answers only: interim ones are not for `http.response.start`.
STATUS_LINES: Final = {status: _status_line(status) for status in range(200, 1000)}


class ClientLeft(OSError):
    """Raised by ``send()`` when nobody can receive the answer any more (ASGI HTTP specification 2.4)."""


class Exchange:
    """One request and its answer: `run` is the application's task, `receive` and `send` are its arguments."""

    __slots__ = (
        "_framing",
        "_head",
        "_is_delivered",
        "_is_http10",
        "_is_told",
        "_left",
        "_wakeup",
        "body",
        "client_keeps_alive",
        "connection",
        "expects_continue",
        "is_complete",
        "is_gone",
        "keeps_alive",
        "length",
        "received",
        "scope",
        "stage",
        "task",
    )

    def __init__(self, connection: HttpConnection, scope: Scope, keeps_alive: bool, is_http10: bool) -> None:
        self.connection: HttpConnection | WebSocketConnection = connection
        self.scope = scope
        self.client_keeps_alive = keeps_alive
        self.keeps_alive = keeps_alive
        self.stage = WAITING
        self.task: asyncio.Task[None] | None = None
        #: What has arrived and the application has not received; a bytearray once it has grown.
        self.body: bytes | bytearray = b""
        self.received = 0
        #: The request's content-length, if it has one and the body is not there yet.
        self.length: int | None = None
        self.expects_continue = False
        self.is_complete = False
        self.is_gone = False
        self._is_http10 = is_http10
        self._is_delivered = False
        self._is_told = False  # the application knows that the client has left
        self._wakeup: asyncio.Event | None = None

    # -- the connection's side -----------------------------------------------------------------------------

    def add_body(self, data: bytes) -> None:
        """More of the request's body has arrived."""
        self.received += len(data)
        if self.stage == ANSWERED:
            return  # nobody will ask for it
        if not self.body:
            self.body = data
        elif isinstance(self.body, bytearray):
            self.body += data
        else:
            self.body = bytearray(self.body)
            self.body += data
        self.wake()

    def complete(self) -> None:
        """The request has arrived whole."""
        self.is_complete = True
        self.wake()

    def leave(self) -> None:
        """Nobody will read the answer."""
        self.is_gone = True
        self.wake()

    def wake(self) -> None:
        """Let a waiting `receive` look again."""
        if self._wakeup is not None:
            self._wakeup.set()

    async def run(self) -> None:
        """The application's life with this request; whatever it does, the client gets an answer or an end."""
        shared = self.connection.shared
        try:
            await shared.application(self.scope, self.receive, self.send)
        except BaseException as error:
            self._failed(error)
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise
        else:
            if self.stage != ANSWERED and not self.is_gone:
                log.error(
                    "the application returned without %s: %s",
                    "the end of its answer" if self.stage == STREAMING else "an answer",
                    self,
                )
                self._make_up()
        finally:
            shared.running.discard(self)

    def __str__(self) -> str:
        return f"{self.scope['method']} {self.scope['path']}"

    def _failed(self, error: BaseException) -> None:
        is_over = self.is_gone or self.stage == ANSWERED
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if is_over and is_cancelled:
            return
        if self.is_gone and self._is_told:  # as a rule this is what a framework makes of `ClientLeft`
            log.info("the application ended with %r because its client had left: %s", error, self)
            return
        log.error("the application %s: %s", "was cancelled" if is_cancelled else "raised", self, exc_info=error)
        if not is_over:
            self._make_up()

    def _make_up(self) -> None:
        """500 if the client has seen nothing yet, else an end that cannot be mistaken for a whole answer."""
        if self.stage == STREAMING:
            self.connection.truncate()
        else:
            self._hold_head({"status": 500, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
            self._write(b"Internal Server Error", is_end=True)

    # -- the application's side ----------------------------------------------------------------------------

    async def receive(self) -> Message:
        """ASGI ``receive``: the body as it arrives, then ``http.disconnect`` once there is nobody to answer."""
        connection = self.connection
        while self.stage != ANSWERED:
            if not self._is_delivered and (self.body or self.is_complete):
                body, self.body = self.body, b""
                self._is_delivered = self.is_complete
                connection.resume_reading_if_room()
                return {"type": "http.request", "body": bytes(body), "more_body": not self.is_complete}
            if self.is_gone or connection.has_eof:
                self._is_told = True
                break
            if self.expects_continue and self.stage < STREAMING:
                self.expects_continue = False
                connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if self._wakeup is None:
                self._wakeup = asyncio.Event()
            self._wakeup.clear()
            await self._wakeup.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI ``send``.

        Raises:
            ClientLeft: The client has left, or the connection was cut at the drain deadline.
            RuntimeError: The message does not fit here, or the body not its content-length.
        """
        connection = self.connection
        if connection.writable is not None:
            await connection.writable.wait()
        if self.is_gone:
            self._is_told = True
            raise ClientLeft("the client has left")
        kind = message["type"]
        stage = self.stage
        if kind == "http.response.body" and stage in (HELD, STREAMING):
            self._write(message.get("body", b""), is_end=not message.get("more_body", False))
        elif kind == "http.response.start" and stage == WAITING:
            self._hold_head(message)
        elif stage == ANSWERED:
            raise RuntimeError(f"{kind!r} was sent after the end of the answer")
        else:
            expected = "http.response.start" if stage == WAITING else "http.response.body"
            raise RuntimeError(f"{kind!r} was sent where {expected!r} was expected")

    def _hold_head(self, message: Message) -> None:
        """Check and render status and headers. Nothing is written, so a failure can still become a 500."""
        status = message["status"]
        line = STATUS_LINES.get(status)
        if line is None:
            raise RuntimeError(f"{status!r} is not the status of a final answer")
        lines = [line]
        length: int | None = None
        has_date = has_server = False
        for name, value in message.get("headers") or ():
            name = name.lower()
            if name in NOTED:
                if name == b"content-length":
                    if not value.isdigit():
                        raise RuntimeError(f"{value!r} is not a content-length")
                    length = int(value)
                    continue  # written with the rest of the framing
                if name == b"date":
                    has_date = True
                elif name == b"server":
                    has_server = True
                else:
                    # Connection and framing are the server's; the application's wish to close is heard.
                    if name == b"connection" and b"close" in value.lower():
                        self.keeps_alive = False
                    continue
            lines.append(b"%b: %b\r\n" % (name, value))
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("a header field contains a line break")

        defaults = self.connection.shared.date_and_server()
        if has_date or has_server:
            date, server = defaults.splitlines(keepends=True)
            defaults = (b"" if has_date else date) + (b"" if has_server else server)
        self._framing = LENGTH
        if status == 204 or status == 304 or self.scope["method"] == "HEAD":
            self._framing = BODYLESS
            if status == 204:
                length = None  # RFC 9110 section 8.6: MUST NOT
        self._left = length
        self._head = head + defaults
        self.stage = HELD

    def _finish_head(self, size: int, *, is_end: bool) -> bytes:
        """The rest of the head: it depends on the first body event, and on whether the worker is leaving."""
        head = self._head
        if self._framing == LENGTH and self._left is None:
            if is_end:
                self._left = size
            elif self._is_http10:
                self._framing = UNTIL_CLOSE
                self.keeps_alive = False
            else:
                self._framing = CHUNKED
                head += b"transfer-encoding: chunked\r\n"
        if self._left is not None:
            head += b"content-length: %d\r\n" % self._left
        if self.expects_continue:
            # Nobody asked for the body: whether it comes is anybody's guess (RFC 9110 section 10.1.1).
            self.keeps_alive = False
        if self.connection.announce_close(self):
            return head + b"connection: close\r\n\r\n"
        if self._is_http10:
            return head + b"connection: keep-alive\r\n\r\n"
        return head + b"\r\n"

    def _write(self, body: bytes, *, is_end: bool) -> None:
        size = len(body)
        if self._framing == LENGTH and self._left is not None and (size > self._left or (is_end and size < self._left)):
            more_or_less = "longer" if size > self._left else "shorter"
            raise RuntimeError(f"the body is {more_or_less} than its content-length")
        head = tail = b""
        if self.stage == HELD:
            head = self._finish_head(size, is_end=is_end)
            self.stage = STREAMING
        framing = self._framing
        if framing == LENGTH:
            assert self._left is not None
            self._left -= size
        elif framing == CHUNKED:
            if size:
                head += b"%x\r\n" % size
                tail = b"\r\n"
            if is_end:
                tail += b"0\r\n\r\n"
        elif framing == BODYLESS:
            body, size = b"", 0

        transport = self.connection.transport
        if size > JOIN_BYTES_MAX:
            transport.writelines([part for part in (head, body, tail) if part])
        elif head or tail:
            transport.write(b"".join((head, body, tail)))
        elif size:
            transport.write(body)

        if is_end:
            self.stage = ANSWERED
            self.body = b""
            self.wake()
            self.connection.answered(self)

    @property
    def is_delimited(self) -> bool:
        """Whether the client can tell a whole body from one that was cut short by a close."""
        return self._framing != UNTIL_CLOSE
