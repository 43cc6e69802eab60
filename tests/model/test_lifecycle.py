from __future__ import annotations

from itertools import product

import pytest

from hotport.model.inputs import Clock, Elapsed, Exited, Said, Timer
from hotport.model.lifecycle import CURRENT, TRANSITIONS, Event, IllegalTransition, Phase, Worker, advance
from hotport.model.rules import step
from hotport.model.service import Service

PAIRS = list(product(Phase, Event))
KNOWN = [pair for pair in PAIRS if pair in TRANSITIONS]
UNKNOWN = [pair for pair in PAIRS if pair not in TRANSITIONS]
FACTS = (Event.READY, Event.ACCEPTING, Event.QUIESCED, Event.LEAVING)


def test_pair_that_is_not_in_the_table_raises() -> None:
    for phase, event in UNKNOWN:
        with pytest.raises(IllegalTransition, match=f"{event} in {phase}"):
            advance(phase, event)


def test_pair_of_the_table_leads_where_the_table_says() -> None:
    for pair in KNOWN:
        assert advance(*pair) is TRANSITIONS[pair]


def test_word_that_is_not_in_the_table_changes_nothing() -> None:
    """A program behind ``--`` may say what it likes; only decisions that are not in the table are bugs of ours."""
    for phase, event in UNKNOWN:
        worker = Worker(1, 1, phase)
        is_stopping = phase not in CURRENT  # or else a replacement is started
        service = Service(
            wanted=1, generation=1, generations=1, spawned=1, workers={1: worker}, is_stopping=is_stopping
        )
        if event in FACTS:
            assert step(service, Said(1, event)) == (service, ())


def test_every_worker_can_end_in_every_phase_and_nothing_follows() -> None:
    for phase in set(Phase) - {Phase.GONE}:
        assert advance(phase, Event.EXITED) is Phase.GONE
    assert not [event for phase, event in TRANSITIONS if phase is Phase.GONE]


def test_every_phase_and_every_event_occurs() -> None:
    assert {phase for phase, _ in TRANSITIONS} | set(TRANSITIONS.values()) == set(Phase)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_worker_that_leaves_never_becomes_current_again() -> None:
    for (before, _), after in TRANSITIONS.items():
        assert before in CURRENT or after not in CURRENT


def test_worker_accepts_only_after_it_was_told_to() -> None:
    assert {pair for pair, after in TRANSITIONS.items() if after is Phase.SERVING and pair[0] is not after} == {
        (Phase.OPENING, Event.ACCEPTING)
    }
    assert {
        event for (before, event), after in TRANSITIONS.items() if after is Phase.OPENING and before is not after
    } == {Event.OPEN}


def test_worker_is_either_drained_or_terminated_and_drained_if_it_may_have_accepted() -> None:
    for phase in Phase:
        can_be_drained = (phase, Event.DRAIN) in TRANSITIONS
        can_be_terminated = (phase, Event.TERMINATE) in TRANSITIONS
        assert can_be_drained == (phase in CURRENT - {Phase.STARTING, Phase.READY})
        assert not (can_be_drained and can_be_terminated)


def test_worker_that_is_gone_is_forgotten() -> None:
    worker = Worker(1, 1, Phase.DRAINING)
    service = Service(wanted=1, generation=1, generations=1, spawned=1, workers={1: worker}, is_stopping=True)
    after, _ = step(service, Exited(1, "exited with status 0"))
    assert after.workers == {}
    assert step(service, Elapsed(Timer(Clock.KILL, 2))) == (service, ())
