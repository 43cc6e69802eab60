"""Who leaves the accept queue to others: evenly shared, whoever wakes up first."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.model.balance import INSIST_MAX, Deferral, is_ahead


def test_worker_alone_is_never_ahead() -> None:
    assert not is_ahead(1_000_000, [])


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        (1, [0, 0, 0], False),
        (2, [0, 0, 0], True),
        (17, [16, 16, 16], False),
        (18, [16, 16, 16], True),
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
            able = [n for n in range(workers) if not is_ahead(counts[n], counts[:n] + counts[n + 1 :])]
            counts[able[0]] += 1
    mean = sum(counts) / workers
    assert max(counts) <= mean * 1.1 + 2


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
