"""The coordinator: engines that behave in every way, without load."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from hotport.churn import run as run_module
from hotport.churn.plan import Plan
from hotport.churn.restarts import Restarts, RunCommand
from hotport.churn.result import Bucket, Load, RestartMark, Target
from hotport.churn.run import Experiment, Observer, accept_gaps, default_engines, descriptors_needed, run, shares
from hotport.errors import StartError
from tests.support import assert_three_lines

pytestmark = pytest.mark.anyio

TARGET = Target("http://127.0.0.1:9", "127.0.0.1", 9, True, False)


@pytest.fixture(autouse=True)
def engine_is_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = str(Path(__file__).with_name("fake_engine.py"))
    monkeypatch.setattr(run_module, "ENGINE", (sys.executable, fake))


def plan(path: str = "/", *, duration_ms: float = 300, loads: list[Load] | None = None) -> Plan:
    return Plan(TARGET, loads or [Load("connect", rate=10.0)], 8, 0, duration_ms, path=path)


def test_shares_add_up_to_what_was_asked_for() -> None:
    whole = plan(loads=[Load("connect", rate=10.0), Load("keepalive", count=5), Load("websocket", count=1)])
    parts = shares(whole, 3)
    assert [sum(load.count for load in part.loads if load.kind == "keepalive") for part in parts] == [2, 2, 1]
    assert [[load.kind for load in part.loads] for part in parts][1:] == [["connect", "keepalive"]] * 2
    assert sum(load.rate for part in parts for load in part.loads) == pytest.approx(10.0)
    assert len({part.seed for part in parts}) == 3


def test_the_engines_needed_follow_from_the_load_and_the_machine() -> None:
    assert default_engines([Load("connect", rate=200)], cores=8) == 1
    assert default_engines([Load("connect", rate=3500)], cores=8) == 4
    assert default_engines([Load("keepalive", count=10_000)], cores=8) == 8


def test_descriptors_are_counted_for_a_target_that_stands_still() -> None:
    asked = plan(loads=[Load("connect", rate=100.0), Load("keepalive", count=50)])
    assert descriptors_needed(asked, 1) == 32 + 1000 + 50
    assert descriptors_needed(asked, 2) == 32 + 500 + 25


def mark(began_ms: float) -> RestartMark:
    return RestartMark(1, "", began_ms)


def test_an_accept_gap_is_the_longest_pause_that_touches_a_restart() -> None:
    answers = [0, 100, 150, 500, 510, 520, 900]
    assert accept_gaps(answers, [mark(120), mark(515)], 1000) == [350, 380]
    assert accept_gaps(answers, [], 1000) == []


def test_an_accept_gap_may_last_to_the_end() -> None:
    assert accept_gaps([10, 20], [mark(15)], 1000) == [980]


def test_there_is_no_accept_gap_where_nobody_connected() -> None:
    assert accept_gaps([], [mark(15)], 1000) == [None]


async def test_engines_are_added_up_bucket_by_bucket() -> None:
    seen: list[Bucket] = []
    result = await run(Experiment(plan(), engines=2), Observer(bucket=seen.append))
    assert [bucket.at_ms for bucket in seen] == [0, 100, 200]
    assert seen == result.buckets
    assert seen[0] == Bucket(0, {"connect": {"answered": 4}}, {"connect": {20: 4}}, {"generation 1": 4}, 2, 6)
    assert result.totals == {"connect": {"answered": 12}}
    assert (result.lag.p50, result.lag.p99) == (10, 20)
    assert result.verdict.exit_code == 0
    assert not result.is_partial


async def test_incidents_of_all_engines_are_in_the_order_of_time() -> None:
    result = await run(Experiment(plan("/refuse"), engines=2))
    ends = [incident.ended_ms for incident in result.incidents]
    assert ends == sorted(ends)
    assert len(ends) == 6
    assert result.verdict.exit_code == 1


async def test_an_allowed_loss_does_not_fail_a_run() -> None:
    result = await run(Experiment(plan("/refuse"), allowed={"refused": None}))
    assert result.verdict.exit_code == 0


async def test_a_run_whose_engine_dies_means_nothing_and_keeps_what_was_seen() -> None:
    result = await run(Experiment(plan("/die"), engines=2))
    assert result.verdict.exit_code == 2
    assert result.verdict.why_invalid == ["engine 2: killed by SIGKILL before its time"]
    assert [bucket.fates["connect"]["answered"] for bucket in result.buckets] == [4, 2, 2]


async def test_a_run_whose_engine_cannot_be_understood_means_nothing() -> None:
    result = await run(Experiment(plan("/mumble")))
    assert result.verdict.exit_code == 2
    assert "what cannot be read" in result.verdict.why_invalid[0]


async def test_a_run_whose_engine_never_ends_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "OVERDUE_S", -11.3)
    result = await run(Experiment(plan("/stay")))
    assert result.verdict.exit_code == 2
    assert "not over" in result.verdict.why_invalid[0]


async def test_what_the_machine_did_not_allow_makes_a_run_invalid() -> None:
    result = await run(Experiment(plan("/ports"), engines=2))
    assert result.own_limits == {"EADDRNOTAVAIL": 2}
    assert result.verdict.exit_code == 2


@pytest.mark.parametrize(("path", "why"), [("/unarmed", "EMFILE"), ("/import-error", "no module named engine")])
async def test_an_engine_that_cannot_begin_is_an_error(path: str, why: str) -> None:
    with pytest.raises(StartError, match=why) as caught:
        await run(Experiment(plan(path), engines=2))
    assert_three_lines(str(caught.value), "HP710")


async def test_restarts_are_performed_meanwhile_and_told_as_they_go() -> None:
    told: list[str] = []
    restarts = Restarts(RunCommand("echo hello"), times=2, after_s=0.05, every_s=0.1)
    observer = Observer(restart=lambda mark: told.append(f"{mark.number} {mark.outcome}"))
    result = await run(Experiment(plan(duration_ms=1000), restarts=restarts), observer)
    assert told == ["1 ", "1 done", "2 ", "2 done"]
    assert [mark.number for mark in result.restarts] == [1, 2]
    assert result.restarts[0].began_ms > 49  # timers of uvloop count whole milliseconds
    assert len(result.accept_gap_ms) == 2
    assert result.verdict.exit_code == 0


async def test_a_run_that_is_too_short_for_its_restarts_says_so() -> None:
    restarts = Restarts(RunCommand("true"), times=2, after_s=0.0, every_s=60.0)
    result = await run(Experiment(plan(), restarts=restarts))
    assert result.verdict.exit_code == 2
    assert "before restart 2 of 2" in result.verdict.why_invalid[0]


@pytest.mark.parametrize("command", ["true", "sleep 0.5"], ids=["shorter than its time", "longer"])
async def test_the_load_ends_when_the_last_restart_has_had_its_time_and_settled(command: str) -> None:
    restarts = Restarts(RunCommand(command), times=1, after_s=0.1, every_s=0.3)
    result = await run(Experiment(plan(duration_ms=60_000), restarts=restarts, settle_s=0.2))
    (mark,) = result.restarts
    assert mark.ended_ms is not None
    assert max(mark.began_ms + 300, mark.ended_ms) + 200 <= result.duration_ms < 60_000
    assert result.verdict.exit_code == 0


async def test_a_run_whose_restarts_failed_proves_nothing() -> None:
    restarts = Restarts(RunCommand("exit 3"), times=1, after_s=0.0)
    result = await run(Experiment(plan(), restarts=restarts))
    assert result.verdict.exit_code == 2
    assert result.verdict.why_invalid == ["restart 1 failed: exited 3"]


@pytest.mark.parametrize("settle_s", [None, 1.0])
async def test_stopping_early_gives_a_partial_result(settle_s: float | None) -> None:
    stop = asyncio.Event()
    restarts = Restarts(RunCommand("sleep 1000"), times=1, after_s=0.0)
    experiment = Experiment(plan(duration_ms=60_000), engines=2, restarts=restarts, settle_s=settle_s)
    result = await run(experiment, Observer(bucket=lambda _: stop.set()), stop)
    assert result.is_partial
    assert result.buckets
    assert result.duration_ms < 60_000
    assert [(mark.outcome, mark.detail) for mark in result.restarts] == [("failed", "interrupted")]


async def test_cancelling_ends_engines_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path))
    begun = asyncio.Event()
    restarts = Restarts(RunCommand("sleep 1000"), times=1, after_s=0.0)
    experiment = Experiment(plan("/stay"), engines=2, restarts=restarts)
    task = asyncio.create_task(run(experiment, Observer(restart=lambda _: begun.set())))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for name in os.listdir(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(int(name), 0)
