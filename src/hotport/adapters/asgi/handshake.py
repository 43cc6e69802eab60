"""Negotiate WebSocket handshakes, and resume WebSockets that another process had negotiated.

The websockets library validates handshakes; nothing here writes to a connection.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from hotport.adapters.asgi.fields import check_field
from hotport.adapters.asgi.frames import COMPRESSED_BYTES_MAX
from hotport.adapters.asgi.spec import Scope
from hotport.adapters.base import NotAdopted
from hotport.options import Options
from hotport.wire.envelope import WebSocketState

__all__ = ["Handshakes", "Negotiation", "Resumption", "is_handshake", "render_answer"]

log = logging.getLogger("hotport.error")

#: Header fields of a handshake that the library validates.
JUDGED: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"host",
        b"origin",
        b"sec-websocket-extensions",
        b"sec-websocket-key",
        b"sec-websocket-protocol",
        b"sec-websocket-version",
        b"transfer-encoding",
        b"upgrade",
    }
)

#: Header fields of the handshake's answer that the application cannot set.
RESERVED: Final = frozenset(
    {
        "connection",
        "content-length",
        "sec-websocket-accept",
        "sec-websocket-extensions",
        "transfer-encoding",
        "upgrade",
    }
)


class _Demoted(logging.LoggerAdapter[logging.Logger]):
    """Demotes the library's info messages, which it logs for every connection."""

    def info(self, msg: object, *args: object, **options: Any) -> None:
        self.debug(msg, *args, **options)


class Negotiation(NamedTuple):
    """The result of a handshake.

    Attributes:
        protocol: Has the refusal to write, if there is neither `answer` nor `why`.
        answer: Accepts the handshake; the application may add to it.
        status: The status of the refusal if there is no `answer`.
        why: The text of the refusal if the library has none.
    """

    protocol: ServerProtocol
    answer: Response | None
    status: int = 101
    why: str = ""


class Resumption(NamedTuple):
    """A WebSocket of another process, negotiated here as it was there; `handshake` is its request."""

    state: WebSocketState
    protocol: ServerProtocol
    answer: Response
    handshake: bytes


class Handshakes:
    """Negotiates the WebSockets of one adapter."""

    __slots__ = ("_has_server", "_has_warned", "_is_deflating", "_log", "_message_bytes_max", "all_movable")

    def __init__(self, options: Options) -> None:
        self.all_movable = options.handoff == "websocket"
        self._log = _Demoted(logging.getLogger("hotport.websocket"), {})
        self._has_server = options.server_header
        self._has_warned = False
        self._is_deflating = options.ws_deflate
        self._message_bytes_max = options.ws_message_max_bytes

    def negotiate(self, scope: Scope, *, is_movable: bool) -> Negotiation:
        """Let the library validate a handshake request; `is_movable` as in `_read`."""
        # Only the fields that it validates: the library has limits of its own for the rest, which is within ours.
        head = b"%b / HTTP/1.1\r\n%b\r\n" % (scope["method"].encode(), _lines(scope["headers"]))
        protocol, request = self._read(head, is_movable=is_movable)
        if request is None:
            if any(protocol.writes):
                return Negotiation(protocol, None, 400)
            # It has closed without an answer.
            error = protocol.handshake_exc
            cause = error.__cause__ if error is not None and error.__cause__ is not None else error
            return Negotiation(protocol, None, 400, f"Failed to open a WebSocket connection: {cause}.")
        answer = protocol.accept(request)
        if answer.status_code == 101:
            return Negotiation(protocol, answer)
        if self._has_server:
            answer.headers["Server"] = "hotport"
        protocol.send_response(answer)
        return Negotiation(protocol, None, answer.status_code)

    def resume(self, state: WebSocketState) -> Resumption:
        """Negotiate a WebSocket of another process again, with the same result.

        Raises:
            NotAdopted: The negotiation has another result here.
        """
        head = b"GET / HTTP/1.1\r\n%b\r\n" % _lines(state.headers)
        protocol, request = self._read(head, is_movable=True)
        if request is None:
            raise NotAdopted("its handshake would not be understood")
        answer = protocol.accept(request)
        extensions = answer.headers.get("Sec-WebSocket-Extensions", "")
        if answer.status_code != 101 or extensions != state.extensions:
            raise NotAdopted(f"the extensions {state.extensions!r} were agreed upon, and would be {extensions!r}")
        if state.subprotocol:
            answer.headers["Sec-WebSocket-Protocol"] = state.subprotocol
        protocol.send_response(answer)
        protocol.data_to_send()  # the client has got it from the other process
        lines = b"".join(b"%b: %b\r\n" % field for field in state.headers)
        return Resumption(state, protocol, answer, b"GET %b HTTP/1.1\r\n%b\r\n" % (state.target, lines))

    def _read(self, head: bytes, *, is_movable: bool) -> tuple[ServerProtocol, Request | None]:
        """Return a protocol that has read a handshake, and the request if the library found one in it.

        zlib does not export the context that a compressed message shares with those before it. So WebSockets that may
        move are negotiated without context takeover (RFC 7692 sections 7.1.1 and 7.2.1).
        """
        extensions = None
        if self._is_deflating:
            # Small windows, as in the library's own server: they cost memory while a connection stays open.
            deflate = ServerPerMessageDeflateFactory(
                server_no_context_takeover=is_movable,
                client_no_context_takeover=is_movable,
                server_max_window_bits=12,
                client_max_window_bits=12,
                compress_settings={"memLevel": 5},
            )
            extensions = [deflate]
        # A part of a compressed message may be longer than its content, whose limit is checked in
        # `WebSocketConnection._on_frame`.
        protocol = ServerProtocol(
            extensions=extensions, max_size=self._message_bytes_max + COMPRESSED_BYTES_MAX, logger=self._log
        )
        protocol.receive_data(head)
        requests = protocol.events_received()
        if not requests:
            return protocol, None
        assert isinstance(requests[0], Request)
        return protocol, requests[0]

    def warn_of_state(self, session: object) -> None:
        """Warn once that a resumed WebSocket's application never called ``movable()``: it may not know the client."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s was resumed by `handoff = websocket`, and its application has not called movable(): if its protocol"
                " keeps state (Socket.IO, GraphQL subscriptions, STOMP), its clients now wait for ever; then use"
                " `handoff = auto`",
                session,
            )


def is_handshake(scope: Scope) -> bool:
    """Whether an upgrade request asks for a WebSocket.

    HTTP/1.0 has no upgrades: RFC 9110 section 7.8.
    """
    return scope["http_version"] == "1.1" and any(
        name == b"upgrade" and b"websocket" in value.lower() for name, value in scope["headers"]
    )


def render_answer(
    answer: Response,
    offered: Collection[str],
    subprotocol: str | None,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    has_server: bool,
) -> None:
    """Add an application's headers and subprotocol to the answer that accepts a handshake.

    Args:
        offered: The client's subprotocols.
        has_server: Whether to add a ``server`` field if `headers` have none.

    Raises:
        RuntimeError: The answer would be malformed, or the client would have to refuse it.
    """
    fields: list[tuple[str, str]] = []
    for raw_name, raw_value in headers:
        check_field(raw_name, raw_value)
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name == "sec-websocket-protocol":
            raise RuntimeError("'sec-websocket-protocol' is no header of 'websocket.accept': use 'subprotocol'")
        if name not in RESERVED:
            fields.append((name, value))
    if subprotocol is not None:
        if subprotocol not in offered:
            raise RuntimeError(f"the client has not offered the subprotocol {subprotocol!r}")
        answer.headers["Sec-WebSocket-Protocol"] = subprotocol
    names = {name for name, _ in fields}
    if "date" in names:
        del answer.headers["Date"]
    if "server" not in names and has_server:
        answer.headers["Server"] = "hotport"
    for name, value in fields:
        answer.headers[name] = value


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % field for field in headers if field[0] in JUDGED)
