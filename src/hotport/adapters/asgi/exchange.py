"""One HTTP request and its answer: the ASGI application's side."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import lru_cache
from time import perf_counter
from typing import Any, Final, Protocol, cast

from hotport.adapters.asgi import requestid
from hotport.adapters.asgi.fields import LINES, NOTED, STATUS_LINES, render_field
from hotport.adapters.asgi.sendfile import Sink, send_file
from hotport.adapters.asgi.shared import Shared
from hotport.adapters.asgi.spec import Application, Message, Scope
from hotport.adapters.asgi.stacks import waiting_place
from hotport.adapters.asgi.states import ANSWERED, HELD, STREAMING, TRAILING, WAITING
from hotport.adapters.counts import NO_ANSWER
from hotport.options import format_duration

__all__ = ["CLIENT_LEFT", "CUT", "TOO_SLOW", "Answering", "ClientLeft", "Exchange", "Requesting"]

log = logging.getLogger("hotport.error")

# How the client learns where the body ends (RFC 9112 section 6).
BODYLESS: Final = 0
LENGTH: Final = 1
CHUNKED: Final = 2
UNTIL_CLOSE: Final = 3

#: Larger bodies are not copied behind their head or chunk size but passed to the transport beside it, if the event
#: loop supports that (`Shared.can_gather`).
JOIN_BYTES_MAX: Final = 16 * 1024

#: An application that has sent so much of a body without waiting lets others have their turn.
BURST_BYTES: Final = 1024 * 1024

#: Turns of the event loop that a head waits for its body. Middleware that runs the application in a task of its own
#: (Starlette's BaseHTTPMiddleware) passes the body on one or two turns after the head.
HELD_TURNS: Final = 4

#: Why an answer has no reader, in the log's words.
CLIENT_LEFT: Final = "its client had left"
CUT: Final = "its connection was cut"
TOO_SLOW: Final = "its client was too slow"
TIMED_OUT: Final = "it had taken longer than request_timeout"

#: Seconds from the cancellation of an application until the log says that it has not ended.
STUBBORN_S: Final = 5.0


class ClientLeft(OSError):
    """Raised by ``send()`` when the client cannot receive the answer any more (ASGI HTTP specification 2.4)."""

    def __init__(self) -> None:
        super().__init__("the client has left")


class Answering(Protocol):
    """The interface that an answer needs of its connection."""

    shared: Shared
    transport: asyncio.Transport
    #: None unless the transport's write buffer is too full; set when there is room again.
    writable: asyncio.Event | None
    has_eof: bool

    def announce_close(self, exchange: Exchange) -> bool:
        """Whether the head about to be written must say that this answer is the last."""

    def answered(self, exchange: Exchange) -> None:
        """Handle that the answer is completely written."""

    def truncate(self) -> None:
        """End the connection so that the unfinished answer does not look complete."""

    def resume_reading_if_room(self) -> None:
        """Resume reading if there is room, after the application has received something."""


class Requesting(Answering, Sink, Protocol):
    """`Answering`, for requests with a body and answers with files; a handshake has neither."""

    def ask_for_body(self) -> None:
        """Answer 100 Continue to a client that expects it before it sends its body."""

    def see_client_read(self) -> None:
        """Enforce `send_timeout` on unsent data."""


class Exchange:
    """One request and its answer: `run` is the application's task, `receive` and `send` are its arguments."""

    __slots__ = (
        "_blocked",
        "_has_trailers",
        "_head",
        "_is_delivered",
        "_is_head",
        "_is_http10",
        "_is_told",
        "_left",
        "_sent_before",
        "_trailers",
        "_wakeup",
        "_why_gone",
        "application",
        "began",
        "body",
        "client_keeps_alive",
        "connection",
        "expects_continue",
        "framing",
        "held_bytes",
        "is_complete",
        "is_ended",
        "is_gone",
        "keeps_alive",
        "length",
        "method",
        "received",
        "request",
        "scope",
        "sent",
        "stage",
        "status",
        "task",
    )

    def __init__(
        self, connection: Requesting, application: Application, scope: Scope, keeps_alive: bool, is_http10: bool
    ) -> None:
        self.connection: Answering = connection
        self.application = application
        self.scope = scope
        self.client_keeps_alive = keeps_alive
        self.keeps_alive = keeps_alive
        self.stage = WAITING
        self.status = 0
        #: A copy of the scope that the application cannot change; None once the access log has the request.
        self.request = dict(scope) if connection.shared.access is not None else None
        if self.request is not None and connection.shared.makes_ids:
            self.request[requestid.KEY] = scope["state"][requestid.KEY]
        #: Bytes of the answer's body that were written.
        self.sent = 0
        #: When the application was called (`perf_counter`), if the access log or metrics ask for it; 0 before.
        self.began = 0.0
        self.task: asyncio.Task[None] | None = None
        #: Body bytes that the application has not received; a bytearray once it has grown.
        self.body: bytes | bytearray = b""
        self.received = 0
        #: The request's content-length, -1 if it is chunked; None if the body came with the head.
        self.length: int | None = None
        self.expects_continue = False
        self.is_complete = False
        self.is_gone = False
        #: The client has ended its sending side, but not everything that it has sent is read.
        self.is_ended = False
        #: Bytes of memory that the waiting request takes, without its body.
        self.held_bytes = 0
        self._is_http10 = is_http10
        self.method = method = scope["method"]
        self._is_head = method == "HEAD"
        self._sent_before = 0  # `sent` when the application waited last
        self._is_delivered = False
        self._is_told = False  # the application was told that the client has left
        self._why_gone = CLIENT_LEFT
        self._wakeup: asyncio.Event | None = None
        self._blocked: asyncio.Future[None] | None = None  # while the kernel takes no more of a file

    def __str__(self) -> str:
        # the raw path: its escapes protect the log
        return f"{self.scope['method']} {self.scope['raw_path'].decode('latin-1')}"

    # -- called by the connection --------------------------------------------------------------------------

    def add_body(self, data: bytes) -> None:
        """Add bytes of the request's body."""
        self.received += len(data)
        self.expects_continue = False  # the body has come without it
        if self.stage == ANSWERED:
            return  # the application will not receive it
        if not self.body:
            self.body = data
        elif isinstance(self.body, bytearray):
            self.body += data
        else:
            self.body = bytearray(self.body)
            self.body += data
        if self._wakeup is not None:  # as in `wake`, without a call
            self._wakeup.set()

    def leave(self, why: str = CLIENT_LEFT, status: int = NO_ANSWER) -> None:
        """Drop the rest of the answer, which has no reader now; only the first `why` is kept.

        Args:
            status: What the client gets in place of an answer.
        """
        if self.request is not None:
            self.log(self.status)
        if not self.is_gone:
            self.is_gone, self._why_gone = True, why
            if self.stage != ANSWERED and (self.began or status):
                self.count(status)
        self._unblock()
        self.wake()

    def log(self, status: int) -> None:
        """Write the request to the access log, once."""
        access = self.connection.shared.access
        request, self.request = self.request, None
        if access is not None and request is not None:
            access.ended(request, status, self.sent, self.began)

    def count(self, status: int) -> None:
        """Count the request in the metrics; to be called once, before the last of its answer is written."""
        count = self.connection.shared.count_request
        if count is not None:
            count(self.method, status, self.began or perf_counter())

    def _unblock(self) -> None:
        if self._blocked is not None and not self._blocked.done():
            self._blocked.set_result(None)

    def wake(self) -> None:
        """Make a waiting `receive` check again."""
        if self._wakeup is not None:
            self._wakeup.set()

    async def run(self) -> None:
        """Run the application for this request; if it fails, answer 500 or end the connection."""
        try:
            await self.application(self.scope, self.receive, self.send)
        except BaseException as error:
            self._failed(error)
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise
        else:
            if self.stage != ANSWERED and not self.is_gone:
                log.log(
                    logging.INFO if self._is_told else logging.ERROR,  # told `http.disconnect`, it may end early
                    "the application returned without %s: %s",
                    "an answer" if self.stage < STREAMING else "the end of its answer",
                    self,
                )
                self._make_up()
        finally:
            self.connection.shared.running.discard(self)

    def _failed(self, error: BaseException) -> None:
        is_over = self.is_gone or self.stage == ANSWERED
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if is_over and is_cancelled:
            return
        if self._is_told:  # usually a framework's reaction to `ClientLeft`, or to a disconnect
            log.info("the application ended with %r because %s: %s", error, self._why_gone, self)
        else:
            log.error("the application %s: %s", "was cancelled" if is_cancelled else "raised", self, exc_info=error)
        if not is_over:
            self._make_up()

    def time_out(self) -> None:
        """End the request, which has taken longer than `request_timeout`: cancel the application, and answer for it.

        The client does not wait for the application's reaction, which may never come.
        """
        connection, task = self.connection, self.task
        shared = connection.shared
        shared.registry.timeouts += 1
        if shared.registry.counts is not None:
            shared.registry.counts.timed_out()
        self._log_place("the application took longer than request_timeout (%s) and is cancelled: %s")
        if self.stage < STREAMING:
            self._make_up(503, b"the request took too long\n")
        else:
            self.leave(TIMED_OUT)
            self._make_up()
        self.is_gone, self._why_gone = True, TIMED_OUT
        if task is not None and not task.done():
            task.cancel()
            shared.loop.call_later(STUBBORN_S, self._check_ended)

    def _check_ended(self) -> None:
        if self.task is not None and not self.task.done():
            self._log_place("the application still runs after request_timeout (%s) and a cancellation: %s")

    def _log_place(self, what: str) -> None:
        """Log where the application waits, as a traceback; at most `STACKS_MAX` a second."""
        shared, error = self.connection.shared, None
        if self.task is not None and shared.may_show_stack():
            error = TimeoutError("the application waits here").with_traceback(waiting_place(self.task, self.scope))
        log.error(what, format_duration(shared.options.request_timeout_s), self, exc_info=error)

    def _make_up(self, status: int = 500, body: bytes = b"Internal Server Error") -> None:
        """Answer with `status` if nothing is sent yet, else truncate the answer recognisably."""
        if self.stage >= STREAMING:
            self.connection.shared.registry.errors += 1
            self.connection.truncate()
        else:
            self._hold_head({"status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
            self._write(body, is_end=True)

    # -- called by the application -------------------------------------------------------------------------

    async def receive(self) -> Message:
        """ASGI ``receive``: the body as it arrives, then ``http.disconnect`` after the answer or the client's end."""
        connection = self.connection
        while self.stage != ANSWERED:
            if not self._is_delivered and (self.body or self.is_complete):
                body, self.body = self.body, b""
                self._is_delivered = self.is_complete
                connection.resume_reading_if_room()
                return {"type": "http.request", "body": bytes(body), "more_body": not self.is_complete}
            if self.is_gone or self.is_ended or connection.has_eof:
                self._is_told = True
                break
            if self.expects_continue and self.stage < STREAMING:
                self.expects_continue = False
                cast("Requesting", connection).ask_for_body()  # a handshake has no body
            if self._wakeup is None:
                self._wakeup = asyncio.Event()
            self._wakeup.clear()
            await self._wakeup.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI ``send``.

        Raises:
            ClientLeft: The client has left, or the connection was cut at the drain deadline.
            RuntimeError: The message is not allowed here, or the body does not match its content-length.
        """
        writable = self.connection.writable
        if writable is not None:
            await writable.wait()
            self._sent_before = self.sent
        if self.is_gone:
            self._is_told = True
            raise ClientLeft
        kind = message["type"]
        stage = self.stage
        if kind == "http.response.body" and HELD <= stage <= STREAMING:
            if self.connection.transport.is_closing():
                # A write has failed. `connection_lost` comes in the event loop's next turn, which never begins if an
                # application only sends: nothing pauses it any more.
                self.leave()
                self._is_told = True
                raise ClientLeft
            self._write(message.get("body", b""), is_end=not message.get("more_body", False))
            if self.sent - self._sent_before > BURST_BYTES and self.stage == STREAMING:
                self._sent_before = self.sent
                await self.connection.shared.turns.turn()
        elif kind == "http.response.start" and stage == WAITING:
            self._hold_head(message)
            if self.task is not None:  # else this is its eager first step, after which `open_soon` is called
                shared = self.connection.shared
                if not shared.held:
                    shared.loop.call_soon(shared.open_held)
                shared.held.append(self)
        elif kind == "http.response.pathsend" and (stage == HELD or (stage == STREAMING and not self.sent)):
            await self._send_file(message["path"])
        elif kind == "http.response.trailers" and stage == TRAILING:
            self._send_trailers(message)
        elif kind == "http.response.early_hint" and stage == WAITING:
            self._send_hints(message)
        elif stage == ANSWERED:
            raise RuntimeError(f"{kind!r} was sent after the end of the answer")
        else:
            raise RuntimeError(f"{kind!r} was sent where {EXPECTED[stage]!r} was expected")

    def _hold_head(self, message: Message) -> None:
        """Check and render status and headers, but write nothing: a failure can still become a 500."""
        status = message["status"]
        line = STATUS_LINES.get(status)
        if line is None:
            raise RuntimeError(f"{status!r} is not the status of a final answer")
        lines = [line]
        left: int | None = None
        has_date = has_server = False
        for field in message.get("headers") or ():
            if type(field) is not tuple:
                field = tuple(field)
            if field[0] == b"content-length":
                left = _length(field[1])
                continue  # written with the rest of the framing
            line = LINES.get(field)
            if line is None:
                name, line = render_field(field)
                if name in NOTED:
                    if name == b"content-length":
                        left = _length(field[1])
                        continue
                    if name == b"date":
                        has_date = True
                    elif name == b"server":
                        has_server = True
                    else:
                        # The server sets connection and framing; it only honours the application's `close`.
                        if name == b"connection" and b"close" in field[1].lower():
                            self.keeps_alive = False
                        continue
            lines.append(line)

        shared = self.connection.shared
        defaults = shared.defaults or shared.make_defaults()
        if has_date or has_server:
            own = b"date" if has_date else b"", b"server" if has_server else b""
            lines += [each for each in defaults.splitlines(keepends=True) if each.partition(b":")[0] not in own]
        else:
            lines.append(defaults)
        self.framing = LENGTH
        if status == 204 or status == 304 or self._is_head:
            self.framing = BODYLESS
            if status == 204:
                left = None  # RFC 9110 section 8.6: MUST NOT
        self.status = status
        self._left = left
        self._has_trailers = message.get("trailers", False)
        self._head = lines
        self.stage = HELD

    def open_soon(self, turns: int = HELD_TURNS) -> None:
        """Write the head alone if no body comes within `turns` turns of the event loop."""
        if self.stage != HELD or self.is_gone:
            return
        if turns:
            self.connection.shared.loop.call_soon(self.open_soon, turns - 1)
            return
        self.stage = STREAMING
        self.connection.transport.write(b"".join(self._finish_head(0, is_end=False)))

    def _finish_head(self, size: int, *, is_end: bool) -> list[bytes]:
        """Complete the head, by the first body event and by whether the worker leaves."""
        framing = self.framing
        left = self._left
        if framing == LENGTH and left is None:
            if is_end and not self._has_trailers:
                left = size
            elif self._is_http10:
                framing = UNTIL_CLOSE
                self.keeps_alive = False
            else:
                framing = CHUNKED
        if framing == LENGTH and size != left:  # rare; saves a call
            self._check_length(size, left, is_end=is_end)
        self.framing = framing
        self._left = left
        lines = self._head
        if left is not None:
            lines.append(_length_line(left))
        elif framing == CHUNKED:
            lines.append(b"transfer-encoding: chunked\r\n")
        if self.expects_continue:
            # No 100 Continue was sent, so the body may come or not (RFC 9110 section 10.1.1).
            self.keeps_alive = False
        if self.connection.announce_close(self):
            lines.append(b"connection: close\r\n\r\n")
        else:
            lines.append(b"connection: keep-alive\r\n\r\n" if self._is_http10 else b"\r\n")
        return lines

    def _check_length(self, size: int, left: int | None, *, is_end: bool) -> None:
        assert left is not None
        if size > left or (is_end and size < left):
            raise RuntimeError(f"the body is {'longer' if size > left else 'shorter'} than its content-length")

    def _write(self, body: bytes, *, is_end: bool) -> None:
        if type(body) is not bytes:
            body = _as_bytes(body)
        size = len(body)
        if self.stage == HELD:
            parts = self._finish_head(size, is_end=is_end)
            self.stage = STREAMING
        else:
            parts = []
            if self.framing == LENGTH:
                self._check_length(size, self._left, is_end=is_end)
        framing = self.framing
        if framing == LENGTH:
            self._left -= size  # type: ignore[operator]  # set by `_finish_head`
        elif framing == CHUNKED and size:
            parts.append(b"%x\r\n" % size)
        elif framing == BODYLESS:
            size = 0
        if size:
            self.sent += size
            parts.append(body)
        if framing == CHUNKED:
            if size:
                parts.append(b"\r\n")
            if is_end and not self._has_trailers:
                parts.append(b"0\r\n\r\n")

        if self.began and is_end and not self._has_trailers:  # as in `count`, without a call
            count = self.connection.shared.count_request
            if count is not None:
                count(self.method, self.status, self.began)
        if size > JOIN_BYTES_MAX and self.connection.shared.can_gather:
            self.connection.transport.writelines(parts)
        elif parts:
            self.connection.transport.write(b"".join(parts))
        if is_end:
            if self._has_trailers:
                self.stage = TRAILING
                self._trailers: list[bytes] = []
            else:
                self._end()

    def _end(self) -> None:
        self.stage = ANSWERED
        self.body = b""
        if self.status >= 500:
            self.connection.shared.registry.errors += 1
        if self.request is not None:
            self.log(self.status)
        if self._wakeup is not None:
            self._wakeup.set()
        self.connection.answered(self)

    # -- extensions ----------------------------------------------------------------------------------------

    async def _send_file(self, path: str) -> None:
        """Send a file as the whole body (``http.response.pathsend``)."""
        with open(path, "rb", buffering=0) as file:  # noqa: ASYNC230  a local file, as sendfile(2) needs it
            size = os.fstat(file.fileno()).st_size
            before, after = self._frame_file(size)
            self.connection.transport.write(before)
            if self.framing != BODYLESS and not await send_file(cast("Requesting", self.connection), self, file, size):
                self._is_told = True
                raise ClientLeft
        if not self._has_trailers:
            self.count(self.status)
        if after:
            self.connection.transport.write(after)
        if self._has_trailers:
            self.stage = TRAILING
            self._trailers = []
        else:
            self._end()

    def _frame_file(self, size: int) -> tuple[bytes, bytes]:
        """Return the bytes before and after a file that is the whole body."""
        if self.stage == HELD:
            has_trailers, self._has_trailers = self._has_trailers, False  # a known length leaves no room for trailers
            head = self._finish_head(size, is_end=True)
            self._has_trailers = has_trailers
            self.stage = STREAMING
            return b"".join(head), b""
        if self.framing == LENGTH:
            self._check_length(size, self._left, is_end=True)
        if self.framing != CHUNKED:
            return b"", b""
        end = b"" if self._has_trailers else b"0\r\n\r\n"
        return (b"%x\r\n" % size, b"\r\n" + end) if size else (b"", end)

    @property
    def is_blocked(self) -> bool:
        """Whether the file being sent waits for the kernel."""
        return self._blocked is not None

    async def wait_writable(self, fd: int) -> None:
        """Wait until the descriptor is writable, or the answer has no reader any more."""
        loop = self.connection.shared.loop
        self._blocked = loop.create_future()
        loop.add_writer(fd, self._unblock)
        cast("Requesting", self.connection).see_client_read()  # a WebSocket's denial has no files
        try:
            await self._blocked
        finally:
            loop.remove_writer(fd)
            self._blocked = None

    def _send_trailers(self, message: Message) -> None:
        """Send trailers in a chunked answer, if the client accepts them (``http.response.trailers``)."""
        for field in message.get("headers") or ():
            self._trailers.append(render_field(tuple(field))[1])
        if message.get("more_trailers", False):
            return
        self.count(self.status)
        if self.framing == CHUNKED:
            wants = any(name == b"te" and b"trailers" in value.lower() for name, value in self.scope["headers"])
            self.connection.transport.write(b"".join((b"0\r\n", *(self._trailers if wants else ()), b"\r\n")))
        self._end()

    def _send_hints(self, message: Message) -> None:
        """Send links to fetch before the answer (``http.response.early_hint``; RFC 8297)."""
        if not self._is_http10:
            lines = [render_field((b"link", link))[1] for link in message["links"]]
            self.connection.transport.write(b"".join((b"HTTP/1.1 103 Early Hints\r\n", *lines, b"\r\n")))


#: The message that an application may send, by stage.
EXPECTED: Final = {
    WAITING: "http.response.start",
    HELD: "http.response.body",
    STREAMING: "http.response.body",
    TRAILING: "http.response.trailers",
}


@lru_cache(maxsize=1024)
def _length_line(length: int) -> bytes:
    return b"content-length: %d\r\n" % length


@lru_cache(maxsize=1024)
def _length(value: Any) -> int:
    if not isinstance(value, bytes) or not value.isdigit():
        raise RuntimeError(f"{value!r} is not a content-length")
    return int(value)


def _as_bytes(body: object) -> bytes:
    if isinstance(body, bytearray | memoryview | bytes):
        return bytes(body)
    raise RuntimeError(f"a body is a byte string, not {type(body).__name__}")
