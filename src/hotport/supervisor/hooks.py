"""The commands that run once a generation: ``before_start`` before its workers, ``after_restart`` after its restart."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Protocol, TypeVarTuple

import anyio

from hotport.errors import HotportError, StartError
from hotport.kernel.process import describe_exit
from hotport.model import inputs
from hotport.model.inputs import Prepared
from hotport.model.rules import NOT_PREPARED
from hotport.observe.logs import get_logger
from hotport.options import format_duration
from hotport.supervisor.command import Command
from hotport.supervisor.contain import Containing
from hotport.supervisor.launch import Launch
from hotport.supervisor.news import Publisher
from hotport.wire.messages import Report, encode

__all__ = ["Hooks"]

Arguments = TypeVarTuple("Arguments")

#: Reports that wait for ``after_restart``; further ones are dropped, and that is logged.
REPORTS_MAX: Final = 16

#: Seconds that killed commands have to end.
KILLED_S: Final = 1.0


class Loop(Protocol):
    """The interface that hooks need of the supervisor's loop."""

    def input(self, event: inputs.Input) -> None:
        """Queue an input for the model."""

    def start(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        """Start a task that an unexpected error ends."""


class Hooks:
    """Runs the commands of one service: at most one of each kind at a time, in order."""

    def __init__(self, name: str, loop: Loop, news: Publisher) -> None:
        self._name = name
        self._loop = loop
        self._news = news
        self._wanted = 0  # the generation that is to be prepared
        self._running: dict[str, tuple[Command, int, Launch]] = {}
        self._untold: deque[tuple[Report, Launch]] = deque()
        self._is_telling = False
        self._is_hurried = False
        self._busy = 0
        self._is_idle = anyio.Event()
        self._log = get_logger("hotport.supervisor")

    @property
    def pids(self) -> Iterator[int]:
        """The commands that run."""
        return (command.pid for command, _, _ in self._running.values())

    # -- before_start --------------------------------------------------------------------------------------

    def prepare(self, generation: int, launch: Launch) -> None:
        """Run ``before_start`` for a generation; `Prepared` reports the outcome."""
        self._wanted = generation
        self._busy += 1
        self._loop.start("before_start", self._prepare, generation, launch)

    def abandon(self, generation: int, why: str) -> None:
        """End ``before_start`` of a generation, if it still runs or waits for its turn."""
        if self._wanted != generation:
            return
        self._wanted = 0
        if "before_start" not in self._running:
            return
        command, running, launch = self._running["before_start"]
        if running == generation:
            failure = self._failure(generation, why, command.output, launch)
            self._log.warning("before_start.abandoned", generation=generation, exception=failure)
            self._news.note_failure(generation, failure)
            command.end()

    async def _prepare(self, generation: int, launch: Launch) -> None:
        why = "before_start could not be run"
        try:
            while "before_start" in self._running:  # that of an abandoned generation is still ending
                await self._running["before_start"][0].ended.wait()
            if self._wanted == generation:
                why = await self._run_before_start(generation, launch)
        finally:
            self._done()
            self._loop.input(Prepared(generation, why))

    async def _run_before_start(self, generation: int, launch: Launch) -> str:
        """Run it; return why it has failed, or an empty text."""
        options = launch.options
        began_s = time.monotonic()
        try:
            command = self._start("before_start", options.before_start, generation, launch)
        except (HotportError, OSError) as error:
            self._news.note_failure(generation, str(error))
            self._log.warning("before_start.failed", generation=generation, exception=str(error))
            return "before_start could not be executed"
        status = await self._wait("before_start", command)
        output, ms = command.output, round((time.monotonic() - began_s) * 1000)
        if self._wanted != generation:
            self._log.info("before_start.ended", generation=generation, exit=describe_exit(status), output=output)
            return "it was abandoned"
        self._wanted = 0
        if status == 0:
            self._log.info("before_start.succeeded", generation=generation, ms=ms, output=output)
            return ""
        why = f"before_start {describe_exit(status)}"
        failure = self._failure(generation, why, output, launch)
        self._news.note_failure(generation, failure)
        self._log.warning("before_start.failed", generation=generation, ms=ms, exception=failure)
        return why

    def _failure(self, generation: int, why: str, output: str, launch: Launch) -> str:
        """Render the error of a command that has failed, or was ended."""
        options = launch.options
        lines = ("the end of its output:", *output.splitlines()) if output else ("it has written nothing",)
        is_late = why == NOT_PREPARED
        error = StartError(
            "HP406",
            f"cannot prepare generation {generation} of {self._name}",
            cause=f"{why}; " + "\n         ".join(lines),
            fix=f"cd {shlex.quote(launch.directory)} && {shlex.join(options.before_start)}",
            note=f"before_start_timeout is {format_duration(options.before_start_timeout_s)}" if is_late else "",
        )
        return str(error)

    # -- after_restart -------------------------------------------------------------------------------------

    def tell(self, report: Report, launch: Launch) -> None:
        """Run ``after_restart`` of the generation that serves, with the report of a restart."""
        if not launch.options.after_restart:
            return
        if len(self._untold) >= REPORTS_MAX or self._is_hurried:
            self._log.warning("after_restart.skipped", generation=report.generation)
            return
        self._untold.append((report, launch))
        if not self._is_telling:
            self._is_telling = True
            self._busy += 1
            self._loop.start("after_restart", self._tell_all)

    async def _tell_all(self) -> None:
        try:
            while self._untold:
                with Containing("after_restart"):
                    await self._tell(*self._untold.popleft())
        finally:
            self._is_telling = False
            self._done()

    async def _tell(self, report: Report, launch: Launch) -> None:
        options, generation = launch.options, report.generation
        try:
            command = self._start(
                "after_restart",
                options.after_restart,
                generation,
                launch,
                serving=report.serving,
                stdin=encode(report),
                timeout_s=options.after_restart_timeout_s,
            )
        except (HotportError, OSError) as error:
            self._log.warning("after_restart.failed", generation=generation, exception=str(error))
            return
        status = await self._wait("after_restart", command)
        if status == 0:
            self._log.info("after_restart.succeeded", generation=generation, output=command.output)
            return
        why = "it did not end in time" if command.is_late else describe_exit(status)
        self._log.warning("after_restart.failed", generation=generation, why=why, exception=command.output)

    # -- both ----------------------------------------------------------------------------------------------

    def _start(
        self,
        what: str,
        argv: tuple[str, ...],
        generation: int,
        launch: Launch,
        *,
        serving: int = 0,
        stdin: bytes = b"",
        timeout_s: float | None = None,
    ) -> Command:
        command = Command(
            argv,
            environment=launch.command_environment(serving or generation),
            cwd=launch.directory,
            identity=launch.identity,
            stdin=stdin,
            timeout_s=timeout_s,
            kill_timeout_s=launch.options.kill_timeout_s,
        )
        self._log.info(f"{what}.began", generation=generation, program=argv[0], program_pid=command.pid)
        self._running[what] = command, generation, launch
        if self._is_hurried:
            command.hurry()
        return command

    async def _wait(self, what: str, command: Command) -> int | None:
        try:
            return await command.wait()
        finally:
            del self._running[what]

    def _done(self) -> None:
        self._busy -= 1
        if not self._busy:
            self._is_idle.set()
            self._is_idle = anyio.Event()

    async def wait_idle(self) -> None:
        """Wait until no command runs or waits; each has its time."""
        while self._busy:
            await self._is_idle.wait()

    def hurry(self) -> None:
        """Kill the commands that run, and start no more."""
        self._is_hurried = True
        self._untold.clear()
        for command, _, _ in self._running.values():
            command.hurry()

    async def finish(self, timeout_s: float) -> None:
        """Wait for the commands for at most `timeout_s` seconds, and kill the rest: the service has ended."""
        with anyio.move_on_after(timeout_s):
            await self.wait_idle()
        self.hurry()
        with anyio.move_on_after(KILLED_S):
            await self.wait_idle()
