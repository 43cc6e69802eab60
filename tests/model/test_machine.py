"""Anything may happen to a service at any time; `tests.model.world` says what holds all the same."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hotport.model.effects import StartTimer
from hotport.model.inputs import Answered, Clock, Elapsed, Hung, MoreTime, RecycleDue, Timer
from hotport.model.lifecycle import Event, Phase
from hotport.model.strategies import Strategy
from tests.model.world import World
from tests.support import RESTARTS

FACTS = (Event.READY, Event.ACCEPTING, Event.QUIESCED, Event.LEAVING)
COUNTS = st.integers(1, 4)
#: Phased or not, and how the listeners are passed on; a phased one has its choice of two.
KINDS = st.tuples(st.booleans(), st.sampled_from((Strategy.INHERIT, Strategy.TRANSFER))) | st.tuples(
    st.just(False), st.sampled_from((Strategy.OVERLAP, Strategy.REBIND))
)
CANARIES = st.just(0) | st.integers(0, 3)


class Chaos(RuleBasedStateMachine):
    """A service, and a world that does to it what worlds do."""

    @initialize(wanted=COUNTS, is_booted=st.booleans(), is_prepared=st.booleans())
    def boot(self, wanted: int, is_booted: bool, is_prepared: bool) -> None:
        self.world = World(wanted, is_prepared=is_prepared)
        if is_booted:
            self.world.run()

    @property
    def is_over(self) -> bool:
        return self.world.is_finished

    @property
    def steps(self) -> list[Clock]:
        """The timer of the step that a restart is in."""
        clocks = (Clock.PREPARE, Clock.SETTLE, Clock.BAKE, Clock.WATCH)
        return [clock for clock in clocks if Timer(clock) in self.world.timers]

    # workers

    @precondition(lambda self: self.world.processes and not self.is_over)
    @rule(data=st.data())
    def a_worker_does_what_is_expected(self, data: st.DataObject) -> None:
        self.world.obey(data.draw(st.sampled_from(sorted(self.world.processes))))

    @precondition(lambda self: not self.is_over)
    @rule(data=st.data())
    def everybody_but_a_few_does(self, data: st.DataObject) -> None:
        slow = data.draw(st.sets(st.sampled_from([0, *sorted(self.world.processes)]), max_size=2))
        self.world.run(slow=tuple(slow))

    @precondition(lambda self: self.world.processes and not self.is_over)
    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        self.world.die(data.draw(st.sampled_from(sorted(self.world.processes))))

    @precondition(lambda self: self.world.processes and not self.is_over)
    @rule(data=st.data(), event=st.sampled_from(FACTS))
    def a_worker_says_what_it_likes(self, data: st.DataObject, event: Event) -> None:
        self.world.say(data.draw(st.sampled_from(sorted(self.world.processes))), event)

    @precondition(lambda self: not self.is_over)
    @rule(worker=st.integers(0, 9), event=st.sampled_from(FACTS))
    def somebody_says_what_he_likes(self, worker: int, event: Event) -> None:
        self.world.say(worker, event)

    @precondition(lambda self: self.world.processes and not self.is_over)
    @rule(data=st.data())
    def a_worker_expires(self, data: st.DataObject) -> None:
        self.world.queue.append(RecycleDue(data.draw(st.sampled_from(sorted(self.world.processes)))))

    @precondition(lambda self: self.world.processes and not self.is_over)
    @rule(data=st.data())
    def a_worker_hangs(self, data: st.DataObject) -> None:
        self.world.queue.append(Hung(data.draw(st.sampled_from(sorted(self.world.processes))), 60.0))

    @precondition(lambda self: self.world.processes and not self.is_over)
    @rule(data=st.data())
    def a_worker_answers_again(self, data: st.DataObject) -> None:
        self.world.queue.append(Answered(data.draw(st.sampled_from(sorted(self.world.processes)))))

    @precondition(lambda self: not self.is_over)
    @rule(worker=st.integers(1, 9), seconds=st.floats(0, 100))
    def somebody_wants_more_time(self, worker: int, seconds: float) -> None:
        self.world.queue.append(MoreTime(worker, seconds))

    @precondition(lambda self: not self.is_over)
    @rule()
    def everybody_does(self) -> None:
        self.world.run()

    # the supervisor

    @precondition(lambda self: not self.is_over)
    @rule(forgets_orders=st.booleans())
    def the_supervisor_is_replaced(self, forgets_orders: bool) -> None:
        self.world.crash(forgets_orders=forgets_orders)

    @precondition(lambda self: not self.is_over)
    @rule(forgets_orders=st.booleans())
    def the_supervisor_is_replaced_and_everybody_obeys_the_next(self, forgets_orders: bool) -> None:
        self.world.crash(forgets_orders=forgets_orders)
        self.world.run()
        if self.world.service.generation and not self.is_over:
            assert self.world.service.ids(Phase.SERVING, Phase.OPENING)

    # people

    @precondition(lambda self: not self.is_over)
    @rule(kind=KINDS, wanted=st.none() | COUNTS, canary=CANARIES, is_watched=st.booleans(), is_prepared=st.booleans())
    def somebody_restarts(
        self, kind: tuple[bool, Strategy], wanted: int | None, canary: int, is_watched: bool, is_prepared: bool
    ) -> None:
        is_phased, strategy = kind
        self.world.restart(
            is_phased=is_phased,
            wanted=wanted,
            strategy=strategy,
            canary=canary,
            is_watched=is_watched,
            is_prepared=is_prepared,
        )

    @precondition(lambda self: self.world.preparing and not self.is_over)
    @rule(why=st.sampled_from(("", "exited with status 1")))
    def a_preparation_ends(self, why: str) -> None:
        self.world.prepare(why)

    @precondition(lambda self: not self.is_over)
    @rule(kind=KINDS, wanted=st.none() | COUNTS, canary=CANARIES, is_watched=st.booleans())
    def a_restart_gets_as_far_as_it_can(
        self, kind: tuple[bool, Strategy], wanted: int | None, canary: int, is_watched: bool
    ) -> None:
        self.world.restart(is_phased=kind[0], wanted=wanted, strategy=kind[1], canary=canary, is_watched=is_watched)
        self.world.run()

    @precondition(lambda self: not self.is_over)
    @rule()
    def somebody_wants_the_old_code_back(self) -> None:
        self.world.undo()

    @precondition(lambda self: not self.is_over)
    @rule()
    def somebody_is_satisfied(self) -> None:
        self.world.keep()

    @precondition(lambda self: not self.is_over)
    @rule()
    def the_new_code_is_not_well(self) -> None:
        self.world.find_unhealthy()

    @precondition(lambda self: not self.is_over)
    @rule(wanted=COUNTS)
    def somebody_scales(self, wanted: int) -> None:
        self.world.scale(wanted)

    @precondition(lambda self: not self.is_over)
    @rule(dice=st.integers(0, 20), now=st.booleans())
    def somebody_stops(self, dice: int, now: bool) -> None:
        if dice == 20:  # seldom, or there would be little else
            self.world.stop(now=now)

    @precondition(lambda self: not self.is_over)
    @rule(dice=st.integers(0, 10), now=st.booleans())
    def somebody_stops_later(self, dice: int, now: bool) -> None:
        if dice == 10:
            self.world.stop(now=now, lame_duck_s=10.0)

    @precondition(lambda self: not self.is_over)
    @rule(is_there=st.booleans())
    def a_thief_comes_or_goes(self, is_there: bool) -> None:
        self.world.thief = "pid 4 has it" if is_there else ""

    # time

    @precondition(lambda self: self.world.queue and not self.is_over)
    @rule()
    def the_next_input_is_taken(self) -> None:
        self.world.take()

    @precondition(lambda self: self.world.timers and not self.is_over)
    @rule(data=st.data())
    def a_timer_ends(self, data: st.DataObject) -> None:
        timer = data.draw(st.sampled_from(sorted(self.world.timers, key=str)))
        self.world.elapse(timer.clock, timer.worker)

    @precondition(lambda self: not self.is_over and self.steps)
    @rule()
    def a_restart_comes_a_step_further(self) -> None:
        self.world.elapse(self.steps[0])
        self.world.run()

    @precondition(lambda self: not self.is_over)
    @rule(data=st.data())
    def a_timer_of_long_ago_ends(self, data: st.DataObject) -> None:
        started = sorted({e.timer for e in self.world.effects if isinstance(e, StartTimer)}, key=str)
        if started:
            self.world.queue.append(Elapsed(data.draw(st.sampled_from(started))))

    @precondition(lambda self: self.is_over)
    @rule()
    def nothing_more_happens(self) -> None:
        pass

    def teardown(self) -> None:
        """Whatever happened: a stop ends, when the timers and the kernel do their work."""
        if not hasattr(self, "world"):
            return
        world = self.world
        if not world.service.is_lame_duck:
            world.stop(lame_duck_s=10.0)
        world.stop()
        for _ in range(10):
            while world.queue and not world.is_finished:
                world.take()
            for worker, process in list(world.processes.items()):
                if process.was_killed:
                    world.die(worker)
            for timer in [t for t in world.timers if t.clock in (Clock.DRAIN, Clock.KILL)]:
                world.elapse(timer.clock, timer.worker)
        assert world.is_finished


TestChaos = Chaos.TestCase
TestChaos.settings = settings(max_examples=40 * RESTARTS, stateful_step_count=60, deadline=None)
