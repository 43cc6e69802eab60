"""Effects: everything that the rules make the supervisor do, and the inverse of each."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

from hotport.model.inputs import Clock, Timer

__all__ = [
    "INVERSE",
    "Abandon",
    "Accept",
    "Announce",
    "CloseListeners",
    "Drain",
    "Effect",
    "ExtendTimer",
    "Finish",
    "Kill",
    "News",
    "Open",
    "Prepare",
    "Quiesce",
    "Rebind",
    "Refusal",
    "Refuse",
    "Regain",
    "Release",
    "Share",
    "Spawn",
    "StartTimer",
    "Steer",
    "StopTimer",
    "Terminate",
    "Unsteer",
]


class Prepare(msgspec.Struct, frozen=True):
    """Do what a generation needs once, before its workers start; `Prepared` reports the outcome."""

    generation: int


class Abandon(msgspec.Struct, frozen=True):
    """End the preparation of a generation with everything that it has started; `why` is for the report."""

    generation: int
    why: str


class Spawn(msgspec.Struct, frozen=True):
    """Start a worker."""

    worker: int
    generation: int


class Open(msgspec.Struct, frozen=True):
    """Tell a worker to accept; give it the listeners that it lacks."""

    worker: int


class Quiesce(msgspec.Struct, frozen=True):
    """Tell a worker to stop accepting and to keep its connections.

    Attributes:
        empties: No other worker serves what waits or comes late, so it does.
    """

    worker: int
    empties: bool = False


class Release(msgspec.Struct, frozen=True):
    """Tell a worker to empty the accept queue, to close its listeners, and to keep its connections."""

    worker: int


class Rebind(msgspec.Struct, frozen=True):
    """Close the listeners and bind their addresses again; `Bound` reports the outcome."""

    generation: int


class Regain(msgspec.Struct, frozen=True):
    """Retry binding the lost addresses; `Bound` reports the outcome."""


class Share(msgspec.Struct, frozen=True):
    """Give a worker that accepts the listeners that it lacks."""

    worker: int


class Steer(msgspec.Struct, frozen=True):
    """Steer new connections to the sockets of this generation, away from the one before it."""

    generation: int


class Unsteer(msgspec.Struct, frozen=True):
    """Steer new connections to the sockets of the generation before this one again."""

    generation: int


class Drain(msgspec.Struct, frozen=True):
    """Tell a worker to finish its connections and leave; `is_last` if no worker will serve after it."""

    worker: int
    is_last: bool = False


class Terminate(msgspec.Struct, frozen=True):
    """Tell a worker to leave soon: a draining one cuts its connections, one that takes no orders gets SIGTERM.

    Attributes:
        is_hurried: The request is urgent: it cuts what it has; one that takes no orders is killed.
    """

    worker: int
    is_hurried: bool = False


class Kill(msgspec.Struct, frozen=True):
    """Send a worker's process group SIGKILL."""

    worker: int


class StartTimer(msgspec.Struct, frozen=True):
    """Start a timer; without `seconds` it lasts as long as the options say for its clock."""

    timer: Timer
    seconds: float | None = None


class ExtendTimer(msgspec.Struct, frozen=True):
    """Let a running timer end in `seconds` from now, unless it ends later anyway."""

    timer: Timer
    seconds: float


class StopTimer(msgspec.Struct, frozen=True):
    """Forget a timer."""

    timer: Timer


class CloseListeners(msgspec.Struct, frozen=True):
    """Close the supervisor's own listeners: the service is ending."""


class Refusal(enum.Enum):
    """Why a request is not carried out."""

    IN_PROGRESS = "a restart is in progress"
    STARTING = "the service is still starting"
    STOPPING = "the service is stopping"
    TOO_MANY_DRAINING = "too many older generations are still draining"
    LAME_DUCK = "the service is a lame duck, and stops soon"
    PORT_LOST = "another process has one of its addresses; binding it again is being tried"
    WATCHED = "the last restart is still being watched, and can be undone"
    NOTHING_TO_UNDO = "no restart is in progress or in its undo window"
    NOT_WATCHED = "no restart is being watched"


class Refuse(msgspec.Struct, frozen=True):
    """Answer a request with a refusal; `generation` is the restart in progress, if there is one."""

    request: int
    why: Refusal
    generation: int = 0


class Accept(msgspec.Struct, frozen=True):
    """Accept a request: it is being carried out."""

    request: int
    generation: int = 0


class News(enum.Enum):
    """News for operators, logs and reports."""

    STARTED = "service.started"
    ADOPTED = "service.adopted"
    RESTART_BEGAN = "restart.began"
    PREPARING = "restart.preparing"
    PREPARED = "restart.prepared"
    READY = "restart.ready"
    COMMITTED = "restart.committed"
    QUIESCED = "restart.quiesced"
    DRAINING = "restart.draining"
    DONE = "restart.done"
    ABORTED = "restart.aborted"
    WORKER_LOST = "worker.lost"
    WORKER_RETIRED = "worker.retired"
    WORKER_GIVEN_UP = "worker.given_up"
    BACKING_OFF = "worker.backing_off"
    STOPPING = "service.stopping"
    LAME_DUCK = "service.lame_duck"
    PORT_LOST = "port.lost"
    PORT_REGAINED = "port.regained"
    BAKING = "restart.baking"
    WATCHING = "restart.watching"
    UNDOING = "restart.undoing"
    UNDONE = "restart.undone"


class Announce(msgspec.Struct, frozen=True):
    """Publish a piece of news; `clock` is what elapsed, if the worker was too late."""

    news: News
    generation: int = 0
    worker: int = 0
    why: str = ""
    workers: tuple[int, ...] = ()
    clock: Clock | None = None


class Finish(msgspec.Struct, frozen=True):
    """The supervisor may leave; `has_failed` if the service never served."""

    has_failed: bool = False


Effect = (
    Spawn
    | Open
    | Quiesce
    | Drain
    | Terminate
    | Kill
    | StartTimer
    | ExtendTimer
    | StopTimer
    | CloseListeners
    | Refuse
    | Accept
    | Announce
    | Finish
    | Release
    | Rebind
    | Regain
    | Share
    | Steer
    | Unsteer
    | Prepare
    | Abandon
)


#: Every effect before the point of no return, and what takes it back. What was bound again, the old ones are given.
INVERSE: Final[Mapping[type[Effect], type[Effect]]] = {
    Prepare: Abandon,
    Spawn: Terminate,
    Open: Drain,
    Quiesce: Open,
    Release: Open,
    Rebind: Open,
    Steer: Unsteer,
}
