"""The rules of a service: one pure function from state and input to state and effects.

``step(service, event)`` returns the service that follows and the effects that the supervisor has to carry out,
in order. Nothing here knows a clock, a process or a socket: a timer is an effect, and its end an event.

A restart is a *batch* of new workers that take over from a batch of old ones. In the default mode one batch
holds all of them; a phased restart is a series of batches of one. For each batch::

    PREPARING   do what the generation needs once (migrations, checks), before its first batch
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
    REBINDING   close the last descriptor and bind again; if another process was quicker, the restart aborts, and the
                address is tried again and again

Before the line *(done)* anything that goes wrong with a new worker aborts the restart by the inverses in
`INVERSE`, and the old generation serves on. What goes wrong in the undo window is *undone*, in two steps so that
connections can go back::

    UNDOING     tell the old ones to accept again, wait until each one does, or has failed to
    (undone)    drain the new ones

A restart with a canary has one batch that comes in two parts. After OPENING its first part is BAKING: it serves beside
the old ones, all of which go on accepting, until the bake is over and the rest starts, or until it is undone. There is
none with a strategy that rules it out (`Guarantee.no_canary`).

The restart's number and the wanted count become the service's own only
with the last batch; until then whatever is started outside of the restart is of the old generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from msgspec.structs import replace

from hotport.model.effects import (
    Abandon,
    Accept,
    Announce,
    CloseListeners,
    Drain,
    Effect,
    ExtendTimer,
    Finish,
    Kill,
    News,
    Open,
    Prepare,
    Quiesce,
    Rebind,
    Refusal,
    Refuse,
    Regain,
    Release,
    Share,
    Spawn,
    StartTimer,
    Steer,
    StopTimer,
    Terminate,
    Unsteer,
)
from hotport.model.inputs import (
    Adopt,
    Answered,
    Bound,
    Clock,
    Exited,
    Hung,
    Input,
    MoreTime,
    Prepared,
    RecycleDue,
    RequestKeep,
    RequestRestart,
    RequestScale,
    RequestStop,
    RequestUndo,
    Said,
    Timer,
    Unhealthy,
)
from hotport.model.lifecycle import CURRENT, MORE_TIME_MAX_S, TRANSITIONS, Event, Phase, Worker, advance
from hotport.model.service import Restart, Service, surviving
from hotport.model.steps import STEPS, Step, Undoing
from hotport.model.strategies import GUARANTEES, Strategy

__all__ = [
    "BACKOFF_MAX_S",
    "GENERATIONS_DRAINING_MAX",
    "NOT_PREPARED",
    "refusal",
    "step",
]


BACKOFF_FIRST_S: Final = 0.5


BACKOFF_MAX_S: Final = 30.0


#: Between attempts to bind an address that another process has taken. Seldom in the end: a bind that fails slows the
#: port down, with many connections in TIME_WAIT by milliseconds.
REGAIN_FIRST_S: Final = 0.1


REGAIN_MAX_S: Final = 5.0


#: A restart is refused while this many older generations still drain: each of them holds memory.
GENERATIONS_DRAINING_MAX: Final = 8


#: Why a preparation that lasts too long is given up.
NOT_PREPARED: Final = "before_start did not end in time"


#: What bounds each phase of a worker in which something is awaited of it.
_BOUNDS: Final[Mapping[Phase, Clock]] = {
    Phase.STARTING: Clock.READY,
    Phase.DRAINING: Clock.DRAIN,
    Phase.STOPPING: Clock.KILL,
}


#: Timers that belong to the restart, not to one of its workers.
_CLOCKS: Final = tuple(
    dict.fromkeys(row.clock for row in STEPS.values() if row.clock not in (None, Clock.READY, Clock.OPEN))
)


#: Phases of workers that accept, or have been told to.
_ACCEPTING: Final = frozenset({Phase.OPENING, Phase.SERVING})


#: Phases of workers that have listeners open while they are told to release them.
_HOLDING: Final = (Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.STOPPING)


class _Draft:
    """A service being changed: the one place where values are replaced and effects are listed."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.effects: list[Effect] = []

    def set(self, **changes: object) -> None:
        self.service = replace(self.service, **changes)

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
        """Quiesce or release a worker, by the kind of the restart; both are answered alike."""
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
        """Dismiss a worker as gently as its phase allows; one that is leaving is left alone."""
        phase = self.service.workers[worker].phase
        if (phase, Event.DRAIN) in TRANSITIONS:
            self.drain(worker, is_last=is_last)
        elif phase in CURRENT:
            self.terminate(worker)


def step(service: Service, event: Input) -> tuple[Service, tuple[Effect, ...]]:
    """Apply `event`: return the new state and the effects to carry out, in order."""
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
        case RecycleDue():
            _expired(draft, event.worker)
        case Hung():
            _hung(draft, event)
        case Answered():
            _answered(draft, event.worker)
        case MoreTime():
            _more_time(draft, event)
        case Prepared():
            _prepared(draft, event)
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
    """Finish an interrupted restart in one of two ways: after its commit go forward, before it go back."""
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
        if event.is_prepared:
            draft.set(preparing=first)
            draft.emit(Prepare(first), StartTimer(Timer(Clock.PREPARE)))
            return
        for _ in range(event.wanted):
            draft.spawn(first)


def _request_restart(draft: _Draft, event: RequestRestart) -> None:
    if _is_refused(draft, event):
        return
    generation = draft.service.generations + 1
    wanted = draft.service.wanted if event.wanted is None else event.wanted
    draft.set(generations=generation)
    draft.emit(Accept(event.request, generation), Announce(News.RESTART_BEGAN, generation=generation))
    restart = Restart(
        generation,
        wanted,
        wanted,
        event.is_phased and not event.canary,
        strategy=event.strategy,
        canary=0 if GUARANTEES[event.strategy].no_canary else event.canary,
        is_watched=event.is_watched,
    )
    if not event.is_prepared:
        _begin_batch(draft, restart)
        return
    draft.set(restart=replace(restart, step=Step.PREPARING))
    draft.emit(Announce(News.PREPARING, generation=generation), Prepare(generation), StartTimer(Timer(Clock.PREPARE)))


def _prepared(draft: _Draft, event: Prepared) -> None:
    """Start the workers of a generation that is prepared, or give the generation up."""
    service, restart = draft.service, draft.service.restart
    if service.preparing and service.preparing == event.generation:
        draft.set(preparing=0)
        draft.emit(StopTimer(Timer(Clock.PREPARE)))
        for _ in range(0 if event.why else service.wanted):
            draft.spawn(event.generation)
    elif restart is None or restart.generation != event.generation or restart.step is not Step.PREPARING:
        return  # it was abandoned
    elif event.why:
        _abort(draft, restart, event.why)
    else:
        draft.emit(StopTimer(Timer(Clock.PREPARE)), Announce(News.PREPARED, generation=event.generation))
        _begin_batch(draft, restart)


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
    """Return why a restart or a scaling is refused now, with the generation that is the reason (or 0)."""
    if service.is_stopping:
        return Refusal.STOPPING, 0
    if service.is_lame_duck:
        return Refusal.LAME_DUCK, 0
    if service.restart is not None:
        why = Refusal.WATCHED if STEPS[service.restart.step].is_watched else Refusal.IN_PROGRESS
        return why, service.restart.generation
    if service.generation == 0:
        return Refusal.STARTING, 0
    if is_restart and service.draining_generations >= GENERATIONS_DRAINING_MAX:
        return Refusal.TOO_MANY_DRAINING, 0
    if is_restart and service.regains:
        return Refusal.PORT_LOST, 0
    return None


def _request_verdict(draft: _Draft, event: RequestUndo | RequestKeep) -> None:
    """Decide about the new workers before the watch or the bake has ended."""
    service, restart = draft.service, draft.service.restart
    if service.is_stopping:
        draft.emit(Refuse(event.request, Refusal.STOPPING))
    elif isinstance(event, RequestUndo):
        if restart is None:
            draft.emit(Refuse(event.request, Refusal.NOTHING_TO_UNDO))
            return
        draft.emit(Accept(event.request, restart.generation))
        _take_back(draft, restart, f"{event.by} asked for it")
    elif restart is None or not STEPS[restart.step].is_watched:
        draft.emit(Refuse(event.request, Refusal.NOT_WATCHED, restart.generation if restart else 0))
    else:
        draft.emit(Accept(event.request, restart.generation))
        _end_watch(draft, restart)


def _unhealthy(draft: _Draft, event: Unhealthy) -> None:
    restart = draft.service.restart
    if restart is not None and restart.generation == event.generation and STEPS[restart.step].is_watched:
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
        if before.preparing:
            _abandon_first(draft, "the service is stopping")
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


def _abandon_first(draft: _Draft, why: str) -> None:
    draft.emit(StopTimer(Timer(Clock.PREPARE)), Abandon(draft.service.preparing, why))
    draft.set(preparing=0)


def _drain_last(draft: _Draft) -> None:
    """Let accepting workers empty the queue and leave, once no other worker holds the listeners.

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


def _lost(draft: _Draft, worker: Worker, why: str, clock: Clock | None = None) -> None:
    """Handle the loss of a worker that is still needed."""
    draft.emit(Announce(News.WORKER_LOST, generation=worker.generation, worker=worker.id, why=why, clock=clock))
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


def _hung(draft: _Draft, event: Hung) -> None:
    """Replace a worker that does not answer; a new one of a restart is taken back, as if it had ended."""
    worker, restart = draft.service.workers.get(event.worker), draft.service.restart
    if worker is None or worker.phase is not Phase.SERVING or worker.is_hung:
        return
    draft.put(replace(worker, is_hung=True))
    why = f"has not answered for {event.silent_s:.3g} s"
    if event.waited_s > event.silent_s / 4:  # else the time would not fit to the option
        why += f", and waited for a processor in {event.waited_s:.3g} s of them"
    draft.emit(Announce(News.WORKER_GIVEN_UP, generation=worker.generation, worker=worker.id, why=why))
    if restart is not None and worker.id in restart.new and STEPS[restart.step].is_watched:
        _take_back(draft, restart, f"worker {worker.id} {why}", worker.id)


def _answered(draft: _Draft, worker: int) -> None:
    if worker in draft.service.workers:  # a replacement that was started all the same relieves it
        draft.put(replace(draft.service.workers[worker], is_hung=False))


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
            _lost(draft, worker, why, timer.clock)
        case Clock.DRAIN, Phase.DRAINING:
            draft.terminate(timer.worker)
        case Clock.KILL, Phase.STOPPING:
            draft.emit(Kill(timer.worker))
        case Clock.BACKOFF, _:
            draft.set(is_backing_off=False)
        case Clock.STABLE, _:
            draft.set(failures=0)
        case Clock.LAME_DUCK, _ if service.is_lame_duck:
            _request_stop(draft, RequestStop())
        case Clock.PREPARE, _ if service.preparing:
            _abandon_first(draft, NOT_PREPARED)
        case Clock.REGAIN, _ if service.regains:
            draft.emit(Regain())
        case clock, _ if restart is not None and clock in _CLOCKS and clock is STEPS[restart.step].clock:
            _elapsed_step(draft, restart)


def _elapsed_step(draft: _Draft, restart: Restart) -> None:
    """Handle the end of the timer of a restart's step."""
    match restart.step:
        case Step.PREPARING:
            _abort(draft, restart, NOT_PREPARED)
        case Step.RELEASING:
            holding = restart.old.intersection(draft.service.ids(*_HOLDING))  # so they cannot be bound again
            _abort(draft, restart, f"{_named(holding)} did not let go of the listeners")
        case Step.QUIESCING:
            late = restart.old.intersection(draft.service.ids(Phase.OPENING, Phase.QUIESCING))  # drained as they are
            _settle(draft, restart, why=f"no answer from {_named(late)}")
        case Step.SETTLING if restart.is_watched:
            _watch(draft, restart)
        case Step.SETTLING:
            _finish_batch(draft, restart)
        case _:
            _end_watch(draft, restart)


def _named(workers: Iterable[int]) -> str:
    return ", ".join(f"worker {number}" for number in sorted(workers))


def _begin_batch(draft: _Draft, restart: Restart) -> None:
    size = 1 if restart.is_phased else min(restart.canary or restart.remaining, restart.remaining)
    new = frozenset(draft.spawn(restart.generation) for _ in range(size))
    remaining = restart.remaining - size
    draft.set(restart=replace(restart, remaining=remaining, step=Step.STARTING, new=new, old=frozenset()))


def _take_back(draft: _Draft, restart: Restart, why: str, culprit: int = 0, *, is_lost: bool = False) -> None:
    """Abort the restart or undo it, as the table says for its step."""
    row = STEPS[restart.step]
    match row.lost if is_lost else row.unwanted:
        case Undoing.ABORT:
            _abort(draft, restart, why, culprit)
        case Undoing.UNDO:
            _undo(draft, restart, why, culprit)


def _undo(draft: _Draft, restart: Restart, why: str, culprit: int) -> None:
    """Begin an undo: the new workers leave once the old ones can take their connections."""
    new = tuple(sorted(restart.new))
    draft.emit(
        *(StopTimer(Timer(clock)) for clock in _CLOCKS),
        Announce(News.UNDOING, generation=restart.generation, worker=culprit, why=why, workers=new),
    )
    _unsteer(draft, restart)
    draft.set(restart=replace(restart, step=Step.UNDOING, why=why))


def _abort(draft: _Draft, restart: Restart, why: str, culprit: int = 0) -> None:
    """Abort a restart: the old workers accept again, the new ones leave."""
    _unsteer(draft, restart)
    _reopen(draft, restart)
    _dismiss(draft, restart)
    _give_up(draft, restart, why, culprit)


def _unsteer(draft: _Draft, restart: Restart) -> None:
    if restart.strategy is Strategy.OVERLAP and STEPS[restart.step].is_committed:
        draft.emit(Unsteer(restart.generation))


def _reopen(draft: _Draft, restart: Restart) -> None:
    for old in _alive(draft, restart.old):
        if (draft.service.workers[old].phase, Event.OPEN) in TRANSITIONS:
            draft.open(old)


def _dismiss(draft: _Draft, restart: Restart) -> None:
    """Dismiss the new workers.

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
    if restart.step is Step.PREPARING:
        draft.emit(Abandon(restart.generation, why))
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
    """Proceed with everything that the last event has made possible."""
    service = draft.service
    if not service.workers and not service.preparing and (service.generation == 0 or service.is_stopping):
        draft.emit(Finish(has_failed=not service.is_stopping))
        return
    if service.is_stopping:
        _drain_last(draft)
    if service.restart is not None:
        _go_on_restarting(draft, service.restart)
    restart = draft.service.restart
    if restart is None or restart.step in (Step.PREPARING, Step.BAKING):
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
    """End the watch: the new workers have proved healthy, or the operator keeps them."""
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
    """Begin to close the listeners; dismiss starting workers, which would keep them open."""
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
    """Handle the outcome of a rebind: bound again, or taken by another process."""
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
        least = min(lasting, key=lambda w: (w.phase in _ACCEPTING, not w.is_hung, not w.is_expired, -w.id))
        draft.release(least.id)
    if service.is_backing_off:
        return
    for _ in range(service.wanted - len(lasting)):
        draft.spawn(service.generation)
    current = _counted(draft)
    leaving = sum(w.is_hung and w.phase not in CURRENT for w in service.workers.values())
    is_room = leaving < service.wanted  # each has its memory, and they may hang faster than they are killed
    expired = [w for w in current if (w.is_expired or (w.is_hung and is_room)) and w.phase is Phase.SERVING]
    if expired and len(current) == service.wanted:  # nobody is being relieved yet
        first = max(expired, key=lambda w: (w.is_hung, -w.id))
        draft.spawn(service.generation, replaces=first.id)


def _lasting(draft: _Draft) -> list[Worker]:
    """Return current workers except those that leave once their replacement serves."""
    current = _counted(draft)
    relieved = {w.replaces for w in current}
    return [w for w in current if w.id not in relieved]


def _counted(draft: _Draft) -> list[Worker]:
    """Return current workers, without those of a restart that has not replaced any yet."""
    restart = draft.service.restart
    return [w for w in draft.service.current if restart is None or w.id not in restart.new]
