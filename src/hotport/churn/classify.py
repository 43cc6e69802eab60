"""Classify attempts: from how far one had come, and what happened then, to its fate."""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from typing import Final

from hotport.churn.fates import ConnectionEvent, Fate

__all__ = ["FATES", "OWN_LIMITS", "Happening", "Stage", "classify", "happening_of"]


class Stage(enum.Enum):
    """How far an attempt has come; IDLE is a connection without one."""

    CONNECTING = "connecting"
    CONNECTED = "connected, nothing sent"
    PARTLY_SENT = "partly sent"
    SENT = "sent"
    ANSWERING = "answer begun"
    IDLE = "idle"
    MESSAGE = "numbered message sent"
    DATAGRAM = "numbered datagram sent"


class Happening(enum.Enum):
    """What a system call, the clock or the reader of answers reported."""

    REFUSED = "refused"
    RESET = "reset"
    ENDED = "ended"
    OVERDUE = "overdue"
    WHOLE = "whole answer"
    WRONG = "wrong answer"


def _row(
    refused: Fate | ConnectionEvent,
    reset: Fate | ConnectionEvent,
    ended: Fate | ConnectionEvent,
    overdue: Fate,
    whole: Fate,
    wrong: Fate,
) -> dict[Happening, Fate | ConnectionEvent]:
    return dict(zip(Happening, (refused, reset, ended, overdue, whole, wrong), strict=True))


#: Every pair that can be. Linux answers a reset in the handshake with ECONNREFUSED, so that a reset of a connection of
#: which the client has not heard that it was made means that it was made (tcp_reset() in net/ipv4/tcp_input.c).
FATES: Final[Mapping[Stage, Mapping[Happening, Fate | ConnectionEvent]]] = {
    Stage.CONNECTING: {
        Happening.REFUSED: Fate.REFUSED,
        Happening.RESET: Fate.RESET_BEFORE_SEND,
        Happening.ENDED: Fate.RESET_BEFORE_SEND,
        Happening.OVERDUE: Fate.TIMED_OUT,
    },
    Stage.CONNECTED: _row(
        Fate.RESET_BEFORE_SEND,
        Fate.RESET_BEFORE_SEND,
        Fate.RESET_BEFORE_SEND,
        Fate.TIMED_OUT,
        Fate.WRONG_STATUS,  # to something that was not asked
        Fate.WRONG_STATUS,
    ),
    Stage.PARTLY_SENT: _row(
        Fate.RESET_AFTER_SEND,
        Fate.RESET_AFTER_SEND,
        Fate.CLOSED_UNANSWERED,
        Fate.TIMED_OUT,
        Fate.ANSWERED,
        Fate.WRONG_STATUS,
    ),
    Stage.SENT: _row(
        Fate.RESET_AFTER_SEND,
        Fate.RESET_AFTER_SEND,
        Fate.CLOSED_UNANSWERED,
        Fate.TIMED_OUT,
        Fate.ANSWERED,
        Fate.WRONG_STATUS,
    ),
    Stage.ANSWERING: _row(
        Fate.TRUNCATED, Fate.TRUNCATED, Fate.TRUNCATED, Fate.TIMED_OUT, Fate.ANSWERED, Fate.WRONG_STATUS
    ),
    Stage.IDLE: {
        Happening.REFUSED: ConnectionEvent.IDLE_CLOSE,
        Happening.RESET: ConnectionEvent.IDLE_CLOSE,
        Happening.ENDED: ConnectionEvent.IDLE_CLOSE,
        Happening.WHOLE: ConnectionEvent.IDLE_CLOSE,  # it answers no request: the client closes
        Happening.WRONG: ConnectionEvent.IDLE_CLOSE,
    },
    Stage.MESSAGE: _row(Fate.LOST, Fate.LOST, Fate.LOST, Fate.TIMED_OUT, Fate.ANSWERED, Fate.WRONG_STATUS),
    Stage.DATAGRAM: _row(Fate.REFUSED, Fate.LOST, Fate.LOST, Fate.LOST, Fate.ANSWERED, Fate.WRONG_STATUS),
}

#: Errnos by which this machine, not the target, keeps a connection from being begun.
OWN_LIMITS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}
)

_REFUSING: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ENOENT,  # no such Unix socket
        errno.EACCES,
        errno.EPERM,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
    }
)


def happening_of(number: int) -> Happening:
    """Translate an errno of connect, send or recv."""
    if number in _REFUSING:
        return Happening.REFUSED
    return Happening.OVERDUE if number == errno.ETIMEDOUT else Happening.RESET


def classify(stage: Stage, happening: Happening) -> Fate | ConnectionEvent:
    """Return the fate of an attempt, or the event of an idle connection.

    Raises:
        LookupError: If that cannot happen then: a mistake of the caller's.
    """
    return FATES[stage][happening]
