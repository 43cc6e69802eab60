"""A lame duck serves on, says that it is leaving, and stops when its time is over."""

from __future__ import annotations

import pytest

from hotport.model.effects import (
    Announce,
    CloseListeners,
    Drain,
    Finish,
    News,
    Quiesce,
    Refusal,
    Refuse,
    Spawn,
    StartTimer,
    StopTimer,
    Terminate,
)
from hotport.model.inputs import Clock, Timer
from hotport.model.lifecycle import Phase
from hotport.model.service import Stage
from tests.model.world import World, news

TIMER = Timer(Clock.LAME_DUCK)


def lame_duck(wanted: int = 1) -> World:
    """A service that has become a lame duck, and what followed from that."""
    world = World(wanted).run()
    world.effects.clear()
    world.stop(lame_duck_s=10.0)
    return world.run()


def test_nothing_is_done_to_workers_while_the_time_runs() -> None:
    world = lame_duck(2)
    assert world.effects == [Announce(News.LAME_DUCK, why="10 s"), StartTimer(TIMER, 10.0)]
    assert world.service.stage is Stage.LAME_DUCK
    assert world.service.ids(Phase.SERVING) == (1, 2)


def test_it_drains_like_any_other_when_the_time_is_over() -> None:
    world = lame_duck(2)
    world.effects.clear()
    world.elapse(Clock.LAME_DUCK)
    world.run()
    assert [e for e in world.effects if isinstance(e, Drain)] == [Drain(1, is_last=True), Drain(2, is_last=True)]
    assert CloseListeners() in world.effects
    assert world.service.stage is Stage.STOPPING
    assert world.effects[-1] == Finish()


@pytest.mark.parametrize("lame_duck_s", [0.0, 10.0])
def test_a_second_stop_ends_the_time_and_a_third_the_draining(lame_duck_s: float) -> None:
    world = lame_duck()
    world.effects.clear()
    world.stop(lame_duck_s=lame_duck_s)
    world.take()
    assert StopTimer(TIMER) in world.effects
    assert Drain(1, is_last=True) in world.effects
    assert Terminate(1, is_hurried=True) not in world.effects
    world.stop(lame_duck_s=lame_duck_s)
    world.take()
    assert Terminate(1, is_hurried=True) in world.effects


def test_a_stop_now_waits_for_nothing() -> None:
    world = lame_duck()
    world.stop(now=True)
    world.run()
    assert Terminate(1, is_hurried=True) in world.effects
    assert world.effects[-1] == Finish()


def test_now_is_stronger_than_a_time_in_one_request() -> None:
    world = World(1).run()
    world.stop(now=True, lame_duck_s=10.0)
    world.run()
    assert News.LAME_DUCK not in news(world.effects)
    assert Terminate(1, is_hurried=True) in world.effects


def test_a_service_that_has_never_served_stops_at_once() -> None:
    world = World(1)
    world.take()
    world.stop(lame_duck_s=10.0)
    world.run()
    assert News.LAME_DUCK not in news(world.effects)
    assert Terminate(1) in world.effects
    assert world.effects[-1] == Finish(has_failed=False)


def test_restarts_and_scaling_are_refused() -> None:
    world = lame_duck()
    request = world.restart()
    assert world.take() == (Refuse(request, Refusal.LAME_DUCK),)
    request = world.scale(2)
    assert world.take() == (Refuse(request, Refusal.LAME_DUCK),)


def test_a_worker_that_is_lost_is_replaced() -> None:
    world = lame_duck(2)
    world.die(1)
    world.run()
    assert Spawn(3, 1) in world.effects
    assert world.service.ids(Phase.SERVING) == (2, 3)
    assert world.service.stage is Stage.LAME_DUCK


def test_a_restart_that_has_begun_goes_on() -> None:
    world = World(1).run()
    world.restart()
    world.run(slow=(2,))
    world.stop(lame_duck_s=10.0)
    world.run()
    assert Quiesce(1) in world.effects
    world.elapse(Clock.SETTLE)
    world.run()
    assert News.DONE in news(world.effects)
    assert world.service.generation == 2
    assert world.service.stage is Stage.LAME_DUCK


def test_a_restart_that_has_not_ended_with_the_time_is_given_up() -> None:
    world = World(1).run()
    world.restart()
    world.run(slow=(2,))
    world.stop(lame_duck_s=10.0)
    world.take()
    world.elapse(Clock.LAME_DUCK)
    world.run()
    assert news(world.effects)[-3:].count(News.ABORTED) == 1
    assert world.effects[-1] == Finish()


def test_the_stage_is_ready_through_a_whole_restart() -> None:
    world = World(2)
    assert world.service.stage is Stage.STARTING
    world.run()
    stages = set()
    world.restart()
    while world.queue or any(world.obey(worker) for worker in list(world.processes)):
        world.take()
        stages.add(world.service.stage)
    world.elapse(Clock.SETTLE)
    while world.queue or any(world.obey(worker) for worker in list(world.processes)):
        world.take()
        stages.add(world.service.stage)
    assert world.service.generation == 2
    assert stages == {Stage.READY}


def test_a_service_without_workers_is_not_ready() -> None:
    world = World(1).run()
    world.die(1)
    world.take()
    unserved = world.service.stage
    world.run()
    assert (unserved, world.service.stage) == (Stage.UNSERVED, Stage.READY)
