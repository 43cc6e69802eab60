"""Which workers hang, by the rounds in which they were asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.model.hang import ROUND_MAX_S, Case, Finding, Found, Look, judge, round_s

HUNG, GIVEN_UP, UNHUNG, STOPPED, CONTINUED = Found


class Watch:
    """Rounds of one second, with a report after 3 s and a replacement after 6 s."""

    def __init__(self) -> None:
        self.cases: dict[int, Case] = {}
        self.passed = 0
        self.found: list[tuple[int, int, Found]] = []  # when, which worker, what

    def round(self, *looks: Look, lateness_s: float = 0.0) -> list[Finding]:
        self.passed += 1
        self.cases, findings = judge(self.cases, looks, planned_s=1.0, lateness_s=lateness_s)
        self.found += [(self.passed, each.worker, each.found) for each in findings]
        return findings

    def rounds(self, count: int, *looks: Look, lateness_s: float = 0.0) -> None:
        for _ in range(count):
            self.round(*looks, lateness_s=lateness_s)


def look(worker: int, *, answers: bool = False, **more: Any) -> Look:
    return Look(worker=worker, has_answered=answers, **{"report_s": 3.0, "timeout_s": 6.0, **more})


def well(worker: int) -> Look:
    return look(worker, answers=True)


def test_worker_that_answers_is_well() -> None:
    watch = Watch()
    watch.rounds(100, well(1), well(2))
    assert watch.found == []


def test_worker_that_does_not_answer_is_reported_and_then_given_up_once() -> None:
    watch = Watch()
    watch.rounds(20, look(1), well(2))
    assert watch.found == [(3, 1, HUNG), (6, 1, GIVEN_UP)]


def test_worker_that_answers_at_last_is_well_again_and_is_reported_anew() -> None:
    watch = Watch()
    watch.rounds(4, look(1), well(2))
    assert watch.round(well(1), well(2)) == [Finding(1, UNHUNG, 4.0)]
    watch.rounds(7, look(1), well(2))
    assert watch.found == [(3, 1, HUNG), (5, 1, UNHUNG), (8, 1, HUNG), (11, 1, GIVEN_UP)]


def test_worker_that_blocks_again_and_again_for_less_than_the_bound_is_never_given_up() -> None:
    watch = Watch()
    for _ in range(1000):
        watch.rounds(5, look(1), well(2))
        watch.round(well(1), well(2))
    assert {found for _, _, found in watch.found} == {HUNG, UNHUNG}


@pytest.mark.parametrize(
    ("report_s", "timeout_s", "found"), [(0.0, 6.0, [HUNG, GIVEN_UP]), (3.0, 0.0, [HUNG]), (0, 0, [])]
)
def test_bound_of_0_is_for_ever_but_none_is_replaced_without_a_report(
    report_s: float, timeout_s: float, found: list[Found]
) -> None:
    watch = Watch()
    watch.rounds(100, look(1, report_s=report_s, timeout_s=timeout_s), well(2))
    assert [each for _, _, each in watch.found] == found


def test_round_in_which_the_supervisor_was_late_does_not_count() -> None:
    """A machine that was suspended, or everything stopped and continued: workers could answer no more than it could."""
    watch = Watch()
    watch.rounds(100, look(1), well(2), lateness_s=0.6)
    assert watch.found == []
    assert watch.round(look(1), well(2), lateness_s=3600.0) == []
    watch.rounds(6, look(1), well(2), lateness_s=0.4)
    assert watch.found == [(104, 1, HUNG), (107, 1, GIVEN_UP)]


def test_answer_in_a_late_round_is_an_answer() -> None:
    watch = Watch()
    watch.rounds(5, look(1), well(2))
    assert watch.round(well(1), well(2), lateness_s=10.0) == [Finding(1, UNHUNG, 5.0)]


def test_time_without_a_processor_does_not_count() -> None:
    watch = Watch()
    for second in range(40):  # it runs for a quarter of the time; what it waited before the first round is unknown
        watch.round(look(1, waited_s=100.0 + 0.75 * second), well(2))
    assert watch.found == [(9, 1, HUNG), (21, 1, GIVEN_UP)]


def test_how_long_it_waited_for_a_processor_is_told() -> None:
    watch = Watch()
    for second in range(6):
        watch.round(look(1, waited_s=0.5 * second), well(2))
    assert watch.round(well(1), well(2)) == [Finding(1, UNHUNG, 6.0, 2.5)]


def test_clock_of_waiting_that_goes_back_adds_nothing() -> None:
    watch = Watch()
    watch.round(look(1, waited_s=9.0), well(2))
    watch.round(look(1, waited_s=0.0), well(2))
    assert watch.cases[1].silent_s == 2.0


def test_worker_that_had_no_processor_at_all_is_not_hung() -> None:
    watch = Watch()
    for second in range(1000):
        watch.round(look(1, waited_s=1.1 * second), well(2))
    assert watch.found == []
    assert watch.cases[1].silent_s == 1.0  # of the first round


def test_stopped_worker_is_named_and_neither_hung_nor_given_up() -> None:
    watch = Watch()
    watch.rounds(100, look(1, is_stopped=True), well(2))
    assert watch.round(look(1), well(2)) == [Finding(1, CONTINUED, 100.0)]
    watch.rounds(2, look(1), well(2))
    assert watch.found == [(3, 1, STOPPED), (101, 1, CONTINUED), (103, 1, HUNG)]


def test_stopped_worker_that_answers_was_continued() -> None:
    watch = Watch()
    watch.rounds(5, look(1, is_stopped=True), well(2))
    assert watch.round(well(1), well(2)) == [Finding(1, CONTINUED, 5.0)]
    assert watch.cases[1] == Case()


def test_hung_worker_that_a_debugger_stops_has_all_of_its_time_afterwards() -> None:
    watch = Watch()
    watch.rounds(5, look(1), well(2))
    watch.rounds(2, look(1, is_stopped=True), well(2))
    watch.rounds(6, look(1), well(2))
    assert watch.found == [(3, 1, HUNG), (13, 1, GIVEN_UP)]


def test_stopped_worker_is_not_named_without_a_bound() -> None:
    watch = Watch()
    watch.rounds(100, look(1, is_stopped=True, report_s=0.0), well(2))
    assert watch.found == []


def test_only_worker_is_given_up_at_its_bound() -> None:
    watch = Watch()
    watch.rounds(20, look(1))
    assert watch.found == [(3, 1, HUNG), (6, 1, GIVEN_UP)]


def test_if_all_are_silent_one_is_given_up_after_twice_the_bound() -> None:
    """The cause is rather outside: memory, a disk, a database. But if all hang, nobody serves."""
    watch = Watch()
    watch.rounds(20, look(1), look(2), look(3))
    assert watch.found == [(3, 1, HUNG), (3, 2, HUNG), (3, 3, HUNG), (12, 1, GIVEN_UP)]


def test_next_one_is_given_up_when_the_last_one_has_been_relieved() -> None:
    watch = Watch()
    watch.rounds(12, look(1), look(2), look(3))
    watch.found.clear()
    watch.rounds(3, look(1), look(2), look(3), well(4))
    assert watch.found == []
    watch.rounds(2, look(1, is_serving=False), look(2), look(3), well(4))
    assert watch.found == [(16, 2, GIVEN_UP)]


def test_next_one_is_given_up_when_the_last_one_has_answered() -> None:
    watch = Watch()
    watch.rounds(8, look(1), look(2), well(3))
    assert watch.found[-1] == (6, 1, GIVEN_UP)
    watch.rounds(2, well(1), look(2), well(3))
    assert watch.found[-2:] == [(9, 1, UNHUNG), (9, 2, GIVEN_UP)]


def test_the_longest_silent_one_is_given_up_first() -> None:
    watch = Watch()
    watch.rounds(2, well(1), look(2), well(3))
    watch.rounds(20, look(1), look(2), well(3))
    assert (6, 2, GIVEN_UP) in watch.found


def test_none_is_given_up_in_a_late_round() -> None:
    watch = Watch()
    watch.rounds(8, look(1), look(2), well(3))
    watch.round(well(1), look(2), well(3), lateness_s=5.0)
    assert watch.found[-1] == (9, 1, UNHUNG)
    watch.round(well(1), look(2), well(3))
    assert watch.found[-1] == (10, 2, GIVEN_UP)


def test_worker_that_does_not_serve_is_reported_only() -> None:
    watch = Watch()
    watch.rounds(100, look(1, is_serving=False), well(2))
    assert watch.found == [(3, 1, HUNG)]


def test_stopped_workers_are_no_sign_that_the_others_could_answer() -> None:
    watch = Watch()
    watch.rounds(20, look(1), look(2, is_stopped=True))
    assert [each for each in watch.found if each[2] is GIVEN_UP] == [(12, 1, GIVEN_UP)]


def test_silence_that_is_usual_shows_that_others_are_well() -> None:
    """A program of its own says WATCHDOG=1 every half of the bound."""
    watch = Watch()
    for second in range(7):
        watch.round(look(1, grace_s=3.0), look(2, answers=second % 3 == 0, grace_s=3.0))
    assert watch.found == [(3, 1, HUNG), (6, 1, GIVEN_UP)]


def test_worker_that_says_that_it_hangs_is_given_up_at_once_and_one_at_a_time() -> None:
    watch = Watch()
    watch.rounds(3, look(1, has_failed=True, answers=True), look(2, has_failed=True))
    assert watch.found == [(1, 1, HUNG), (1, 2, HUNG), (1, 1, GIVEN_UP)]


def test_worker_that_is_not_looked_at_any_more_is_forgotten() -> None:
    watch = Watch()
    watch.rounds(5, look(1), well(2))
    watch.round(well(2))
    assert watch.cases.keys() == {2}
    watch.rounds(5, look(1), well(2))
    assert [found for _, _, found in watch.found] == [HUNG, HUNG]


@pytest.mark.parametrize(
    ("report_s", "timeout_s", "lasts_s"),
    [(10.0, 60.0, 1.0), (0.0, 60.0, ROUND_MAX_S), (600.0, 0.0, ROUND_MAX_S), (0.0, 0.0, ROUND_MAX_S), (3.0, 1.0, 0.1)],
)
def test_round_is_a_tenth_of_the_shorter_bound(report_s: float, timeout_s: float, lasts_s: float) -> None:
    assert round_s(report_s, timeout_s) == lasts_s


def test_round_is_never_so_short_that_it_is_load() -> None:
    assert round_s(0.001, 0.0) == 0.05


LOOKS = st.lists(
    st.builds(
        Look,
        worker=st.integers(1, 4),
        has_answered=st.booleans(),
        report_s=st.sampled_from([0.0, 2.0]),
        timeout_s=st.sampled_from([0.0, 4.0]),
        is_serving=st.booleans(),
        has_failed=st.sampled_from([False, False, False, True]),
        is_stopped=st.booleans(),
        waited_s=st.none() | st.floats(0, 100),
    ),
    unique_by=lambda each: each.worker,
)


@given(st.lists(st.tuples(LOOKS, st.sampled_from([0.0, 0.3, 9.0])), max_size=40))
def test_whatever_happens_one_is_given_up_at_a_time_and_told_in_order(
    history: Sequence[tuple[list[Look], float]],
) -> None:
    cases: dict[int, Case] = {}
    for looks, lateness_s in history:
        before = cases
        cases, findings = judge(before, looks, planned_s=1.0, lateness_s=lateness_s)
        assert cases.keys() == {each.worker for each in looks}
        given_up = [each.worker for each in findings if each.found is GIVEN_UP]
        assert len(given_up) <= (lateness_s < 1.0)
        for each in looks:
            worker, was = each.worker, before.get(each.worker, Case())
            found = [finding.found for finding in findings if finding.worker == worker]
            assert cases[worker].is_reported or not cases[worker].is_given_up
            assert (HUNG in found) == (cases[worker].is_reported and not was.is_reported)
            assert (UNHUNG in found) == (was.is_reported and each.has_answered and not each.has_failed)
            if worker in given_up:
                assert each.is_serving
                assert not each.has_answered or each.has_failed
                assert each.has_failed or cases[worker].silent_s >= each.timeout_s > 0
                assert not any(
                    cases[other.worker].is_given_up for other in looks if other.is_serving and other is not each
                )
            for finding in findings:
                assert finding.silent_s >= finding.waited_s >= 0.0
