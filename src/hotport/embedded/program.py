"""How this process was started, and so how to start its successor."""

from __future__ import annotations

import builtins
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hotport.errors import RestartError
from hotport.kernel.process import has_terminal, working_directory
from hotport.wire.listenfds import LISTEN_VARIABLES
from hotport.wire.succession import SUCCESSION_VARIABLE

__all__ = ["Program", "Start"]

#: Meant for one process alone; a successor gets its own.
PRIVATE_VARIABLES: Final = (*LISTEN_VARIABLES, SUCCESSION_VARIABLE, "NOTIFY_SOCKET", "WATCHDOG_PID", "MAINPID")

#: They end, and everything in the container with them, when the process ends that they have started.
ENDING_INITS: Final = frozenset({"tini", "docker-init", "podman-init", "dumb-init", "catatonit", "sh", "bash", "dash"})

#: By every interpreter, for itself.
IGNORED_BY_PYTHON: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ})


@dataclass(frozen=True, slots=True)
class Start:
    """A command to execute, with its directory, environment and ignored signals; links are resolved now."""

    argv: tuple[str, ...]
    directory: str
    environment: Mapping[str, str]
    ignored: frozenset[int]


@dataclass(frozen=True, slots=True)
class Program:
    """How this process was started.

    Attributes:
        argv: As the interpreter got it.
        directory: The working directory *as it was named*.
        environment: As it was then: what the program has set since would hide a change of, say, its ``.env`` file.
        ignored: Signals that it was started to ignore (nohup(1), or a shell's ``&``).
    """

    argv: tuple[str, ...]
    directory: str
    environment: Mapping[str, str]
    ignored: frozenset[int]

    @classmethod
    def snapshot(cls) -> Program:
        """Record it now: the program may change its directory later.

        Sources: proc_pid_environ(5): the environment at the time of exec, whatever setenv(3) did since.
        """
        environment = _initial_environment()
        ignored = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
        deaf_to = frozenset(ignored - IGNORED_BY_PYTHON)
        return cls(tuple(sys.orig_argv), working_directory(environment), environment, deaf_to)

    def why_not_again(self) -> str:
        """Explain why the same command line would not start the same program; empty if it would."""
        if "_pytest" in sys.modules:
            return "it runs in pytest, which would run all tests once more"
        if hasattr(sys, "ps1") or sys.flags.interactive or hasattr(builtins, "__IPYTHON__"):
            return "it was typed at a prompt"
        if "multiprocessing" in sys.modules and sys.modules["multiprocessing"].parent_process() is not None:
            return "it is a process of multiprocessing, which only its parent can start"
        if sys.argv[:1] in ([], [""], ["-"]):
            return "it was read from stdin, which cannot be read again"
        return ""

    def resolve(self, argv: Sequence[str] | None, serving: int) -> Start:
        """Return what starts the successor.

        Args:
            argv: In place of this program's own command line; its first word may be relative to the directory.

        Raises:
            RestartError: The working directory, the interpreter or the program is not there (HP443).
        """
        directory = os.path.realpath(self.directory)
        if not os.path.isdir(directory):
            raise _not_there(f"the working directory {self.directory}", serving)
        words = list(argv) if argv is not None else list(self.argv)
        if argv is None and "/" not in words[0]:
            words[0] = sys.executable or words[0]  # as it was found on the PATH
        if "/" in words[0] and not os.access(os.path.join(directory, words[0]), os.X_OK):
            raise _not_there(f"the program {words[0]}", serving)
        if argv is None and not _is_there(sys.argv[0], words, directory):
            raise _not_there(f"{sys.argv[0]}, looked for in {directory},", serving)
        return Start(tuple(words), directory, {**self.environment, "PWD": self.directory}, self.ignored)

    def _why_not_outlived(self) -> str:
        if os.getpid() == 1:
            return "it is pid 1, and everything in the container ends with it"
        if os.getppid() == 1 and (init := _name_of_init()) in ENDING_INITS:
            return f"it was started by {init} (pid 1), which ends the container when this process ends"
        if os.getsid(0) == os.getpid() and has_terminal() and signal.SIGHUP not in self.ignored:
            return "it leads the session of a terminal, which hangs up on everybody when this process ends (setsid(2))"
        return ""

    def refuse_if_it_cannot(self, argv: Sequence[str] | None, serving: int) -> None:
        """Raise an error if no successor could be started, whatever the server does.

        Raises:
            RestartError: It could not outlive this process (HP440), a supervisor does this (HP441), or the same
                command line would not start the same program (HP442).
        """
        if why := self._why_not_outlived():
            raise RestartError(
                "HP440",
                "cannot restart: no successor could outlive this process",
                cause=why,
                fix="hotport serve app:app",
                note="the pid of a supervisor stays the same",
                serving=serving,
            )
        if "HOTPORT_GENERATION" in os.environ:
            raise RestartError(
                "HP441",
                "cannot restart: this process is a worker",
                cause="a hotport supervisor has started it, and would take its end for a failure",
                fix="hotport restart",
                serving=serving,
            )
        if argv is None and (why := self.why_not_again()):
            raise RestartError(
                "HP442",
                "cannot restart: this program cannot be started again as it was",
                cause=why,
                fix='await server.restart(argv=["python", "server.py"])',
                note="name the command that starts the program",
                serving=serving,
            )


def _is_there(script: str, words: Sequence[str], directory: str) -> bool:
    """Whether the script that the command line names is found by that name."""
    return script not in words or script == "-c" or os.path.exists(os.path.join(directory, script))


def _not_there(what: str, serving: int) -> RestartError:
    return RestartError(
        "HP443",
        "cannot restart: the program is not where it was",
        cause=f"{what} is not there, or cannot be used",
        note="start the server by an absolute path, or name the command: await server.restart(argv=[...])",
        serving=serving,
    )


def _name_of_init() -> str:
    try:
        with open("/proc/1/comm") as file:
            return file.read().strip()
    except OSError:
        return "an unknown program"


def _initial_environment() -> dict[str, str]:
    # setproctitle writes over where the kernel looks.
    if "setproctitle" not in sys.modules:
        try:
            with open("/proc/self/environ", "rb") as file:
                entries = [entry.partition(b"=") for entry in file.read().split(b"\0") if entry]
        except OSError:
            entries = []
        if entries and all(equals for _, equals, _ in entries):
            found = {os.fsdecode(key): os.fsdecode(value) for key, _, value in entries}
            return {key: value for key, value in found.items() if key not in PRIVATE_VARIABLES}
    return {key: value for key, value in os.environ.items() if key not in PRIVATE_VARIABLES}
