"""One WebSocket: the ASGI application's side."""

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

#: Memory of a message beside its content: a dict, and its place in a queue.
MESSAGE_BYTES: Final = 256


class Talking(Answering, Protocol):
    """The interface that a session needs of its connection."""

    is_reading_paused: bool

    @property
    def handoff(self) -> object:
        """Not None while the worker leaves."""

    @property
    def is_connecting(self) -> bool:
        """Whether the handshake is unanswered, or a denial is incomplete."""

    @property
    def is_open(self) -> bool:
        """Whether messages may be sent."""

    @property
    def is_resumed(self) -> bool:
        """Whether another process has already answered the handshake that the application is to answer."""

    def make_movable(self, export: Callable[[], Any] | None = None) -> None:
        """Allow the WebSocket to move to another process."""

    def come_to_rest(self) -> None:
        """Check for a safe point: the application waits for a message."""

    def accept(self, subprotocol: str | None, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Answer the handshake."""

    def refuse(self, status: int, why: str) -> None:
        """Deny the handshake with `status`."""

    def send_message(self, text: str | None, data: bytes | None) -> None:
        """Write one message."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake, if the WebSocket is open."""


class Session:
    """One WebSocket: `run` is the application's task, `receive` and `send` are its arguments.

    Args:
        request: The handshake, as an HTTP exchange that was not begun; it sends the answer if the application denies
            the WebSocket.
        state: The state that another process's application has exported.
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
        #: Complete messages that the application has not received, oldest first.
        self.undelivered: deque[Message] = deque([{"type": "websocket.connect"}])
        #: Memory of these; messages taken by `hold` are not counted.
        self.waiting_bytes = _cost(self.undelivered[0])
        #: Delivered after all messages; nothing can be sent once it is set.
        self.disconnect: Message | None = None
        #: The application has closed, denied, raised or returned: it receives no more messages.
        self.has_finished = False
        self._is_told = False  # the application was told that the client has left
        self.why_gone = CLIENT_LEFT  # or another reason for telling it
        self._waiters: list[asyncio.Future[None]] = []
        self._receiving = 0
        self._held: tuple[Message, ...] = ()

    def __str__(self) -> str:
        return f"WebSocket {self.scope['raw_path'].decode('latin-1')}"

    @property
    def is_receiving(self) -> bool:
        """Whether the application waits for a message."""
        return self._receiving > 0

    # -- called by the connection --------------------------------------------------------------------------

    def deliver(self, kind: str, content: str | bytes) -> None:
        """Queue a complete message, of kind ``"text"`` or ``"bytes"``."""
        if not self.has_finished:
            self.undelivered.append({"type": "websocket.receive", kind: content})
            self.waiting_bytes += MESSAGE_BYTES + getsizeof(content)
            if self._waiters:
                self._wake()

    def end(self, code: int, reason: str) -> None:
        """End receiving and sending; the first call sets the code and the reason."""
        if self.disconnect is None:
            self.disconnect = {"type": "websocket.disconnect", "code": code, "reason": reason}
            self.denial.leave()
            self._wake()

    def hold(self) -> tuple[Message, ...]:
        """Take back undelivered messages, even if the application was woken for one but has not run yet."""
        self._held = tuple(self.undelivered)
        self._clear()
        return self._held

    def let_go(self) -> None:
        """Put back the messages that `hold` has taken."""
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

    # -- called by the application -------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the application for this WebSocket; close the WebSocket or deny the handshake at its end."""
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
                # "if the application dies the socket should be closed": as for a `websocket.close` without a code.
                self.connection.close(1000, "")
        finally:
            self._finish()
            shared.running.discard(self)

    def _failed(self, error: BaseException) -> None:
        is_over = self.has_finished or self.disconnect is not None
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if is_over and is_cancelled:
            return
        if self._is_told:  # usually a framework's reaction to `ClientLeft`
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
            if self.connection.is_reading_paused:
                self.connection.resume_reading_if_room()  # the next message may be half here
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
        """ASGI ``send``; waits while earlier messages fill the write buffer.

        Raises:
            ClientLeft: The client has left, or the WebSocket is being closed.
            RuntimeError: The message is not allowed here.
        """
        connection = self.connection
        while connection.writable is not None:  # the connection may stand still again before this runs
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
            connection.refuse(403, "")  # the client, which has its 101, would not understand an HTTP answer
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
    """Bytes of memory that a message takes; a text takes up to four for each character."""
    content = message.get("text")
    return MESSAGE_BYTES + getsizeof(message.get("bytes") if content is None else content)


def _scope(request: Scope) -> Scope:
    """Make a WebSocket's scope from its handshake's."""
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
