"""Inputs of the rules: everything that can happen to a service."""

from __future__ import annotations

import enum

import msgspec

from hotport.model.lifecycle import Event, Worker
from hotport.model.strategies import Strategy

__all__ = [
    "Adopt",
    "Answered",
    "Bound",
    "Clock",
    "Elapsed",
    "Exited",
    "Hung",
    "Input",
    "MoreTime",
    "Prepared",
    "RecycleDue",
    "RequestKeep",
    "RequestRestart",
    "RequestScale",
    "RequestStop",
    "RequestUndo",
    "Said",
    "Timer",
    "Unhealthy",
]


class Adopt(msgspec.Struct, frozen=True):
    """Begin: without workers, or with those of a dead supervisor, or of this process before its exec.

    Attributes:
        workers: Those that are alive, each in its phase by its own word: never OPENING nor QUIESCING, which are orders
            under way, and those died with the process that gave them.
        wanted: How many should serve.
        generations: How many generation numbers have been given out, as far as is known.
        spawned: How many worker numbers.
        favoured: The generation that should go on if several serve whole; 0: the newest.
        is_prepared: If a first generation has to be started: it is prepared before its workers.
    """

    workers: tuple[Worker, ...]
    wanted: int
    generations: int
    spawned: int
    favoured: int = 0
    is_prepared: bool = False


class RequestRestart(msgspec.Struct, frozen=True):
    """A restart is requested; `request` comes back with the answer.

    Attributes:
        wanted: The number of workers from this restart on; None keeps it.
        canary: So many new workers bake before the others start; not with `is_phased`.
        is_watched: Keep the old workers for an undo window.
        is_prepared: Prepare the generation before its first workers start.
    """

    request: int
    is_phased: bool = False
    wanted: int | None = None
    strategy: Strategy = Strategy.INHERIT
    canary: int = 0
    is_watched: bool = False
    is_prepared: bool = False


class RequestScale(msgspec.Struct, frozen=True):
    """Another number of workers is requested."""

    request: int
    wanted: int


class RequestStop(msgspec.Struct, frozen=True):
    """The end of the service is requested; a second request, or `now`, cuts connections; a third kills workers.

    Attributes:
        is_succeeded: Another supervisor's workers accept already: no worker has to empty the accept queue.
        lame_duck_s: Seconds to serve on before, if it is this request that begins the stop; the next one ends them.
    """

    now: bool = False
    is_succeeded: bool = False
    lame_duck_s: float = 0.0


class Said(msgspec.Struct, frozen=True):
    """A worker reported an `Event` (any but ``EXITED``)."""

    worker: int
    event: Event


class Exited(msgspec.Struct, frozen=True):
    """A worker has exited and been reaped, or could not be started."""

    worker: int
    why: str


class RecycleDue(msgspec.Struct, frozen=True):
    """A worker has reached a recycling limit and should be replaced."""

    worker: int


class Hung(msgspec.Struct, frozen=True):
    """A worker has not answered for so long that it should be replaced.

    Attributes:
        waited_s: How much of that it has waited for a processor, which does not count.
    """

    worker: int
    silent_s: float
    waited_s: float = 0.0


class Answered(msgspec.Struct, frozen=True):
    """A worker that was `Hung` answers again."""

    worker: int


class MoreTime(msgspec.Struct, frozen=True):
    """A worker asked for `seconds` from now (``EXTEND_TIMEOUT_USEC``, sd_notify(3))."""

    worker: int
    seconds: float


class Bound(msgspec.Struct, frozen=True):
    """`Rebind` or `Regain` has been carried out; `why` says which process holds an address, if one does.

    Attributes:
        is_kept: It could not be begun: the listeners are as they were.
    """

    why: str = ""
    is_kept: bool = False


class Prepared(msgspec.Struct, frozen=True):
    """The preparation of a generation has ended; `why` says how, unless it has succeeded."""

    generation: int
    why: str = ""


class RequestUndo(msgspec.Struct, frozen=True):
    """The return of the old generation is requested, `by` a command, a signal or a health rule."""

    request: int
    by: str


class RequestKeep(msgspec.Struct, frozen=True):
    """The end of the bake or of the undo window is requested: keep the new workers."""

    request: int


class Unhealthy(msgspec.Struct, frozen=True):
    """The new workers of a restart are not healthy; `worker` is 0 if it is about all of them together."""

    generation: int
    why: str
    worker: int = 0


class Clock(enum.Enum):
    """The kinds of timer; those from `QUIESCE` on belong to no worker."""

    READY = "ready"
    OPEN = "open"
    DRAIN = "drain"
    KILL = "kill"
    QUIESCE = "quiesce"
    SETTLE = "settle"
    BACKOFF = "backoff"
    STABLE = "stable"
    LAME_DUCK = "lame_duck"
    REGAIN = "regain"
    BAKE = "bake"
    WATCH = "watch"
    PREPARE = "prepare"


class Timer(msgspec.Struct, frozen=True):
    """One timer; starting it again replaces it."""

    clock: Clock
    worker: int = 0


class Elapsed(msgspec.Struct, frozen=True):
    """A timer has ended; one that is not awaited any more changes nothing."""

    timer: Timer


Input = (
    Adopt
    | RequestRestart
    | RequestScale
    | RequestStop
    | Said
    | Exited
    | RecycleDue
    | Hung
    | Answered
    | MoreTime
    | Elapsed
    | Bound
    | Prepared
    | RequestUndo
    | RequestKeep
    | Unhealthy
)
