"""What a supervisor does with workers that another one has started: one generation goes on, and nobody else is left."""

from __future__ import annotations

import pytest

from hotport.model.effects import Announce, Drain, Effect, News, Open, Spawn, StartTimer, Terminate
from hotport.model.inputs import Adopt, Clock, Timer
from hotport.model.lifecycle import Phase, Worker
from hotport.model.rules import step
from hotport.model.service import Service, surviving

S, R, Q, D, X = Phase.SERVING, Phase.READY, Phase.QUIESCED, Phase.DRAINING, Phase.STARTING


def adopt(*phases: tuple[int, Phase], wanted: int = 2) -> tuple[Service, tuple[Effect, ...]]:
    """A service of workers 1, 2, ..., each of a generation and in a phase."""
    workers = tuple(Worker(number, *each) for number, each in enumerate(phases, 1))
    service, effects = step(Service(wanted), Adopt(workers, wanted, 5, 9))
    return service, tuple(effect for effect in effects if not isinstance(effect, Announce | StartTimer))


@pytest.mark.parametrize(
    ("phases", "generation", "effects"),
    [
        # a restart, step by step
        ([(1, S), (1, S)], 1, (Open(1), Open(2))),
        ([(1, S), (1, S), (2, X), (2, X)], 1, (Open(1), Open(2), Terminate(3), Terminate(4))),
        ([(1, S), (1, S), (2, R), (2, X)], 1, (Open(1), Open(2), Terminate(3), Terminate(4))),
        ([(1, S), (1, S), (2, S), (2, R)], 1, (Open(1), Open(2), Drain(3), Terminate(4))),
        ([(1, S), (1, S), (2, S), (2, S)], 2, (Open(3), Open(4), Drain(1), Drain(2))),  # the commit
        ([(1, Q), (1, S), (2, S), (2, S)], 2, (Open(3), Open(4), Drain(1), Drain(2))),
        ([(1, Q), (1, Q), (2, S), (2, S)], 2, (Open(3), Open(4), Drain(1), Drain(2))),
        ([(1, D), (1, Q), (2, S), (2, S)], 2, (Open(3), Open(4), Drain(2))),
        ([(1, D), (1, D), (2, S), (2, S)], 2, (Open(3), Open(4))),
        # the new generation has lost one after the commit: it is taken back, as it would have been
        ([(1, Q), (1, Q), (2, S)], 1, (Open(1), Open(2), Drain(3))),
        # a batch of a phased restart
        ([(1, S), (1, S), (2, S)], 1, (Open(1), Open(2), Drain(3))),
        # somebody is missing
        ([(1, S)], 1, (Open(1), Spawn(10, 1))),
        ([(1, D), (1, D)], 0, (Spawn(10, 6), Spawn(11, 6))),
        # before the first commit
        ([(1, X), (1, R)], 0, (Open(2),)),
        ([(1, X), (2, R)], 0, (Open(2), Terminate(1))),
        ([], 0, (Spawn(10, 6), Spawn(11, 6))),
    ],
)
def test_one_generation_goes_on(phases: list[tuple[int, Phase]], generation: int, effects: tuple[Effect, ...]) -> None:
    service, found = adopt(*phases)
    assert service.generation == generation
    assert found == effects


def test_generation_that_is_being_taken_back_to_goes_on() -> None:
    workers = tuple(Worker(number, generation, S) for number, generation in enumerate((1, 1, 2, 2), 1))
    service, effects = step(Service(2), Adopt(workers, 2, 2, 4, favoured=1))
    assert service.generation == 1
    assert Drain(3) in effects
    assert Drain(4) in effects


def test_worker_of_another_generation_stays_until_it_is_replaced() -> None:
    service, effects = adopt((1, S), (2, S), (2, S), wanted=3)
    assert service.generation == 2
    assert effects == (Open(2), Open(3), Spawn(10, 2))
    assert service.workers[1].is_expired
    assert service.workers[10].replaces == 1


def test_everything_that_is_awaited_is_bounded() -> None:
    workers = (Worker(1, 1, S), Worker(2, 1, X), Worker(3, 1, D))
    _, effects = step(Service(2), Adopt(workers, 2, 1, 3))
    assert StartTimer(Timer(Clock.READY, 2)) in effects
    assert StartTimer(Timer(Clock.DRAIN, 3)) in effects
    assert Announce(News.ADOPTED, generation=1, workers=(1, 2, 3)) in effects


def test_numbers_are_never_given_out_twice() -> None:
    service, _ = step(Service(1), Adopt((Worker(7, 3, S),), 1, 2, 4))
    assert service.generations == 3
    assert service.spawned == 7


def test_generation_of_which_most_is_left_survives_and_the_older_of_equals() -> None:
    def of(*phases: tuple[int, Phase]) -> int:
        return surviving((Worker(number, *each) for number, each in enumerate(phases)), 4)

    assert of((1, S), (2, S), (2, Q)) == 2
    assert of((1, Q), (2, S)) == 1
    assert of((1, X), (2, D)) == 0
