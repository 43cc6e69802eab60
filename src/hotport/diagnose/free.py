"""Free an address: plan the steps, and carry them out on exactly the processes that were seen."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from shlex import quote
from typing import Final

import msgspec

from hotport.diagnose.diagnosis import Diagnosis, holders_of
from hotport.errors import ConfigError
from hotport.kernel import procfs
from hotport.kernel.process import send_signal
from hotport.model.bind import Can, reset_outgoing
from hotport.model.port import Port, UnixName
from hotport.model.process import ending

__all__ = ["Step", "free", "plan"]

#: What a manager gets to stop a service; systemd itself waits 90 s before it kills.
COMMAND_S: Final = 120.0
TERM_S: Final = 10.0
KILL_S: Final = 5.0
#: Seconds between two looks, if nothing ends before: a process may close a socket, and live on.
TICK_S: Final = 1.0

CUT: Final = "their connections are cut"


class Step(msgspec.Struct, frozen=True):
    """One step towards a free address.

    Attributes:
        text: For the operator.
        timeout_s: Seconds after which the next step begins, or the last one has failed.
        command: To run by the shell; empty for a step that sends signals or waits.
        signals: To send to `pids`, by their names, in order.
    """

    text: str
    timeout_s: float
    command: str = ""
    signals: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()


def plan(diagnosis: Diagnosis, *, untouchable: Collection[int]) -> tuple[Step, ...]:
    """Plan how to free an address; a pure function. Empty if it is free.

    Args:
        untouchable: Processes that must not be signalled: this one, and those above it.

    Raises:
        ConfigError: Nothing that can be ended makes the address free (HP134).
    """
    answer = diagnosis.answers[diagnosis.usual]
    if answer.can == Can.YES:
        return ()
    if answer.can == Can.NO and answer.error != "EADDRINUSE":
        raise _refusal(diagnosis, answer.rule, next(iter(diagnosis.remedies), ""))
    if (reset := _reset(diagnosis)) is not None:
        return (reset,)
    end = ending(holders_of(diagnosis))
    if own := [each for each in end.processes if each.pid in untouchable]:
        raise _refusal(diagnosis, f"{own[0]} runs this command, or is process 1", "")
    steps = [Step(f"run `{command}`", COMMAND_S, command) for command in end.commands]
    if end.processes:
        pids = tuple(each.pid for each in end.processes)
        names = ", ".join(f"{each.pid} ({each.command})" for each in end.processes)
        signals = ("SIGTERM", "SIGCONT") if any(each.is_suspended for each in end.processes) else ("SIGTERM",)
        steps.append(Step(f"send {' and '.join(signals)} to pid {names}", TERM_S, signals=signals, pids=pids))
        steps.append(Step(f"send SIGKILL to those that have not ended; {CUT}", KILL_S, signals=("SIGKILL",), pids=pids))
    steps += _leftovers(diagnosis.facts, diagnosis)
    if not steps:
        raise _refusal(diagnosis, answer.because, next(iter(diagnosis.remedies), ""))
    return tuple(steps)


def _reset(diagnosis: Diagnosis) -> Step | None:
    """Plan for a port that only outgoing connections have: their program is spared, and connects again."""
    facts, blockers = diagnosis.facts, diagnosis.answers[diagnosis.usual].blockers
    if isinstance(facts, Port) and blockers and all(old.is_outgoing for old in blockers):
        command = reset_outgoing(facts)
        return Step(f"run `{command}`: its program connects again, from another port", KILL_S, command)
    return None


def _leftovers(facts: Port | UnixName, diagnosis: Diagnosis) -> Iterator[Step]:
    """Plan what follows, or is enough, where no process holds the address."""
    if isinstance(facts, UnixName):
        if facts.found == "socket" and not facts.is_abstract and (facts.holders or not facts.is_held):
            path = quote(facts.path)
            yield Step(f"remove the socket file {path}", KILL_S, f"rm -f -- {path}")
        return
    blockers = diagnosis.answers[diagnosis.usual].blockers
    if any(old.is_held and not old.holders for old in blockers):
        raise _refusal(diagnosis, "a process that may not be looked at holds it", f"sudo hotport why {facts.address}")
    orphans = [old for old in blockers if not old.is_held and not old.is_timed]
    if orphans and not any(old.holders for old in blockers):
        command = f"ss -K sport = :{facts.number}"
        yield Step(f"run `{command}`: connections without a process are reset", KILL_S, command)
    if timed := [old.ends_in_s for old in blockers if old.is_timed]:
        yield Step(f"wait until the kernel forgets old connections, {max(timed):.0f} s", max(timed) + TICK_S)


def free(
    diagnosis: Diagnosis, look: Callable[[], Diagnosis], *, agrees: Callable[[tuple[Step, ...]], bool]
) -> Diagnosis:
    """Free an address; bounded by the timeouts of its steps. Binds nothing.

    Signals go through pidfds that are opened before the processes are looked at once more, so they cannot reach a
    process that got the number of one that has ended.

    Args:
        look: Reads and judges the address again.
        agrees: Shows the steps to the operator, and tells whether they are to be carried out.

    Returns:
        The last look; whether it is free says whether that worked.

    Raises:
        ConfigError: It cannot be freed, or what holds it has changed meanwhile (HP134).

    Sources: pidfd_open(2); pidfd_send_signal(2).
    """
    steps = plan(diagnosis, untouchable=_own_line())
    if not steps or not agrees(steps):
        return diagnosis
    with ExitStack() as stack:
        pidfds: dict[int, int] = {}
        for pid in {pid for step in steps for pid in step.pids}:
            try:
                pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, pidfds[pid])
        diagnosis, before = look(), diagnosis
        if diagnosis.free != Can.YES and _names(before) != _names(diagnosis):
            raise _refusal(
                before, "other processes hold it now than those that were shown", f"hotport why {before.address}"
            )
        for number, step in enumerate(steps, 1):
            if diagnosis.free == Can.YES:
                break
            if step.signals and not _alive(pidfds, step.pids):
                continue
            print(f"{number}. {step.text}", file=sys.stderr, flush=True)
            if not _carry_out(step, pidfds, diagnosis):
                diagnosis = look()
                break
            diagnosis = _await(step, pidfds, look)
    return diagnosis


def _carry_out(step: Step, pidfds: Mapping[int, int], diagnosis: Diagnosis) -> bool:
    """Run the step's command or send its signals; false if the command failed, so that the next must not follow."""
    if step.command:
        try:
            done = subprocess.run(
                ["sh", "-c", step.command],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                timeout=step.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"   it has not ended after {step.timeout_s:.0f} s", file=sys.stderr)
            return False
        if done.returncode:
            print(f"   it failed with exit code {done.returncode}", file=sys.stderr)
        return done.returncode == 0
    for pid in step.pids:
        for name in step.signals if pid in pidfds else ():
            try:
                send_signal(pidfds[pid], signal.Signals[name])
            except PermissionError:
                cause = f"pid {pid} is not yours to signal"
                raise _refusal(diagnosis, cause, f"sudo hotport why {diagnosis.address} --free") from None
    return True


def _await(step: Step, pidfds: Mapping[int, int], look: Callable[[], Diagnosis]) -> Diagnosis:
    """Look again whenever a process has ended, and every second, until it is free or the step's time is over."""
    deadline = time.monotonic() + (0.0 if step.command else step.timeout_s)
    while True:
        alive = _alive(pidfds, step.pids)  # before the look: what has ended by then, holds nothing in it
        diagnosis = look()
        left_s = deadline - time.monotonic()
        if diagnosis.free == Can.YES or left_s <= 0 or (step.pids and not alive):
            return diagnosis
        waiting = select.poll()
        for pid in alive:
            waiting.register(pidfds[pid], select.POLLIN)
        waiting.poll(min(TICK_S, left_s) * 1000)


def _alive(pidfds: Mapping[int, int], pids: Collection[int]) -> list[int]:
    """Those that have not ended. Sources: pidfd_open(2): readable when it has."""
    found = []
    for pid in pids:
        if pid in pidfds:
            waiting = select.poll()
            waiting.register(pidfds[pid], select.POLLIN)
            found += [] if waiting.poll(0) else [pid]
    return found


def _names(diagnosis: Diagnosis) -> set[int]:
    return {holder.pid for holder in holders_of(diagnosis)}


def _own_line() -> set[int]:
    found, pid = {1}, os.getpid()
    while pid > 1:
        found.add(pid)
        pid = procfs.parent(pid)
    return found


def _refusal(diagnosis: Diagnosis, cause: str, fix: str) -> ConfigError:
    return ConfigError("HP134", f"cannot free {diagnosis.address}", cause=cause, fix=fix, note="nothing was ended")
