"""One WebSocket, as an ASGI application sees it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from sys import getsizeof
from typing import Any, Final, Protocol

from hotport.adapters.asgi.exchange import CLIENT_LEFT, Answering, ClientLeft, Exchange
from hotport.adapters.asgi.spec import Message, Scope
from hotport.adapters.asgi.states import STREAMING, WAITING

__all__ = ["Session", "Talking"]

log = logging.getLogger("hotport.error")

#: What a message costs beside its content: a dict, and its place in a queue.
MESSAGE_BYTES: Final = 256


class Talking(Answering, Protocol):
    """What a session asks of its connection."""

    @property
    def handoff(self) -> object:
        """Not None while the worker leaves."""

    @property
    def is_connecting(self) -> bool:
        """The application has not answered the handshake, or not all of a denial is sent."""

    @property
    def is_open(self) -> bool:
        """Messages may be sent."""

    @property
    def is_resumed(self) -> bool:
        """The handshake that the application is about to answer was answered in another process."""

    def make_movable(self, export: Callable[[], Any] | None = None) -> None:
        """The application agrees that another process may go on."""

    def come_to_rest(self) -> None:
        """The application waits for a message: this may be a safe point."""

    def accept(self, subprotocol: str | None, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Answer the handshake."""

    def refuse(self, status: int, why: str) -> None:
        """Answer the handshake with a status that is no 101."""

    def send_message(self, text: str | None, data: bytes | None) -> None:
        """Write one message."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake, if the WebSocket is open."""


class Session:
    """One WebSocket: `run` is the application's task, `receive` and `send` are its arguments.

    Args:
        request: The handshake, as an HTTP exchange that was not begun: if the application denies the WebSocket, it
            carries the answer.
        state: What another process's application has exported.
    """

    __slots__ = (
        "_held",
        "_is_told",
        "_receiving",
        "_waiters",
        "connection",
        "denial",
        "disconnect",
        "has_finished",
        "scope",
        "task",
        "undelivered",
        "waiting_bytes",
        "why_gone",
    )

    def __init__(self, connection: Talking, request: Exchange, state: Any = None) -> None:
        self.connection = connection
        self.denial = request
        self.scope = _scope(request.scope)
        hotport = self.scope["extensions"]["hotport"]
        self.scope["extensions"]["hotport"] = {
            **hotport,
            "movable": connection.make_movable,
            "resumed": connection.is_resumed,
            "state": state,
        }
        self.task: asyncio.Task[None] | None = None
        #: What has arrived whole and the application has not received, oldest first.
        self.undelivered: deque[Message] = deque([{"type": "websocket.connect"}])
        #: Memory of all of these; what has been held is not counted.
        self.waiting_bytes = _cost(self.undelivered[0])
        #: Received after all of the above; there is nobody to send to once it is set.
        self.disconnect: Message | None = None
        #: The application has closed, denied, raised or returned: it is not interested in messages any more.
        self.has_finished = False
        self._is_told = False  # the application knows that the client has left
        self.why_gone = CLIENT_LEFT  # or why else the application was told so
        self._waiters: list[asyncio.Future[None]] = []
        self._receiving = 0
        self._held: tuple[Message, ...] = ()

    def __str__(self) -> str:
        return f"WebSocket {self.scope['raw_path'].decode('latin-1')}"

    @property
    def is_receiving(self) -> bool:
        """The application waits for a message, and has not begun with the next one."""
        return self._receiving > 0

    # -- the connection's side -----------------------------------------------------------------------------

    def deliver(self, kind: str, content: str | bytes) -> None:
        """A message has arrived whole: its content is ``"text"`` or ``"bytes"``."""
        if not self.has_finished:
            self.undelivered.append({"type": "websocket.receive", kind: content})
            self.waiting_bytes += MESSAGE_BYTES + getsizeof(content)
            if self._waiters:
                self._wake()

    def end(self, code: int, reason: str) -> None:
        """Nothing will arrive any more, and nothing can be sent; the first call says why."""
        if self.disconnect is None:
            self.disconnect = {"type": "websocket.disconnect", "code": code, "reason": reason}
            self.denial.leave()
            self._wake()

    def hold(self) -> tuple[Message, ...]:
        """Take back what the application has not received: also if it has been woken for that, and not run yet."""
        self._held = tuple(self.undelivered)
        self._clear()
        return self._held

    def let_go(self) -> None:
        """Put back what `hold` has taken."""
        self.undelivered.extend(self._held)
        self.waiting_bytes += sum(map(_cost, self._held))
        self._held = ()
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _clear(self) -> None:
        self.undelivered.clear()
        self.waiting_bytes = 0

    def _finish(self) -> None:
        self.has_finished = True
        self._clear()
        self.connection.resume_reading_if_room()

    # -- the application's side ----------------------------------------------------------------------------

    async def run(self) -> None:
        """The application's life with this WebSocket: as long as it runs, unless the client or the worker leaves."""
        shared = self.connection.shared
        try:
            await shared.application(self.scope, self.receive, self.send)
        except BaseException as error:
            self._failed(error)
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise
        else:
            if not self.has_finished and self.connection.is_connecting:
                what = "the end of its answer" if self.denial.stage == STREAMING else "an answer"
                log.error("the application returned without %s: %s", what, self)
                self.connection.refuse(500, "Internal Server Error")
            else:
                # "if the application dies the socket should be closed": as if it had said so without a code, 1000.
                self.connection.close(1000, "")
        finally:
            self._finish()
            shared.running.discard(self)

    def _failed(self, error: BaseException) -> None:
        is_over = self.has_finished or self.disconnect is not None
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if is_over and is_cancelled:
            return
        if self._is_told:  # as a rule this is what a framework makes of `ClientLeft`
            log.info("the application ended with %r because %s: %s", error, self.why_gone, self)
        else:
            log.error("the application %s: %s", "was cancelled" if is_cancelled else "raised", self, exc_info=error)
            self.connection.shared.registry.errors += not is_cancelled
        if not is_over and self.connection.is_connecting:
            self.connection.refuse(500, "Internal Server Error")
        else:
            self.connection.close(1011, "")

    async def receive(self) -> Message:
        """ASGI ``receive``: ``websocket.connect``, then messages, then ``websocket.disconnect`` for ever."""
        undelivered = self.undelivered
        while True:
            if undelivered:
                message = undelivered.popleft()
                self.waiting_bytes = self.waiting_bytes - _cost(message) if undelivered else 0
                self.connection.resume_reading_if_room()
                return message
            if self.disconnect is not None:
                self._is_told = True
                return dict(self.disconnect)
            waiter = self.connection.shared.loop.create_future()
            self._waiters.append(waiter)
            self._receiving += 1
            if self.connection.handoff is not None:
                self.connection.come_to_rest()
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                raise
            finally:
                self._receiving -= 1

    async def send(self, message: Message) -> None:
        """ASGI ``send``; waits while the client does not read what was sent before.

        Raises:
            ClientLeft: The client has left, or the WebSocket is being closed.
            RuntimeError: The message does not fit here.
        """
        connection = self.connection
        while connection.writable is not None:  # it may stand still again before we run
            await connection.writable.wait()
        kind = message["type"]
        if connection.is_open:
            if kind == "websocket.send":
                if connection.transport.is_closing():  # as in `Exchange.send`
                    self._is_told = True
                    raise ClientLeft
                connection.send_message(message.get("text"), message.get("bytes"))
            elif kind == "websocket.close":
                code = message.get("code")
                connection.close(1000 if code is None else code, message.get("reason") or "")
                self._finish()
            else:
                raise RuntimeError(f"{kind!r} was sent on an open WebSocket")
        elif self.has_finished:
            raise RuntimeError(f"{kind!r} was sent after the end of the WebSocket")
        elif self.disconnect is not None or not connection.is_connecting:
            self._is_told = True
            raise ClientLeft
        elif kind.startswith("websocket.http.response.") and connection.is_resumed:
            connection.refuse(403, "")  # the client would not understand the rest of it
            self._finish()
        elif kind in ("websocket.http.response.start", "websocket.http.response.body"):
            await self.denial.send({**message, "type": kind.removeprefix("websocket."), "trailers": False})
            self.denial.open_soon()
        elif self.denial.stage != WAITING:
            raise RuntimeError(f"{kind!r} was sent where 'websocket.http.response.body' was expected")
        elif kind == "websocket.accept":
            connection.accept(message.get("subprotocol"), message.get("headers") or ())
        elif kind == "websocket.close":
            connection.refuse(403, "")
            self._finish()
        else:
            raise RuntimeError(f"{kind!r} was sent where 'websocket.accept' was expected")


def _cost(message: Message) -> int:
    """Bytes of memory that a message takes. A text takes up to four for each of its characters."""
    content = message.get("text")
    return MESSAGE_BYTES + getsizeof(message.get("bytes") if content is None else content)


def _scope(request: Scope) -> Scope:
    """A WebSocket's scope has what the scope of its handshake has, but no method."""
    offered = b",".join(value for name, value in request["headers"] if name == b"sec-websocket-protocol")
    return {
        **{key: value for key, value in request.items() if key != "method"},
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "scheme": "wss" if request["scheme"] == "https" else "ws",
        "subprotocols": [word.strip() for word in offered.decode("latin-1").split(",") if word.strip()],
        "extensions": {
            **{name: value for name, value in request["extensions"].items() if not name.startswith("http.")},
            "websocket.http.response": {},
        },
    }
