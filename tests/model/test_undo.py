"""Taking a restart back after its commit: the undo window, the canary, and what may happen in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hotport.model.effects import Accept, Announce, Drain, News, Open, Quiesce, Refusal, Refuse, Spawn, Terminate
from hotport.model.inputs import Clock, Elapsed, Hung, RecycleDue, Timer, Unhealthy
from hotport.model.lifecycle import Event, Phase
from hotport.model.steps import Step
from tests.model.test_service import orders, phases, reached, serving
from tests.model.world import World, news


def watching(wanted: int = 2) -> World:
    """Generation 2 serves, generation 1 stays for an undo."""
    world = serving(wanted)
    world.restart(is_watched=True)
    world.run().elapse(Clock.SETTLE)
    world.run().effects.clear()
    assert reached(world) is Step.WATCHING
    return world


def baking(wanted: int = 2, canary: int = 1, *, is_watched: bool = False) -> World:
    """A canary of generation 2 serves beside all of generation 1."""
    world = serving(wanted)
    world.restart(canary=canary, is_watched=is_watched)
    world.run().effects.clear()
    assert reached(world) is Step.BAKING
    return world


def why(world: World, event: News) -> str:
    return next(e.why for e in world.effects if isinstance(e, Announce) and e.news is event)


# -- the undo window ----------------------------------------------------------------------------------------


def test_old_workers_stay_quiesced_until_the_window_ends_and_then_drain() -> None:
    world = watching()
    assert phases(world) == {1: Phase.QUIESCED, 2: Phase.QUIESCED, 3: Phase.SERVING, 4: Phase.SERVING}
    assert world.service.generation == 1
    world.elapse(Clock.WATCH)
    world.run()
    assert orders(world.effects) == [Drain(1), Drain(2)]
    assert News.DONE in news(world.effects)
    assert world.service.generation == 2


def test_undo_lets_the_old_ones_accept_and_only_then_the_new_ones_go() -> None:
    world = watching()
    request = world.undo()
    world.run(slow=(2,))
    assert Accept(request, 2) in world.effects
    assert orders(world.effects) == [Open(1), Open(2)]
    assert reached(world) is Step.UNDOING
    world.run()
    assert orders(world.effects) == [Open(1), Open(2), Drain(3), Drain(4)]
    assert news(world.effects)[:2] == [News.UNDOING, News.UNDONE]
    assert why(world, News.UNDONE) == "somebody asked for it"
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}
    assert world.service.generation == 1


@pytest.mark.parametrize("is_exit", [True, False])
def test_loss_of_a_new_worker_in_the_window_undoes_the_restart(is_exit: bool) -> None:
    world = watching()
    world.die(3) if is_exit else world.say(3, Event.LEAVING)
    world.run()
    assert [e for e in orders(world.effects) if isinstance(e, Open | Drain)] == [Open(1), Open(2), Drain(4)]
    assert News.UNDONE in news(world.effects)
    assert world.service.failures == 0  # it was not of the code that serves


def test_new_workers_that_are_not_well_are_taken_back() -> None:
    world = watching()
    world.find_unhealthy("worker 4 answered GET / with 500", 4)
    world.run()
    assert Announce(News.UNDOING, 2, 4, "worker 4 answered GET / with 500", (3, 4)) in world.effects
    assert why(world, News.UNDONE) == "worker 4 answered GET / with 500"


def test_verdict_about_another_restart_changes_nothing() -> None:
    for world in (serving(2), watching()):
        before = world.service
        world.queue.append(Unhealthy(7, "it was not well"))
        world.run()
        assert world.service == before


def test_verdict_that_comes_before_the_window_changes_nothing() -> None:
    world = serving(2)
    world.restart(is_watched=True)
    world.run().find_unhealthy()
    assert reached(world.run()) is Step.SETTLING


def test_second_undo_is_accepted_and_changes_nothing() -> None:
    world = watching()
    world.undo()
    world.run(slow=(1, 2))
    again = world.undo()
    world.run(slow=(1, 2))
    assert world.effects[-1] == Accept(again, 2)


def test_new_worker_that_dies_while_it_is_taken_back_is_no_news() -> None:
    world = watching()
    world.undo()
    world.run(slow=(1, 2))
    world.die(3)
    world.run()
    assert news(world.effects).count(News.UNDOING) == 1
    assert orders(world.effects) == [Open(1), Open(2), Drain(4)]


def test_old_worker_that_cannot_accept_again_is_replaced_and_the_others_serve() -> None:
    world = watching()
    world.undo()
    world.run(slow=(1,))
    world.elapse(Clock.OPEN, 1)
    world.run(slow=(1,))
    assert News.UNDONE in news(world.effects)
    assert Spawn(5, 1) in world.effects
    assert Drain(3) in world.effects


def test_new_ones_serve_on_until_old_code_does_if_every_old_worker_fails_to_accept_again() -> None:
    world = watching(1)
    world.undo()
    world.run(slow=(1,))
    world.die(1)
    world.run(slow=(3,))
    assert News.UNDONE in news(world.effects)
    assert phases(world) == {2: Phase.SERVING, 3: Phase.STARTING}
    world.run()
    assert phases(world) == {3: Phase.SERVING}
    assert world.service.workers[3].generation == 1


def test_old_worker_that_becomes_ready_while_the_restart_is_undone_is_opened() -> None:
    world = serving(2)
    world.die(1)
    world.run(slow=(3,))  # its replacement is slow
    world.restart(is_watched=True)
    world.run(slow=(3,))
    world.elapse(Clock.SETTLE)
    world.run(slow=(3,))
    world.undo()
    world.run(slow=(2, 3))
    assert reached(world) is Step.UNDOING
    world.run(slow=(2,))
    assert phases(world)[3] is Phase.SERVING
    world.run()
    assert phases(world) == {2: Phase.SERVING, 3: Phase.SERVING}


def test_window_ends_when_nobody_is_left_to_be_taken_back() -> None:
    world = watching()
    world.die(1)
    world.run()
    assert reached(world) is Step.WATCHING
    world.die(2)
    world.run()
    assert News.DONE in news(world.effects)
    assert Timer(Clock.WATCH) not in world.timers


def test_undo_before_the_commit_aborts() -> None:
    world = serving(1)
    world.restart()
    world.run(slow=(2,)).undo()
    world.run(slow=(2,))
    assert why(world, News.ABORTED) == "somebody asked for it"
    assert Terminate(2) in world.effects


def test_undo_while_old_workers_quiesce_takes_them_back() -> None:
    world = serving(1)
    world.restart()
    world.run(slow=(1,))
    assert reached(world) is Step.QUIESCING
    world.undo()
    world.run()
    assert [e for e in orders(world.effects) if isinstance(e, Quiesce | Drain)] == [Quiesce(1), Drain(2)]
    assert News.UNDONE in news(world.effects)
    assert phases(world) == {1: Phase.SERVING}


def test_undo_and_keep_without_a_restart_are_refused() -> None:
    world = serving(1)
    assert [world.undo(), world.keep()] == [1, 2]
    world.run()
    assert world.effects == [Refuse(1, Refusal.NOTHING_TO_UNDO), Refuse(2, Refusal.NOT_WATCHED)]


def test_undo_and_keep_are_refused_while_the_service_stops() -> None:
    world = watching()
    world.stop()
    world.undo()
    world.keep()
    world.run(slow=(1, 2, 3, 4))
    assert [e for e in world.effects if isinstance(e, Refuse)] == [
        Refuse(2, Refusal.STOPPING),
        Refuse(3, Refusal.STOPPING),
    ]
    assert News.ABORTED in news(world.effects)
    world.run()
    assert world.is_finished


def test_keep_ends_the_window_at_once() -> None:
    world = watching()
    request = world.keep()
    world.run()
    assert Accept(request, 2) in world.effects
    assert News.DONE in news(world.effects)


def test_other_requests_are_refused_in_the_window_with_the_restart_that_is_watched() -> None:
    world = watching()
    world.scale(5)
    world.restart()
    world.run()
    assert world.effects == [Refuse(2, Refusal.WATCHED, 2), Refuse(3, Refusal.WATCHED, 2)]


def test_timers_of_another_step_end_nothing() -> None:
    for world, clock in ((watching(), Clock.BAKE), (baking(), Clock.WATCH)):
        before = world.service
        world.queue.append(Elapsed(Timer(clock)))
        world.run()
        assert world.service == before


def test_each_worker_of_a_phased_restart_has_a_window_of_its_own() -> None:
    world = serving(2)
    world.restart(is_phased=True, is_watched=True)
    for _ in range(2):
        world.run().elapse(Clock.SETTLE)
        world.run()
        assert reached(world) is Step.WATCHING
        world.elapse(Clock.WATCH)
    world.run()
    assert News.DONE in news(world.effects)


# -- the canary ---------------------------------------------------------------------------------------------


def test_canary_serves_beside_every_old_worker() -> None:
    world = baking()
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING, 3: Phase.SERVING}


def test_rest_follows_when_the_bake_is_over_and_the_canary_belongs_to_it() -> None:
    world = baking(3, is_watched=True)
    world.elapse(Clock.BAKE)
    world.run()
    assert orders(world.effects) == [
        *(Spawn(5, 2), Spawn(6, 2), Open(5), Open(6)),
        *(Quiesce(1), Quiesce(2), Quiesce(3)),
    ]
    world.elapse(Clock.SETTLE)
    world.run()
    assert reached(world) is Step.WATCHING
    world.undo()
    world.run()
    assert orders(world.effects)[-3:] == [Drain(4), Drain(5), Drain(6)]


def test_canary_of_all_workers_needs_no_others() -> None:
    world = baking(2, canary=5)
    assert len(world.service.workers) == 4
    world.keep()
    world.run()
    assert orders(world.effects) == [Quiesce(1), Quiesce(2)]


@pytest.mark.parametrize("what", ["undo", "find_unhealthy", "die"])
def test_canary_that_is_taken_back_leaves_the_old_ones_as_they_were(what: str) -> None:
    world = baking()
    getattr(world, what)(*((3,) if what == "die" else ()))
    world.run()
    assert orders(world.effects) == ([] if what == "die" else [Drain(3)])
    assert News.UNDONE in news(world.effects)
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}


def test_rest_that_fails_to_start_takes_the_canary_along() -> None:
    world = baking()
    world.elapse(Clock.BAKE)
    world.run(slow=(4,))
    world.die(4)
    world.run()
    assert News.ABORTED in news(world.effects)
    assert Drain(3) in world.effects
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}


@pytest.mark.parametrize("make", [watching, baking])
def test_new_worker_that_hangs_while_it_is_watched_undoes_the_restart(make: Callable[[], World]) -> None:
    world = make()
    world.queue.append(Hung(3, 60.0))
    world.run(slow=(3,))
    assert why(world, News.UNDONE) == "worker 3 has not answered for 60 s"
    assert phases(world).items() >= {1: Phase.SERVING, 2: Phase.SERVING}.items()


def test_old_worker_that_hangs_in_the_undo_window_is_not_replaced_in_it() -> None:
    world = watching()
    world.queue.append(Hung(1, 60.0))
    world.run()
    assert orders(world.effects) == []


def test_old_workers_are_looked_after_while_a_canary_bakes() -> None:
    world = baking()
    world.die(1)
    world.queue.append(RecycleDue(2))
    world.run()
    assert [e for e in orders(world.effects) if isinstance(e, Spawn)] == [Spawn(4, 1), Spawn(5, 1)]
    assert phases(world) == {3: Phase.SERVING, 4: Phase.SERVING, 5: Phase.SERVING}
    assert reached(world) is Step.BAKING
