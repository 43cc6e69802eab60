"""The signals of a supervisor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, Final

import anyio
import anyio.abc

from hotport.errors import HotportError
from hotport.kernel.process import adopts_orphans, ends_with_terminal, has_terminal, numbers, reap_orphans
from hotport.model.inputs import RequestStop
from hotport.model.signals import HELD, NOTES, TERMINATING
from hotport.observe.logs import get_logger
from hotport.options import WORKERS_MAX
from hotport.supervisor.contain import Containing, retried
from hotport.supervisor.requests import restart, scale
from hotport.supervisor.supervisor import Supervisor
from hotport.supervisor.upgrade import Upgrade

__all__ = ["SIGNALS", "handle_signals"]

#: All that are handled, but for SIGCHLD.
SIGNALS: Final = numbers(HELD | TERMINATING)


async def handle_signals(supervisor: Supervisor, upgrade: Upgrade, tasks: anyio.abc.TaskGroup) -> None:
    """Do what `hotport.model.signals` says about each signal, until cancelled; requests run in `tasks`."""
    log = get_logger("hotport.signals")
    handled = [*SIGNALS, signal.SIGCHLD]
    is_bound_to_terminal = ends_with_terminal()
    has_hung_up = False

    async def answer(what: Callable[[], Any], refused: Callable[[str], None] = lambda why: None) -> None:
        with Containing("request", lambda error: refused(repr(error))):
            try:
                await what()
            except HotportError as error:  # nobody waits for an answer: the log has to tell
                log.warning("request.failed", error=str(error))
                refused(str(error))

    async def answer_each() -> None:
        nonlocal has_hung_up
        async for number in signals:
            if supervisor.has_departed:  # it is for the next supervisor
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                if number in SIGNALS:
                    os.kill(os.getpid(), number)
                continue
            name = signal.Signals(number).name
            log.debug("signal.received", signal=name)
            match number:
                case signal.SIGHUP if is_bound_to_terminal and not has_terminal():
                    if not has_hung_up:  # the shell and the kernel may both say it, and a second stop is at once
                        log.info("terminal.hung_up")
                        if not supervisor.service.is_stopping:
                            supervisor.input(RequestStop())
                    has_hung_up = True
                case signal.SIGHUP:
                    tasks.start_soon(answer, lambda: restart(supervisor), supervisor.news.manager.refused)
                case signal.SIGTERM:
                    supervisor.stop()
                case signal.SIGINT:  # of a person at a terminal, whom no load balancer follows
                    supervisor.input(RequestStop())
                case signal.SIGQUIT:
                    supervisor.input(RequestStop(now=True))
                case signal.SIGTTIN | signal.SIGTTOU:
                    change = 1 if number == signal.SIGTTIN else -1
                    wanted = min(max(1, supervisor.service.wanted + change), WORKERS_MAX)
                    tasks.start_soon(answer, lambda wanted=wanted: scale(supervisor, wanted))
                case signal.SIGCHLD:
                    if adopts_orphans() and not supervisor.awaits_child:  # the next signal comes at its end
                        reap_orphans({*supervisor.fleet.pids(), *supervisor.hooks.pids})
                case signal.SIGUSR1:
                    log.info("signal.ignored", signal=name, why=NOTES[name])
                case signal.SIGUSR2:
                    tasks.start_soon(answer, lambda: upgrade.begin(None))
                case _:
                    raise AssertionError(f"nothing is done about {name}")

    with anyio.open_signal_receiver(*handled) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by the supervisor that this process was
        await retried("signals", answer_each)  # inside: a signal without a handler ends the process
