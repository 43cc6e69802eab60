"""A world for the model to live in: workers, timers and one queue, as the supervisor has them, and no operating system.

Everything that happens is put at the end of `World.queue`, and one input at a time is taken from its beginning; so
words cross orders and timers end after they were stopped, as they do in life. After every step `World` checks what
must hold whatever happened before (`_check`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from hotport.model.effects import (
    Abandon,
    Accept,
    Announce,
    CloseListeners,
    Drain,
    Effect,
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
    Bound,
    Clock,
    Elapsed,
    Exited,
    Input,
    Prepared,
    RequestKeep,
    RequestRestart,
    RequestScale,
    RequestStop,
    RequestUndo,
    Said,
    Timer,
    Unhealthy,
)
from hotport.model.lifecycle import CURRENT, Event, Phase, Worker
from hotport.model.rules import step
from hotport.model.service import Service
from hotport.model.steps import STEPS, Step
from hotport.model.strategies import Strategy

#: The worker timer that bounds each phase in which an answer is awaited.
BOUNDS = {
    Phase.STARTING: Clock.READY,
    Phase.OPENING: Clock.OPEN,
    Phase.DRAINING: Clock.DRAIN,
    Phase.STOPPING: Clock.KILL,
}
LEAVING = (Phase.DRAINING, Phase.STOPPING)


@dataclass
class Process:
    """A worker process: what it was told, and what it has said."""

    generation: int
    orders: deque[Open | Quiesce | Release | Drain | Terminate] = field(default_factory=deque)
    has_said_ready: bool = False
    was_killed: bool = False
    accepts: bool | None = None
    has_listeners: bool = True

    @property
    def phase(self) -> Phase:
        """How far it is, by its own word."""
        if self.orders and isinstance(self.orders[0], Drain | Terminate):
            return Phase.DRAINING
        if not self.has_said_ready:
            return Phase.STARTING
        return {None: Phase.READY, True: Phase.SERVING, False: Phase.QUIESCED}[self.accepts]


class World:
    """Carries out effects and feeds events, in order.

    Attributes:
        processes: Those that run; one leaves when its end is put into the queue.
        timers: Those that run.
        effects: Everything that was ever emitted.
        thief: Somebody else who takes an address whenever nobody has it; empty if there is none.
        is_lost: The supervisor has no listener.
        is_kept: With a `thief`: it is one of the workers, whose socket is left to it.
        preparing: The generation whose preparation runs; 0 if none does.
    """

    def __init__(self, wanted: int, *, is_prepared: bool = False) -> None:
        self.service = Service(wanted=wanted)
        self.queue: deque[Input] = deque([Adopt((), wanted, 0, 0, is_prepared=is_prepared)])
        self.preparing = 0
        self._is_prepared = is_prepared
        self._prepared: list[int] = []
        self.processes: dict[int, Process] = {}
        self.timers: set[Timer] = set()
        self.effects: list[Effect] = []
        self.is_finished = False
        self.thief = ""
        self.is_lost = False
        self.is_kept = False
        self._requests = 0
        self._accepting: set[int] = set()
        self._emitted: list[Effect] = []  # by the current batch of a restart
        self._generations: list[int] = [1]
        self._quiesced: set[int] = set()  # old ones of the restart in progress that are still to be taken back

    # -- what may be done to it ----------------------------------------------------------------------------

    def request(self, make: Callable[[int], Input]) -> int:
        """Queue a request and return its number."""
        self._requests += 1
        self.queue.append(make(self._requests))
        return self._requests

    def restart(
        self,
        *,
        is_phased: bool = False,
        wanted: int | None = None,
        strategy: Strategy = Strategy.INHERIT,
        canary: int = 0,
        is_watched: bool = False,
        is_prepared: bool = False,
    ) -> int:
        return self.request(lambda n: RequestRestart(n, is_phased, wanted, strategy, canary, is_watched, is_prepared))

    def prepare(self, why: str = "") -> None:
        """The preparation that runs ends."""
        self.queue.append(Prepared(self.preparing, why))
        self.preparing = 0

    def undo(self) -> int:
        return self.request(lambda n: RequestUndo(n, "somebody"))

    def keep(self) -> int:
        return self.request(RequestKeep)

    def find_unhealthy(self, why: str = "it is not well", worker: int = 0) -> None:
        restart = self.service.restart
        self.queue.append(Unhealthy(restart.generation if restart else self.service.generation, why, worker))

    def scale(self, wanted: int) -> int:
        return self.request(lambda n: RequestScale(n, wanted))

    def stop(self, *, now: bool = False, lame_duck_s: float = 0.0) -> None:
        self.queue.append(RequestStop(now, lame_duck_s=lame_duck_s))

    def say(self, worker: int, event: Event) -> None:
        self.queue.append(Said(worker, event))

    def die(self, worker: int, why: str = "was killed by SIGKILL") -> None:
        del self.processes[worker]
        self.queue.append(Exited(worker, why))

    def crash(self, *, forgets_orders: bool) -> None:
        """The supervisor dies, and another one adopts what is left.

        Args:
            forgets_orders: What workers were told and have not carried out never reached them.
        """
        service = self.service
        self.thief, self.is_lost = "", False  # the next one cannot begin before it has every address
        self.queue.clear()
        self.timers.clear()
        self.preparing = 0  # it ends with the supervisor
        self._emitted = []
        self._quiesced.clear()
        for number, process in list(self.processes.items()):
            if process.was_killed:
                del self.processes[number]
            elif forgets_orders:
                process.orders.clear()
            if process.accepts:
                self._accepting.add(number)
        workers = tuple(Worker(number, each.generation, each.phase) for number, each in self.processes.items())
        numbers = service.generations, service.spawned, service.favoured
        self.queue.append(Adopt(workers, service.wanted, *numbers, self._is_prepared))
        self.service = Service(wanted=service.wanted)
        self.take()
        self._generations = [self.service.generations]

    def elapse(self, clock: Clock, worker: int = 0) -> None:
        timer = Timer(clock, worker)
        self.timers.remove(timer)
        self.queue.append(Elapsed(timer))

    def obey(self, worker: int) -> bool:
        """Let a worker do the next thing that is expected of it; False if that is nothing."""
        process = self.processes[worker]
        if process.was_killed:
            self.die(worker)
        elif process.orders and isinstance(process.orders[0], Drain | Terminate):
            self.die(worker, "exited with status 0")
        elif not process.has_said_ready:
            process.has_said_ready = True
            self.say(worker, Event.READY)
        elif process.orders:
            order = process.orders.popleft()
            process.accepts = isinstance(order, Open)
            self.say(worker, Event.ACCEPTING if isinstance(order, Open) else Event.QUIESCED)
        else:
            return False
        return True

    def run(self, *, slow: tuple[int, ...] = ()) -> World:
        """Everybody but `slow` does what is expected, until nothing is left to do but wait for timers.

        Args:
            slow: Workers; 0 is the preparation of a generation.
        """
        while not self.is_finished and (self.queue or self._obeys(slow)):
            while self.queue and not self.is_finished:
                self.take()
        return self

    def _obeys(self, slow: tuple[int, ...]) -> bool:
        """Somebody but `slow` does the next thing that is expected."""
        if self.preparing and 0 not in slow:
            self.prepare()
            return True
        return any(self.obey(worker) for worker in list(self.processes) if worker not in slow)

    def take(self) -> tuple[Effect, ...]:
        """Take the next input, carry out what follows from it, and check it."""
        before, event = self.service, self.queue.popleft()
        self.service, effects = step(before, event)
        self.effects += effects
        if isinstance(event, Said) and event.event is Event.ACCEPTING:
            self._accepting.add(event.worker)
        for effect in effects:
            self._carry_out(effect)
        if isinstance(event, Adopt):
            workers = {worker.id: worker for worker in event.workers}
            before = replace(before, workers=workers, spawned=event.spawned, generations=event.generations)
            self._check_adoption(event, effects)
        self._check(before, event, effects)
        return effects

    def _check_adoption(self, event: Adopt, effects: tuple[Effect, ...]) -> None:
        """One generation goes on, whole or to become so; whoever is not of it leaves, now or when it is not missed."""
        after = self.service
        assert after.restart is None
        kept = after.generation
        for worker in after.current:
            assert worker.generation == kept or worker.is_expired or kept == 0
            if worker.generation == kept and worker.phase is Phase.SERVING:
                assert Open(worker.id) in effects  # an order to cease may be on its way
        if any(worker.phase in (Phase.SERVING, Phase.QUIESCED) for worker in event.workers):
            assert kept

    # -- what the supervisor does --------------------------------------------------------------------------

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Prepare(generation):
                assert not self.preparing
                assert generation not in self._prepared, "once a generation"
                self.preparing = generation
                self._prepared.append(generation)
            case Abandon(generation):
                assert generation == self._prepared[-1]
                self.preparing = 0
            case Spawn(worker, generation):
                self.processes[worker] = Process(generation)
            case Open(worker) | Quiesce(worker) | Release(worker) | Drain(worker) | Terminate(worker) if (
                worker in self.processes
            ):
                assert isinstance(effect, Open | Quiesce | Release | Drain | Terminate)
                process = self.processes[worker]
                if isinstance(effect, Drain | Terminate):
                    process.orders.clear()  # whatever it was told before, it leaves now
                process.orders.append(effect)
            case Kill(worker) if worker in self.processes:
                self.processes[worker].was_killed = True
            case StartTimer(timer):
                self.timers.add(timer)
            case StopTimer(timer):
                self.timers.discard(timer)
            case Rebind():
                # Who has been told to drain has closed its listeners first.
                holding = (Phase.STARTING, Phase.READY, Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.STOPPING)
                restart = self.service.restart
                assert restart is not None
                assert restart.old.isdisjoint(self.service.ids(*holding))
                self.is_lost = bool(self.thief) and not self.is_kept
                self.queue.append(Bound(self.thief, self.is_kept))
            case Regain():
                assert self.service.regains
                self.is_lost = bool(self.thief)
                self.queue.append(Bound(self.thief))
            case Finish():
                self.is_finished = True
            case _:
                pass

    # -- what must hold ------------------------------------------------------------------------------------

    def _check(self, before: Service, event: Input, effects: tuple[Effect, ...]) -> None:
        after = self.service
        self._check_names(before, effects)
        self._check_answers(before, event, effects)
        self._check_bounds(after)
        self._check_restart(before, event, effects)
        self._check_preparation(after)
        self._check_numbers(after)
        self._check_port(before, event, after)
        self._check_listeners(before, event, effects)
        finishes = [e for e in effects if isinstance(e, Finish)]
        is_over = not after.workers and not after.preparing and (after.is_stopping or after.generation == 0)
        assert len(finishes) == is_over
        assert not finishes or finishes[0].has_failed is not after.is_stopping
        assert effects.count(CloseListeners()) == (after.is_stopping and not before.is_stopping)
        assert not (after.is_lame_duck and (after.is_stopping or after.generation == 0))
        if after.is_stopping:
            assert after.restart is None
            assert not after.ids(Phase.STARTING, Phase.READY)
            assert not after.current or after.ids(Phase.STOPPING)  # serving until these are gone

    def _check_names(self, before: Service, effects: tuple[Effect, ...]) -> None:
        """No effect names a worker that is not there; numbers are never reused."""
        there = set(before.workers)
        for effect in effects:
            match effect:
                case Spawn(worker):
                    assert worker == before.spawned + 1 + len(there - before.workers.keys())
                    there.add(worker)
                case (
                    Open(worker)
                    | Quiesce(worker)
                    | Release(worker)
                    | Share(worker)
                    | Drain(worker)
                    | Terminate(worker)
                    | Kill(worker)
                ):
                    assert worker in there
                case StartTimer(timer):
                    assert timer.worker == 0 or timer.worker in self.service.workers
                case StopTimer(timer) | Announce(worker=timer):
                    named = timer.worker if isinstance(timer, Timer) else timer
                    assert named == 0 or named in there
                case _:
                    pass
        assert list(self.service.workers) == sorted(self.service.workers)

    def _check_answers(self, before: Service, event: Input, effects: tuple[Effect, ...]) -> None:
        """A request is answered at once, and once; during a restart with the restart's generation."""
        answers = [e for e in effects if isinstance(e, Accept | Refuse)]
        if not isinstance(event, RequestRestart | RequestScale | RequestUndo | RequestKeep):
            assert not answers
            return
        (answer,) = answers
        assert answer.request == event.request
        if isinstance(answer, Refuse):
            assert self.service == before
            assert len(effects) == 1
        if before.is_stopping:
            assert answer == Refuse(event.request, Refusal.STOPPING)
        elif isinstance(event, RequestUndo):
            restart = before.restart
            assert answer == (
                Accept(event.request, restart.generation) if restart else Refuse(event.request, Refusal.NOTHING_TO_UNDO)
            )
        elif isinstance(event, RequestKeep):
            generation = before.restart.generation if before.restart else 0
            is_watched = before.restart is not None and STEPS[before.restart.step].is_watched
            assert answer == (
                Accept(event.request, generation)
                if is_watched
                else Refuse(event.request, Refusal.NOT_WATCHED, generation)
            )
        elif before.is_lame_duck:
            assert answer == Refuse(event.request, Refusal.LAME_DUCK)
        elif before.regains and before.restart is None and isinstance(event, RequestRestart):
            assert answer == Refuse(event.request, Refusal.PORT_LOST) or before.generation == 0 or before.ids(*LEAVING)
        elif before.restart is not None:
            why = Refusal.WATCHED if STEPS[before.restart.step].is_watched else Refusal.IN_PROGRESS
            assert answer == Refuse(event.request, why, before.restart.generation)
        elif isinstance(event, RequestRestart) and isinstance(answer, Accept):
            assert answer.generation == self._generations[-1] + 1
            self._generations.append(answer.generation)

    def _check_bounds(self, after: Service) -> None:
        """Nothing is waited for without a timer that ends the waiting."""
        running = self.timers | {event.timer for event in self.queue if isinstance(event, Elapsed)}
        for worker in after.workers.values():
            if (clock := BOUNDS.get(worker.phase)) and Timer(clock, worker.id) not in running:
                process = self.processes.get(worker.id)
                assert process is None or process.was_killed
        clocks = {
            Step.PREPARING: Clock.PREPARE,
            Step.QUIESCING: Clock.QUIESCE,
            Step.RELEASING: Clock.QUIESCE,
            Step.SETTLING: Clock.SETTLE,
            Step.BAKING: Clock.BAKE,
            Step.WATCHING: Clock.WATCH,
        }
        step_ = after.restart.step if after.restart else None
        for at, clock in clocks.items():
            if step_ is at:
                assert Timer(clock) in running
            elif clock in (Clock.BAKE, Clock.WATCH) or (clock is Clock.PREPARE and not after.preparing):
                assert Timer(clock) not in self.timers  # it would end the same step of the next restart
        if step_ is Step.UNDOING:  # else it would be over
            assert after.restart is not None
            assert after.restart.old.intersection(after.ids(Phase.OPENING))
        if after.restart is not None and after.restart.step is Step.REBINDING:
            assert any(isinstance(event, Bound) for event in self.queue)
        if after.regains:
            assert Timer(Clock.REGAIN) in running or any(isinstance(event, Bound) for event in self.queue)
        if after.is_backing_off:
            assert Timer(Clock.BACKOFF) in running
        assert not after.is_lame_duck or Timer(Clock.LAME_DUCK) in running

    def _check_preparation(self, after: Service) -> None:
        """A preparation runs while it is waited for, and no longer; meanwhile its generation has no workers."""
        restart = after.restart
        waits = restart.generation if restart and restart.step is Step.PREPARING else after.preparing
        if waits:
            assert self.preparing == waits or any(isinstance(e, Prepared) and e.generation == waits for e in self.queue)
            assert Timer(Clock.PREPARE) in self.timers or Elapsed(Timer(Clock.PREPARE)) in self.queue
            assert waits not in {worker.generation for worker in after.workers.values()}
            assert not after.is_stopping
        else:
            assert not self.preparing

    def _check_restart(self, before: Service, event: Input, effects: tuple[Effect, ...]) -> None:
        after, news = self.service, [e.news for e in effects if isinstance(e, Announce)]
        began = news.count(News.RESTART_BEGAN)
        over = news.count(News.DONE) + news.count(News.ABORTED) + news.count(News.UNDONE)
        assert (before.restart is not None) + began - over == (after.restart is not None)
        held = after.restart.new | after.restart.old if after.restart else frozenset()
        for worker in after.current:  # nobody is forgotten half-way
            if worker.phase in (Phase.READY, Phase.QUIESCING, Phase.QUIESCED):
                assert worker.id in held
        for effect in effects:
            if isinstance(effect, Quiesce):
                assert after.restart is not None
                assert after.restart.new <= self._accepting
        restart = before.restart
        if restart is None:
            self._emitted = [e for e in effects if after.restart and isinstance(e, Spawn)]
            return
        old = [w for w in before.current if w.generation != restart.generation and w.id != _subject(event)]
        if not before.is_stopping and not after.is_stopping and News.DRAINING not in news:
            relieved = {w.replaces for w in after.workers.values()} | {w.replaces for w in before.workers.values()}
            for worker in old:
                if News.UNDONE in news and worker.phase is Phase.STARTING:
                    continue  # one of the new ones serves, and is relieved by another when it is known to
                is_useless = restart.strategy is Strategy.REBIND and after.workers[worker.id].phase is Phase.STOPPING
                assert worker.id in relieved or after.workers[worker.id].phase in CURRENT or is_useless
                is_useless = restart.strategy is Strategy.REBIND and worker.phase in (Phase.STARTING, Phase.READY)
                assert Terminate(worker.id) not in effects or is_useless
        self._check_undo(before, effects)
        if News.ABORTED in news and not after.is_stopping:
            self._check_inverses(before, event, effects)
        if News.DRAINING in news:
            self._emitted = []
        batch = after.restart.new | after.restart.old if after.restart else frozenset()
        self._emitted += [e for e in effects if isinstance(e, Spawn | Open | Quiesce | Release) and e.worker in batch]
        if News.DRAINING not in news:
            self._emitted += [e for e in effects if isinstance(e, Steer)]

    def _check_undo(self, before: Service, effects: tuple[Effect, ...]) -> None:
        """Old ones accept again before new ones go; and then none of both is forgotten."""
        after, restart = self.service, before.restart
        assert restart is not None
        self._quiesced |= {e.worker for e in effects if isinstance(e, Quiesce)}
        self._quiesced -= {e.worker for e in effects if isinstance(e, Open)}
        told = [e.news for e in effects if isinstance(e, Announce)]
        if restart.step is Step.UNDOING and after.restart is not None:
            assert not [e for e in effects if isinstance(e, Drain) and e.worker in restart.new]
        if News.UNDONE in told:
            (undone,) = (e for e in effects if isinstance(e, Announce) and e.news is News.UNDONE)
            assert set(undone.workers) <= after.workers.keys()  # each is still to be waited for
            assert after.generation == before.generation
            assert after.wanted == before.wanted
            assert not restart.old.intersection(before.ids(Phase.OPENING) if restart.step is not Step.UNDOING else ())
            assert not restart.old.intersection(after.ids(Phase.OPENING, Phase.QUIESCING, Phase.QUIESCED, Phase.READY))
            has_old = any(w.generation != restart.generation for w in after.current if w.phase is Phase.SERVING)
            for worker in after.current:
                if worker.generation == restart.generation:
                    assert worker.is_expired
                    assert not has_old or worker.id not in restart.new
            self._emitted = []
        if after.restart is None:
            assert after.is_stopping or not self._quiesced.intersection(after.ids(Phase.QUIESCED))
            self._quiesced.clear()

    def _check_inverses(self, before: Service, event: Input, effects: tuple[Effect, ...]) -> None:
        """An abort takes back what the batch has done: each effect, where its worker is still there to be told."""
        after, restart = self.service, before.restart
        assert restart is not None
        assert after.generation == before.generation
        assert after.wanted == before.wanted
        others_serve = any(
            w.phase in (Phase.OPENING, Phase.SERVING) and w.generation != restart.generation for w in after.current
        )
        for effect in self._emitted:
            if isinstance(effect, Steer):
                assert Unsteer(effect.generation) in effects
                continue
            assert isinstance(effect, Spawn | Open | Quiesce | Release)
            worker = before.workers.get(effect.worker)
            if worker is None or effect.worker not in after.workers or worker.phase in LEAVING:
                continue
            if worker.id == _subject(event) and not isinstance(event, Elapsed):
                continue  # it left by itself
            if isinstance(effect, Quiesce | Release):
                assert Open(worker.id) in effects
            elif worker.phase is Phase.SERVING and not others_serve:
                assert after.workers[worker.id].is_expired  # leaves when another serves
            elif isinstance(effect, Open) or Open(worker.id) in self._emitted:
                assert any(isinstance(e, Drain) and e.worker == worker.id for e in effects)
            else:
                assert Terminate(worker.id) in effects
        for worker in after.current:
            if worker.generation == restart.generation:
                assert worker.is_expired
        self._emitted = []

    def _check_numbers(self, after: Service) -> None:
        """Between restarts there are as many workers as wanted, and one more while one is being replaced."""
        restart = after.restart
        is_maintained = restart is None or restart.step in (Step.PREPARING, Step.BAKING)
        if not is_maintained or after.is_stopping or after.generation == 0:
            return
        counted = [w for w in after.current if restart is None or w.id not in restart.new]  # a canary comes on top
        current = {w.id for w in counted}
        relieved = [w.replaces for w in counted if w.replaces in current]
        assert len(relieved) <= 1
        lasting = len(current) - len(relieved)
        assert lasting == after.wanted or (after.is_backing_off and lasting < after.wanted)
        for worker in counted:
            assert worker.phase not in (Phase.QUIESCING, Phase.QUIESCED, Phase.READY)
        expired = [w for w in counted if w.is_expired and w.phase is Phase.SERVING]
        assert not expired or relieved or after.is_backing_off

    def _check_port(self, before: Service, event: Input, after: Service) -> None:
        """No decision of ours but a rebind, only a worker's own failure, leaves the port to nobody."""
        if after.is_stopping or (after.restart and after.restart.step in (Step.RELEASING, Step.REBINDING)):
            return
        serving = [w.id for w in before.workers.values() if w.phase is Phase.SERVING and w.id != _subject(event)]
        if serving:
            assert after.ids(Phase.SERVING, Phase.OPENING)

    def _check_listeners(self, before: Service, event: Input, effects: tuple[Effect, ...]) -> None:
        """Who is told to serve has listeners, or is given them when they are there; a steered restart is one with its
        own sockets."""
        for effect in effects:
            if isinstance(effect, Steer | Unsteer):
                restart = before.restart
                assert restart is not None
                assert restart.strategy is Strategy.OVERLAP
                assert effect.generation == restart.generation
        if isinstance(event, Bound) and event.why == "" and before.regains and not before.is_stopping:
            assert {e.worker for e in effects if isinstance(e, Share)} == set(before.ids(Phase.OPENING, Phase.SERVING))
        if self.is_lost and not self.service.is_stopping and not any(isinstance(e, Bound) for e in self.queue):
            assert self.service.regains


def _subject(event: Input) -> int:
    """The worker that an event is about."""
    match event:
        case Said(worker) | Exited(worker):
            return worker
        case Elapsed(timer):
            return timer.worker
        case _:
            return 0


def news(effects: list[Effect]) -> list[News]:
    """The news among effects."""
    return [e.news for e in effects if isinstance(e, Announce)]
