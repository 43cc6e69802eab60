"""Upgrade a supervisor by exec: the same pid, new code, perhaps another interpreter, while its workers serve.

The new one is tried first, in another process. State that it could not learn from the workers passes the exec as
inherited descriptors and one variable.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final

import anyio
import msgspec

from hotport import __version__
from hotport.channel import Channel
from hotport.errors import ExitCode, RestartError
from hotport.kernel.fork import withhold
from hotport.kernel.process import adopt_orphans, adopts_orphans
from hotport.kernel.sockets import inherited_listener
from hotport.model.effects import Refusal
from hotport.observe import logs
from hotport.supervisor.contain import retried
from hotport.supervisor.inheritance import Inheritance
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.wire.listenfds import LISTEN_VARIABLES
from hotport.wire.messages import PROTOCOL, Done, Memory, encode

__all__ = ["Upgrade", "answer_check", "inherit", "report"]

VARIABLE: Final = "HOTPORT_UPGRADE"

#: Set for a process that only prints its `Identity`.
CHECK: Final = "HOTPORT_UPGRADE_CHECK"

_LAST_WORDS_CHARS_MAX: Final = 2000


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A supervisor's version of hotport, its interpreter, and its version of the control protocol."""

    version: str
    python: str
    protocol: int

    def __str__(self) -> str:
        return f"hotport {self.version} on {self.python}"


class _Passed(msgspec.Struct, frozen=True, kw_only=True):
    """The variable, as JSON; integers are descriptors. Other versions of hotport read it, so fields stay.

    Attributes:
        pid: The process for which it is meant, as ``LISTEN_PID``.
        numbers: Worker numbers by pid.
        status: The status port: its address in the options, its bound address, and its descriptor.
        adopts_orphans: Whether it is the parent of descendants whose parent has ended.
    """

    pid: int
    service: str
    lock: int
    control: int
    notify: int
    listeners: dict[str, int]
    client: int | None
    memory: Memory
    numbers: dict[int, int]
    before: Identity
    began_s: float
    status: tuple[str, str, int] | None = None
    adopts_orphans: bool = False

    def descriptors(self) -> Iterator[int]:
        """All descriptors in the variable."""
        yield from (self.lock, self.control, self.notify, *self.listeners.values())
        if self.client is not None:
            yield self.client
        if self.status is not None:
            yield self.status[2]


# -- the supervisor before ----------------------------------------------------------------------------------


class Upgrade:
    """The upgrade of a supervisor: prepared while it runs, carried out when its event loop has ended.

    Descriptors: owns a duplicate of the connection to the client that waits for the outcome.
    """

    def __init__(self, supervisor: Supervisor, rundir: RuntimeDirectory) -> None:
        self._supervisor = supervisor
        self._rundir = rundir
        self._argv: list[str] = []
        self._client: socket.socket | None = None
        self._began_s = 0.0
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        withhold(self)

    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that a forked child must not have."""
        return () if self._client is None else (self._client.fileno(),)

    async def begin(self, python: str | None, client: Channel | None = None) -> None:
        """Try the next supervisor, and let this one depart.

        Args:
            python: Another interpreter, or None.
            client: The connection on which the next supervisor replies.

        Raises:
            RestartError: A restart, stop or take-over is in progress (HP657), or the new one cannot start (HP652,
                HP653).
        """
        self._check()
        argv = await preflight(self._supervisor, python)
        await self._supervisor.hooks.wait_idle()  # the next supervisor would not know of them
        self._check()
        self._argv = argv
        self._client = socket.socket(fileno=os.dup(client.fileno())) if client is not None else None
        self._began_s = time.monotonic()
        self._supervisor.depart()

    def _check(self) -> None:
        supervisor = self._supervisor
        cause = supervisor.why_busy
        if not cause and supervisor.service.is_lame_duck:
            cause = Refusal.LAME_DUCK.value
        if cause:
            raise RestartError(
                "HP657",
                f"cannot upgrade the supervisor of {supervisor.name} now",
                cause=cause,
                fix=f"hotport status {supervisor.name}",
                note="try again when that has ended",
                serving=supervisor.service.generation,
            )

    def carry_out(self) -> None:
        """Exec the next supervisor if this one has departed; return if the service has ended.

        Blocked signals stay blocked, and pending, until the next supervisor can handle them.

        If the exec fails in spite of the preflight, the old program is exec'ed again. If that fails, too, this process
        ends and its workers continue to serve, as after any death of a supervisor.

        Sources: execve(2): the signal mask and pending signals are preserved; descriptors, unless close-on-exec.
        """
        if not self._supervisor.is_departing:
            return
        if self._ignores_hangup:  # as set by nohup(1); the exec would reset a handler
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        directory = self._supervisor.surroundings.directory
        passed = self._pack()
        for fd in passed.descriptors():
            os.set_inheritable(fd, True)
        environment = {**os.environ, VARIABLE: msgspec.json.encode(passed).decode(), "PWD": directory}
        for name in LISTEN_VARIABLES:
            environment.pop(name, None)
        try:
            os.chdir(directory)
            self._supervisor.fleet.starter.end_templates()
            logs.flush()
            os.execvpe(self._argv[0], self._argv, environment)
        except OSError as error:
            print(f"hotport: cannot execute {self._argv[0]}: {error.strerror}; going on as before", file=sys.stderr)
            logs.flush()
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)

    def _pack(self) -> _Passed:
        supervisor, rundir = self._supervisor, self._rundir
        status = supervisor.status_port
        return _Passed(
            pid=os.getpid(),
            service=supervisor.name,
            lock=rundir.lock,
            control=rundir.control.fileno(),
            notify=supervisor.fleet.notify_socket.fileno(),
            listeners={address: listener.fileno() for address, listener in supervisor.listeners.items()},
            client=self._client.fileno() if self._client is not None else None,
            memory=supervisor.fleet.memory,
            numbers={process.pid: worker for worker, process in supervisor.fleet.processes.items()},
            before=describe_self(),
            began_s=self._began_s,
            status=(status.bind, status.address, status.listener.fileno()) if status else None,
            adopts_orphans=adopts_orphans(),
        )

    def close(self) -> None:
        """Close the client's connection: the service has ended, and there is no upgrade."""
        if self._client is not None:
            self._client.close()


def describe_self() -> Identity:
    """The identity of this process."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return Identity(version=__version__, python=python, protocol=PROTOCOL)


async def preflight(supervisor: Supervisor, python: str | None) -> list[str]:
    """Try the new supervisor: it reads its options and prints its identity, and does not touch the service.

    Args:
        python: Another interpreter; None for this process's own, resolved again.

    Returns:
        The command line to exec.

    Raises:
        RestartError: It could not start (HP652), or cannot talk to the workers (HP653).
    """
    directory = supervisor.surroundings.directory
    argv = _command_line(python, directory)
    words = ""
    supervisor.awaits_child = True
    try:
        with anyio.fail_after(supervisor.options.ready_timeout_s):
            ended = await anyio.run_process(
                argv, env={**os.environ, CHECK: "1", "PWD": directory}, cwd=directory, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        words = ended.stderr.decode(errors="replace").strip()[-_LAST_WORDS_CHARS_MAX:]
        found = msgspec.json.decode(ended.stdout.splitlines()[-1], type=Identity)
    except OSError as error:
        cause = f"{argv[0]}: {error.strerror}"
        fix, note = f"ls -l {argv[0]}", "name another interpreter with --python"
        raise _refused("HP652", supervisor, cause, fix, note) from error
    except TimeoutError:
        raise _refused("HP652", supervisor, "it did not say in time who it is", 'ready_timeout = "2m"') from None
    except (IndexError, msgspec.MsgspecError):
        cause = words.replace("\n", "\n         ") or "it did not say who it is"
        fix = f"{CHECK}=1 {shlex.join(argv)}"
        raise _refused("HP652", supervisor, cause, fix) from None
    finally:
        supervisor.awaits_child = False
    if found.protocol != PROTOCOL:
        cause = f"{found} speaks version {found.protocol} of the control protocol, and the workers version {PROTOCOL}"
        note = "then serve with the new version"
        raise _refused("HP653", supervisor, cause, f"hotport stop {supervisor.name}", note)
    return argv


def _refused(code: str, supervisor: Supervisor, cause: str, fix: str, note: str = "") -> RestartError:
    return RestartError(
        code,
        f"cannot upgrade the supervisor of {supervisor.name}; it continues unchanged",
        cause=cause,
        fix=fix,
        note=note,
        serving=supervisor.service.generation,
    )


def _command_line(python: str | None, directory: str) -> list[str]:
    """Return this process's command line, with another interpreter if one is named.

    A console script belongs to one environment: another interpreter gets the module instead.
    """
    interpreter, *arguments = sys.orig_argv
    if "/" not in interpreter:
        interpreter = sys.executable
    elif arguments and (named := _named_beside(os.path.join(directory, arguments[0]))):
        interpreter = named  # of the script's current version: argv[0] is the one of its start
    if python is not None and arguments and os.path.basename(arguments[0]) == "hotport":
        arguments[:1] = ["-m", "hotport"]
    return [python or interpreter, *arguments]


def _named_beside(script: str) -> str:
    """Return the interpreter in a console script's first line, if it is in the same virtual environment."""
    with suppress(OSError, UnicodeDecodeError), open(script) as file:
        first = file.readline().strip()
        named = first.removeprefix("#!")
        is_beside = os.path.samefile(os.path.dirname(named), os.path.dirname(script))
        if first != named and is_beside and os.access(named, os.X_OK):
            return named
    return ""


# -- the supervisor after -----------------------------------------------------------------------------------


def answer_check(environ: Mapping[str, str]) -> None:
    """Print the identity of this process, and exit, if a supervisor asks for it before an upgrade.

    Raises:
        SystemExit: The identity is printed; code behind the service's end must not run.
    """
    if CHECK in environ:
        print(encode(describe_self()).decode())
        raise SystemExit(ExitCode.DONE)


def inherit(environ: Mapping[str, str], pid: int) -> Inheritance | None:
    """Receive the state and descriptors that this process passed to itself by exec; None if there was no upgrade."""
    text = environ.get(VARIABLE)
    if text is None:
        return None
    passed = msgspec.json.decode(text, type=_Passed)
    if passed.pid != pid:
        return None
    for fd in passed.descriptors():
        os.set_inheritable(fd, False)
    if passed.adopts_orphans:  # which survives the exec: it has to reap them
        adopt_orphans()
    control, notify = (socket.socket(fileno=fd) for fd in (passed.control, passed.notify))
    for each in (control, notify):
        each.setblocking(False)
    status = None
    if passed.status is not None:
        bind, address, fd = passed.status
        status = StatusPort(bind, address, inherited_listener(fd, is_in_use=True))
    return Inheritance(
        version=str(passed.before),
        memory=passed.memory,
        lock=passed.lock,
        listeners={address: inherited_listener(fd, is_in_use=True) for address, fd in passed.listeners.items()},
        status_port=status,
        paths=(control, notify),
        service=passed.service,
        numbers=passed.numbers,
        client=Channel(socket.socket(fileno=passed.client)) if passed.client is not None else None,
        began_s=passed.began_s,
    )


async def report(inheritance: Inheritance, supervisor: Supervisor) -> None:
    """Log the upgrade when the workers are adopted, and reply to the client that waits for it."""
    await retried("succession", supervisor.begun.wait)
    ms = (time.monotonic() - inheritance.began_s) * 1000
    text = (
        f"pid {os.getpid()} is {describe_self()} (was {inheritance.version}) after {ms:.0f} ms; "
        f"{len(supervisor.fleet.processes)} workers serve on"
    )
    logs.get_logger("hotport.supervisor").info("supervisor.upgraded", detail=text)
    if inheritance.client is not None:
        with inheritance.client as client, suppress(OSError):  # the client did not wait
            await client.say(Done(detail=text))
