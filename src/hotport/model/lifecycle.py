"""The life of one worker, as a table.

Two kinds of event move a worker from phase to phase. *Decisions* are ours (`Event.OPEN` and the other verbs);
*facts* are the worker's word or the kernel's (`Event.READY` and the other participles). Everything that can
change a phase is in `TRANSITIONS`; what several workers mean together is decided in `hotport.model.rules`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

__all__ = ["CURRENT", "MORE_TIME_MAX_S", "TRANSITIONS", "Event", "IllegalTransition", "Phase", "Worker", "advance"]


class Phase(enum.Enum):
    """The phase of a worker's life."""

    STARTING = "starting"  #: exec'ed; has not said READY=1
    READY = "ready"  #: initialised by its own word; waits for the commit
    OPENING = "opening"  #: told to accept; has not acknowledged
    SERVING = "serving"  #: accepts
    QUIESCING = "quiescing"  #: told to stop accepting; has not acknowledged
    QUIESCED = "quiesced"  #: accepts no more, keeps its connections, can be told to accept again
    DRAINING = "draining"  #: its connections finish; it leaves by itself
    STOPPING = "stopping"  #: told to end; nothing of it is wanted any more
    GONE = "gone"  #: reaped


class Event(enum.Enum):
    """What changes a worker's phase."""

    READY = "ready"
    ACCEPTING = "accepting"
    QUIESCED = "quiesced"
    LEAVING = "leaving"
    EXITED = "exited"
    OPEN = "open"
    QUIESCE = "quiesce"
    DRAIN = "drain"
    TERMINATE = "terminate"


class IllegalTransition(AssertionError):
    """An event that the table does not have for that phase: a bug. Nothing was changed."""


#: Workers that serve now or are on their way to it.
CURRENT: Final = frozenset({Phase.STARTING, Phase.READY, Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.QUIESCED})

_P, _E = Phase, Event

TRANSITIONS: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (_P.STARTING, _E.READY): _P.READY,  # initialised, and said so; no traffic yet
    (_P.STARTING, _E.LEAVING): _P.STOPPING,  # gave up by itself
    (_P.STARTING, _E.TERMINATE): _P.STOPPING,
    (_P.READY, _E.READY): _P.READY,  # sd_notify(3): a repeated READY=1 changes nothing
    (_P.READY, _E.OPEN): _P.OPENING,
    (_P.READY, _E.LEAVING): _P.STOPPING,
    (_P.READY, _E.TERMINATE): _P.STOPPING,
    (_P.OPENING, _E.READY): _P.OPENING,
    (_P.OPENING, _E.QUIESCED): _P.OPENING,  # the answer to the order that this one took back
    (_P.OPENING, _E.ACCEPTING): _P.SERVING,  # the commit, once all of a batch have said so
    (_P.OPENING, _E.LEAVING): _P.DRAINING,  # it may have accepted already
    (_P.OPENING, _E.DRAIN): _P.DRAINING,
    (_P.SERVING, _E.READY): _P.SERVING,
    (_P.SERVING, _E.QUIESCE): _P.QUIESCING,
    (_P.SERVING, _E.LEAVING): _P.DRAINING,  # somebody signalled it directly
    (_P.SERVING, _E.DRAIN): _P.DRAINING,
    (_P.QUIESCING, _E.READY): _P.QUIESCING,
    (_P.QUIESCING, _E.QUIESCED): _P.QUIESCED,
    (_P.QUIESCING, _E.OPEN): _P.OPENING,  # undo
    (_P.QUIESCING, _E.LEAVING): _P.DRAINING,
    (_P.QUIESCING, _E.DRAIN): _P.DRAINING,
    (_P.QUIESCED, _E.READY): _P.QUIESCED,
    (_P.QUIESCED, _E.OPEN): _P.OPENING,  # undo
    (_P.QUIESCED, _E.LEAVING): _P.DRAINING,
    (_P.QUIESCED, _E.DRAIN): _P.DRAINING,
    (_P.DRAINING, _E.READY): _P.DRAINING,  # words that crossed the order to leave
    (_P.DRAINING, _E.ACCEPTING): _P.DRAINING,
    (_P.DRAINING, _E.QUIESCED): _P.DRAINING,
    (_P.DRAINING, _E.LEAVING): _P.DRAINING,
    (_P.DRAINING, _E.TERMINATE): _P.STOPPING,
    (_P.STOPPING, _E.READY): _P.STOPPING,
    (_P.STOPPING, _E.ACCEPTING): _P.STOPPING,
    (_P.STOPPING, _E.QUIESCED): _P.STOPPING,
    (_P.STOPPING, _E.LEAVING): _P.STOPPING,
    **{(phase, _E.EXITED): _P.GONE for phase in _P if phase is not _P.GONE},
}


def advance(phase: Phase, event: Event) -> Phase:
    """The phase that follows.

    Raises:
        IllegalTransition: The pair is not in `TRANSITIONS`.
    """
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        raise IllegalTransition(f"{event} in {phase}") from None


#: So much time a worker may ask for at once; it can ask again before that is over.
MORE_TIME_MAX_S: Final = 3600.0


class Worker(msgspec.Struct, frozen=True):
    """One worker process.

    Attributes:
        id: Numbered from 1 over the life of the service, never reused.
        replaces: The worker that is drained as soon as this one serves, if it was started for that.
        is_expired: It has served long enough (``max_requests`` and the like) and waits for its replacement.
        is_hung: It does not answer, and waits for its replacement; or leaves.
    """

    id: int
    generation: int
    phase: Phase = Phase.STARTING
    replaces: int | None = None
    is_expired: bool = False
    is_hung: bool = False
