"""Restarts whose listeners are passed on in other ways than by inheriting them."""

from __future__ import annotations

import pytest

from hotport.model.effects import (
    Announce,
    Drain,
    Effect,
    Kill,
    News,
    Open,
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
    Terminate,
    Unsteer,
)
from hotport.model.inputs import Bound, Clock, Elapsed, Timer
from hotport.model.lifecycle import Event, Phase
from hotport.model.rules import REGAIN_FIRST_S, REGAIN_MAX_S
from hotport.model.steps import Step
from hotport.model.strategies import Strategy
from tests.model.world import World, news

Deed = Spawn | Open | Quiesce | Drain | Terminate | Kill | Release | Rebind | Regain | Share | Steer | Unsteer


def restarting(strategy: Strategy, *, wanted: int = 2, slow: tuple[int, ...] = ()) -> World:
    """A service that has booted and gets as far with a restart as it can without `slow` workers, but not to its end."""
    world = World(wanted).run()
    world.effects.clear()
    world.restart(strategy=strategy)
    return world.run(slow=slow)


def deeds(effects: list[Effect]) -> list[Effect]:
    return [e for e in effects if isinstance(e, Deed)]


def reached(world: World) -> Step | None:
    return world.service.restart.step if world.service.restart else None


def phases(world: World) -> dict[int, Phase]:
    return {w.id: w.phase for w in world.service.workers.values()}


def test_transfer_goes_through_the_same_steps_as_inherit() -> None:
    assert restarting(Strategy.TRANSFER).effects == restarting(Strategy.INHERIT).effects


# -- overlap ------------------------------------------------------------------------------------------------


def test_overlap_steers_at_the_commit_before_old_workers_empty_their_queue() -> None:
    world = restarting(Strategy.OVERLAP)
    assert reached(world) is Step.SETTLING
    spawns, opens = [Spawn(3, 2), Spawn(4, 2)], [Open(3), Open(4)]
    quiesces = [Quiesce(1, empties=True), Quiesce(2, empties=True)]
    assert deeds(world.effects) == [*spawns, *opens, Steer(2), *quiesces]


@pytest.mark.parametrize("slow", [(), (1, 2)])
def test_overlap_that_aborts_after_the_commit_steers_back(slow: tuple[int, ...]) -> None:
    world = restarting(Strategy.OVERLAP, slow=slow)
    world.effects.clear()
    world.die(3)
    world.take()
    assert deeds(world.effects) == [Unsteer(2), Open(1), Open(2), Drain(4)]


@pytest.mark.parametrize("is_ready", [False, True])
def test_overlap_that_aborts_before_the_commit_has_steered_nothing(is_ready: bool) -> None:
    world = restarting(Strategy.OVERLAP, slow=(3, 4))
    if is_ready:
        world.obey(3)
        world.obey(4)
        world.take()
        world.take()
        assert reached(world) is Step.OPENING
    world.effects.clear()
    world.die(3)
    world.take()
    assert deeds(world.effects) == [Drain(4) if is_ready else Terminate(4)]


# -- rebind -------------------------------------------------------------------------------------------------


def test_rebind_closes_nothing_before_every_new_worker_has_started() -> None:
    world = restarting(Strategy.REBIND, slow=(4,))
    assert reached(world) is Step.STARTING
    assert deeds(world.effects) == [Spawn(3, 2), Spawn(4, 2)]


def test_rebind_opens_new_workers_when_the_addresses_are_bound_again() -> None:
    world = restarting(Strategy.REBIND)
    assert reached(world) is Step.SETTLING
    spawns, releases = [Spawn(3, 2), Spawn(4, 2)], [Release(1), Release(2)]
    assert deeds(world.effects) == [*spawns, *releases, Rebind(2), Open(3), Open(4)]
    world.elapse(Clock.SETTLE)
    world.run()
    assert phases(world) == {3: Phase.SERVING, 4: Phase.SERVING}
    assert news(world.effects)[-3:] == [News.DONE, News.WORKER_RETIRED, News.WORKER_RETIRED]


def test_rebind_waits_for_every_old_worker_to_let_go() -> None:
    world = restarting(Strategy.REBIND, slow=(2,))
    assert reached(world) is Step.RELEASING
    assert Rebind(2) not in world.effects
    world.run()
    assert Rebind(2) in world.effects


def test_rebind_aborts_if_an_old_worker_does_not_let_go() -> None:
    world = restarting(Strategy.REBIND, slow=(2,))
    world.effects.clear()
    world.elapse(Clock.QUIESCE)
    world.take()
    assert deeds(world.effects) == [Open(1), Open(2), Terminate(3), Terminate(4)]
    aborted = next(e for e in world.effects if isinstance(e, Announce) and e.news is News.ABORTED)
    assert aborted.why == "worker 2 did not let go of the listeners"


def test_rebind_aborts_while_old_workers_let_go() -> None:
    world = restarting(Strategy.REBIND, slow=(1, 2))
    world.effects.clear()
    world.die(3)
    world.take()
    assert deeds(world.effects) == [Open(1), Open(2), Terminate(4)]


def test_rebind_terminates_an_old_worker_that_only_starts_and_waits_for_its_end() -> None:
    world = World(2).run()
    world.scale(3)
    world.run(slow=(3,))
    world.effects.clear()
    world.restart(strategy=Strategy.REBIND)
    world.run(slow=(3,))
    assert Terminate(3) in world.effects
    assert reached(world) is Step.RELEASING
    world.run()
    assert reached(world) is Step.SETTLING


def test_rebind_waits_for_an_old_worker_that_is_opening_to_open_and_let_go() -> None:
    world = World(1).run()
    world.scale(2)
    world.run(slow=(2,))
    world.obey(2)
    world.take()
    assert phases(world)[2] is Phase.OPENING
    world.restart(strategy=Strategy.REBIND)
    world.run(slow=(2,))
    assert Release(2) not in world.effects
    world.run()
    assert Release(2) in world.effects
    assert reached(world) is Step.SETTLING


def test_new_worker_that_dies_while_addresses_are_bound_leaves_them_to_the_old_ones() -> None:
    world = restarting(Strategy.REBIND, slow=(1, 2))
    world.obey(1)
    world.obey(2)
    world.take()
    world.die(3)
    world.take()
    assert reached(world) is Step.REBINDING
    world.effects.clear()
    world.take()  # its end comes before the answer
    assert deeds(world.effects) == [Open(1), Open(2), Terminate(4)]
    world.run()
    assert world.service.regains == 0


def test_abort_after_a_rebind_gives_old_workers_what_was_bound() -> None:
    world = restarting(Strategy.REBIND)
    world.effects.clear()
    world.die(3)
    world.take()
    assert deeds(world.effects) == [Open(1), Open(2), Drain(4)]


# -- a thief ------------------------------------------------------------------------------------------------


def stolen(*, is_kept: bool = False) -> World:
    """A service one of whose addresses somebody took in a rebind, or kept."""
    world = World(2).run()
    world.is_kept = is_kept
    world.thief = "pid 7 (thief, user eve) is listening on it"
    world.effects.clear()
    world.restart(strategy=Strategy.REBIND)
    return world.run()


def test_restart_in_which_somebody_takes_the_port_aborts_and_names_the_thief() -> None:
    world = stolen()
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}
    aborted = next(e for e in world.effects if isinstance(e, Announce) and e.news is News.ABORTED)
    lost = next(e for e in world.effects if isinstance(e, Announce) and e.news is News.PORT_LOST)
    assert aborted.why == lost.why == "pid 7 (thief, user eve) is listening on it"
    assert world.service.generation == 1


def test_rebind_that_cannot_begin_aborts_and_no_port_is_lost() -> None:
    """It was said that somebody had taken the port, and a moment later that it was ours again."""
    world = stolen(is_kept=True)
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}
    assert News.ABORTED in news(world.effects)
    assert News.PORT_LOST not in news(world.effects)
    assert not world.service.regains
    assert not world.is_lost


def test_port_is_tried_again_with_pauses_that_grow_to_a_bound() -> None:
    world = stolen()
    for _ in range(9):
        world.elapse(Clock.REGAIN)
        world.run()
    pauses = [e.seconds for e in world.effects if isinstance(e, StartTimer) and e.timer.clock is Clock.REGAIN]
    assert pauses == [REGAIN_FIRST_S * 2**n for n in range(6)] + [REGAIN_MAX_S] * 4
    assert news(world.effects).count(News.PORT_LOST) == 1


def test_port_that_is_there_again_is_given_to_whoever_serves() -> None:
    world = stolen()
    world.thief = ""
    world.effects.clear()
    world.elapse(Clock.REGAIN)
    world.run()
    assert deeds(world.effects) == [Regain(), Share(1), Share(2)]
    assert news(world.effects) == [News.PORT_REGAINED]
    assert world.service.regains == 0
    world.restart()
    world.run()
    assert reached(world) is Step.SETTLING


def test_restart_is_refused_while_the_port_is_lost_but_scaling_is_not() -> None:
    world = stolen()
    request = world.restart()
    assert world.take() == (Refuse(request, Refusal.PORT_LOST),)
    world.scale(3)
    world.run()
    assert phases(world) == dict.fromkeys((1, 2, 5), Phase.SERVING)


def test_stopping_service_forgets_the_port_that_it_lost() -> None:
    world = stolen()
    world.stop()
    world.take()
    assert Timer(Clock.REGAIN) not in world.timers
    world.queue.append(Elapsed(Timer(Clock.REGAIN)))
    world.queue.append(Bound("pid 7 has it"))
    world.run()
    assert world.is_finished
    assert Regain() not in world.effects


def test_answer_that_nobody_waits_for_changes_nothing() -> None:
    world = World(1).run()
    before = world.service
    world.queue.append(Bound())
    assert world.take() == ()
    assert world.service == before


def test_worker_says_quiesced_for_what_it_has_released() -> None:
    world = restarting(Strategy.REBIND, slow=(1, 2))
    world.say(1, Event.QUIESCED)
    world.take()
    assert phases(world)[1] is Phase.QUIESCED
