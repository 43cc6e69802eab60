"""Find workers that hang: ask each one that serves, again and again, and report or give up one that does not answer.

That is polled, since a worker that hangs says nothing. `hotport.model.hang` decides. A program of its own is not asked:
it is watched from its first ``WATCHDOG=1`` on (sd_notify(3)), and its stacks are unknown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import anyio

import hotport
from hotport.kernel.process import is_stopped, run_delay_s
from hotport.kernel.procfs import sleeps, state_of
from hotport.kernel.stacks import HANDLER, STACK_IN_C, STACKS, STACKS_IN_C, open_stack_pipe, read_stack
from hotport.model import inputs
from hotport.model.hang import Case, Finding, Found, Look, judge, round_s
from hotport.model.lifecycle import Phase
from hotport.observe.logs import get_logger
from hotport.supervisor.counters import Counters
from hotport.supervisor.loop import Loop
from hotport.supervisor.process import Hang, WorkerProcess
from hotport.wire.messages import Inspection, InspectOrder
from hotport.wire.stack import STACK_BYTES_MAX, Stack

__all__ = ["Hangs", "take_stack"]

#: Workers in these phases can answer: they have started, and have not ended.
STEADY: Final = (Phase.SERVING, Phase.QUIESCING, Phase.QUIESCED, Phase.DRAINING)

#: Seconds that a worker has to tell its stack, in each of three ways.
STACK_TIMEOUT_S: Final = 1.0

#: How often a second a thread that waits for the interpreter's lock goes to sleep, at least: CPython asks every 5 ms.
LOCK_ASKED: Final = 50

#: The directory of this package, whose functions are not the application's.
OURS: Final = os.path.dirname(hotport.__file__)


class Told(NamedTuple):
    """A worker's stacks.

    Attributes:
        is_waiting: The thread with the event loop waits for the interpreter's lock, which another thread keeps.
        obstacle: Why they are not known.
    """

    stack: Stack = Stack()
    is_waiting: bool = False
    obstacle: str = ""


class Hangs:
    """Watches the workers of a service.

    Args:
        processes: The workers, by number; owned by the fleet.
    """

    def __init__(self, loop: Loop, processes: Mapping[int, WorkerProcess], counters: Counters) -> None:
        self._loop = loop
        self._processes = processes
        self._counters = counters
        self._cases: dict[int, Case] = {}
        self._log = get_logger("hotport.supervisor")

    async def watch(self) -> None:
        """Ask and judge, round after round, until cancelled."""
        while True:
            options = self._loop.options
            planned_s = round_s(options.hang_report_s, options.hang_timeout_s)
            began = anyio.current_time()
            looks: list[Look] = []
            async with anyio.create_task_group() as tasks:
                for process, phase in self._steady():
                    tasks.start_soon(self._look, process, phase, planned_s, looks)
            await anyio.sleep_until(began + planned_s)
            lateness_s = anyio.current_time() - began - planned_s
            self._cases, findings = judge(self._cases, looks, planned_s=planned_s, lateness_s=lateness_s)
            for number, case in self._cases.items():
                if (asked := self._processes.get(number)) is not None:
                    asked.silent_s = case.unheard_s
            for finding in findings:
                self._act(finding)

    def _steady(self) -> Iterator[tuple[WorkerProcess, Phase]]:
        service = self._loop.service
        for number in service.ids(*STEADY):
            if process := self._processes.get(number):
                yield process, service.workers[number].phase

    async def _look(self, process: WorkerProcess, phase: Phase, timeout_s: float, looks: list[Look]) -> None:
        """Ask a worker, and look at it if it does not answer within the round."""
        options = self._loop.options
        if process.is_foreign:
            bound_s = process.watchdog_s or options.hang_timeout_s if options.hang_timeout_s else 0.0
            has_answered, process.was_fed = process.was_fed, False
            if not process.is_watched or not bound_s:
                return
            report_s, grace_s = bound_s, bound_s / 2
        else:
            bound_s, report_s, grace_s = options.hang_timeout_s, options.hang_report_s, 0.0
            has_answered = await process.ask(InspectOrder(is_watched=True), Inspection, timeout_s) is not None
            if not has_answered and not process.is_talking:
                return  # its end, or a new connection, is under way
        looks.append(
            Look(
                worker=process.worker,
                has_answered=has_answered,
                report_s=report_s,
                timeout_s=bound_s,
                grace_s=grace_s,
                is_serving=phase is Phase.SERVING,
                has_failed=process.has_failed,
                is_stopped=not has_answered and is_stopped(process.pid),
                waited_s=None if has_answered else run_delay_s(process.pid),
            )
        )

    def _act(self, finding: Finding) -> None:
        process = self._processes.get(finding.worker)
        if process is None:
            return
        match finding.found:
            case Found.HUNG:
                self._counters.count("hung")
                self._loop.start("hang", self._report, process, finding.silent_s)
            case Found.UNHUNG:
                self._loop.input(inputs.Answered(process.worker))
                self._loop.start("hang", self._withdraw, process, finding.silent_s)
            case Found.GIVEN_UP:
                self._loop.input(inputs.Hung(process.worker, finding.silent_s, finding.waited_s))
            case Found.STOPPED:
                self._log.warning(
                    "worker.stopped",
                    worker=process.worker,
                    worker_pid=process.pid,
                    why="it was stopped by a signal or a debugger; it does not hang, and is not replaced",
                    fix=f"kill -CONT {process.pid}",
                )
            case Found.CONTINUED:
                self._log.info("worker.continued", worker=process.worker, stopped_s=round(finding.silent_s, 1))

    async def _report(self, process: WorkerProcess, silent_s: float) -> None:
        """Log a worker that hangs, with its stacks, and keep them for `hotport status`."""
        async with process.telling:
            if process.is_foreign:
                why = "it has said WATCHDOG=trigger" if process.has_failed else "it does not say WATCHDOG=1 any more"
                told = Told()
            else:
                told = await take_stack(process)
                why = "another thread keeps the interpreter's lock" if told.is_waiting else "its event loop is blocked"
                why = f"{why}; {told.obstacle}" if told.obstacle else why
            at = told.stack.place(OURS, self._loop.options.app_dir, is_waiting=told.is_waiting)
            process.hang = Hang(at, told.stack.text)
            self._log.warning(
                "worker.hung",
                worker=process.worker,
                generation=process.generation,
                worker_pid=process.pid,
                silent_s=round(silent_s, 1),
                at=at,
                why=why,
                stack=told.stack.text,
            )

    async def _withdraw(self, process: WorkerProcess, silent_s: float) -> None:
        """Log that a worker answers again, after it was reported."""
        async with process.telling:
            process.hang = None
            self._log.info(
                "worker.unhung",
                worker=process.worker,
                generation=process.generation,
                worker_pid=process.pid,
                silent_s=round(silent_s, 1),
            )


async def take_stack(process: WorkerProcess) -> Told:
    """Ask a worker for its stacks. Descriptors: none is left open."""
    if process.stack_pipe is None:
        return Told(obstacle="its stack is not known: it runs another version of hotport")
    try:
        pipe = open_stack_pipe(process.pid, process.stack_pipe)
    except OSError as error:
        return Told(obstacle=f"its stack cannot be read: {error}")
    is_waiting = False
    try:
        while read_stack(pipe):  # the answer to an earlier question
            pass
        slept = sleeps(process.pid)
        stack = await _ask(process, pipe, STACKS)
        if not stack.threads:  # its main thread does not run Python
            is_waiting = sleeps(process.pid) - slept >= LOCK_ASKED * STACK_TIMEOUT_S
            stack = await _ask(process, pipe, STACKS_IN_C if is_waiting else STACK_IN_C)
    except OSError as error:
        return Told(obstacle=f"it cannot be signalled: {error}")
    finally:
        os.close(pipe)
    if not stack.threads:
        return Told(obstacle=f"its stack is not known: it takes no signal (state {state_of(process.pid)})")
    return Told(stack, is_waiting)


async def _ask(process: WorkerProcess, pipe: int, number: int) -> Stack:
    """Ask in one of the three ways; what it has told in time may be empty."""
    process.signal_main_thread(number)
    told, stack = b"", Stack()
    with anyio.move_on_after(STACK_TIMEOUT_S):
        while not stack.is_whole and len(told) < STACK_BYTES_MAX:
            await anyio.wait_readable(pipe)
            if not (piece := read_stack(pipe)):  # it has ended
                break
            told += piece
            stack = Stack.parse(told, hidden=HANDLER if number == STACKS else "")
    return stack
