from __future__ import annotations

import pytest

from hotport.model.health import Ill, Rules, Sample, verdict

MIB = 1 << 20


@pytest.mark.parametrize(
    ("rules", "sample", "why"),
    [
        (Rules(), Sample(worker=3, probe="answered GET / with 500"), "answered GET / with 500"),
        (
            Rules(lag_max_s=0.5),
            Sample(worker=3, is_silent=True),
            "has not answered for 0.5 s: its event loop is held up; that is health_lag_max",
        ),
        (
            Rules(lag_max_s=0.5),
            Sample(worker=3, lag_s=0.75),
            "had its event loop held up for 0.75 s; health_lag_max is 0.5 s",
        ),
        (
            Rules(memory_max_bytes=100 * MIB),
            Sample(worker=3, memory_bytes=101 * MIB),
            "uses 101 MiB of memory; health_memory_max is 100 MiB",
        ),
    ],
)
def test_worker_that_breaks_a_rule_is_named_with_what_was_seen_and_the_rule(
    rules: Rules, sample: Sample, why: str
) -> None:
    assert verdict(rules, [Sample(worker=2), sample]) == Ill(f"worker 3 {why}", 3)


def test_nothing_is_a_reason_that_no_rule_forbids() -> None:
    bad = Sample(worker=1, requests=100, errors=100, lag_s=60.0, memory_bytes=1 << 40, is_silent=True)
    assert verdict(Rules(), [bad]) is None
    assert verdict(Rules(errors_max=0.5), []) is None


def test_what_is_just_allowed_is_well() -> None:
    rules = Rules(errors_max=0.1, requests_min=10, lag_max_s=0.5, memory_max_bytes=MIB)
    assert verdict(rules, [Sample(worker=1, requests=10, errors=1, lag_s=0.5, memory_bytes=MIB)]) is None


@pytest.mark.parametrize(("requests", "is_ill"), [(8, False), (10, True)])
def test_errors_of_all_workers_count_together_and_only_from_so_many_requests_on(requests: int, is_ill: bool) -> None:
    rules = Rules(errors_max=0.1, requests_min=10)
    half = Sample(worker=1, requests=requests // 2, errors=1)
    ill = Ill(f"2 of {requests} requests failed; health_errors_max is 0.1")
    assert verdict(rules, [half, half]) == (ill if is_ill else None)
