"""Bounds against values from tables and from sums that are exact."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.churn.certainty import attempts_to_prove, bounds, differs, percent, rank_bounds


@pytest.mark.parametrize(
    ("lost", "attempts", "low", "high"),
    [
        (0, 6000, 0.0, 0.000499),  # the rule of three: 3 / 6000
        (0, 10, 0.0, 0.2589),
        (1, 10, 0.00253, 0.44502),  # Clopper and Pearson
        (5, 10, 0.18709, 0.81291),
        (10, 10, 0.69150, 1.0),
        (3, 1000, 0.000619, 0.008742),
        (240, 100_000, 0.002106, 0.002723),
        (0, 0, 0.0, 1.0),
    ],
)
def test_bounds_are_those_of_the_tables(lost: int, attempts: int, low: float, high: float) -> None:
    assert bounds(lost, attempts) == pytest.approx((low, high), rel=2e-3)


@given(st.integers(1, 300), st.data())
def test_bounds_are_where_the_binomial_tails_are_as_large_as_they_should_be(attempts: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(1, attempts))
    low, high = bounds(lost, attempts)
    assert low < lost / attempts <= high

    def tail(share: float, counts: range) -> float:
        return math.fsum(math.comb(attempts, k) * share**k * (1 - share) ** (attempts - k) for k in counts)

    assert tail(low, range(lost, attempts + 1)) == pytest.approx(0.025, rel=1e-6)
    if lost < attempts:
        assert tail(high, range(lost + 1)) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize(("share", "attempts"), [(0.01, 299), (0.0001, 29_956), (0.5, 5)])
def test_proof_needs_so_many_attempts(share: float, attempts: int) -> None:
    assert attempts_to_prove(share) == attempts
    assert bounds(0, attempts)[1] <= share < bounds(0, attempts - 1)[1]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 1000), (0, 1000), False),
        ((0, 1000), (5, 1000), False),  # p = 0.062
        ((0, 1000), (6, 1000), True),  # p = 0.031
        ((6, 1000), (0, 1000), True),
        ((3, 10), (0, 0), False),
        ((1000, 100_000), (1200, 100_000), True),
    ],
)
def test_difference_is_told_from_chance(one: tuple[int, int], other: tuple[int, int], expected: bool) -> None:
    assert differs(*one, *other) is expected


def test_rank_of_a_percentile_is_uncertain_by_the_number_of_values() -> None:
    assert rank_bounds(10_000, 0.99) == pytest.approx((0.98805, 0.99195), abs=1e-4)
    assert rank_bounds(10, 0.99) == pytest.approx((0.9283, 1.0), abs=1e-3)
    assert rank_bounds(0, 0.5) == (0.0, 1.0)


def test_shares_are_written_with_the_digits_that_mean_something() -> None:
    assert [percent(share) for share in (0, 0.000499, 0.00000123, 0.12, 0.034, 1)] == [
        "0 %", "0.050 %", "0.00012 %", "12 %", "3.4 %", "100 %",
    ]  # fmt: skip
