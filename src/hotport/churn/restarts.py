"""Restarting the target while it is under load: by a command, by a signal, or by asking hotport."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeAlias

import msgspec

from hotport.churn.result import RestartMark
from hotport.errors import ConfigError, describe_errno
from hotport.kernel.process import describe_exit, kill_group
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import Failure, Reply, Report, RestartRequest, decode, encode

__all__ = ["AskHotport", "How", "Restarts", "RunCommand", "SendSignal"]

#: Of what a command has written, its end is kept.
OUTPUT_BYTES_MAX: Final = 2000

#: For a command that is interrupted, from SIGTERM to SIGKILL.
TERM_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class RunCommand:
    """A line for the shell; its exit status 0 means that the restart is done."""

    command: str

    def __str__(self) -> str:
        return self.command


@dataclass(frozen=True, slots=True)
class SendSignal:
    """A signal to a process; nothing reports when the restart that it causes is done.

    Attributes:
        pid_file: Read anew each time, as a restart may change what stands there; or
        pid: one that never changes.
    """

    signum: signal.Signals
    pid_file: Path | None = None
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.signum.name} to {f'the pid in {self.pid_file}' if self.pid_file else f'pid {self.pid}'}"

    def check(self) -> None:
        """Raises:
        ConfigError: There is no such process, or it is not ours (HP714).
        """
        try:
            os.kill(self.read_pid(), 0)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "HP714",
                f"cannot send {self}",
                cause=_describe(error),
                fix=f"ps -p {self.pid}" if self.pid_file is None else f"cat {shlex.quote(str(self.pid_file))}",
                note="name the server's pid with --pid, or a command that restarts it with --restart",
            ) from None

    def read_pid(self) -> int:
        """Raises OSError or ValueError if the file has none."""
        pid = self.pid if self.pid_file is None else int(self.pid_file.read_text().split("\n", 1)[0])
        if pid <= 1:
            raise ValueError(f"{pid} is not a server's pid")
        return pid


@dataclass(frozen=True, slots=True)
class AskHotport:
    """The request of ``hotport restart``, over the control socket of a service."""

    name: str
    control: Path

    def __str__(self) -> str:
        return f"hotport restart {self.name}"


How: TypeAlias = RunCommand | SendSignal | AskHotport


@dataclass(frozen=True, slots=True)
class Restarts:
    """A schedule. A restart that takes longer than `every_s` delays the next; there is never more than one.

    Attributes:
        after_s: Load before the first one.
        every_s: From the beginning of one to the beginning of the next.
        timeout_s: For each.
    """

    how: How
    times: int = 3
    after_s: float = 2.0
    every_s: float = 5.0
    timeout_s: float = 60.0

    @property
    def needs_s(self) -> float:
        """Return how long a run takes if no restart delays the next."""
        return self.after_s + self.times * self.every_s

    @property
    def needs_s_max(self) -> float:
        """Return how long a run takes if each restart needs its full timeout."""
        return self.after_s + self.times * max(self.every_s, self.timeout_s) + self.every_s

    async def perform(self, now_ms: Callable[[], float], end_ms: float, tell: Callable[[RestartMark], None]) -> None:
        """Restart again and again, and `tell` each mark twice: when it began and when it has an outcome.

        None begins after `end_ms`. One that fails does not end the schedule.

        Cancellation: safe; a command is ended, and the mark says so.
        """
        begin_ms = self.after_s * 1000
        for number in range(1, self.times + 1):
            if max(begin_ms, now_ms()) >= end_ms:
                return
            await asyncio.sleep(max(0.0, begin_ms - now_ms()) / 1000)
            mark = RestartMark(number, str(self.how), began_ms=now_ms())
            begin_ms = mark.began_ms + self.every_s * 1000
            tell(mark)
            try:
                async with asyncio.timeout(self.timeout_s):
                    await _perform(self.how, mark)
            except TimeoutError:
                mark.outcome, mark.detail = "timed out", f"not over after {self.timeout_s:g} s"
            except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
                mark.outcome, mark.detail = "failed", _describe(error)
            except asyncio.CancelledError:
                mark.outcome, mark.detail = "failed", "interrupted"
                raise
            finally:
                if mark.outcome not in {"sent", "timed out"}:
                    mark.ended_ms = now_ms()
                tell(mark)


async def _perform(how: How, mark: RestartMark) -> None:
    match how:
        case RunCommand():
            await _run(how.command, mark)
        case SendSignal():
            os.kill(how.read_pid(), how.signum)
            mark.outcome = "sent"
        case AskHotport():
            await _ask(how.control, mark)


async def _run(command: str, mark: RestartMark) -> None:
    # A file and no pipe: what the command leaves running in the background may keep its output open.
    with tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_shell(
            command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us; and what it has started ends with it when it takes too long
        )
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            mark.detail = _tail(output)
            raise
        mark.outcome = "done" if status == 0 else "failed"
        said = _tail(output)
        mark.detail = said if status == 0 else f"{describe_exit(status)}{': ' if said else ''}{said}"


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a command and its process group."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        async with asyncio.timeout(TERM_S):
            await process.wait()
    except (ProcessLookupError, TimeoutError):
        pass
    finally:
        kill_group(process.pid)
        await process.wait()


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - OUTPUT_BYTES_MAX))
    return output.read().decode(errors="replace").strip()


async def _ask(control: Path, mark: RestartMark) -> None:
    reader, writer = await asyncio.open_unix_connection(control)
    try:
        writer.write(encode_frame(encode(RestartRequest())))
        decoder = FrameDecoder()
        while data := await reader.read(65536):
            for payload in decoder.feed(data):
                match decode(payload, Reply):
                    case Report() as report:
                        mark.outcome, mark.detail = report.outcome, report.error
                        mark.report = msgspec.to_builtins(report)
                    case Failure() as failure:
                        mark.outcome, mark.detail = "failed", f"{failure.code} {failure.what}: {failure.cause}"
        if not mark.outcome:
            raise EOFError("the supervisor ended before the restart did")
    finally:
        writer.close()


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return describe_errno(error.errno) + (f": {error.filename}" if error.filename else "")
    return str(error)
