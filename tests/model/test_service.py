from __future__ import annotations

import pytest

from hotport.model.effects import (
    INVERSE,
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
    Release,
    Spawn,
    StartTimer,
    Steer,
    Terminate,
    Unsteer,
)
from hotport.model.inputs import Answered, Clock, Elapsed, Exited, Hung, MoreTime, RecycleDue, Timer
from hotport.model.lifecycle import Event, Phase
from hotport.model.rules import BACKOFF_MAX_S, GENERATIONS_DRAINING_MAX
from hotport.model.steps import Step
from hotport.model.strategies import Strategy
from tests.model.world import World, news

Order = Spawn | Open | Quiesce | Drain | Terminate | Kill


def serving(wanted: int) -> World:
    """A service that has booted: generation 1 serves, workers 1 to `wanted`."""
    world = World(wanted).run()
    world.effects.clear()
    return world


def settling(
    wanted: int, *, is_phased: bool = False, strategy: Strategy = Strategy.INHERIT, is_prepared: bool = False
) -> World:
    """A service in whose restart everything but the end of the settle timer has happened."""
    world = serving(wanted)
    world.restart(is_phased=is_phased, strategy=strategy, is_prepared=is_prepared)
    return world.run()


def orders(effects: list[Effect]) -> list[Order]:
    """What was done to workers, in order."""
    return [e for e in effects if isinstance(e, Order)]


def phases(world: World) -> dict[int, Phase]:
    return {w.id: w.phase for w in world.service.workers.values()}


def reached(world: World) -> Step | None:
    return world.service.restart.step if world.service.restart else None


def backoffs(world: World) -> list[float | None]:
    return [e.seconds for e in world.effects if isinstance(e, StartTimer) and e.timer.clock is Clock.BACKOFF]


# -- boot ---------------------------------------------------------------------------------------------------


def test_boot_starts_every_worker_and_each_accepts_as_soon_as_it_is_ready() -> None:
    world = World(2).run()
    assert orders(world.effects) == [Spawn(1, 1), Spawn(2, 1), Open(1), Open(2)]
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING}
    assert news(world.effects) == [News.STARTED]


def test_boot_in_which_some_workers_fail_goes_on_and_replaces_them() -> None:
    world = World(2)
    world.take()
    world.die(1)
    world.run()
    assert phases(world) == {2: Phase.SERVING, 3: Phase.SERVING}


def test_boot_in_which_every_worker_fails_has_failed() -> None:
    world = World(2)
    world.take()
    world.die(1)
    world.die(2)
    world.run()
    assert world.effects[-1] == Finish(has_failed=True)
    assert News.STARTED not in news(world.effects)


def test_worker_that_never_says_ready_is_terminated_then_killed() -> None:
    world = World(1)
    world.take()
    world.elapse(Clock.READY, 1)
    world.take()
    world.elapse(Clock.KILL, 1)
    world.run()
    assert orders(world.effects) == [Spawn(1, 1), Terminate(1), Kill(1)]
    assert world.effects[-1] == Finish(has_failed=True)


def test_worker_that_wants_more_time_gets_it_while_it_starts_or_drains() -> None:
    world = World(1)
    world.take()
    world.queue.append(MoreTime(1, 90.0))
    assert world.take() == (ExtendTimer(Timer(Clock.READY, 1), 90.0),)
    world.queue.append(MoreTime(1, 1e14))
    assert world.take() == (ExtendTimer(Timer(Clock.READY, 1), 3600.0),)
    world.run()
    world.queue.append(MoreTime(1, 90.0))
    assert world.take() == ()
    world.stop()
    world.take()
    world.queue.append(MoreTime(1, 90.0))
    assert world.take() == (ExtendTimer(Timer(Clock.DRAIN, 1), 90.0),)


def test_requests_are_refused_while_nobody_serves_yet() -> None:
    world = World(1)
    world.take()
    first, second = world.restart(), world.scale(2)
    assert world.take() == (Refuse(first, Refusal.STARTING),)
    assert world.take() == (Refuse(second, Refusal.STARTING),)


# -- restart ------------------------------------------------------------------------------------------------


def test_restart_drains_old_workers_only_after_new_ones_accept_and_have_settled() -> None:
    world = settling(2)
    assert orders(world.effects) == [Spawn(3, 2), Spawn(4, 2), Open(3), Open(4), Quiesce(1), Quiesce(2)]
    world.elapse(Clock.SETTLE)
    world.run()
    assert orders(world.effects)[6:] == [Drain(1), Drain(2)]
    assert phases(world) == {3: Phase.SERVING, 4: Phase.SERVING}
    assert world.service.generation == 2
    assert [n for n in news(world.effects) if n is not News.WORKER_RETIRED] == [
        News.RESTART_BEGAN,
        News.READY,
        News.COMMITTED,
        News.QUIESCED,
        News.DRAINING,
        News.DONE,
    ]


def test_old_workers_are_not_quiesced_while_one_new_worker_has_not_acknowledged() -> None:
    world = serving(1)
    world.restart(wanted=2)
    world.take()
    world.obey(2)
    world.obey(3)
    world.take()
    world.take()
    world.run(slow=(3,))
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING, 3: Phase.OPENING}
    assert orders(world.effects) == [Spawn(2, 2), Spawn(3, 2), Open(2), Open(3)]


def test_second_request_is_refused_with_the_number_of_the_restart_in_progress() -> None:
    world = serving(1)
    first, second, third = world.restart(), world.restart(), world.scale(2)
    assert world.take()[0] == Accept(first, 2)
    assert world.take() == (Refuse(second, Refusal.IN_PROGRESS, 2),)
    assert world.take() == (Refuse(third, Refusal.IN_PROGRESS, 2),)


def test_restart_may_change_how_many_workers_are_wanted() -> None:
    world = serving(1)
    world.restart(wanted=3)
    world.run()
    world.elapse(Clock.SETTLE)
    world.run()
    assert list(phases(world)) == [2, 3, 4]
    assert world.service.wanted == 3


def test_old_worker_that_never_acknowledges_to_have_quiesced_is_drained_all_the_same() -> None:
    world = serving(1)
    world.restart()
    world.run(slow=(1,))
    assert phases(world)[1] is Phase.QUIESCING
    world.elapse(Clock.QUIESCE)
    world.run(slow=(1,))
    assert Announce(News.QUIESCED, generation=2, why="no answer from worker 1") in world.effects
    world.elapse(Clock.SETTLE)
    world.run(slow=(1,))
    assert orders(world.effects)[-1] == Drain(1)
    world.elapse(Clock.DRAIN, 1)
    world.run(slow=(1,))
    world.elapse(Clock.KILL, 1)
    world.run(slow=(1,))
    assert orders(world.effects)[-2:] == [Terminate(1), Kill(1)]


def test_old_worker_that_acknowledges_after_it_was_told_to_drain_has_all_its_time_from_then_on() -> None:
    world = serving(1)
    world.restart()
    world.run(slow=(1,))
    world.elapse(Clock.QUIESCE)
    world.take()
    world.elapse(Clock.SETTLE)
    world.take()
    world.effects.clear()
    world.say(1, Event.QUIESCED)
    world.take()
    assert world.effects == [StartTimer(Timer(Clock.DRAIN, 1))]
    assert phases(world)[1] is Phase.DRAINING


def test_old_worker_lost_before_the_commit_does_not_stop_the_restart() -> None:
    world = serving(2)
    world.restart()
    world.take()
    world.die(1)
    world.run()
    world.elapse(Clock.SETTLE)
    world.run()
    assert list(phases(world)) == [3, 4]


def test_restart_mends_a_service_in_which_everything_is_crash_looping() -> None:
    world = serving(2)
    world.die(1)
    world.die(2)
    world.take()
    world.take()
    world.die(3)
    world.take()
    assert world.service.is_backing_off
    world.restart()
    world.run()
    world.elapse(Clock.SETTLE)
    world.run()
    assert phases(world) == {4: Phase.SERVING, 5: Phase.SERVING}
    assert (world.service.failures, world.service.is_backing_off) == (0, False)
    assert Timer(Clock.BACKOFF) not in world.timers


def test_restart_is_refused_while_too_many_old_generations_still_drain() -> None:
    world = serving(1)
    for _ in range(GENERATIONS_DRAINING_MAX):
        newest = world.service.spawned
        world.restart()
        world.run(slow=tuple(i for i in world.processes if i < newest))
        world.elapse(Clock.SETTLE)
        world.take()
    assert world.service.draining_generations == GENERATIONS_DRAINING_MAX
    request = world.restart()
    assert world.take() == (Refuse(request, Refusal.TOO_MANY_DRAINING),)
    scale = world.scale(2)
    assert world.take()[0] == Accept(scale, GENERATIONS_DRAINING_MAX + 1)


# -- abort --------------------------------------------------------------------------------------------------


def test_every_effect_before_the_point_of_no_return_has_an_inverse() -> None:
    done = [effect for strategy in Strategy for effect in settling(2, strategy=strategy, is_prepared=True).effects]
    changing = {type(effect) for effect in done if isinstance(effect, Order | Prepare | Release | Rebind | Steer)}
    assert set(INVERSE) == changing == {Prepare, Spawn, Open, Quiesce, Release, Rebind, Steer}
    assert set(INVERSE.values()) == {Abandon, Terminate, Drain, Open, Unsteer}


def test_abort_while_new_workers_start_terminates_them() -> None:
    world = serving(2)
    world.restart()
    world.take()
    world.die(3, "exited with status 3")
    world.effects.clear()
    world.take()
    assert orders(world.effects) == [Terminate(4)]
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING, 4: Phase.STOPPING}
    aborted = next(e for e in world.effects if isinstance(e, Announce) and e.news is News.ABORTED)
    assert (aborted.worker, aborted.why) == (3, "worker 3 exited with status 3")
    assert (aborted.generation, aborted.workers) == (2, (3, 4))


def test_abort_while_new_workers_open_drains_them() -> None:
    world = serving(2)
    world.restart()
    world.take()
    world.obey(3)
    world.obey(4)
    world.take()
    world.take()
    assert phases(world)[3] is phases(world)[4] is Phase.OPENING
    world.elapse(Clock.OPEN, 3)
    world.effects.clear()
    world.take()
    assert orders(world.effects) == [Drain(3), Drain(4)]
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING, 3: Phase.DRAINING, 4: Phase.DRAINING}


@pytest.mark.parametrize("slow", [(1, 2), (2,), ()])
@pytest.mark.parametrize("leaves", [False, True])
def test_abort_after_the_commit_opens_old_workers_before_it_drains_new_ones(
    slow: tuple[int, ...], leaves: bool
) -> None:
    world = serving(2)
    world.restart()
    world.run(slow=slow)
    assert reached(world) is (Step.QUIESCING if slow else Step.SETTLING)
    world.effects.clear()
    if leaves:
        world.say(3, Event.LEAVING)
    else:
        world.die(3)
    world.take()
    assert orders(world.effects) == [Open(1), Open(2), Drain(4)]
    world.run()
    assert phases(world).items() >= {1: Phase.SERVING, 2: Phase.SERVING}.items()
    assert 4 not in phases(world)
    assert world.service.generation == 1


def test_old_worker_that_has_left_by_itself_is_not_taken_back() -> None:
    world = settling(2)
    world.say(1, Event.LEAVING)
    world.take()
    world.effects.clear()
    world.die(3)
    world.take()
    assert orders(world.effects) == [Open(2), Drain(4), Spawn(5, 1)]


def test_aborted_restart_does_not_change_how_many_workers_are_wanted() -> None:
    world = serving(1)
    world.restart(wanted=4)
    world.take()
    world.die(2)
    world.run()
    assert phases(world) == {1: Phase.SERVING}


def test_worker_lost_after_an_abort_is_replaced_by_the_code_that_serves() -> None:
    """Seen by clients: after a restart that had been taken back, answers of the code that had failed."""
    world = settling(1)
    world.die(2)
    world.run()
    world.die(1)
    world.run()
    assert Spawn(3, 1) in world.effects


def test_generation_number_of_an_aborted_restart_is_not_used_again() -> None:
    world = serving(1)
    world.restart()
    world.take()
    world.die(2)
    world.run()
    request = world.restart()
    assert world.take()[0] == Accept(request, 3)


def test_old_worker_that_is_still_starting_at_the_commit_is_not_lost_by_an_abort() -> None:
    """It used to be terminated at the commit, which nothing takes back."""
    world = World(2)
    world.run(slow=(2,))
    world.restart()
    world.run(slow=(2,))
    assert phases(world)[2] is Phase.STARTING
    world.obey(2)
    world.take()
    assert phases(world)[2] is Phase.READY
    world.effects.clear()
    world.die(3)
    world.take()
    assert orders(world.effects) == [Open(1), Open(2), Drain(4)]


def test_old_worker_that_is_being_opened_at_the_commit_is_quiesced_when_it_has_answered() -> None:
    """It used to accept, with the old code, as long as the new code was watched."""
    world = World(2)
    world.run(slow=(2,))
    world.obey(2)
    world.restart()
    world.run(slow=(2,))
    assert reached(world) is Step.QUIESCING
    assert phases(world)[2] is Phase.OPENING
    world.run()
    assert reached(world) is Step.SETTLING
    assert phases(world) == {1: Phase.QUIESCED, 2: Phase.QUIESCED, 3: Phase.SERVING, 4: Phase.SERVING}


def test_new_workers_that_serve_are_kept_until_others_do_if_no_old_one_is_left_to_take_back() -> None:
    world = settling(2)
    world.die(1)
    world.die(2)
    world.run()
    world.effects.clear()
    world.die(3)
    world.take()
    assert orders(world.effects) == []  # two losses in a row: the old code is tried again after a pause
    assert phases(world) == {4: Phase.SERVING}
    world.elapse(Clock.BACKOFF)
    world.run()
    assert orders(world.effects) == [Spawn(5, 1), Spawn(6, 1), Open(5), Open(6), Drain(4)]


# -- phased restart -----------------------------------------------------------------------------------------


def test_phased_restart_replaces_one_worker_at_a_time_oldest_first() -> None:
    world = settling(2, is_phased=True)
    assert orders(world.effects) == [Spawn(3, 2), Open(3), Quiesce(1)]
    world.elapse(Clock.SETTLE)
    world.effects.clear()
    world.run()
    assert orders(world.effects) == [Drain(1), Spawn(4, 2), Open(4), Quiesce(2)]
    assert news(world.effects).count(News.DONE) == 0
    world.elapse(Clock.SETTLE)
    world.run()
    assert phases(world) == {3: Phase.SERVING, 4: Phase.SERVING}
    assert news(world.effects).count(News.DONE) == 1


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (4, 2)])
def test_phased_restart_ends_with_as_many_workers_as_wanted(before: int, after: int) -> None:
    world = serving(before)
    world.restart(is_phased=True, wanted=after)
    for _ in range(after):
        world.run()
        world.elapse(Clock.SETTLE)
    world.run()
    assert phases(world) == {before + 1 + i: Phase.SERVING for i in range(after)}


def test_phased_restart_that_aborts_is_taken_back_one_by_one_start_first() -> None:
    world = settling(2, is_phased=True)
    world.elapse(Clock.SETTLE)
    world.run(slow=(4,))
    world.effects.clear()
    world.die(4)
    world.run()
    assert orders(world.effects) == [Spawn(5, 1), Open(5), Drain(3)]
    assert phases(world) == {2: Phase.SERVING, 5: Phase.SERVING}
    assert {w.generation for w in world.service.current} == {1}


# -- crashes ------------------------------------------------------------------------------------------------


def test_first_lost_worker_is_replaced_at_once_and_further_ones_after_growing_pauses() -> None:
    world = serving(1)
    for _ in range(10):
        world.die(max(world.processes))
        world.run()
        if world.service.is_backing_off:
            assert not world.processes
            world.elapse(Clock.BACKOFF)
            world.take()
    assert backoffs(world) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, BACKOFF_MAX_S, BACKOFF_MAX_S, BACKOFF_MAX_S]


def test_workers_that_fall_together_are_one_failure() -> None:
    """Eight workers killed at once used to mean half a minute with one."""
    world = serving(8)
    for worker in range(1, 9):
        world.die(worker)
    world.run()
    assert backoffs(world) == [0.5]
    world.elapse(Clock.BACKOFF)
    world.run()
    assert len(world.service.ids(Phase.SERVING)) == 8


def test_quiet_spell_makes_the_next_loss_the_first_again() -> None:
    world = serving(1)
    world.die(1)
    world.run()
    world.elapse(Clock.STABLE)
    world.take()
    world.die(2)
    world.run()
    assert phases(world) == {3: Phase.SERVING}
    assert backoffs(world) == []


def test_spell_in_which_a_worker_was_lost_is_not_quiet() -> None:
    world = serving(1)
    world.die(1)
    world.take()
    assert Timer(Clock.STABLE) not in world.timers


def test_worker_that_leaves_by_itself_is_replaced_before_it_has_drained() -> None:
    world = serving(1)
    world.say(1, Event.LEAVING)
    world.run()
    assert phases(world) == {1: Phase.DRAINING, 2: Phase.SERVING}
    world.die(1)
    world.run()
    assert news(world.effects).count(News.WORKER_LOST) == 1
    assert phases(world) == {2: Phase.SERVING}


def test_worker_that_gives_up_while_it_starts_is_replaced_and_killed_if_it_stays() -> None:
    world = serving(1)
    world.scale(2)
    world.take()
    world.say(2, Event.LEAVING)
    world.run()
    world.elapse(Clock.KILL, 2)
    world.take()
    assert orders(world.effects) == [Spawn(2, 1), Spawn(3, 1), Open(3), Kill(2)]


# -- recycling ----------------------------------------------------------------------------------------------


def test_expired_workers_are_replaced_start_first_and_one_at_a_time() -> None:
    world = serving(2)
    world.queue += [RecycleDue(1), RecycleDue(2)]
    world.run()
    assert orders(world.effects) == [Spawn(3, 1), Open(3), Drain(1), Spawn(4, 1), Open(4), Drain(2)]
    assert News.WORKER_LOST not in news(world.effects)
    assert phases(world) == {3: Phase.SERVING, 4: Phase.SERVING}


def test_expired_worker_serves_on_while_its_replacement_fails() -> None:
    world = serving(1)
    world.queue.append(RecycleDue(1))
    for replacement in (2, 3):
        world.take()
        world.die(replacement)
    world.take()
    assert phases(world) == {1: Phase.SERVING}
    world.elapse(Clock.BACKOFF)
    world.run()
    assert phases(world) == {4: Phase.SERVING}


def test_replacement_takes_the_place_of_an_expired_worker_that_dies_first() -> None:
    world = serving(1)
    world.queue.append(RecycleDue(1))
    world.take()
    world.die(1)
    world.run()
    assert orders(world.effects) == [Spawn(2, 1), Open(2)]
    assert phases(world) == {2: Phase.SERVING}


# -- hung workers -------------------------------------------------------------------------------------------


def test_hung_worker_is_replaced_start_first_and_has_the_time_to_drain() -> None:
    world = serving(2)
    world.queue.append(Hung(1, 60.0))
    world.take()
    (news_,) = [e for e in world.effects if isinstance(e, Announce) and e.news is News.WORKER_GIVEN_UP]
    assert (news_.worker, news_.why) == (1, "has not answered for 60 s")
    world.run(slow=(1,))
    assert orders(world.effects) == [Spawn(3, 1), Open(3), Drain(1)]
    assert Timer(Clock.DRAIN, 1) in world.timers
    assert phases(world) == {1: Phase.DRAINING, 2: Phase.SERVING, 3: Phase.SERVING}
    world.elapse(Clock.DRAIN, 1)
    world.take()
    world.elapse(Clock.KILL, 1)
    world.take()
    assert orders(world.effects)[-2:] == [Terminate(1), Kill(1)]


def test_time_that_it_waited_for_a_processor_is_told_if_it_is_much() -> None:
    world = serving(2)
    world.queue += [Hung(1, 80.0, 20.0), Hung(2, 90.0, 30.0)]
    world.run()
    told = [e.why for e in world.effects if isinstance(e, Announce) and e.news is News.WORKER_GIVEN_UP]
    assert told == [
        "has not answered for 80 s",
        "has not answered for 90 s, and waited for a processor in 30 s of them",
    ]


def test_hung_worker_is_replaced_before_one_that_has_only_served_long_enough() -> None:
    world = serving(2)
    world.queue += [RecycleDue(1), Hung(2, 60.0), Hung(2, 61.0)]
    world.take()
    world.run(slow=(2,))
    assert orders(world.effects)[:6] == [Spawn(3, 1), Open(3), Drain(1), Spawn(4, 1), Open(4), Drain(2)]
    world = serving(3)
    world.queue += [RecycleDue(1), RecycleDue(2), Hung(3, 60.0)]
    world.run(slow=(3,))
    drained = [e.worker for e in orders(world.effects) if isinstance(e, Drain)]
    assert drained == [1, 3, 2]


def test_hung_worker_that_answers_before_its_replacement_is_started_stays() -> None:
    world = serving(2)
    world.restart(is_watched=True)
    world.run().elapse(Clock.SETTLE)
    world.queue += [Hung(1, 60.0), Hung(3, 60.0), Answered(1), Answered(3), Answered(99)]
    world.run()
    assert not any(worker.is_hung for worker in world.service.workers.values())


def test_hung_worker_that_leaves_anyway_or_is_unknown_is_not_given_up() -> None:
    world = serving(2)
    world.say(1, Event.LEAVING)
    world.take()
    world.effects.clear()
    world.queue += [Hung(1, 60.0), Hung(99, 60.0)]
    world.take()
    assert News.WORKER_GIVEN_UP not in news(world.effects)


def test_workers_that_hang_faster_than_they_are_killed_are_no_more_than_twice_as_many() -> None:
    world = serving(1)
    world.queue.append(Hung(1, 60.0))
    world.run(slow=(1,))
    world.queue.append(Hung(2, 60.0))
    world.run(slow=(1, 2))
    assert phases(world) == {1: Phase.DRAINING, 2: Phase.SERVING}
    world.die(1)
    world.run(slow=(2,))
    assert phases(world) == {2: Phase.DRAINING, 3: Phase.SERVING}


def test_hung_workers_are_let_go_first_when_there_are_too_many() -> None:
    world = serving(3)
    world.queue.append(Hung(1, 60.0))
    world.take()
    world.scale(2)
    world.take()
    assert world.service.workers[1].phase is Phase.DRAINING


# -- scale --------------------------------------------------------------------------------------------------


def test_scaling_up_starts_workers_of_the_generation_that_serves() -> None:
    world = settling(1)
    world.elapse(Clock.SETTLE)
    world.run()
    world.scale(3)
    world.run()
    assert orders(world.effects)[-4:] == [Spawn(3, 2), Spawn(4, 2), Open(3), Open(4)]


def test_scaling_down_drains_the_newest_first() -> None:
    world = serving(3)
    world.scale(1)
    world.take()
    assert orders(world.effects) == [Drain(3), Drain(2)]


def test_scaling_down_keeps_those_that_serve() -> None:
    """With one worker serving and an older one starting, the one that served used to be drained."""
    world = World(2)
    world.run(slow=(1,))
    world.scale(1)
    world.run()
    assert phases(world) == {2: Phase.SERVING}
    assert Terminate(1) in world.effects


def test_scaling_down_in_the_middle_of_a_replacement_reaches_the_number_at_once() -> None:
    world = serving(2)
    world.queue.append(RecycleDue(1))
    world.scale(1)
    world.take()
    world.take()
    assert [w.id for w in world.service.current] == [2]


def test_scaling_up_waits_for_the_end_of_a_back_off() -> None:
    world = serving(1)
    world.die(1)
    world.take()
    world.die(2)
    world.take()
    world.scale(2)
    world.run()
    assert phases(world) == {}
    world.elapse(Clock.BACKOFF)
    world.run()
    assert phases(world) == {3: Phase.SERVING, 4: Phase.SERVING}


# -- stop ---------------------------------------------------------------------------------------------------


def test_stop_drains_every_worker_and_finishes_when_the_last_is_gone() -> None:
    world = serving(2)
    world.stop()
    world.run()
    assert orders(world.effects) == [Drain(1, is_last=True), Drain(2, is_last=True)]
    assert CloseListeners() in world.effects
    assert world.effects[-1] == Finish()


def test_second_stop_has_connections_cut_and_a_third_kills() -> None:
    """Workers that were killed at the second one could not say what they had cut."""
    world = serving(1)
    world.stop()
    world.run(slow=(1,))
    world.effects.clear()
    world.stop()
    world.take()
    assert orders(world.effects) == [Terminate(1, is_hurried=True)]
    assert StartTimer(Timer(Clock.KILL, 1)) in world.effects
    world.stop()
    world.run()
    assert orders(world.effects)[1:] == [Kill(1)]
    assert world.effects[-1] == Finish()


def test_stop_now_has_connections_cut_at_once_and_loses_nobody() -> None:
    world = serving(1)
    world.stop(now=True)
    world.run()
    assert Terminate(1, is_hurried=True) in world.effects
    assert Kill(1) not in world.effects
    assert News.WORKER_LOST not in news(world.effects)
    assert world.effects[-1] == Finish()


def test_stop_now_kills_workers_that_have_no_connections_yet() -> None:
    world = World(1)
    world.take()
    world.stop(now=True)
    world.run()
    assert orders(world.effects) == [Spawn(1, 1), Terminate(1), Kill(1)]
    assert world.effects[-1] == Finish()


def test_stop_during_boot_is_no_failure() -> None:
    world = World(1)
    world.take()
    world.stop()
    world.run()
    assert orders(world.effects) == [Spawn(1, 1), Terminate(1)]
    assert world.effects[-1] == Finish(has_failed=False)


@pytest.mark.parametrize(("slow", "step"), [((3,), Step.STARTING), ((1,), Step.QUIESCING), ((), Step.SETTLING)])
def test_stop_during_a_restart_aborts_it_and_ends_both_generations(slow: tuple[int, ...], step: Step) -> None:
    world = serving(2)
    world.restart()
    world.run(slow=slow)
    assert reached(world) is step
    world.stop()
    world.take()
    request = world.restart()
    assert world.take() == (Refuse(request, Refusal.STOPPING),)
    world.run()
    assert news(world.effects).count(News.ABORTED) == 1
    assert world.effects[-1] == Finish()


def test_stop_lets_those_that_serve_go_on_until_the_last_one_that_cannot_is_gone() -> None:
    world = serving(2)
    world.restart()
    world.run(slow=(3,))
    world.effects.clear()
    world.stop()
    world.take()
    assert orders(world.effects) == [Terminate(3), Terminate(4)]
    assert phases(world) == {1: Phase.SERVING, 2: Phase.SERVING, 3: Phase.STOPPING, 4: Phase.STOPPING}
    world.die(4)
    world.take()
    assert phases(world)[1] is Phase.SERVING
    world.die(3)
    world.take()
    assert orders(world.effects)[2:] == [Drain(1, is_last=True), Drain(2, is_last=True)]
    world.run()
    assert world.effects[-1] == Finish()


def test_stop_without_any_worker_finishes_at_once() -> None:
    world = serving(1)
    world.die(1)
    world.take()
    world.die(2)
    world.take()
    world.stop()
    world.take()
    assert world.effects[-1] == Finish()


# -- whatever is said ---------------------------------------------------------------------------------------


def test_events_that_nobody_waits_for_change_nothing() -> None:
    world = serving(1)
    before = world.service
    world.say(1, Event.QUIESCED)
    world.say(99, Event.READY)
    world.queue += [RecycleDue(99), MoreTime(99, 1.0), Exited(99, "exited with status 0")]
    world.queue += [Elapsed(Timer(clock, worker)) for clock in Clock for worker in (0, 1, 99)]
    while world.queue:
        assert world.take() == ()
    assert world.service == before
