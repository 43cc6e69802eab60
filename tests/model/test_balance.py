"""Who leaves the accept queue to others: evenly shared, whoever wakes up first."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.model.balance import (
    AHEAD_MIN,
    AHEAD_RATIO,
    DRIFT_MIN,
    DRIFT_RATIO,
    HUNG_S,
    INSIST_MAX,
    LATE_FORGET_S,
    LATE_HOLD_MAX_S,
    LATE_HOLD_S,
    MOVES_MAX,
    Deferral,
    Lateness,
    is_ahead,
    plan_moves,
    unable,
)


def test_worker_alone_is_never_ahead() -> None:
    assert not is_ahead(1_000_000, [])


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        (2, [0, 0, 0], False),
        (3, [0, 0, 0], True),
        (19, [16, 16, 16], False),
        (20, [16, 16, 16], True),
        (500, [500, 0, 0], True),  # after `hotport scale`
        (0, [500, 500, 0], False),
        (1030, [1000, 1000, 1000], False),
        (1050, [1000, 1000, 1000], True),
    ],
)
def test_ahead_is_clearly_more_than_the_mean(mine: int, others: list[int], expected: bool) -> None:
    assert is_ahead(mine, others) is expected


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=64))
def test_somebody_can_always_take(counts: list[int]) -> None:
    ahead = [is_ahead(mine, counts[:n] + counts[n + 1 :]) for n, mine in enumerate(counts)]
    assert not all(ahead)


@pytest.mark.unmeasured
@given(st.integers(2, 16), st.integers(64, 400), st.randoms(use_true_random=False))
def test_whoever_wakes_first_the_shares_are_even(workers: int, arrivals: int, chance: random.Random) -> None:
    counts = [0] * workers
    favourites = chance.choices(range(workers), weights=[2.0**-n for n in range(workers)], k=arrivals * workers)
    for favourite in favourites:
        if sum(counts) == arrivals:
            break
        if not is_ahead(counts[favourite], counts[:favourite] + counts[favourite + 1 :]):
            counts[favourite] += 1
        else:  # its turn is over; the rest are woken by the same connection
            able = (n for n in range(workers) if not is_ahead(counts[n], counts[:n] + counts[n + 1 :]))
            counts[next(able)] += 1
    mean = sum(counts) / workers
    assert max(counts) <= mean * (1 + AHEAD_RATIO) + AHEAD_MIN + 1


def test_deferring_to_those_who_do_not_take_becomes_rare_and_is_resumed() -> None:
    deferral = Deferral()
    waits: list[int] = []
    for connection in range(200):
        if deferral.is_due():
            waits.append(connection)
            deferral.ended(was_taken=False)  # and takes that one itself
    gaps = [after - before for before, after in itertools.pairwise(waits)]
    assert gaps[:4] == [1, 2, 4, 8]
    assert set(gaps[4:]) == {INSIST_MAX}
    deferral.ended(was_taken=True)
    assert deferral.is_due()


# -- connections that are open ------------------------------------------------------------------------------


def step(counts: dict[int, int]) -> int:
    """Every worker looks once, one after the other; how many connections have moved."""
    moved = 0
    for mine in list(counts):
        moves = plan_moves(mine, counts)
        assert sum(moves.values()) <= min(counts[mine], MOVES_MAX)
        for to, count in moves.items():
            assert to != mine
            assert count > 0
            counts[mine] -= count
            counts[to] += count
            moved += count
    return moved


@pytest.mark.unmeasured
@given(st.lists(st.integers(0, 2_000), min_size=2, max_size=32))
def test_moves_end_and_leave_an_even_share(sizes: list[int]) -> None:
    counts = dict(enumerate(sizes))
    moves = [step(counts) for _ in range(80)]
    mean = sum(sizes) / len(sizes)
    assert max(counts.values()) <= mean * (1 + DRIFT_RATIO) + DRIFT_MIN
    assert moves[-1] == 0
    assert sum(counts.values()) == sum(sizes)
    assert sum(moves) <= sum(abs(size - mean) for size in sizes)


@given(st.lists(st.integers(0, 400), min_size=2, max_size=16))
def test_workers_that_look_at_the_same_moment_do_not_overshoot(sizes: list[int]) -> None:
    counts = dict(enumerate(sizes))
    arrived = dict.fromkeys(counts, 0)
    for mine in counts:
        for to, count in plan_moves(mine, counts).items():
            arrived[to] += count
    mean = sum(sizes) / len(sizes)
    assert all(counts[key] + count < mean + 1 for key, count in arrived.items() if count)


def test_scaling_up_is_even_after_two_looks() -> None:
    counts = {1: 500, 2: 500, 3: 0, 4: 0}
    step(counts)
    step(counts)
    assert set(counts.values()) == {250}


@pytest.mark.unmeasured
def test_a_day_of_drift_moves_little() -> None:
    """Clients come to a worker with fewer, as they do, and leave by chance: moves are rare and bounded."""
    chance = random.Random(7)
    counts = dict.fromkeys(range(4), 250)
    moved_in_hour: list[int] = []
    for _ in range(24):
        moved = 0
        for _ in range(360):  # every ten seconds 40 clients leave, and 40 come
            for _ in range(40):
                leaving = chance.choices(list(counts), weights=list(counts.values()))[0]
                counts[leaving] -= 1
                counts[min(counts, key=counts.__getitem__)] += 1
            moved += step(counts)
        moved_in_hour.append(moved)
    assert max(moved_in_hour) == 0  # what comes evens it out
    counts = {0: 1000, 1: 0, 2: 0, 3: 0}  # nobody comes any more, and one worker's clients stay
    assert [step(counts) for _ in range(7)] == [125] * 6 + [0]


@pytest.mark.parametrize(
    ("counts", "late", "expected"),
    [
        ({1: 100, 2: 100, 3: 100}, {1}, {3: 50, 2: 50}),
        ({1: 3, 2: 100, 3: 100}, {1}, {3: 2, 2: 1}),
        ({1: 1, 2: 133, 3: 133, 4: 133}, {1}, {4: 1}),
        ({1: 100, 2: 100}, {1, 2}, {}),  # they all are: the machine is, or the application is like that
        ({1: 100, 2: 10}, {2}, {}),
        ({1: 0, 2: 10}, {1}, {}),
    ],
)
def test_worker_that_is_held_up_hands_on_what_it_has(
    counts: dict[int, int], late: set[int], expected: dict[int, int]
) -> None:
    assert plan_moves(1, counts, late) == expected


@given(st.lists(st.integers(0, 2_000), min_size=2, max_size=16))
def test_whoever_asks_gets_shares_as_even_as_can_be(sizes: list[int]) -> None:
    counts = dict(enumerate(sizes))
    for mine in list(counts):
        for to, count in plan_moves(mine, counts, is_asked=True).items():
            counts[mine] -= count
            counts[to] += count
    assert max(counts.values()) - min(counts.values()) <= len(sizes)


@pytest.mark.parametrize(
    ("counts", "full", "expected"),
    [
        ({1: 100, 2: 0, 3: 20}, {1}, {2: 40, 3: 20}),
        ({1: 100, 2: 0, 3: 20}, {3}, {2: 50}),  # short of memory: it keeps what it has
        ({1: 100, 2: 40, 3: 100}, {2, 3}, {}),
        ({1: 100, 2: 100, 3: 0}, {1, 2}, {3: 33}),
    ],
)
def test_full_workers_hand_on_and_get_none(counts: dict[int, int], full: set[int], expected: dict[int, int]) -> None:
    assert plan_moves(1, counts, full=full, is_asked=True) == expected


def test_nothing_moves_to_full_workers_from_one_that_is_held_up() -> None:
    assert plan_moves(1, {1: 50, 2: 100, 3: 100}, {1}, full={2, 3}) == {}


def test_worker_that_is_held_up_again_and_again_is_trusted_less_and_less() -> None:
    lateness = Lateness()
    now_s = 1000.0
    assert not lateness.see(now_s, math.inf)  # it has never looked before
    holds = []
    for _ in range(9):
        now_s += LATE_FORGET_S / 2
        assert not lateness.see(now_s, 0.3)
        now_s += 0.5
        assert lateness.see(now_s, 0.3)
        begun_s = now_s
        while lateness.see(now_s, 0.0):
            now_s += 0.25
        holds.append(now_s - begun_s)
    assert holds == [LATE_HOLD_S * 2**n for n in range(7)] + [LATE_HOLD_MAX_S] * 2
    now_s += LATE_FORGET_S
    assert not lateness.see(now_s, 0.3)
    assert lateness.see(now_s + 3.0, 2.9)  # it hardly runs at all
    assert lateness.see(now_s + 2.8 + LATE_HOLD_S, 0.3)
    assert lateness.see(now_s + 2.7 + 2 * LATE_HOLD_S, 0.0)
    assert not lateness.see(now_s + 2.9 + 2 * LATE_HOLD_S, 0.0)


@pytest.mark.parametrize(
    ("dues_s", "expected"),
    [
        ({1: 0.0, 2: 99.0, 3: 101.0}, {1}),
        ({1: 0.0, 2: 100.0}, {1}),
        ({1: 0.0, 2: 0.0, 3: 100.0}, set()),  # or the third would get everything
        ({1: 0.0, 2: 0.0, 3: 98.0}, {3}),
        ({1: 0.0, 2: 98.0}, {2}),
        ({1: 98.0, 2: 98.0}, set()),
        ({1: 98.0, 2: 98.0, 3: 100.0}, {1, 2}),
    ],
)
def test_workers_that_are_held_up_or_hang_are_unable_unless_there_are_no_others(
    dues_s: dict[int, float], expected: set[int]
) -> None:
    assert unable(dues_s, 99.5 + HUNG_S - 0.5) == expected
