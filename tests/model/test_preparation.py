"""What a generation needs once is done before its workers start, or they do not start."""

from __future__ import annotations

import pytest

from hotport.model.effects import INVERSE, Abandon, Announce, Finish, News, Prepare, Refusal, Refuse, Spawn, StopTimer
from hotport.model.inputs import Clock, Elapsed, Prepared, Timer
from hotport.model.lifecycle import Phase
from hotport.model.rules import NOT_PREPARED
from hotport.model.steps import Step
from hotport.model.strategies import Strategy
from tests.model.test_service import phases, reached, serving
from tests.model.world import World, news


def preparing(wanted: int = 2, **options: object) -> World:
    """A service that prepares generation 2, while generation 1 serves."""
    world = serving(wanted)
    world.restart(is_prepared=True, **options)  # type: ignore[arg-type]
    world.run(slow=(0,))
    assert reached(world) is Step.PREPARING
    assert world.preparing == 2
    return world


def spawned(world: World) -> list[tuple[int, int]]:
    return [(e.worker, e.generation) for e in world.effects if isinstance(e, Spawn)]


def aborted(world: World) -> str:
    """Why the restart was aborted; the old generation serves as before."""
    (told,) = (e for e in world.effects if isinstance(e, Announce) and e.news is News.ABORTED)
    assert world.service.restart is None
    assert world.service.generation == 1
    assert set(phases(world).values()) == {Phase.SERVING}
    assert StopTimer(Timer(Clock.PREPARE)) in world.effects
    return told.why


@pytest.mark.parametrize("options", [{}, {"is_phased": True}, {"canary": 1}, {"strategy": Strategy.REBIND}])
def test_workers_start_when_their_generation_is_prepared_and_it_is_prepared_once(options: dict[str, object]) -> None:
    world = preparing(2, **options)
    assert spawned(world) == []
    assert news(world.effects) == [News.RESTART_BEGAN, News.PREPARING]
    world.run()
    while world.service.restart is not None:
        clock = Clock.BAKE if reached(world) is Step.BAKING else Clock.SETTLE
        world.elapse(clock)
        world.run()
    assert sum(isinstance(e, Prepare) for e in world.effects) == 1
    assert spawned(world) == [(3, 2), (4, 2)]
    told = news(world.effects)
    assert told.count(News.PREPARED) == 1
    assert told.index(News.PREPARED) < told.index(News.READY)
    assert world.service.generation == 2


def test_preparation_that_fails_aborts_the_restart() -> None:
    world = preparing()
    world.prepare("exited with status 1")
    world.run()
    assert aborted(world) == "exited with status 1"
    assert spawned(world) == []


def test_preparation_that_lasts_too_long_is_ended_and_aborts_the_restart() -> None:
    world = preparing()
    world.elapse(Clock.PREPARE)
    world.take()
    assert Abandon(2, NOT_PREPARED) in world.effects
    assert aborted(world) == NOT_PREPARED
    assert INVERSE[Prepare] is Abandon


def test_undo_ends_a_preparation() -> None:
    world = preparing()
    world.undo()
    world.take()
    assert Abandon(2, "somebody asked for it") in world.effects
    assert aborted(world) == "somebody asked for it"


def test_what_an_abandoned_preparation_says_changes_nothing() -> None:
    world = preparing()
    world.undo()
    world.take()
    world.restart(is_prepared=True)
    world.take()
    before = world.service
    for late in (Prepared(2), Prepared(2, "killed by SIGTERM"), Prepared(7), Elapsed(Timer(Clock.SETTLE))):
        world.queue.append(late)
        assert world.take() == ()
    assert world.service == before
    assert world.preparing == 3


def test_lost_workers_are_replaced_by_old_code_during_a_preparation() -> None:
    """Migrations take minutes; a service used to wait for the end of a restart with its replacements."""
    world = preparing()
    world.die(1)
    world.run(slow=(0,))
    assert phases(world) == {2: Phase.SERVING, 3: Phase.SERVING}
    assert spawned(world) == [(3, 1)], "which needs no preparation"
    world.run()
    world.elapse(Clock.SETTLE)
    world.run()
    assert {w.generation for w in world.service.current} == {2}


def test_requests_are_refused_during_a_preparation() -> None:
    world = preparing()
    for request in (world.restart(), world.scale(3)):
        assert world.take() == (Refuse(request, Refusal.IN_PROGRESS, 2),)
    request = world.keep()
    assert world.take() == (Refuse(request, Refusal.NOT_WATCHED, 2),)


def test_stop_ends_a_preparation() -> None:
    world = preparing()
    world.stop()
    world.take()
    assert Abandon(2, "the service is stopping") in world.effects
    assert not world.preparing
    world.run()
    assert world.effects[-1] == Finish()


def test_workers_that_are_lost_or_wanted_later_need_no_preparation() -> None:
    world = World(1, is_prepared=True).run()
    world.scale(2)
    world.run()
    world.die(1)
    world.run()
    assert spawned(world) == [(1, 1), (2, 1), (3, 1)]
    world.crash(forgets_orders=False)
    world.run()
    assert sum(isinstance(e, Prepare) for e in world.effects) == 1


# -- the first generation


def booting() -> World:
    world = World(2, is_prepared=True)
    world.take()
    assert world.preparing == 1
    return world


def test_first_generation_is_prepared_too() -> None:
    world = booting()
    assert world.effects[0] == Prepare(1)
    world.run()
    assert spawned(world) == [(1, 1), (2, 1)]
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}


def test_service_whose_first_generation_cannot_be_prepared_has_failed() -> None:
    world = booting()
    world.prepare("exited with status 1")
    world.take()
    assert world.effects[-1] == Finish(has_failed=True)
    assert spawned(world) == []


def test_service_whose_first_preparation_lasts_too_long_has_failed() -> None:
    world = booting()
    request = world.restart()
    assert world.take() == (Refuse(request, Refusal.STARTING),)
    world.elapse(Clock.PREPARE)
    world.take()
    assert world.effects[-2:] == [Abandon(1, NOT_PREPARED), Finish(has_failed=True)]


def test_stop_ends_the_first_preparation() -> None:
    world = booting()
    world.stop()
    world.take()
    assert Abandon(1, "the service is stopping") in world.effects
    assert world.effects[-1] == Finish()
    assert StopTimer(Timer(Clock.PREPARE)) in world.effects


def test_first_preparation_goes_on_when_the_workers_of_an_older_supervisor_have_left() -> None:
    world = World(1, is_prepared=True).run()
    world.stop()
    world.take()
    world.crash(forgets_orders=False)
    assert world.preparing == 2, "what is left drains, so another generation has to start"
    world.die(1)
    world.take()
    assert not world.is_finished
    world.run()
    assert phases(world) == {2: Phase.SERVING}
