"""Fates of requests, messages and connections: closed lists without an "other".

A request is one attempt; nothing is ever repeated quietly. It ends in exactly one `Fate`. A numbered message on a
connection that carries many (a WebSocket, a raw stream, datagrams) does, too. What happens to connections between
requests is an `Event`: no request is lost by it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

__all__ = ["LOSSES", "MEANINGS", "ConnectionEvent", "Fate", "Kind", "Tally"]


class Kind(enum.Enum):
    """How a client behaves."""

    CONNECT = "connect"
    KEEPALIVE = "keepalive"
    LATE = "late"
    HALFHEAD = "halfhead"
    SLOW = "slow"
    UPLOAD = "upload"
    WEBSOCKET = "websocket"
    STREAM = "stream"
    DATAGRAM = "datagram"
    TLS = "tls"


class Fate(enum.Enum):
    """How an attempt ended."""

    ANSWERED = "answered"
    LATE = "late"
    REFUSED = "refused"
    RESET_BEFORE_SEND = "reset before send"
    RESET_AFTER_SEND = "reset after send"
    CLOSED_UNANSWERED = "closed unanswered"
    TRUNCATED = "truncated"
    TIMED_OUT = "timed out"
    WRONG_STATUS = "wrong status"
    LOST = "lost message"
    DUPLICATED = "duplicated message"
    OUT_OF_ORDER = "out-of-order message"


class ConnectionEvent(enum.Enum):
    """What happened to a connection without the loss of a request."""

    IDLE_CLOSE = "idle close"
    TOLD_TO_CLOSE = "told to close"
    CONNECTED = "connected"
    RECONNECTED = "reconnected"


#: Everything but a whole answer in time, and a whole answer that was late.
LOSSES: Final = tuple(fate for fate in Fate if fate not in (Fate.ANSWERED, Fate.LATE))

MEANINGS: Final[Mapping[Fate | ConnectionEvent, str]] = {
    Fate.ANSWERED: "a whole answer, in time",
    Fate.LATE: "a whole answer, but longer after the intended start than is allowed",
    Fate.REFUSED: "no process listened (ECONNREFUSED), or the handshake was answered with a reset",
    Fate.RESET_BEFORE_SEND: "the connection was made, and was reset or closed before anything was sent on it",
    Fate.RESET_AFTER_SEND: "a reset after the request, or a part of it, was sent, and before a byte of the answer",
    Fate.CLOSED_UNANSWERED: "an orderly end after the request was sent, and before a byte of the answer",
    Fate.TRUNCATED: "the connection ended, in whatever way, in the middle of the answer",
    Fate.TIMED_OUT: "no whole answer by the deadline, or no connection",
    Fate.WRONG_STATUS: "a whole answer with another status than was expected, or another content",
    Fate.LOST: "a numbered message was not answered before its connection ended",
    Fate.DUPLICATED: "a numbered message was answered more than once",
    Fate.OUT_OF_ORDER: "a numbered message was answered after a later one",
    ConnectionEvent.IDLE_CLOSE: "the server closed a connection on which no request was under way",
    ConnectionEvent.TOLD_TO_CLOSE: (
        "a whole answer said `Connection: close`, or a WebSocket was closed with 1001 or 1012"
    ),
    ConnectionEvent.CONNECTED: (
        "a connection was made by a client that keeps it; also each time that it had to make a new one"
    ),
    ConnectionEvent.RECONNECTED: "a client that keeps its connection had to make a new one",
}


class Tally(dict[tuple[str, str], int]):
    """Counts of fates and events by kind of client: ``tally["keepalive", "answered"]``."""

    def __missing__(self, key: tuple[str, str]) -> int:
        return 0

    def add(self, kind: Kind, what: Fate | ConnectionEvent, count: int = 1) -> None:
        """Count one more."""
        self[kind.value, what.value] += count

    def merge(self, other: Mapping[tuple[str, str], int]) -> None:
        """Add the counts of another tally."""
        for key, count in other.items():
            self[key] += count

    def total(self, what: Fate | ConnectionEvent) -> int:
        """Sum over all kinds of client."""
        return sum(count for (_, name), count in self.items() if name == what.value)

    @property
    def lost(self) -> int:
        """Count the attempts that got no whole answer."""
        return sum(self.total(fate) for fate in LOSSES)
