"""What a service does next: one pure function over everything that can happen to it.

``step(service, event)`` returns the service that follows and the effects that the supervisor has to carry out,
in order. Nothing here knows a clock, a process or a socket: a timer is an effect, and its end an event.

A restart is a *batch* of new workers that take over from a batch of old ones. In the default mode one batch
holds all of them; a phased restart is a series of batches of one. For each batch::

    STARTING    spawn the new ones, wait until every one has said READY=1
    OPENING     tell them to accept, wait until every one has acknowledged     <- the commit
    QUIESCING   tell the old ones to stop accepting, wait for the acknowledgements
    SETTLING    watch the new ones for a moment; the old ones can still be taken back
    WATCHING    if that was asked for: the undo window. The old ones stay, quiesced, and hand their connections over
    (done)      drain the old ones; only this has no inverse

How the listeners reach the new ones is the restart's `Strategy`. For *inherit* and *transfer* nothing changes here.
*overlap* gives the new generation sockets of its own: at the commit newcomers are steered to them. *rebind* has two
steps more before OPENING, and none of the old ones is left to be quiesced after it::

    RELEASING   tell the old ones to empty the accept queue and to close the listeners, wait for the acknowledgements
    REBINDING   close the last descriptor and bind again; if somebody else was quicker, the restart aborts, and the
                address is tried again and again

Before the line *(done)* anything that goes wrong with a new worker aborts the restart by the inverses in
`INVERSE`, and the old generation serves on. What goes wrong in the undo window is *undone*, in two steps so that
connections can go back::

    UNDOING     tell the old ones to accept again, wait until each one does, or has failed to
    (undone)    drain the new ones

A restart with a canary has one batch that comes in two parts. After OPENING its first part is BAKING: it serves beside
the old ones, all of which go on accepting, until the bake is over and the rest starts, or until it is undone. There is
none with *rebind*, for which the old ones cannot go on accepting.

The restart's number and the wanted count become the service's own only
with the last batch; until then whatever is started outside of the restart is of the old generation.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from hotport.model.guarantee import Strategy
from hotport.model.lifecycle import CURRENT, TRANSITIONS, Event, Phase, advance

__all__ = [
    "BACKOFF_MAX_S",
    "GENERATIONS_DRAINING_MAX",
    "INVERSE",
    "MORE_TIME_MAX_S",
    "Effect",
    "Input",
    "Restart",
    "Service",
    "Stage",
    "Step",
    "Worker",
    "refusal",
    "step",
    "surviving",
]

BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0

#: So much time a worker may ask for at once; it can ask again before that is over.
MORE_TIME_MAX_S: Final = 3600.0

#: Between attempts to bind an address that somebody has taken. Seldom in the end: a bind that fails slows the port
#: down, with many connections in TIME_WAIT by milliseconds.
REGAIN_FIRST_S: Final = 0.1
REGAIN_MAX_S: Final = 5.0

#: A restart is refused while this many older generations still drain: each of them holds memory.
GENERATIONS_DRAINING_MAX: Final = 8


# -- state --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process.

    Attributes:
        id: Numbered from 1 over the life of the service, never reused.
        replaces: The worker that is drained as soon as this one serves, if it was started for that.
        is_expired: It has served long enough (``max_requests`` and the like) and waits for its replacement.
    """

    id: int
    generation: int
    phase: Phase = Phase.STARTING
    replaces: int | None = None
    is_expired: bool = False


class Step(enum.Enum):
    """How far the current batch of a restart has come."""

    STARTING = "starting"
    RELEASING = "releasing"
    REBINDING = "rebinding"
    OPENING = "opening"
    BAKING = "baking"
    QUIESCING = "quiescing"
    SETTLING = "settling"
    WATCHING = "watching"
    UNDOING = "undoing"


#: Steps in which the new workers are to stay, unless something happens.
_COMMITTED: Final = frozenset({Step.QUIESCING, Step.SETTLING, Step.WATCHING})

#: Steps in which the new workers serve, are watched, and are taken back if they are not well.
WATCHED: Final = frozenset({Step.BAKING, Step.WATCHING})


@dataclass(frozen=True, slots=True)
class Restart:
    """A restart in progress.

    Attributes:
        wanted: How many workers should serve when it is done.
        remaining: New workers still to be started after this batch.
        new: Workers of the current batch.
        old: Workers that the current batch replaces; filled in when it commits.
        canary: How many new workers start, and bake, before the others; 0 once they have, or if there are none.
        is_watched: The old workers of each batch stay for an undo window.
        why: Why it is being undone.
    """

    generation: int
    wanted: int
    remaining: int
    is_phased: bool = False
    step: Step = Step.STARTING
    new: frozenset[int] = frozenset()
    old: frozenset[int] = frozenset()
    strategy: Strategy = Strategy.INHERIT
    canary: int = 0
    is_watched: bool = False
    why: str = ""


class Stage(enum.Enum):
    """Whether clients should be sent to a service, and why not; a restart makes no difference."""

    STARTING = "starting"
    READY = "ready"
    UNSERVED = "unserved"
    LAME_DUCK = "lame duck"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that decisions are made from.

    Attributes:
        wanted: How many workers should serve.
        generation: The one that new workers are of, outside of a restart; 0 before the first worker serves.
        generations: How many generation numbers have been given out.
        failures: Times that workers were lost without a quiet spell between them.
        is_backing_off: No replacement is started before the back-off timer ends.
        is_lame_duck: It serves on for a while, and then stops: load balancers are to take it out until then.
        regains: Since somebody else has taken one of the addresses: how often it was tried to be had; 0: nobody has.
    """

    wanted: int
    generation: int = 0
    generations: int = 0
    spawned: int = 0
    workers: Mapping[int, Worker] = field(default_factory=lambda: MappingProxyType({}))
    restart: Restart | None = None
    is_stopping: bool = False
    failures: int = 0
    is_backing_off: bool = False
    is_lame_duck: bool = False
    regains: int = 0

    def ids(self, *phases: Phase) -> tuple[int, ...]:
        """Workers in one of `phases`, oldest first."""
        return tuple(w.id for w in self.workers.values() if w.phase in phases)

    @property
    def current(self) -> tuple[Worker, ...]:
        """Workers that serve or are on their way to it."""
        return tuple(w for w in self.workers.values() if w.phase in CURRENT)

    @property
    def draining_generations(self) -> int:
        """How many generations have nothing left but leaving workers."""
        current = {w.generation for w in self.current}
        return len({w.generation for w in self.workers.values()} - current)

    @property
    def favoured(self) -> int:
        """The generation that a next supervisor should go on with if several serve whole."""
        restart = self.restart
        if restart is not None and restart.step in _COMMITTED and not restart.remaining:
            return restart.generation
        return self.generation

    @property
    def stage(self) -> Stage:
        """What load balancers are told; while workers are exchanged it stays READY."""
        if self.is_stopping:
            return Stage.STOPPING
        if self.generation == 0:
            return Stage.STARTING
        if self.is_lame_duck:
            return Stage.LAME_DUCK
        return Stage.READY if self.ids(*_SERVED) else Stage.UNSERVED


# -- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adopt:
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


@dataclass(frozen=True, slots=True)
class RequestRestart:
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


@dataclass(frozen=True, slots=True)
class RequestScale:
    """Somebody asks for another number of workers."""

    request: int
    wanted: int


@dataclass(frozen=True, slots=True)
class RequestStop:
    """End the service; a second request, or `now`, has connections cut; one more kills the workers.

    Attributes:
        is_succeeded: Another supervisor's workers accept already: nobody has to empty the accept queue.
        lame_duck_s: Seconds to serve on before, if it is this request that begins the stop; the next one ends them.
    """

    now: bool = False
    is_succeeded: bool = False
    lame_duck_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Said:
    """A worker said something (one of the facts in `Event` but ``EXITED``)."""

    worker: int
    event: Event


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker is gone and has been reaped, or could not be started at all."""

    worker: int
    why: str


@dataclass(frozen=True, slots=True)
class Expired:
    """A worker has served long enough and should be replaced."""

    worker: int


@dataclass(frozen=True, slots=True)
class MoreTime:
    """A worker asked for `seconds` from now (``EXTEND_TIMEOUT_USEC``, sd_notify(3))."""

    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Bound:
    """`Rebind` or `Regain` has been carried out; with a `why`, somebody else has an address.

    Attributes:
        is_kept: It could not be begun: the listeners are as they were.
    """

    why: str = ""
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class RequestUndo:
    """Somebody, `by` name, wants the old generation back."""

    request: int
    by: str


@dataclass(frozen=True, slots=True)
class RequestKeep:
    """Somebody has seen enough of the new workers: end the bake or the undo window now."""

    request: int


@dataclass(frozen=True, slots=True)
class Unhealthy:
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


@dataclass(frozen=True, slots=True)
class Timer:
    """One timer; starting it again replaces it."""

    clock: Clock
    worker: int = 0


@dataclass(frozen=True, slots=True)
class Elapsed:
    """A timer has ended. One that nobody waits for any more changes nothing."""

    timer: Timer


Input = (
    Adopt
    | RequestRestart
    | RequestScale
    | RequestStop
    | Said
    | Exited
    | Expired
    | MoreTime
    | Elapsed
    | Bound
    | RequestUndo
    | RequestKeep
    | Unhealthy
)


# -- effects ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a worker."""

    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class Open:
    """Tell a worker to accept; it is given the listeners that it has not got."""

    worker: int


@dataclass(frozen=True, slots=True)
class Quiesce:
    """Tell a worker to stop accepting and to keep its connections.

    Attributes:
        empties: Nobody else serves what waits, or comes late; it does.
    """

    worker: int
    empties: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Tell a worker to empty the accept queue, to close its listeners, and to keep its connections."""

    worker: int


@dataclass(frozen=True, slots=True)
class Rebind:
    """Close the listeners and bind their addresses again; `Bound` says what came of it."""

    generation: int


@dataclass(frozen=True, slots=True)
class Regain:
    """Try again to bind the addresses that somebody else has; `Bound` says what came of it."""


@dataclass(frozen=True, slots=True)
class Share:
    """Give a worker that accepts the listeners that it has not got."""

    worker: int


@dataclass(frozen=True, slots=True)
class Steer:
    """Let every new connection come to the sockets of this generation, and none to those of the one before it."""

    generation: int


@dataclass(frozen=True, slots=True)
class Unsteer:
    """Let every new connection come to the sockets of the generation before this one again."""

    generation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell a worker to finish its connections and leave; `is_last` if nobody will serve after it."""

    worker: int
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Terminate:
    """Tell a worker to leave soon: one that drains, to cut what it has; one that takes no orders gets SIGTERM.

    Attributes:
        is_hurried: Somebody does not want to wait: it cuts what it has; one that takes no orders is killed.
    """

    worker: int
    is_hurried: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """Send a worker's process group SIGKILL."""

    worker: int


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Start a timer; without `seconds` it lasts as long as the options say for its clock."""

    timer: Timer
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ExtendTimer:
    """Let a running timer end in `seconds` from now, unless it ends later anyway."""

    timer: Timer
    seconds: float


@dataclass(frozen=True, slots=True)
class StopTimer:
    """Forget a timer."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class CloseListeners:
    """Give up the supervisor's own listeners: the service is ending."""


class Refusal(enum.Enum):
    """Why a request is not carried out."""

    IN_PROGRESS = "a restart is in progress"
    STARTING = "the service is still starting"
    STOPPING = "the service is stopping"
    TOO_MANY_DRAINING = "too many older generations are still draining"
    LAME_DUCK = "the service is a lame duck, and stops soon"
    PORT_LOST = "somebody else has one of its addresses, and it is tried to get that back first"
    WATCHED = "the last restart is still being watched, and can be undone"
    NOTHING_TO_UNDO = "no restart is in progress or in its undo window"
    NOT_WATCHED = "no restart is being watched"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a request with a refusal; `generation` is the restart in progress, if there is one."""

    request: int
    why: Refusal
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Accept:
    """Answer a request: it is being carried out."""

    request: int
    generation: int = 0


class News(enum.Enum):
    """What is told to operators, logs and reports."""

    STARTED = "service.started"
    ADOPTED = "service.adopted"
    RESTART_BEGAN = "restart.began"
    READY = "restart.ready"
    COMMITTED = "restart.committed"
    QUIESCED = "restart.quiesced"
    DRAINING = "restart.draining"
    DONE = "restart.done"
    ABORTED = "restart.aborted"
    WORKER_LOST = "worker.lost"
    WORKER_RETIRED = "worker.retired"
    BACKING_OFF = "worker.backing_off"
    STOPPING = "service.stopping"
    LAME_DUCK = "service.lame_duck"
    PORT_LOST = "port.lost"
    PORT_REGAINED = "port.regained"
    BAKING = "restart.baking"
    WATCHING = "restart.watching"
    UNDOING = "restart.undoing"
    UNDONE = "restart.undone"


@dataclass(frozen=True, slots=True)
class Announce:
    """Something worth telling has happened."""

    news: News
    generation: int = 0
    worker: int = 0
    why: str = ""
    workers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
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
)

#: Every effect before the point of no return, and what takes it back. What was bound again, the old ones are given.
INVERSE: Final[Mapping[type[Effect], type[Effect]]] = {
    Spawn: Terminate,
    Open: Drain,
    Quiesce: Open,
    Release: Open,
    Rebind: Open,
    Steer: Unsteer,
}

#: What bounds each phase of a worker in which something is awaited of it.
_BOUNDS: Final[Mapping[Phase, Clock]] = {
    Phase.STARTING: Clock.READY,
    Phase.DRAINING: Clock.DRAIN,
    Phase.STOPPING: Clock.KILL,
}

#: Timers of a restart.
_CLOCKS: Final = (Clock.QUIESCE, Clock.SETTLE, Clock.BAKE, Clock.WATCH)

#: Phases of workers that accept, or have been told to.
_ACCEPTING: Final = frozenset({Phase.OPENING, Phase.SERVING})

#: Phases of workers that have listeners open while they are told to release them.
_HOLDING: Final = (Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.STOPPING)

#: Phases of workers that serve, or step aside for others that do.
_SERVED: Final = (Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.QUIESCED)


# -- decisions ----------------------------------------------------------------------------------------------


class _Draft:
    """A service being changed: the one place where values are replaced and effects are listed."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.effects: list[Effect] = []

    def set(self, **changes: object) -> None:
        self.service = replace(self.service, **changes)  # type: ignore[arg-type]

    def emit(self, *effects: Effect) -> None:
        self.effects.extend(effects)

    def put(self, worker: Worker) -> None:
        self.set(workers=MappingProxyType({**self.service.workers, worker.id: worker}))

    def remove(self, worker: int) -> None:
        left = {i: w for i, w in self.service.workers.items() if i != worker}
        self.set(workers=MappingProxyType(left))

    def move(self, worker: int, event: Event) -> Phase:
        before = self.service.workers[worker]
        phase = advance(before.phase, event)
        self.put(replace(before, phase=phase))
        return phase

    # what may be done to one worker: the decision, its effect, and the timer that bounds the answer

    def spawn(self, generation: int, *, replaces: int | None = None) -> int:
        worker = self.service.spawned + 1
        self.set(spawned=worker)
        self.put(Worker(worker, generation, replaces=replaces))
        self.emit(Spawn(worker, generation), StartTimer(Timer(Clock.READY, worker)))
        return worker

    def open(self, worker: int) -> None:
        self.move(worker, Event.OPEN)
        self.emit(Open(worker), StartTimer(Timer(Clock.OPEN, worker)))

    def quiesce(self, worker: int, restart: Restart) -> None:
        """By the kind of the restart; the answer is the same."""
        self.move(worker, Event.QUIESCE)
        if restart.step is Step.RELEASING:
            self.emit(Release(worker))
        else:
            self.emit(Quiesce(worker, restart.strategy is Strategy.OVERLAP))

    def drain(self, worker: int, *, is_last: bool = False) -> None:
        self.move(worker, Event.DRAIN)
        self.emit(Drain(worker, is_last), StartTimer(Timer(Clock.DRAIN, worker)))

    def terminate(self, worker: int, *, is_hurried: bool = False) -> None:
        self.move(worker, Event.TERMINATE)
        self.emit(Terminate(worker, is_hurried), StartTimer(Timer(Clock.KILL, worker)))

    def release(self, worker: int, *, is_last: bool = False) -> None:
        """Let a worker go in the kindest way that its phase allows; one that is going is left alone."""
        phase = self.service.workers[worker].phase
        if (phase, Event.DRAIN) in TRANSITIONS:
            self.drain(worker, is_last=is_last)
        elif phase in CURRENT:
            self.terminate(worker)


def step(service: Service, event: Input) -> tuple[Service, tuple[Effect, ...]]:
    """What follows from `event`: the new state and the effects to carry out, in order."""
    draft = _Draft(service)
    match event:
        case Adopt():
            _adopt(draft, event)
        case RequestRestart():
            _request_restart(draft, event)
        case RequestScale():
            _request_scale(draft, event)
        case RequestStop():
            _request_stop(draft, event)
        case Said():
            _said(draft, event)
        case Exited():
            _exited(draft, event)
        case Expired():
            _expired(draft, event.worker)
        case MoreTime():
            _more_time(draft, event)
        case Bound():
            _bound(draft, event.why, is_kept=event.is_kept)
        case RequestUndo() | RequestKeep():
            _request_verdict(draft, event)
        case Unhealthy():
            _unhealthy(draft, event)
        case _:
            _elapsed(draft, event.timer)
    _go_on(draft)
    return draft.service, tuple(draft.effects)


def _adopt(draft: _Draft, event: Adopt) -> None:
    """Everything that a restart can be broken off at ends in one of two ways: its commit was reached, or it was not."""
    workers = MappingProxyType({worker.id: worker for worker in sorted(event.workers, key=lambda w: w.id)})
    generation = surviving(event.workers, event.wanted, event.favoured)
    draft.set(
        workers=workers,
        wanted=event.wanted,
        generation=generation,
        generations=max([event.generations, *(worker.generation for worker in event.workers)]),
        spawned=max([event.spawned, *workers]),
    )
    if workers:
        draft.emit(Announce(News.ADOPTED, generation=generation, workers=tuple(workers)))
    for worker in event.workers:
        if clock := _BOUNDS.get(worker.phase):
            draft.emit(StartTimer(Timer(clock, worker.id)))
    # Before the first commit there is nothing to go back to: the newest that starts goes on with it.
    kept = generation or max((w.generation for w in draft.service.current), default=0)
    accepting = 0
    for worker in [w for w in draft.service.current if w.generation == kept]:
        if worker.phase is Phase.SERVING:
            draft.emit(Open(worker.id))  # an order of its last supervisor to cease may have been under way
        elif worker.phase is not Phase.STARTING:
            draft.open(worker.id)
        accepting += worker.phase is not Phase.STARTING
    for worker in [w for w in draft.service.current if w.generation != kept]:
        if worker.phase is Phase.SERVING and accepting < event.wanted:
            draft.put(replace(worker, is_expired=True))  # it is missed until another serves in its place
        else:
            draft.release(worker.id)
    if not draft.service.current:
        first = draft.service.generations + 1
        draft.set(generations=first)
        for _ in range(event.wanted):
            draft.spawn(first)


def surviving(workers: Iterable[Worker], wanted: int, favoured: int = 0) -> int:
    """The generation that a service is of whose supervisor is gone: one that serves whole, else what is left.

    A generation serves whole only after its commit, or before the next one's; of several the `favoured` one goes on, or
    the newest. 0 if none has begun to serve.
    """
    workers = tuple(workers)
    serving = Counter(w.generation for w in workers if w.phase is Phase.SERVING)
    if whole := [generation for generation, count in serving.items() if count >= wanted]:
        return favoured if favoured in whole else max(whole)
    left = Counter(w.generation for w in workers if w.phase in (Phase.SERVING, Phase.QUIESCED))
    return max(left, key=lambda generation: (left[generation], -generation), default=0)


def _request_restart(draft: _Draft, event: RequestRestart) -> None:
    if _is_refused(draft, event):
        return
    generation = draft.service.generations + 1
    wanted = draft.service.wanted if event.wanted is None else event.wanted
    draft.set(generations=generation)
    draft.emit(Accept(event.request, generation), Announce(News.RESTART_BEGAN, generation=generation))
    _begin_batch(
        draft,
        Restart(
            generation,
            wanted,
            wanted,
            event.is_phased and not event.canary,
            strategy=event.strategy,
            canary=0 if event.strategy is Strategy.REBIND else event.canary,
            is_watched=event.is_watched,
        ),
    )


def _request_scale(draft: _Draft, event: RequestScale) -> None:
    if _is_refused(draft, event):
        return
    draft.set(wanted=event.wanted)
    draft.emit(Accept(event.request, draft.service.generation))


def _is_refused(draft: _Draft, event: RequestRestart | RequestScale) -> bool:
    refused = refusal(draft.service, is_restart=isinstance(event, RequestRestart))
    if refused is not None:
        draft.emit(Refuse(event.request, *refused))
    return refused is not None


def refusal(service: Service, *, is_restart: bool) -> tuple[Refusal, int] | None:
    """Why a restart, or another number of workers, is refused now, and the generation that is the reason (or 0)."""
    if service.is_stopping:
        return Refusal.STOPPING, 0
    if service.is_lame_duck:
        return Refusal.LAME_DUCK, 0
    if service.restart is not None:
        why = Refusal.WATCHED if service.restart.step in WATCHED else Refusal.IN_PROGRESS
        return why, service.restart.generation
    if service.generation == 0:
        return Refusal.STARTING, 0
    if is_restart and service.draining_generations >= GENERATIONS_DRAINING_MAX:
        return Refusal.TOO_MANY_DRAINING, 0
    if is_restart and service.regains:
        return Refusal.PORT_LOST, 0
    return None


def _request_verdict(draft: _Draft, event: RequestUndo | RequestKeep) -> None:
    """Somebody decides about the new workers before the time is over."""
    service, restart = draft.service, draft.service.restart
    if service.is_stopping:
        draft.emit(Refuse(event.request, Refusal.STOPPING))
    elif isinstance(event, RequestUndo):
        if restart is None:
            draft.emit(Refuse(event.request, Refusal.NOTHING_TO_UNDO))
            return
        draft.emit(Accept(event.request, restart.generation))
        if restart.step is not Step.UNDOING:
            _take_back(draft, restart, f"{event.by} asked for it")
    elif restart is None or restart.step not in WATCHED:
        draft.emit(Refuse(event.request, Refusal.NOT_WATCHED, restart.generation if restart else 0))
    else:
        draft.emit(Accept(event.request, restart.generation))
        _end_watch(draft, restart)


def _unhealthy(draft: _Draft, event: Unhealthy) -> None:
    restart = draft.service.restart
    if restart is not None and restart.generation == event.generation and restart.step in WATCHED:
        _take_back(draft, restart, event.why, event.worker)


def _request_stop(draft: _Draft, event: RequestStop) -> None:
    before = draft.service
    is_first = not (before.is_stopping or before.is_lame_duck)
    if is_first and event.lame_duck_s and before.generation and not event.now:  # else nobody is sent here yet
        seconds = event.lame_duck_s
        draft.set(is_lame_duck=True)
        draft.emit(Announce(News.LAME_DUCK, why=f"{seconds:g} s"), StartTimer(Timer(Clock.LAME_DUCK), seconds))
        return
    draft.set(is_stopping=True, is_lame_duck=False)
    if before.is_lame_duck:
        draft.emit(StopTimer(Timer(Clock.LAME_DUCK)))
    if not before.is_stopping:
        draft.emit(Announce(News.STOPPING), CloseListeners())
        if before.regains:
            draft.set(regains=0)
            draft.emit(StopTimer(Timer(Clock.REGAIN)))
    for worker, was in before.workers.items():
        is_at_once = event.now or before.is_stopping
        if is_at_once or event.is_succeeded or was.phase not in _ACCEPTING:
            draft.release(worker, is_last=not event.is_succeeded)
        if is_at_once and draft.service.workers[worker].phase is Phase.DRAINING:
            draft.terminate(worker, is_hurried=True)  # it can still say what it has cut
        elif is_at_once:
            draft.emit(Kill(worker))
    _drain_last(draft)
    if before.restart is not None:
        _give_up(draft, before.restart, "the service is stopping")


def _drain_last(draft: _Draft) -> None:
    """Let those that accept empty the queue and leave, once nobody else holds the listeners any more.

    A worker that is stuck in its start-up would keep the port open and never accept: what queued behind it would be
    reset when it is killed. So the others serve until it is gone.
    """
    if not draft.service.ids(Phase.STARTING, Phase.READY, Phase.STOPPING):
        for worker in draft.service.current:
            draft.release(worker.id, is_last=True)


def _said(draft: _Draft, event: Said) -> None:
    worker = draft.service.workers.get(event.worker)
    if worker is None or (worker.phase, event.event) not in TRANSITIONS:
        return  # a foreign program may say what it likes, when it likes
    before = worker.phase
    phase = draft.move(worker.id, event.event)
    if phase is Phase.DRAINING and event.event is Event.QUIESCED:  # it was late, and has all its time from here on
        draft.emit(StartTimer(Timer(Clock.DRAIN, worker.id)))
    if phase is before:
        return
    match phase:
        case Phase.READY:
            draft.emit(StopTimer(Timer(Clock.READY, worker.id)))
            restart = draft.service.restart
            if restart is None or worker.id not in restart.new | restart.old:
                draft.open(worker.id)
        case Phase.SERVING:
            draft.emit(StopTimer(Timer(Clock.OPEN, worker.id)), StartTimer(Timer(Clock.STABLE)))
            if draft.service.generation == 0:
                draft.set(generation=worker.generation)
                draft.emit(Announce(News.STARTED, generation=worker.generation))
        case Phase.DRAINING:
            draft.emit(StartTimer(Timer(Clock.DRAIN, worker.id)))
        case Phase.STOPPING:
            draft.emit(StartTimer(Timer(Clock.KILL, worker.id)))
    if phase in (Phase.DRAINING, Phase.STOPPING):
        _lost(draft, worker, "left by itself")


def _exited(draft: _Draft, event: Exited) -> None:
    worker = draft.service.workers.get(event.worker)
    if worker is None:
        return
    draft.move(worker.id, Event.EXITED)
    draft.remove(worker.id)
    for clock in (Clock.READY, Clock.OPEN, Clock.DRAIN, Clock.KILL):
        draft.emit(StopTimer(Timer(clock, worker.id)))
    if worker.phase in CURRENT:
        _lost(draft, worker, event.why)
    draft.emit(Announce(News.WORKER_RETIRED, generation=worker.generation, worker=worker.id, why=event.why))


def _lost(draft: _Draft, worker: Worker, why: str) -> None:
    """A worker that was wanted is leaving or gone."""
    draft.emit(Announce(News.WORKER_LOST, generation=worker.generation, worker=worker.id, why=why))
    restart = draft.service.restart
    if restart is not None and worker.id in restart.new:
        _take_back(draft, restart, f"worker {worker.id} {why}", worker.id, is_lost=True)
        return
    draft.emit(StopTimer(Timer(Clock.STABLE)))  # this spell was not quiet
    if draft.service.is_backing_off:
        return  # several that fall together are one failure
    failures = draft.service.failures + 1
    draft.set(failures=failures)
    if failures > 1:  # the first one is replaced at once
        seconds = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 2, 16))
        draft.set(is_backing_off=True)
        draft.emit(
            Announce(News.BACKING_OFF, why=f"{seconds:g} s"),
            StartTimer(Timer(Clock.BACKOFF), seconds),
        )


def _expired(draft: _Draft, worker: int) -> None:
    if worker in draft.service.workers:
        draft.put(replace(draft.service.workers[worker], is_expired=True))


def _more_time(draft: _Draft, event: MoreTime) -> None:
    worker = draft.service.workers.get(event.worker)
    seconds = min(event.seconds, MORE_TIME_MAX_S)
    if worker is not None and worker.phase is Phase.STARTING:
        draft.emit(ExtendTimer(Timer(Clock.READY, worker.id), seconds))
    elif worker is not None and worker.phase is Phase.DRAINING:
        draft.emit(ExtendTimer(Timer(Clock.DRAIN, worker.id), seconds))


def _elapsed(draft: _Draft, timer: Timer) -> None:
    service, restart = draft.service, draft.service.restart
    worker = service.workers.get(timer.worker)
    match timer.clock, worker.phase if worker else None:
        case (Clock.READY, Phase.STARTING) | (Clock.OPEN, Phase.OPENING):
            assert worker is not None
            word = "READY=1" if timer.clock is Clock.READY else "that it accepts"
            why = f"did not say {word} in time"
            draft.release(worker.id)
            _lost(draft, worker, why)
        case Clock.DRAIN, Phase.DRAINING:
            draft.terminate(timer.worker)
        case Clock.KILL, Phase.STOPPING:
            draft.emit(Kill(timer.worker))
        case Clock.QUIESCE, _ if restart is not None and restart.step is Step.QUIESCING:
            late = restart.old.intersection(service.ids(Phase.OPENING, Phase.QUIESCING))  # they are drained as they are
            _settle(draft, restart, why=f"no answer from {_named(late)}")
        case Clock.QUIESCE, _ if restart is not None and restart.step is Step.RELEASING:
            holding = restart.old.intersection(service.ids(*_HOLDING))  # so the listeners cannot be bound again
            _abort(draft, restart, f"{_named(holding)} did not let go of the listeners")
        case Clock.SETTLE, _ if restart is not None and restart.step is Step.SETTLING:
            _watch(draft, restart) if restart.is_watched else _finish_batch(draft, restart)
        case Clock.BAKE, _ if restart is not None and restart.step is Step.BAKING:
            _end_watch(draft, restart)
        case Clock.WATCH, _ if restart is not None and restart.step is Step.WATCHING:
            _end_watch(draft, restart)
        case Clock.BACKOFF, _:
            draft.set(is_backing_off=False)
        case Clock.STABLE, _:
            draft.set(failures=0)
        case Clock.LAME_DUCK, _ if service.is_lame_duck:
            _request_stop(draft, RequestStop())
        case Clock.REGAIN, _ if service.regains:
            draft.emit(Regain())


def _named(workers: Iterable[int]) -> str:
    return ", ".join(f"worker {number}" for number in sorted(workers))


# -- the restart --------------------------------------------------------------------------------------------


def _begin_batch(draft: _Draft, restart: Restart) -> None:
    size = 1 if restart.is_phased else min(restart.canary or restart.remaining, restart.remaining)
    new = frozenset(draft.spawn(restart.generation) for _ in range(size))
    remaining = restart.remaining - size
    draft.set(restart=replace(restart, remaining=remaining, step=Step.STARTING, new=new, old=frozenset()))


def _take_back(draft: _Draft, restart: Restart, why: str, culprit: int = 0, *, is_lost: bool = False) -> None:
    """Abort the restart or undo it, as its step demands; a new worker that `is_lost` while it is undone is no news."""
    if restart.step is Step.UNDOING:
        return
    if restart.step in WATCHED or (restart.step in (Step.QUIESCING, Step.SETTLING) and not is_lost):
        draft.emit(
            *(StopTimer(Timer(clock)) for clock in _CLOCKS),
            Announce(
                News.UNDOING,
                generation=restart.generation,
                worker=culprit,
                why=why,
                workers=tuple(sorted(restart.new)),
            ),
        )
        _unsteer(draft, restart)
        draft.set(restart=replace(restart, step=Step.UNDOING, why=why))
    else:
        _abort(draft, restart, why, culprit)


def _abort(draft: _Draft, restart: Restart, why: str, culprit: int = 0) -> None:
    """Take back what the restart has done: the old ones accept again, the new ones go."""
    _unsteer(draft, restart)
    _reopen(draft, restart)
    _dismiss(draft, restart)
    _give_up(draft, restart, why, culprit)


def _unsteer(draft: _Draft, restart: Restart) -> None:
    if restart.strategy is Strategy.OVERLAP and restart.step in (Step.QUIESCING, Step.SETTLING, Step.WATCHING):
        draft.emit(Unsteer(restart.generation))


def _reopen(draft: _Draft, restart: Restart) -> None:
    for old in _alive(draft, restart.old):
        if (draft.service.workers[old].phase, Event.OPEN) in TRANSITIONS:
            draft.open(old)


def _dismiss(draft: _Draft, restart: Restart) -> None:
    """Let the new ones go.

    New ones on whom the port depends wait for a replacement of the old code first: those of earlier batches,
    and every one that serves if no old one is left.
    """
    current = draft.service.current
    is_served = any(w.phase in _ACCEPTING for w in current if w.generation != restart.generation)
    for worker in [w for w in current if w.generation == restart.generation]:
        if worker.id in restart.new and (is_served or worker.phase is not Phase.SERVING):
            draft.release(worker.id)
        else:
            draft.put(replace(worker, is_expired=True))


def _give_up(draft: _Draft, restart: Restart, why: str, culprit: int = 0, news: News = News.ABORTED) -> None:
    leaving = restart.new - {w.id for w in draft.service.current}
    if news is News.UNDONE:  # an abort is told in the same step as a worker's end, and before it
        leaving &= draft.service.workers.keys()
    draft.set(restart=None)
    draft.emit(
        *(StopTimer(Timer(clock)) for clock in _CLOCKS),
        Announce(
            news,
            generation=restart.generation,
            worker=culprit,
            why=why,
            workers=tuple(sorted(leaving)),
        ),
    )


def _go_on(draft: _Draft) -> None:
    """Whatever has become possible by the last event."""
    service = draft.service
    if not service.workers and (service.generation == 0 or service.is_stopping):
        draft.emit(Finish(has_failed=not service.is_stopping))
        return
    if service.is_stopping:
        _drain_last(draft)
    if service.restart is not None:
        _go_on_restarting(draft, service.restart)
    restart = draft.service.restart
    if restart is None or restart.step is Step.BAKING:
        _go_on_maintaining(draft)


def _go_on_restarting(draft: _Draft, restart: Restart) -> None:
    phases = {draft.service.workers[i].phase for i in _alive(draft, restart.new)}
    match restart.step:
        case Step.STARTING if phases <= {Phase.READY, Phase.SERVING}:
            draft.emit(Announce(News.READY, generation=restart.generation))
            (_release if restart.strategy is Strategy.REBIND else _open)(draft, restart)
        case Step.RELEASING:
            _go_on_releasing(draft, restart)
        case Step.OPENING if phases == {Phase.SERVING}:
            _bake(draft, restart) if restart.canary else _commit(draft, restart)
        case Step.QUIESCING | Step.SETTLING | Step.WATCHING:
            for worker in sorted(restart.old.intersection(draft.service.ids(Phase.SERVING))):
                draft.quiesce(worker, restart)  # one that was being opened at the commit as soon as it has answered
            if restart.step is Step.QUIESCING and restart.old.isdisjoint(
                draft.service.ids(Phase.OPENING, Phase.QUIESCING)
            ):
                _settle(draft, restart)
            if restart.step is Step.WATCHING and restart.old.isdisjoint(w.id for w in draft.service.current):
                _end_watch(draft, restart)  # there is nobody left to be taken back
        case Step.UNDOING:
            _reopen(draft, restart)
            if restart.old.isdisjoint(draft.service.ids(Phase.OPENING)):
                _dismiss(draft, restart)
                _give_up(draft, restart, restart.why, news=News.UNDONE)
        case _:
            pass


def _bake(draft: _Draft, restart: Restart) -> None:
    draft.emit(
        Announce(News.BAKING, generation=restart.generation, workers=tuple(sorted(restart.new))),
        StartTimer(Timer(Clock.BAKE)),
    )
    draft.set(restart=replace(restart, step=Step.BAKING))


def _watch(draft: _Draft, restart: Restart) -> None:
    draft.emit(Announce(News.WATCHING, generation=restart.generation), StartTimer(Timer(Clock.WATCH)))
    draft.set(restart=replace(restart, step=Step.WATCHING))


def _end_watch(draft: _Draft, restart: Restart) -> None:
    """The new workers have shown that they are well, or somebody is satisfied with them."""
    if restart.step is Step.WATCHING:
        draft.emit(StopTimer(Timer(Clock.WATCH)))
        _finish_batch(draft, restart)
        return
    draft.emit(StopTimer(Timer(Clock.BAKE)))
    rest = frozenset(draft.spawn(restart.generation) for _ in range(restart.remaining))
    after = replace(restart, canary=0, remaining=0, step=Step.STARTING, new=restart.new | rest)
    draft.set(restart=after)
    if not rest:
        _commit(draft, after)


def _alive(draft: _Draft, workers: Iterable[int]) -> list[int]:
    return sorted(i for i in workers if i in draft.service.workers)


def _open(draft: _Draft, restart: Restart) -> None:
    for worker in sorted(restart.new.intersection(draft.service.ids(Phase.READY))):  # a canary serves already
        draft.open(worker)
    draft.set(restart=replace(restart, step=Step.OPENING))


def _release(draft: _Draft, restart: Restart) -> None:
    """Begin to close the listeners. A worker that is only starting would keep them open, and is not wanted any more."""
    draft.emit(StartTimer(Timer(Clock.QUIESCE)))
    old = [w for w in draft.service.current if w.generation != restart.generation]
    for worker in old:
        if worker.phase in (Phase.STARTING, Phase.READY):
            draft.terminate(worker.id)
    restart = replace(restart, step=Step.RELEASING, old=frozenset(w.id for w in old))
    draft.set(restart=restart)
    _go_on_releasing(draft, restart)


def _go_on_releasing(draft: _Draft, restart: Restart) -> None:
    for worker in sorted(restart.old.intersection(draft.service.ids(Phase.SERVING))):
        draft.quiesce(worker, restart)
    if restart.old.isdisjoint(draft.service.ids(*_HOLDING)):
        draft.emit(StopTimer(Timer(Clock.QUIESCE)), Rebind(restart.generation))
        draft.set(restart=replace(restart, step=Step.REBINDING))


def _bound(draft: _Draft, why: str, *, is_kept: bool) -> None:
    """The addresses have been bound again, or somebody was quicker."""
    restart, regains = draft.service.restart, draft.service.regains
    if draft.service.is_stopping:
        return
    if why:
        if restart is not None and restart.step is Step.REBINDING:
            _abort(draft, restart, why)
        if is_kept:
            return
        draft.set(regains=regains + 1)
        if not regains:
            draft.emit(Announce(News.PORT_LOST, generation=draft.service.generation, why=why))
        seconds = min(REGAIN_MAX_S, REGAIN_FIRST_S * 2.0 ** min(regains, 16))
        draft.emit(StartTimer(Timer(Clock.REGAIN), seconds))
    elif regains:
        draft.set(regains=0)
        draft.emit(*(Share(worker) for worker in draft.service.ids(Phase.OPENING, Phase.SERVING)))
        draft.emit(Announce(News.PORT_REGAINED, generation=draft.service.generation))
    elif restart is not None and restart.step is Step.REBINDING:
        _open(draft, restart)


def _commit(draft: _Draft, restart: Restart) -> None:
    draft.emit(Announce(News.COMMITTED, generation=restart.generation), StartTimer(Timer(Clock.QUIESCE)))
    if restart.strategy is Strategy.OVERLAP:
        draft.emit(Steer(restart.generation))
    old = [w.id for w in draft.service.current if w.generation != restart.generation]
    if restart.remaining:  # a phased restart takes the oldest, one for one
        old = old[: len(restart.new)]
    restart = replace(restart, step=Step.QUIESCING, old=frozenset(old))
    draft.set(restart=restart)
    _go_on_restarting(draft, restart)


def _settle(draft: _Draft, restart: Restart, why: str = "") -> None:
    draft.emit(
        StopTimer(Timer(Clock.QUIESCE)),
        Announce(News.QUIESCED, generation=restart.generation, why=why),
        StartTimer(Timer(Clock.SETTLE)),
    )
    draft.set(restart=replace(restart, step=Step.SETTLING))


def _finish_batch(draft: _Draft, restart: Restart) -> None:
    old = _alive(draft, restart.old)
    draft.emit(Announce(News.DRAINING, generation=restart.generation, workers=tuple(old)))
    for worker in old:
        draft.release(worker)
    if restart.remaining:
        _begin_batch(draft, restart)
        return
    draft.set(restart=None, generation=restart.generation, wanted=restart.wanted, failures=0, is_backing_off=False)
    draft.emit(StopTimer(Timer(Clock.BACKOFF)), Announce(News.DONE, generation=restart.generation))


# -- between restarts ---------------------------------------------------------------------------------------


def _go_on_maintaining(draft: _Draft) -> None:
    """Keep as many workers as are wanted; replace one that has expired, start first, one at a time.

    A canary that bakes is none of them.
    """
    service = draft.service
    if service.is_stopping or service.generation == 0:
        return
    for worker in _counted(draft):  # a replacement that serves relieves the one it was started for
        if worker.phase is Phase.SERVING and worker.replaces is not None:
            if worker.replaces in service.workers:
                draft.release(worker.replaces)
            draft.put(replace(worker, replaces=None))
    while len(lasting := _lasting(draft)) > service.wanted:  # let go first of those that are missed least
        least = min(lasting, key=lambda w: (w.phase in _ACCEPTING, not w.is_expired, -w.id))
        draft.release(least.id)
    if service.is_backing_off:
        return
    for _ in range(service.wanted - len(lasting)):
        draft.spawn(service.generation)
    current = _counted(draft)
    expired = [w for w in current if w.is_expired and w.phase is Phase.SERVING]
    if expired and len(current) == service.wanted:  # nobody is being relieved yet
        draft.spawn(service.generation, replaces=expired[0].id)


def _lasting(draft: _Draft) -> list[Worker]:
    """Current workers but those that leave as soon as their replacement serves."""
    current = _counted(draft)
    relieved = {w.replaces for w in current}
    return [w for w in current if w.id not in relieved]


def _counted(draft: _Draft) -> list[Worker]:
    """Current workers, without those of a restart that has not replaced any yet."""
    restart = draft.service.restart
    return [w for w in draft.service.current if restart is None or w.id not in restart.new]
