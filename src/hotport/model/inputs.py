"""Everything that can happen to a service: what the supervisor tells the rules."""

from __future__ import annotations

import enum

import msgspec

from hotport.model.guarantee import Strategy
from hotport.model.lifecycle import Event, Worker

__all__ = [
    "Adopt",
    "Bound",
    "Clock",
    "Elapsed",
    "Exited",
    "Input",
    "MoreTime",
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
    """Begin: with the workers of a supervisor that is gone, or was this process before its exec; or without any.

    Attributes:
        workers: Those that are alive, each in its phase by its own word: never OPENING nor QUIESCING, which are orders
            under way, and those died with whoever gave them.
        wanted: How many should serve.
        generations: How many generation numbers have been given out, as far as anybody remembers.
        spawned: How many worker numbers.
        favoured: The generation that should go on if several serve whole; 0: the newest.
    """

    workers: tuple[Worker, ...]
    wanted: int
    generations: int
    spawned: int
    favoured: int = 0


class RequestRestart(msgspec.Struct, frozen=True):
    """Somebody asks for a restart; `request` is given back with the answer.

    Attributes:
        wanted: The number of workers from this restart on; None keeps it.
        canary: So many new workers bake before the others start; not with `is_phased`.
        is_watched: Keep the old workers for an undo window.
    """

    request: int
    is_phased: bool = False
    wanted: int | None = None
    strategy: Strategy = Strategy.INHERIT
    canary: int = 0
    is_watched: bool = False


class RequestScale(msgspec.Struct, frozen=True):
    """Somebody asks for another number of workers."""

    request: int
    wanted: int


class RequestStop(msgspec.Struct, frozen=True):
    """End the service; a second request, or `now`, has connections cut; one more kills the workers.

    Attributes:
        is_succeeded: Another supervisor's workers accept already: nobody has to empty the accept queue.
        lame_duck_s: Seconds to serve on before, if it is this request that begins the stop; the next one ends them.
    """

    now: bool = False
    is_succeeded: bool = False
    lame_duck_s: float = 0.0


class Said(msgspec.Struct, frozen=True):
    """A worker said something (one of the facts in `Event` but ``EXITED``)."""

    worker: int
    event: Event


class Exited(msgspec.Struct, frozen=True):
    """A worker is gone and has been reaped, or could not be started at all."""

    worker: int
    why: str


class RecycleDue(msgspec.Struct, frozen=True):
    """A worker has served long enough and should be replaced."""

    worker: int


class MoreTime(msgspec.Struct, frozen=True):
    """A worker asked for `seconds` from now (``EXTEND_TIMEOUT_USEC``, sd_notify(3))."""

    worker: int
    seconds: float


class Bound(msgspec.Struct, frozen=True):
    """`Rebind` or `Regain` has been carried out; with a `why`, somebody else has an address.

    Attributes:
        is_kept: It could not be begun: the listeners are as they were.
    """

    why: str = ""
    is_kept: bool = False


class RequestUndo(msgspec.Struct, frozen=True):
    """Somebody, `by` name, wants the old generation back."""

    request: int
    by: str


class RequestKeep(msgspec.Struct, frozen=True):
    """Somebody has seen enough of the new workers: end the bake or the undo window now."""

    request: int


class Unhealthy(msgspec.Struct, frozen=True):
    """The new workers of a restart are not well; `worker` is 0 if all of them together are meant."""

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


class Timer(msgspec.Struct, frozen=True):
    """One timer; starting it again replaces it."""

    clock: Clock
    worker: int = 0


class Elapsed(msgspec.Struct, frozen=True):
    """A timer has ended. One that nobody waits for any more changes nothing."""

    timer: Timer


Input = (
    Adopt
    | RequestRestart
    | RequestScale
    | RequestStop
    | Said
    | Exited
    | RecycleDue
    | MoreTime
    | Elapsed
    | Bound
    | RequestUndo
    | RequestKeep
    | Unhealthy
)
