"""A supervisor becomes another one by exec: the same pid, new code, perhaps another interpreter; workers serve on.

The new one is tried out first, in a process of its own. What it could not learn from the workers goes with the exec as
inherited descriptors and one variable.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, NoReturn

import anyio
import msgspec

from hotport import __version__
from hotport.errors import RestartError
from hotport.kernel.sockets import inherited_listener
from hotport.observe import logs
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.wire.frames import encode_frame
from hotport.wire.listenfds import LISTEN_VARIABLES
from hotport.wire.messages import PROTOCOL, Done, Memory, encode

__all__ = [
    "CHECK",
    "Baggage",
    "become",
    "carried",
    "describe_self",
    "listeners_of",
    "pack",
    "preflight",
    "report",
    "sockets_of",
    "status_port_of",
]

VARIABLE: Final = "HOTPORT_UPGRADE"

#: Set for a process that is to say who it would be, and to end.
CHECK: Final = "HOTPORT_UPGRADE_CHECK"

_LAST_WORDS_CHARS_MAX: Final = 2000


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which hotport, on which interpreter, and what it can talk about with workers."""

    version: str
    python: str
    protocol: int

    def __str__(self) -> str:
        return f"hotport {self.version} on {self.python}"


class Baggage(msgspec.Struct, frozen=True, kw_only=True):
    """What goes from one supervisor to the next; numbers are descriptors.

    Attributes:
        pid: For whom it is meant, as ``LISTEN_PID``.
        service: The name of the service, which stays what it was.
        client: A command that waits for the outcome.
        numbers: Workers by pid.
        status: The status port: as the options name it, its address, and its descriptor.
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


def describe_self() -> Identity:
    """This process."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return Identity(version=__version__, python=python, protocol=PROTOCOL)


async def preflight(supervisor: Supervisor, python: str | None) -> list[str]:
    """Let the new supervisor read its options and say who it is; nothing of the service is touched.

    Args:
        python: Another interpreter; None for the one that this process was started with, as it is found now.

    Returns:
        The command line to exec.

    Raises:
        RestartError: It could not start (HP652), or cannot talk with the workers that are there (HP653).
    """
    directory = supervisor.surroundings.directory
    argv = _command_line(python, directory)
    words = ""
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
    """How this process was started, with another interpreter if one is named.

    A console script belongs to one environment: another interpreter gets the module instead.
    """
    interpreter, *arguments = sys.orig_argv
    if "/" not in interpreter:
        interpreter = sys.executable
    elif arguments and (named := _named_beside(os.path.join(directory, arguments[0]))):
        interpreter = named  # the kernel has left no trace of the link by which the script was found
    if python is not None and arguments and os.path.basename(arguments[0]) == "hotport":
        arguments[:1] = ["-m", "hotport"]
    return [python or interpreter, *arguments]


def _named_beside(script: str) -> str:
    """The interpreter that a console script names in its first line, if it is one of a virtual environment."""
    with suppress(OSError, UnicodeDecodeError), open(script) as file:
        first = file.readline().strip()
        named = first.removeprefix("#!")
        is_beside = os.path.samefile(os.path.dirname(named), os.path.dirname(script))
        if first != named and is_beside and os.access(named, os.X_OK):
            return named
    return ""


def pack(
    supervisor: Supervisor, *, lock: int, control: socket.socket, client: socket.socket | None, began_s: float
) -> Baggage:
    """Say what the next supervisor gets."""
    status = supervisor.status_port
    return Baggage(
        pid=os.getpid(),
        service=supervisor.name,
        lock=lock,
        control=control.fileno(),
        notify=supervisor.notify_socket.fileno(),
        listeners={address: listener.fileno() for address, listener in supervisor.listeners.items()},
        client=client.fileno() if client is not None else None,
        memory=supervisor.memory,
        numbers={process.pid: worker for worker, process in supervisor.processes.items()},
        before=describe_self(),
        began_s=began_s,
        status=(status.bind, status.address, status.listener.fileno()) if status else None,
    )


def become(argv: list[str], baggage: Baggage, directory: str) -> NoReturn:
    """Exec the next supervisor. Signals that are blocked stay so, and pending, until it can handle them.

    If even that fails, after the preflight, the old program is tried; if that fails, too, this process ends and its
    workers serve on, as after any other death of a supervisor.

    Sources: execve(2): the signal mask and pending signals are preserved; descriptors, unless close-on-exec.
    """
    descriptors = (baggage.lock, baggage.control, baggage.notify, baggage.client, *baggage.listeners.values())
    for fd in (*descriptors, baggage.status[2] if baggage.status else None):
        if fd is not None:
            os.set_inheritable(fd, True)
    environment = {**os.environ, VARIABLE: msgspec.json.encode(baggage).decode(), "PWD": directory}
    for name in LISTEN_VARIABLES:
        environment.pop(name, None)
    try:
        os.chdir(directory)
        logs.flush()
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        print(f"hotport: cannot execute {argv[0]}: {error.strerror}; going on as before", file=sys.stderr)
        logs.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def carried(environ: Mapping[str, str], pid: int) -> Baggage | None:
    """What the supervisor that this process was before its exec has left; nothing in any other process."""
    text = environ.get(VARIABLE)
    if text is None:
        return None
    baggage = msgspec.json.decode(text, type=Baggage)
    return baggage if baggage.pid == pid else None


def sockets_of(baggage: Baggage) -> tuple[socket.socket, socket.socket]:
    """The control and the notify socket that were carried, owned by the caller."""
    control, notify = (socket.socket(fileno=fd) for fd in (baggage.control, baggage.notify))
    for each in (control, notify):
        each.set_inheritable(False)
        each.setblocking(False)
    os.set_inheritable(baggage.lock, False)
    if baggage.client is not None:
        os.set_inheritable(baggage.client, False)
    return control, notify


def listeners_of(baggage: Baggage) -> dict[str, socket.socket]:
    """The listeners that were carried, owned by the caller."""
    return {address: inherited_listener(fd, is_in_use=True) for address, fd in baggage.listeners.items()}


def status_port_of(baggage: Baggage) -> StatusPort | None:
    """The status port that was carried, owned by the caller."""
    if baggage.status is None:
        return None
    bind, address, fd = baggage.status
    return StatusPort(bind, address, inherited_listener(fd, is_in_use=True))


def report(baggage: Baggage, supervisor: Supervisor) -> str:
    """What has become of the upgrade, in one line; also told to whoever asked for it."""
    ms = (time.monotonic() - baggage.began_s) * 1000
    text = (
        f"pid {os.getpid()} is {describe_self()} (was {baggage.before}) after {ms:.0f} ms; "
        f"{len(supervisor.processes)} workers serve on"
    )
    if baggage.client is not None:
        with socket.socket(fileno=baggage.client) as client:
            client.setblocking(False)
            with suppress(OSError):  # it did not wait
                client.send(encode_frame(encode(Done(detail=text))))
    return text
