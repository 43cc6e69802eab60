"""Limits of a run, from results that never were."""

from __future__ import annotations

import pytest

from hotport.churn.fates import ConnectionEvent, Fate, Kind
from hotport.churn.gates import Gates, Limit, failures
from hotport.churn.result import Result
from hotport.churn.run import quiet_gap, usual_gap
from tests.churn import results


def run(**changes: object) -> Result:
    extra: results.Extra = {2000: {(Kind.WEBSOCKET, ConnectionEvent.RECONNECTED): 3}}
    result = results.build(
        restarts=[results.mark(1, 1000, 1200), results.mark(2, 6000, 6200)], accept_gap_ms=[40.0, 90.0], extra=extra
    )
    result.quiet_gap_ms, result.usual_gap_ms = 25.0, 30.0
    for name, value in changes.items():
        setattr(result, name, value)
    return result


@pytest.mark.parametrize(
    ("gates", "failed"),
    [
        (Gates(), []),
        (Gates(gap=Limit(ms=90)), []),
        (Gates(gap=Limit(ms=50)), ["the accept gap of restart 2 was 90 ms, and 50 ms is the most"]),
        (Gates(gap=Limit(times=4)), []),
        (
            Gates(gap=Limit(times=1.4)),
            [
                "the accept gap of restart 1 was 40 ms, and 1.4 times the undisturbed one is the most",
                "the accept gap of restart 2 was 90 ms, and 1.4 times the undisturbed one is the most",
            ],
        ),
        (Gates(reconnects=3), []),
        (Gates(reconnects=2), ["3 clients had to connect again, and 2 may"]),
        (Gates(p99=Limit(ms=60_000)), []),
        (Gates(prove=0.01), []),
    ],
)
def test_limits_are_compared_with_the_run(gates: Gates, failed: list[str]) -> None:
    assert failures(gates, run()) == ([], failed)


def test_latency_is_compared_with_that_without_a_restart() -> None:
    missing, (failed,) = failures(Gates(p99=Limit(times=1)), run())
    assert missing == []
    assert failed.startswith("p99 during restarts was ")
    assert "1 times the undisturbed one is the most (" in failed
    assert "is the most" in failures(Gates(p99=Limit(ms=0.1)), run())[1][0]


@pytest.mark.parametrize(
    ("gates", "result", "words"),
    [
        (Gates(gap=Limit(ms=20)), run(), "an accept gap of 20 ms cannot be seen: by chance alone 30 ms"),
        (Gates(gap=Limit(ms=50)), run(accept_gap_ms=[None, None]), "there is no accept gap to compare"),
        (Gates(gap=Limit(times=2)), run(quiet_gap_ms=None), "there is no accept gap to compare"),
        (Gates(p99=Limit(ms=9)), results.quiet(), "there is no latency to compare"),
        (Gates(prove=0.00001), run(), "0 lost prove fewer than 0.05"),
    ],
)
def test_limit_that_cannot_be_judged_makes_the_run_mean_nothing(gates: Gates, result: Result, words: str) -> None:
    missing, failed = failures(gates, result)
    assert words in missing[0]
    assert "gap" not in "".join(failed) or gates.gap == Limit(ms=20)


def test_losses_that_were_allowed_may_still_be_more_than_was_to_be_proven() -> None:
    lossy = results.build(restarts=[], accept_gap_ms=[], extra={300: {(Kind.CONNECT, Fate.REFUSED): 9}})
    missing, (failed,) = failures(Gates(prove=0.0001), lossy)
    assert missing == []
    assert "0.010 % was to be proven" in failed


def test_gap_without_a_restart_is_taken_where_none_is_felt() -> None:
    marks = [results.mark(1, 1000, 1200)]
    answers = [*range(10, 1000, 10), 1500, 1900, *range(2210, 4000, 20)]
    assert quiet_gap(answers, marks, 4000) == 20
    assert quiet_gap([], marks, 4000) is None
    assert quiet_gap(answers, [], 4000) == 510
    assert quiet_gap([5], [results.mark(1, 0, 9000)], 4000) is None


def test_gap_that_chance_makes_grows_with_the_time_and_shrinks_with_the_rate() -> None:
    assert usual_gap(1000, 20_000, 1) == pytest.approx(20 * (6.9078 + 0.577), rel=1e-3)
    assert usual_gap(1000, 20_000, 4) == pytest.approx(20 * (5.5215 + 0.577), rel=1e-3)
    assert usual_gap(0, 20_000, 1) is None
    assert usual_gap(1, 0, 1) is None
