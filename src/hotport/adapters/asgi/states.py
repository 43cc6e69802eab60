"""The states of a connection, and what drain, handoff and cut do in each.

If another worker can take it (`hotport.worker.handoff`), a connection *moves* at its next safe point, unnoticed by its
client. Otherwise drain does not close it at once: the client may have just begun to send. Instead, the next head that
is written *and has no request behind it* says ``Connection: close``, and the connection is closed after that answer
(``told_to_close``). So all pipelined requests are answered, in order.
A WebSocket has no next answer: it is closed with a code that gives the reason, at a random moment, so that not all
clients reconnect at once. Quiesce changes nothing in any state: it concerns the listeners.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

from hotport.model.fates import Fate

__all__ = [
    "ANSWERED",
    "HELD",
    "STATES",
    "STREAMING",
    "TRAILING",
    "WAITING",
    "WEBSOCKET_STATES",
    "Drained",
    "Manner",
    "Moves",
    "Row",
    "State",
    "WebSocketState",
]


# The stages of an answer. Plain integers: they are compared for every message.
WAITING: Final = 0  # the application has sent nothing
HELD: Final = 1  # it has sent status and headers; they wait for the first body event, to be one write with it
STREAMING: Final = 2  # the head is written
TRAILING: Final = 3  # so is the body; trailers are to follow
ANSWERED: Final = 4  # everything is written


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


class Moves(Enum):
    """When a connection moves to another worker; over TLS, never."""

    AT_ONCE = "at once, with what has come of a head"
    ANSWERED = "after its answer"
    READ = "when the body is over"
    OPENED = "once it is open"
    WAITING = "if its application agrees: when it waits for the next message, and no half of one has come"
    NEVER = ""


class Manner(Enum):
    """How a connection is ended at the drain deadline."""

    CLOSE = "closed; what is written is still flushed"
    REFUSE = "answered with 503, so that the client knows that it may ask again"
    TRUNCATE = "cut, so that the answer does not look whole"
    GOODBYE = "closed with 1012, and the connection ended"
    NOTHING = "left alone: it ends as it would have"


class Row(NamedTuple):
    """One state.

    Attributes:
        client: What the client is waiting for.
        moves: When it moves, if another worker can take it.
        drained: What it still does once its worker drains, if no other worker can take it.
        manner: How it is ended at the drain deadline.
        fate: The fate counted then; None if it does not depend on this state.
    """

    client: str
    moves: Moves
    drained: Drained
    manner: Manner
    fate: Fate | None = None


STATES: Final[Mapping[State, Row]] = {
    State.FRESH: Row(
        "nothing: it has not sent a byte", Moves.AT_ONCE, Drained.SERVES_ONE_MORE, Manner.CLOSE, Fate.CUT_FRESH
    ),
    State.HALF_HEAD: Row(
        "the rest of its own request's head", Moves.AT_ONCE, Drained.ANSWERS, Manner.REFUSE, Fate.CUT_HALF_HEAD
    ),
    State.BODY: Row(
        "the rest of its own body; the application runs", Moves.ANSWERED, Drained.ANSWERS, Manner.REFUSE, Fate.CUT_BODY
    ),
    State.IN_FLIGHT: Row(
        "an answer, of which nothing is sent", Moves.ANSWERED, Drained.ANSWERS, Manner.REFUSE, Fate.CUT_IN_FLIGHT
    ),
    State.STREAMING: Row(
        "the rest of an answer", Moves.ANSWERED, Drained.SERVES_ONE_MORE, Manner.TRUNCATE, Fate.CUT_STREAMING
    ),
    State.SURPLUS: Row(
        "nothing: it sends a body that will not be read",
        Moves.READ,
        Drained.SERVES_ONE_MORE,
        Manner.CLOSE,
        Fate.IDLE_CLOSED,
    ),
    State.IDLE: Row(
        "nothing; its keep-alive time runs", Moves.AT_ONCE, Drained.SERVES_ONE_MORE, Manner.CLOSE, Fate.IDLE_CLOSED
    ),
    State.CLOSING: Row("nothing: it has its last answer, and must close", Moves.NEVER, Drained.NOTHING, Manner.NOTHING),
    State.CLOSED: Row("nothing", Moves.NEVER, Drained.NOTHING, Manner.NOTHING),
}

WEBSOCKET_STATES: Final[Mapping[WebSocketState, Row]] = {
    WebSocketState.CONNECTING: Row(
        "an answer to its handshake", Moves.OPENED, Drained.OPENS, Manner.REFUSE, Fate.CUT_IN_FLIGHT
    ),
    WebSocketState.DENYING: Row(
        "the rest of an HTTP answer", Moves.NEVER, Drained.ANSWERS, Manner.TRUNCATE, Fate.CUT_STREAMING
    ),
    WebSocketState.OPEN: Row("messages", Moves.WAITING, Drained.CLOSES, Manner.GOODBYE, Fate.CUT_WEBSOCKET),
    WebSocketState.CLOSING: Row(
        "our close frame, or the end of the connection", Moves.NEVER, Drained.NOTHING, Manner.CLOSE
    ),
    WebSocketState.CLOSED: Row("nothing", Moves.NEVER, Drained.NOTHING, Manner.NOTHING),
}
