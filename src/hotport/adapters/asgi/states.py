"""Every state in which a connection can be, and what becomes of it when its worker leaves.

Drain closes nothing: a connection that is closed without notice may be one on which the client has just begun to
send. Instead, the next head that is written *and has no request behind it* says ``Connection: close``, and the
connection is closed after that answer (``told_to_close``). Pipelined requests are thus all answered, in order.
A WebSocket has no next answer: it is closed, with a code that says why, and in the order of chance, so that not all
clients reconnect at once. Quiesce changes nothing in any state: it concerns the listeners.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

__all__ = ["STATES", "WEBSOCKET_STATES", "Drained", "Manner", "Row", "State", "WebSocketState"]


class State(Enum):
    """What a connection is doing; always exactly one of these."""

    FRESH = "fresh"
    HALF_HEAD = "half_head"
    BODY = "body"
    IN_FLIGHT = "in_flight"
    STREAMING = "streaming"
    SURPLUS = "surplus"
    IDLE = "idle"
    CLOSING = "closing"
    CLOSED = "closed"


class WebSocketState(Enum):
    """What a connection is doing once its handshake request has been read; always exactly one of these."""

    CONNECTING = "connecting"
    DENYING = "denying"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Drained(Enum):
    """What a connection still does once its worker drains."""

    SERVES_ONE_MORE = "serves one more request"
    ANSWERS = "answers this request"
    CLOSES = "is closed with 1012 at a random moment of the drain window"
    OPENS = "answers the handshake; is drained once it is open"
    NOTHING = "nothing"


class Manner(Enum):
    """How a connection is ended at the deadline: as politely as its state allows."""

    CLOSE = "closed; what is written is still flushed"
    REFUSE = "answered with 503, so that the client knows that it may ask again"
    TRUNCATE = "cut, so that the answer does not look whole"
    GOODBYE = "closed with 1012, and the connection ended"
    NOTHING = "left alone: it ends as it would have"


class Row(NamedTuple):
    """One state.

    Attributes:
        client: What the client is waiting for.
        drained: What the connection still does once its worker drains.
        manner: How it is ended at the drain deadline.
        fate: What is counted then; empty if that does not depend on this state.
    """

    client: str
    drained: Drained
    manner: Manner
    fate: str = ""


STATES: Final[Mapping[State, Row]] = {
    State.FRESH: Row("nothing: it has not sent a byte", Drained.SERVES_ONE_MORE, Manner.CLOSE, "cut_fresh"),
    State.HALF_HEAD: Row("the rest of its own request's head", Drained.ANSWERS, Manner.REFUSE, "cut_half_head"),
    State.BODY: Row("the rest of its own body; the application runs", Drained.ANSWERS, Manner.REFUSE, "cut_body"),
    State.IN_FLIGHT: Row("an answer, of which nothing is sent", Drained.ANSWERS, Manner.REFUSE, "cut_in_flight"),
    State.STREAMING: Row("the rest of an answer", Drained.SERVES_ONE_MORE, Manner.TRUNCATE, "cut_streaming"),
    State.SURPLUS: Row(
        "nothing: it sends a body that nobody will read", Drained.SERVES_ONE_MORE, Manner.CLOSE, "idle_closed"
    ),
    State.IDLE: Row("nothing; its keep-alive time runs", Drained.SERVES_ONE_MORE, Manner.CLOSE, "idle_closed"),
    State.CLOSING: Row("nothing: it has its last answer, and must close", Drained.NOTHING, Manner.NOTHING),
    State.CLOSED: Row("nothing", Drained.NOTHING, Manner.NOTHING),
}

WEBSOCKET_STATES: Final[Mapping[WebSocketState, Row]] = {
    WebSocketState.CONNECTING: Row("an answer to its handshake", Drained.OPENS, Manner.REFUSE, "cut_in_flight"),
    WebSocketState.DENYING: Row("the rest of an HTTP answer", Drained.ANSWERS, Manner.TRUNCATE, "cut_streaming"),
    WebSocketState.OPEN: Row("messages", Drained.CLOSES, Manner.GOODBYE, "cut_websocket"),
    WebSocketState.CLOSING: Row("our close frame, or the end of the connection", Drained.NOTHING, Manner.CLOSE),
    WebSocketState.CLOSED: Row("nothing", Drained.NOTHING, Manner.NOTHING),
}
