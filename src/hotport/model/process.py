"""A process that holds a socket: who started it, and the right way to end it. Values only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote
from typing import Final

import msgspec

__all__ = ["Container", "Ending", "Origin", "Process", "container_in", "ending"]

#: The command line of a supervisor or a worker of hotport's.
_OURS: Final = re.compile(r"\bhotport(\.worker| serve) ")

#: By what a control group's name begins with, the program that stops the container.
_ENGINES: Final = {"docker": "docker", "libpod": "podman", "cri-containerd": "crictl", "crio": "crictl"}
_CONTAINER: Final = re.compile(r"(?:^|/)(?:([a-z-]+)[-/])?([0-9a-f]{64})(?:\.scope)?(?:/|$)")
_SHOWN_PARENTS: Final = 4


class Container(msgspec.Struct, frozen=True):
    """A container: its name, or the first 12 digits of its id where the name cannot be read.

    Attributes:
        engine: The program that stops it: ``docker``, ``podman`` or ``crictl``.
    """

    engine: str
    name: str

    @property
    def stop(self) -> str:
        """The command that stops it."""
        return f"{self.engine} stop {quote(self.name)}"

    def __str__(self) -> str:
        return f"container {self.name}"


def container_in(path: str) -> Container | None:
    """Find the innermost container in the path of a control group.

    Sources: cgroups(7); the names that Docker, Podman, containerd and CRI-O give to groups.
    """
    found = None
    for match in _CONTAINER.finditer(path.replace("/", "//")):
        prefix = match[1] or ""
        if prefix.endswith("conmon"):  # Podman's monitor of a container, and not in it
            continue
        engine = _ENGINES.get(prefix, "crictl" if "kubepods" in path else "docker")
        found = Container(engine, match[2][:12])
    return found


class Origin(msgspec.Struct, frozen=True):
    """How a process came to be.

    Attributes:
        parents: Its parent, that one's parent and so on, as ``bash (pid 812)``; without process 1.
        terminal: Its controlling terminal, as ``pts/3``; empty if it has none.
        age_s: Seconds since it was started.
        container: That it runs in, or forwards connections to (docker-proxy); None if that is not known.
        forwards: Of docker-proxy, the address in the container.
        is_left: Its process group's leader and its parent have ended: a child that was left behind.
        deleted: What of it has been deleted since: ``program file``, ``working directory``.
    """

    parents: tuple[str, ...] = ()
    terminal: str = ""
    age_s: float = 0.0
    container: Container | None = None
    forwards: str = ""
    is_left: bool = False
    deleted: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{age(self.age_s)} ago"] if self.age_s else []
        if self.is_left:
            parts.append("by a process that has ended (left behind)")
        elif self.parents:
            more = ("...",) if len(self.parents) > _SHOWN_PARENTS else ()
            parts.append(f"by {' in '.join((*self.parents[:_SHOWN_PARENTS], *more))}")
        if self.terminal:
            parts.append(f"at {self.terminal}")
        if self.forwards:
            parts.append(f"to forward to {self.forwards}")
        if self.container:
            parts.append(f"for {self.container}" if self.forwards else f"in {self.container}")
        if self.deleted:
            parts.append(f"({' and '.join(self.deleted)} deleted or replaced since)")
        return " ".join(parts)


class Process(msgspec.Struct, frozen=True):
    """A process that holds a socket.

    Attributes:
        command: How it was started, as far as it fits a line.
        user: A name, or the number where it has none.
        unit: The systemd unit or container that its control group is named after; empty if there is none.
        generation: Of a worker of hotport's, the generation that it runs; 0 for others.
        stop: The command by which what manages it stops it: systemd, a container engine, hotport, supervisord, pm2;
            empty if nothing does, or that cannot be seen.
        is_suspended: Stopped by Ctrl-Z, SIGSTOP or a debugger: it answers nothing, and no signal but KILL and CONT.
    """

    pid: int
    command: str
    user: str
    unit: str = ""
    generation: int = 0
    stop: str = ""
    is_suspended: bool = False
    origin: Origin = Origin()

    @property
    def is_ours(self) -> bool:
        """Whether it is a supervisor or a worker of hotport's."""
        return "hotport stop " in self.stop or self.generation > 0 or _OURS.search(self.command) is not None

    def __str__(self) -> str:
        generation = f", hotport generation {self.generation}" if self.generation else ""
        place = str(self.origin.container) if self.origin.container else self.unit
        unit = f", {place}" if place else ""
        states = ", suspended" * self.is_suspended + ", left behind" * self.origin.is_left
        return f"pid {self.pid} ({self.command}, user {self.user}{unit}{generation}{states})"


class Ending(msgspec.Struct, frozen=True):
    """How to end processes that hold an address.

    Attributes:
        commands: What their managers offer; each once.
        processes: Those without a manager, which take signals.
    """

    commands: tuple[str, ...] = ()
    processes: tuple[Process, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Commands to paste, the gentlest first: the first one ends all of them."""
        kills = []
        suspended = " ".join(str(each.pid) for each in self.processes if each.is_suspended)
        if self.processes:
            kills.append("kill " + " ".join(str(each.pid) for each in self.processes))
        if suspended:
            kills.append(f"kill -CONT {suspended}")
        first = " && ".join((*self.commands, *kills))
        if not suspended:
            return (first,) if first else ()
        terminals = sorted({each.origin.terminal for each in self.processes if each.is_suspended} - {""})
        where = f" at {' and '.join(terminals)}" if terminals else ""
        return (
            f"{first}  # it ends; suspended as it is, it does not hear the first",
            f"kill -CONT {suspended}  # it serves on, as after fg in the shell that started it{where}",
            f"kill -KILL {suspended}  # it ends at once, and its connections are cut",
        )


def ending(holders: Sequence[Process]) -> Ending:
    """Choose how to end processes: by their managers, who would start them again otherwise; the others by signals."""
    # A command of hotport's waits for an answer, which a suspended process does not give.
    managed = [each for each in holders if each.stop and not (each.is_suspended and each.is_ours)]
    commands = tuple(dict.fromkeys(each.stop for each in managed))
    return Ending(commands, tuple(each for each in holders if each not in managed))


def age(seconds: float) -> str:
    """Write a span of time in its largest unit: ``12 s``, ``3 min``, ``5 h``, ``9 d``."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
