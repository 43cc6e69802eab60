"""What is made of a run: pure, from its numbers alone."""

from __future__ import annotations

import msgspec
import pytest

from hotport.churn.fates import LOSSES, ConnectionEvent, Fate, Kind
from hotport.churn.histogram import Histogram
from hotport.churn.result import Lag, Result
from hotport.churn.verdict import (
    answered_by,
    attempts_of,
    judge,
    latency_by_phase,
    losses_by_restart,
    losses_of,
    milliseconds,
    sentences,
    service_us,
    window,
)
from tests.churn import results

LAG = Lag(p50=50.0, p99=400.0, maximum=900.0)
TOTALS = {"connect": {"answered": 100, "refused": 3, "reconnected": 7}, "keepalive": {"late": 2, "truncated": 1}}


def test_events_are_no_attempts_and_late_answers_no_losses() -> None:
    assert attempts_of(TOTALS) == 106
    assert losses_of(TOTALS) == {"refused": 3, "truncated": 1}


@pytest.mark.parametrize(
    ("allowed", "is_clean"),
    [
        ({}, False),
        ({"refused": 3}, False),
        ({"refused": 3, "truncated": 1}, True),
        ({"refused": 2, "truncated": 1}, False),
        ({"refused": None, "truncated": None}, True),
        ({"refused": None, "truncated": 0}, False),
    ],
)
def test_losses_are_clean_as_far_as_they_are_allowed(allowed: dict[str, int | None], is_clean: bool) -> None:
    verdict = judge(TOTALS, lag=LAG, own_limits={}, allowed=allowed)
    assert (verdict.is_valid, verdict.is_clean, verdict.exit_code) == (True, is_clean, 0 if is_clean else 1)
    assert verdict.allowed == allowed


def test_run_that_this_machine_has_spoilt_means_nothing_even_if_something_was_lost() -> None:
    verdict = judge(TOTALS, lag=LAG, own_limits={"EMFILE": 2, "EADDRNOTAVAIL": 0}, engine_errors=["engine 1 died"])
    assert (verdict.is_valid, verdict.exit_code) == (False, 2)
    assert verdict.why_invalid == ["engine 1 died", "this machine did not let 2 attempts begin: EMFILE"]


def test_lag_is_judged_by_its_p99() -> None:
    late = Lag(p50=10.0, p99=5001.0, maximum=9000.0)
    verdict = judge(TOTALS, lag=late, own_limits={})
    assert verdict.exit_code == 2
    assert "5.0 ms at p99" in verdict.why_invalid[0]
    assert judge(TOTALS, lag=late, own_limits={}, lag_p99_us_max=6000.0).is_valid
    assert judge(TOTALS, lag=Lag(p50=10.0, p99=5000.0, maximum=90_000.0), own_limits={}).is_valid


def test_nothing_attempted_is_nothing_learnt() -> None:
    verdict = judge({"keepalive": {"idle close": 3}}, lag=LAG, own_limits={})
    assert (verdict.exit_code, verdict.why_invalid) == (2, ["no attempt was made"])


def test_clean_run_is_one_sentence_and_how_sure_it_is() -> None:
    result = results.clean()
    attempts = attempts_of(result.totals)
    assert sentences(result) == [
        f"3 restarts, {attempts:,} attempts, nothing lost; 40 clients were told to close and reconnected",
        "With 95 % confidence fewer than 0.050 % of attempts are lost",
    ]


def test_losses_are_told_by_fate_with_the_restarts_that_they_followed() -> None:
    result = results.lossy()
    attempts = attempts_of(result.totals)
    first, *more = sentences(result)
    assert first == (
        f"LOST 240 of {attempts:,}: 215 refused within 0.4 s after restarts 1 and 2, "
        "6 lost messages within 0.5 s after restart 1, 5 reset after send within 0.2 s after restart 1, "
        "14 of 7 other kinds"
    )
    assert more[0] == "2 restarts (2 aborted); 20 clients reconnected; 11 idle connections were closed"
    assert more[1:] == [
        "With 95 % confidence between 3.4 % and 4.3 % of attempts are lost",
        "9 answers took longer than 500 ms",
    ]


def test_losses_before_and_after_a_restart_are_told_apart() -> None:
    refused: dict[tuple[Kind, Fate | ConnectionEvent], int] = {(Kind.CONNECT, Fate.REFUSED): 2}
    result = results.build(
        restarts=[results.mark(1, 1000, 1200)],
        accept_gap_ms=[None],
        duration_ms=2000,
        extra={300: refused, 1100: refused},
    )
    assert "4 refused within 0.2 s after restart 1 (2 of them before restart 1)" in sentences(result)[0]
    assert losses_by_restart(result) == [{"refused": 2}, {"refused": 2}]


def test_few_kinds_of_loss_are_all_named() -> None:
    lost: dict[tuple[Kind, Fate | ConnectionEvent], int] = {(Kind.CONNECT, fate): 1 for fate in LOSSES[:4]}
    result = results.build(restarts=[], accept_gap_ms=[], duration_ms=1000, extra={300: lost})
    assert sentences(result)[0].endswith(": 1 refused, 1 reset before send, 1 reset after send, 1 closed unanswered")


def test_losses_that_were_allowed_are_still_told() -> None:
    result = results.build(
        restarts=[],
        accept_gap_ms=[],
        duration_ms=1000,
        extra={300: {(Kind.CONNECT, Fate.REFUSED): 2, (Kind.KEEPALIVE, ConnectionEvent.TOLD_TO_CLOSE): 1}},
        allowed={"refused": 5},
    )
    said, _ = sentences(result)
    assert said.startswith("no restart, ")
    assert said.endswith(" attempts, nothing lost but what was allowed: 2 refused; 1 client was told to close")


def test_invalid_run_says_so_before_anything_else() -> None:
    first, second, _ = sentences(results.invalid())
    assert first.startswith("THIS RUN MEANS NOTHING: engine 2 ended with exit code -9; this machine did not let 17")
    assert second.startswith("What was seen: 1 restart, ")


def test_run_that_was_ended_early_says_when() -> None:
    said = sentences(results.partial())
    assert said[0].startswith("1 restart, ")
    assert said[2] == "The run was ended early, after 3.4 s"


def test_restart_without_an_outcome_is_mentioned() -> None:
    result = results.build(restarts=[results.mark(1, 500, None, "")], accept_gap_ms=[None], duration_ms=1000)
    assert sentences(result)[0].startswith("1 restart (1 without an outcome), ")


def test_every_answer_has_one_phase() -> None:
    for result in (results.clean(), results.partial(), results.quiet(), results.lossy()):
        whole = sum(sum(found.values()) for bucket in result.buckets for found in bucket.latency.values())
        phases = latency_by_phase(result)
        assert sum(len(histogram) for histogram in phases.values()) == whole
        assert bool(len(phases["during"])) == bool(result.restarts)
    assert not len(latency_by_phase(results.quiet())["after"])
    assert not len(latency_by_phase(results.partial())["after"])


def test_restart_is_felt_for_a_moment_after_its_end() -> None:
    assert window(results.mark(1, 1000, 1500)) == (1000, 2500)
    assert window(results.mark(1, 1000, None)) == (1000, 6000)
    result = results.build(restarts=[results.mark(1, 1000, 1450)], accept_gap_ms=[None], duration_ms=4000)

    def answers(*at_ms: int) -> int:
        chosen = [bucket for bucket in result.buckets if bucket.at_ms in at_ms]
        return sum(sum(found.values()) for bucket in chosen for found in bucket.latency.values())

    phases = latency_by_phase(result)
    assert len(phases["before"]) == answers(*range(0, 1000, 100))
    assert len(phases["during"]) == answers(*range(1000, 2500, 100))
    assert len(phases["after"]) == answers(*range(2500, 4000, 100))


def test_who_answered_is_counted_in_order_of_appearance() -> None:
    result = results.clean()
    assert list(answered_by(result.buckets)) == [f"generation {number}" for number in (1, 2, 3, 4)]
    assert sum(answered_by(result.buckets).values()) == attempts_of(result.totals)


@pytest.mark.parametrize(("us", "said"), [(180, "0.18 ms"), (4200, "4.2 ms"), (1_204_000, "1,204 ms"), (0, "0.00 ms")])
def test_durations_have_the_digits_that_mean_something(us: float, said: str) -> None:
    assert milliseconds(us) == said


@pytest.mark.parametrize("build", [results.clean, results.lossy, results.invalid, results.partial, results.quiet])
def test_result_survives_json(build: object) -> None:
    result = build()  # type: ignore[operator]
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result


def test_time_that_a_slow_answer_takes_by_itself_is_no_delay() -> None:
    """Two seconds of a slow endpoint looked like two seconds of waiting for a restart."""
    result = results.build(restarts=[results.mark(1, 1000, 1200)], accept_gap_ms=[None], duration_ms=4000)
    without = latency_by_phase(result)
    assert service_us(result) == 0
    for bucket in result.buckets:
        histogram = Histogram()
        histogram.add(2_300_000 if 1000 <= bucket.at_ms < 1200 else 2_000_000)
        bucket.latency["slow"] = histogram.counts
    assert service_us(result) == pytest.approx(2_000_000, rel=0.01)
    phases = latency_by_phase(result)
    assert phases["during"].maximum == pytest.approx(300_000, rel=0.1)
    assert phases["before"].maximum == without["before"].maximum


def test_limit_that_was_not_kept_is_told_and_fails_the_run() -> None:
    verdict = judge({"connect": {"answered": 9}}, lag=LAG, own_limits={}, failed=["too slow"])
    assert (verdict.is_clean, verdict.exit_code, verdict.failed) == (False, 1, ["too slow"])
    result = results.quiet()
    result.verdict = verdict
    assert sentences(result)[2] == "NOT KEPT: too slow"
