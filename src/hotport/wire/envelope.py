"""The state that travels with a connection when it is handed off, and its encoding.

A connection is a descriptor and an envelope. Between two workers of one service they travel in batches, over the
control socket of the worker that takes them (`hotport.worker.handoff`)::

    REST       so many connections may come in all: keep room for them
    BATCH      envelopes, in the order of the descriptors that come with the frame
    ACK        which of them are not taken, and how many more would be
    GO         they are not served here any more: serve them
    WITHDRAW   they are served here again: let go of them
    ROOM       from the one that takes them, when it had none: so many more would be taken

Every structure here is an array on the wire, so the order of fields is part of `ENVELOPE_VERSION`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from hotport.errors import ControlError
from hotport.wire.tlsrecords import TlsState

__all__ = [
    "ENVELOPE_VERSION",
    "ENVELOPE_VERSIONS",
    "HEADER_BYTES",
    "PLAIN_VERSION",
    "Ack",
    "Envelope",
    "Frame",
    "HttpState",
    "ProtocolState",
    "State",
    "StreamState",
    "WebSocketState",
    "decode_ack",
    "decode_batch",
    "decode_count",
    "encode_frame",
    "encode_state",
    "pack",
    "parse_header",
]

#: Grows when anything in this module changes in a way that the version before cannot read.
ENVELOPE_VERSION: Final = 3

#: The version without TLS. It reads those of version 3 that have none: trailing fields are ignored.
PLAIN_VERSION: Final = 2

#: The versions that are understood.
ENVELOPE_VERSIONS: Final = frozenset({PLAIN_VERSION, ENVELOPE_VERSION})

#: The longest frame that is believed. Undelivered messages travel, and a batch may hold many connections.
FRAME_BYTES_MAX: Final = 1 << 30

_HEADER: Final = struct.Struct("!BI")  # kind, length of the payload

HEADER_BYTES: Final = _HEADER.size


class Frame(enum.IntEnum):
    """The kinds of frame."""

    BATCH = 1
    ACK = 2
    GO = 3
    WITHDRAW = 4
    REST = 5
    ROOM = 6


class HttpState(msgspec.Struct, frozen=True, array_like=True, tag="http"):
    """An HTTP/1.1 connection without a request in progress.

    Attributes:
        has_served: It has had an answer: it is idle, not new.
        wait_s: Seconds until it has waited too long for its client; 0 is never.
    """

    has_served: bool
    wait_s: float


class WebSocketState(msgspec.Struct, frozen=True, array_like=True, tag="websocket"):
    """An open WebSocket between two messages.

    Attributes:
        target: The request target of its handshake.
        headers: The header fields of its handshake.
        subprotocol: What was agreed upon; empty for none.
        extensions: ``Sec-WebSocket-Extensions`` as it was answered.
        undelivered: Messages that the application has not received, texts and byte strings; oldest first.
        waits_for: ``"ping"`` or ``"pong"``: what `wait_s` is the end of; empty for nothing.
        has_heard: The client has sent something since the last ping.
        application: What the application wants to find again.
    """

    target: bytes
    headers: list[tuple[bytes, bytes]]
    subprotocol: str
    extensions: str
    undelivered: list[Any]
    waits_for: str
    wait_s: float
    has_heard: bool
    application: Any


class StreamState(msgspec.Struct, frozen=True, array_like=True, tag="stream"):
    """A byte stream whose handler has agreed; `application` is the state it has exported."""

    application: Any


class ProtocolState(msgspec.Struct, frozen=True, array_like=True, tag="protocol"):
    """An `asyncio.Protocol` that has agreed; `application` is the state it has exported."""

    application: Any


State = HttpState | WebSocketState | StreamState | ProtocolState


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Everything about a connection that its descriptor does not tell.

    Attributes:
        peer: The client's address, or what a PROXY header has said; as Python's socket module has addresses.
        own: Our address likewise.
        is_proxied: A PROXY header has said both.
        unread: Bytes of the client that were taken from the socket and not consumed; of its data, if there is TLS.
        tls: The connection's TLS; None without it.
    """

    peer: Any
    own: Any
    is_proxied: bool
    unread: bytes
    state: State
    tls: TlsState | None = None

    @property
    def endpoints(self) -> tuple[Any, Any]:
        """`peer` and `own`, with tuples where the wire has lists."""
        return _address(self.peer), _address(self.own)


class Ack(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a batch of offers.

    Attributes:
        refused: Which connections of it are not taken, by number.
        room: How many more could be.
    """

    refused: list[int]
    room: int


_encoder: Final = msgspec.msgpack.Encoder()
_batches: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])
_envelopes: Final = msgspec.msgpack.Decoder(Envelope)
_acks: Final = msgspec.msgpack.Decoder(Ack)
_counts: Final = msgspec.msgpack.Decoder(Annotated[int, msgspec.Meta(ge=0)])


def encode_frame(frame: Frame, content: Sequence[msgspec.Raw | Envelope] | Ack | int | None = None) -> bytes:
    """Encode one whole frame."""
    payload = b"" if content is None else _encoder.encode(content)
    return _HEADER.pack(frame, len(payload)) + payload


def encode_state(state: object) -> bytes:
    """Encode the state an application has exported, to learn that it can travel before anything is moved.

    Raises:
        TypeError: It holds something that cannot travel: what JSON has, and bytes, can.
    """
    try:
        return _encoder.encode(state)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TypeError(f"cannot travel to another process: {error}") from None


def pack(envelope: Envelope) -> msgspec.Raw:
    """Encode an envelope for a batch.

    Raises:
        TypeError: It holds something that cannot travel: a path that is no UTF-8, for one.
    """
    return msgspec.Raw(encode_state(envelope))


def parse_header(header: bytes) -> tuple[Frame, int]:
    """Parse the kind of a frame, and how many bytes follow.

    Raises:
        ControlError: It is no header of a frame (HP220).
    """
    kind, size = _HEADER.unpack(header)
    if kind not in Frame._value2member_map_ or size > FRAME_BYTES_MAX:
        raise _not_understood(f"kind {kind}, {size} bytes")
    return Frame(kind), size


def decode_batch(payload: bytes) -> list[Envelope | None]:
    """Decode the envelopes of a batch; None for one that is invalid, so that the others are not lost.

    Raises:
        ControlError: It is no batch (HP220).
    """
    return [_unpack(packed) for packed in _decode(_batches, payload)]


def _unpack(packed: msgspec.Raw) -> Envelope | None:
    try:
        return _envelopes.decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def decode_ack(payload: bytes) -> Ack:
    """The answer to a batch of offers.

    Raises:
        ControlError: It is not one (HP220).
    """
    return _decode(_acks, payload)  # type: ignore[no-any-return]


def decode_count(payload: bytes) -> int:
    """A number of connections.

    Raises:
        ControlError: It is not one (HP220).
    """
    return _decode(_counts, payload)  # type: ignore[no-any-return]


def _decode(decoder: msgspec.msgpack.Decoder[Any], payload: bytes) -> Any:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _not_understood(str(error)) from None


def _not_understood(cause: str) -> ControlError:
    return ControlError(
        "HP220",
        "cannot understand another worker's connections",
        cause=cause,
        fix="hotport restart",
        note="connections move once both generations run the same version of hotport",
    )


def _address(address: Any) -> Any:
    return tuple(address) if isinstance(address, list) else address
