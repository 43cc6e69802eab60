"""Latencies in buckets: never far off, and the same however they were collected."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotport.churn.fates import LOSSES, MEANINGS, ConnectionEvent, Fate, Kind, Tally
from hotport.churn.histogram import Histogram

values = st.lists(st.integers(0, 10**9), min_size=1, max_size=200)


@given(values, st.floats(0, 1))
def test_percentile_is_nearly_that_of_the_values_themselves(us: list[int], share: float) -> None:
    histogram = Histogram()
    for value in us:
        histogram.add(value)
    exact = sorted(us)[max(1, min(len(us), -int(-share * len(us) // 1))) - 1]
    assert abs(histogram.percentile(share) - exact) <= max(0.5, exact * 0.008)
    assert abs(histogram.maximum - max(us)) <= max(0.5, max(us) * 0.008)
    assert len(histogram) == len(us)


@given(values, values)
def test_merged_histograms_are_the_histogram_of_everything(first: list[int], second: list[int]) -> None:
    parts = [Histogram(), Histogram()]
    whole = Histogram()
    for part, us in zip(parts, (first, second), strict=True):
        for value in us:
            part.add(value)
            whole.add(value)
    parts[0].merge(parts[1].counts)
    assert parts[0].counts == whole.counts


def test_nothing_counted_is_zero() -> None:
    assert Histogram().percentile(0.99) == Histogram().maximum == 0.0
    negative = Histogram()
    negative.add(-5)
    assert negative.counts == {0: 1}


def test_tally_knows_losses_from_answers_and_events() -> None:
    tally = Tally()
    tally.add(Kind.CONNECT, Fate.ANSWERED, 5)
    tally.add(Kind.KEEPALIVE, Fate.REFUSED)
    tally.add(Kind.KEEPALIVE, ConnectionEvent.TOLD_TO_CLOSE, 3)
    other = Tally()
    other.add(Kind.SLOW, Fate.TRUNCATED, 2)
    tally.merge(other)
    assert tally.lost == 3
    assert tally.total(Fate.ANSWERED) == 5
    assert tally["slow", "truncated"] == 2
    assert set(MEANINGS) == {*Fate, *ConnectionEvent}
    assert Fate.ANSWERED not in LOSSES
    assert Fate.LATE not in LOSSES
