"""The watch over workers that hang, on a clock that jumps; and how a worker's stacks are got."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import MappingProxyType
from typing import Any, TypeVarTuple

import anyio
import anyio.abc
import pytest
import structlog
from trio.testing import MockClock

from hotport.kernel.spawn import Child
from hotport.model.hang import round_s
from hotport.model.inputs import Answered, Hung, Input
from hotport.model.lifecycle import Phase, Worker
from hotport.model.service import Service
from hotport.options import Options
from hotport.supervisor import hangs as under_test
from hotport.supervisor.contain import contained
from hotport.supervisor.counters import Counters
from hotport.supervisor.hangs import Hangs, Told, take_stack
from hotport.supervisor.lags import WINDOW_S, Lags
from hotport.supervisor.process import Hang, WorkerProcess
from hotport.wire.messages import Inspection
from hotport.wire.stack import Stack

Arguments = TypeVarTuple("Arguments")

pytestmark = pytest.mark.anyio

STACK = Stack.parse(b'Stack (most recent call first):\n  File "/srv/app.py", line 34 in handler\n')


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


class Process(WorkerProcess):
    """A worker that answers while it is well."""

    def __init__(self, worker: int, *, is_foreign: bool = False) -> None:
        super().__init__(worker, 1, Child(1000 + worker, -1), "", is_foreign=is_foreign)
        self.is_well = self.is_talking = True
        self.asked = 0

    async def ask(self, order: Any, kind: type[Any], timeout_s: float) -> Any:
        self.asked += 1
        if self.is_well:
            return Inspection(connections=0, accepted=0, requests=0, rss_bytes=0)
        await anyio.sleep(timeout_s)
        return None


class World:
    """A supervisor's loop, in which workers serve, and what is decided."""

    def __init__(self, *processes: Process, **options: Any) -> None:
        self.processes = {process.worker: process for process in processes}
        workers = {number: Worker(number, 1, Phase.SERVING) for number in self.processes}
        self.service = Service(wanted=len(processes), generation=1, workers=MappingProxyType(workers))
        self.options = Options(target="app:app", app_dir="/srv", **options)
        self.inputs: list[Input] = []
        self.tasks: anyio.abc.TaskGroup

    def input(self, event: Input) -> None:
        self.inputs.append(event)

    def start(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        self.tasks.start_soon(contained, what, run, *args)

    keep = start

    async def pass_time(
        self, seconds: float, then: Callable[[], object] = lambda: None, more_s: float = 0.0
    ) -> list[Any]:
        """Watch for so long, do that, and watch on; return the log."""
        with structlog.testing.capture_logs() as logs:
            async with anyio.create_task_group() as self.tasks:
                self.tasks.start_soon(Hangs(self, self.processes, Counters("", is_on=False)).watch)
                await anyio.sleep(seconds)
                then()
                await anyio.sleep(more_s)
                self.tasks.cancel_scope.cancel()
        return logs


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the kernel says of processes, and what they tell."""
    says: dict[str, Any] = {"stopped": set(), "waited_s": dict[int, float](), "told": Told(STACK)}

    async def told(process: WorkerProcess) -> Told:
        await anyio.sleep(0.01)
        assert isinstance(says["told"], Told)
        return says["told"]

    monkeypatch.setattr(under_test, "is_stopped", lambda pid: pid in says["stopped"])
    monkeypatch.setattr(under_test, "run_delay_s", lambda pid: says["waited_s"].get(pid, 0.0))
    monkeypatch.setattr(under_test, "take_stack", told)
    return says


async def test_worker_that_hangs_is_reported_with_its_line_and_given_up() -> None:
    first, second = Process(1), Process(2)
    world = World(first, second)
    second.is_well = False
    (hung,) = await world.pass_time(70.5)
    assert hung == {
        "event": "worker.hung",
        "log_level": "warning",
        "worker": 2,
        "generation": 1,
        "worker_pid": 1002,
        "silent_s": 10.0,
        "at": "app.py:34 in handler",
        "why": "its event loop is blocked",
        "stack": STACK.text,
    }
    assert world.inputs == [Hung(2, 60.0)]
    assert second.hang == Hang("app.py:34 in handler", STACK.text)
    assert (first.hang, first.silent_s, second.silent_s) == (None, 0.0, 70.0)


async def test_worker_that_answers_again_is_logged_and_not_given_up() -> None:
    process = Process(1)
    process.is_well = False
    world = World(process)
    logs = await world.pass_time(30.5, lambda: setattr(process, "is_well", True), 100.0)
    assert [(line["event"], line["silent_s"]) for line in logs] == [("worker.hung", 10.0), ("worker.unhung", 31.0)]
    assert process.hang is None
    assert world.inputs == [Answered(1)]


async def test_report_comes_before_the_all_clear_though_stacks_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(process: WorkerProcess) -> Told:
        await anyio.sleep(3.0)
        return Told(obstacle="its stack cannot be read")

    monkeypatch.setattr(under_test, "take_stack", slowly)
    process = Process(1)
    process.is_well = False
    logs = await World(process).pass_time(10.5, lambda: setattr(process, "is_well", True), 10.0)
    assert [line["event"] for line in logs] == ["worker.hung", "worker.unhung"]
    assert logs[0]["why"] == "its event loop is blocked; its stack cannot be read"
    assert logs[0]["at"] == ""


async def test_thread_that_keeps_the_interpreters_lock_is_told(kernel: dict[str, Any]) -> None:
    kernel["told"] = Told(STACK, is_waiting=True)
    process = Process(1)
    process.is_well = False
    (hung,) = await World(process).pass_time(11.5)
    assert hung["why"] == "another thread keeps the interpreter's lock"


async def test_worker_that_a_signal_has_stopped_is_named_and_not_given_up(kernel: dict[str, Any]) -> None:
    process = Process(1)
    process.is_well = False
    kernel["stopped"].add(1001)

    def go_on() -> None:
        kernel["stopped"].clear()
        process.is_well = True

    world = World(process, Process(2))
    stopped, continued = await world.pass_time(200.5, go_on, 5.0)
    assert (stopped["event"], stopped["fix"]) == ("worker.stopped", "kill -CONT 1001")
    assert (continued["event"], continued["stopped_s"]) == ("worker.continued", 200.0)
    assert world.inputs == []


async def test_worker_without_a_processor_is_not_hung(kernel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "run_delay_s", lambda pid: anyio.current_time())
    process = Process(1)
    process.is_well = False
    world = World(process, Process(2))
    assert await world.pass_time(600.0) == []
    assert world.inputs == []


async def test_only_workers_that_have_started_are_asked() -> None:
    processes = [Process(number) for number, _ in enumerate(Phase, 1)]
    world = World(*processes)
    workers = {number: Worker(number, 1, phase) for number, phase in enumerate(Phase, 1)}
    world.service = Service(wanted=1, generation=1, workers=MappingProxyType(workers))
    await world.pass_time(3.5)
    asked = {phase for process, phase in zip(processes, Phase, strict=True) if process.asked}
    assert asked == {Phase.SERVING, Phase.QUIESCING, Phase.QUIESCED, Phase.DRAINING}


async def test_worker_that_cannot_be_asked_is_not_judged() -> None:
    process = Process(1)
    process.is_well = process.is_talking = False
    world = World(process)
    assert await world.pass_time(600.0) == []


async def test_worker_that_has_ended_meanwhile_is_forgotten() -> None:
    process = Process(1)
    process.is_well = False
    world = World(process)
    assert await world.pass_time(9.5, world.processes.clear, 10.0) == []


async def test_program_of_its_own_is_watched_from_its_first_word_on() -> None:
    process = Process(1, is_foreign=True)
    world = World(process)
    assert await world.pass_time(600.0) == []
    process.is_watched = process.was_fed = True
    (hung,) = await world.pass_time(70.0)
    assert (hung["why"], hung["at"], hung["stack"]) == ("it does not say WATCHDOG=1 any more", "", "")
    assert world.inputs == [Hung(1, 60.0)]
    assert process.asked == 0


async def test_program_of_its_own_may_choose_its_bound_and_say_that_it_has_failed() -> None:
    process = Process(1, is_foreign=True)
    process.is_watched, process.watchdog_s = True, 5.0
    world = World(process, Process(2))
    await world.pass_time(5.5)
    assert world.inputs == [Hung(1, 5.0)]
    process.was_fed = process.has_failed = True
    (hung,) = await world.pass_time(1.5)
    assert hung["why"] == "it has said WATCHDOG=trigger"
    world = World(process, hang_timeout_s=0.0)
    assert await world.pass_time(100.0) == []


async def test_shorter_bounds_are_looked_at_more_often() -> None:
    process = Process(1)
    process.is_well = False
    world = World(process, hang_report_s=0.0, hang_timeout_s=1.0)
    (hung,) = await world.pass_time(1.15)
    assert hung["silent_s"] == pytest.approx(1.0, abs=0.11)
    assert round_s(0.0, 1.0) == 0.1


# -- stacks -------------------------------------------------------------------------------------------------

SLEEPER = """
import os, sys, time
from hotport.kernel.stacks import StackPipe
pipe = StackPipe()
print(*pipe.identity, flush=True)
{body}
"""


@pytest.fixture
def sleeper(request: pytest.FixtureRequest) -> Any:
    with subprocess.Popen([sys.executable, "-c", SLEEPER.format(body=request.param)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        fd, inode = map(int, child.stdout.readline().split())
        process = WorkerProcess(1, 1, Child(child.pid, os.pidfd_open(child.pid)), "", is_foreign=False)
        process.stack_pipe = (fd, inode)
        yield process
        with suppress(ProcessLookupError):
            child.kill()
        os.close(process._pidfd)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("sleeper", ["time.sleep(900)"], indirect=True)
async def test_stacks_are_asked_for_again_and_again(sleeper: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "STACK_TIMEOUT_S", 0.2)
    places: list[str] = []
    while places[-2:] != ["<string>:6 in <module>"] * 2:  # the first ones may come from its way there
        told = await take_stack(sleeper)
        assert (told.is_waiting, told.obstacle) == (False, "")
        places.append(told.stack.place("/no", "/no"))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "sleeper", ["import signal; signal.pthread_sigmask(0, range(1, 65)); time.sleep(900)"], indirect=True
)
async def test_process_that_takes_no_signal_has_no_stack(
    sleeper: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "STACK_TIMEOUT_S", 0.1)
    for _ in range(20):  # until it has blocked them
        if not (told := await take_stack(sleeper)).stack.threads:
            break
    assert told == Told(obstacle="its stack is not known: it takes no signal (state S)")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("sleeper", ["os._exit(0)"], indirect=True)
async def test_process_that_ends_has_no_stack(sleeper: WorkerProcess) -> None:
    await anyio.wait_readable(sleeper._pidfd)
    assert (await take_stack(sleeper)).obstacle.startswith("its stack cannot be read: ")
    sleeper.stack_pipe = None
    assert (await take_stack(sleeper)).obstacle == "its stack is not known: it runs another version of hotport"


# -- lags ---------------------------------------------------------------------------------------------------


def test_lag_is_the_worst_of_the_answers_since_then() -> None:
    lags = Lags()
    assert lags.worst_s(0.0) is None
    for at_s, lag_s in ((1.0, 0.2), (2.0, 0.5), (3.0, 0.1), (4.0, 0.3)):
        lags.note(at_s, lag_s)
    assert [lags.worst_s(since_s) for since_s in (0.0, 2.0, 2.5, 4.0, 4.5)] == [0.5, 0.5, 0.3, 0.3, None]
    lags.note(3.0 + WINDOW_S, 0.0)
    assert lags.worst_s(0.0) == 0.3
    lags.note(1000.0, 0.0)
    assert lags.worst_s(0.0) == 0.0
