"""Find the workers of a supervisor that has ended, and get their listeners from them.

A supervisor has no state that cannot be recovered here. So every supervisor starts here, after a crash of its
predecessor as after an exec.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
import msgspec
from msgspec.structs import replace as replace_memory

from hotport.address import parse_address, parse_listener_name
from hotport.channel import Channel
from hotport.errors import ControlError, HotportError
from hotport.kernel import procfs
from hotport.kernel.process import duplicate_descriptor
from hotport.kernel.sockets import inherited_listener
from hotport.kernel.users import Identity, identity_of
from hotport.model import lifecycle, service
from hotport.model.lifecycle import Phase
from hotport.observe.logs import get_logger
from hotport.options.definition import WORKERS_MAX
from hotport.supervisor.contain import Containing
from hotport.supervisor.launch import PRIVATE_VARIABLES, Launch
from hotport.supervisor.store import is_bound_to
from hotport.wire.listenfds import parse_listen_environment
from hotport.wire.messages import (
    COUNTERS,
    LOAD_PAGE,
    PROTOCOL,
    Hello,
    ListenersOrder,
    Listening,
    Memory,
    WorkerSpec,
    notify_socket,
    parse_user_directory,
    parse_worker_socket,
    user_of_socket,
    worker_socket,
)

__all__ = ["Found", "Orphan", "survey", "worker_paths"]

#: Seconds to wait for a worker's answer. A serving worker answers at once; one that imports its application, or is busy
#: with it, counts as starting.
ANSWER_TIMEOUT_S: Final = 2.0

#: Seconds to wait for a second answer if no listener was found. Without listeners nothing can be started, and a busy
#: machine is a likelier reason than a worker that hangs.
LAST_ANSWER_TIMEOUT_S: Final = 20.0

_PHASES: Final = {phase.value: phase for phase in (Phase.STARTING, Phase.READY, Phase.SERVING, Phase.QUIESCED)}


@dataclass(slots=True)
class Orphan:
    """A worker that an earlier supervisor has started.

    Attributes:
        user: Whose it is, if not the service's own user's.
        phase: The phase that it has reported; SERVING for a foreign program.
        launch: How it was started; None if that cannot be read.
        listeners: Duplicates of its listeners, by canonical address.
        page: The descriptor of its generation's load page; -1 if it has passed none.
        has_answered: Whether it has reported its listeners, even if it has none.
    """

    worker: int
    generation: int
    pid: int
    control_path: str
    user: int | None = None
    is_foreign: bool = False
    phase: Phase = Phase.STARTING
    launch: Launch | None = None
    memory: Memory | None = None
    listeners: dict[str, socket.socket] = field(default_factory=dict)
    page: int = -1
    has_answered: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether it may have listeners that it has not reported."""
        return not self.has_answered and self.phase is not Phase.DRAINING


@dataclass(frozen=True, slots=True)
class Found:
    """The workers, listeners and numbers with which a supervisor starts.

    Attributes:
        orphans: Oldest first.
        wanted: How many workers should serve; 0 if unknown.
        generations: How many generation numbers were given out, as far as known.
        spawned: How many worker numbers were given out.
        favoured: The generation that the previous supervisor would have kept.
        generation: The generation that serves; 0 if none does.
        listeners: By generation and canonical address; the orphans have the same socket objects.
        pages: Descriptors of the load pages, by generation.
        shared: Addresses that another supervisor also has: see `Listeners`.
    """

    orphans: tuple[Orphan, ...] = ()
    wanted: int = 0
    generations: int = 0
    spawned: int = 0
    favoured: int = 0
    generation: int = 0
    listeners: dict[int, dict[str, socket.socket]] = field(default_factory=dict)
    pages: dict[int, int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    @property
    def workers(self) -> tuple[lifecycle.Worker, ...]:
        """The orphans as workers of the model."""
        return tuple(lifecycle.Worker(each.worker, each.generation, each.phase) for each in self.orphans)

    @property
    def current(self) -> int:
        """The generation to continue with; a new one if none serves or starts."""
        current = (each.generation for each in self.orphans if each.phase is not Phase.DRAINING)
        return self.generation or max(current, default=self.generations + 1)


async def survey(
    directory: str,
    memory: Memory | None = None,
    numbers: Mapping[int, int] | None = None,
    inherited: Mapping[str, socket.socket] | None = None,
) -> Found:
    """Find the workers of the service with this runtime directory, and ask them for their state and listeners.

    The caller holds the directory's lock. Sockets on which no process answers are removed.

    Args:
        memory: The previous supervisor's state, if it could pass it; otherwise workers have it.
        numbers: Its worker numbers by pid, which foreign programs do not know.
        inherited: Listeners of the generation to continue with that this process already has.

    Raises:
        ControlError: A worker speaks another protocol (HP650), or workers hold the port and none gives a duplicate of
            it (HP651). They continue to serve.

    Descriptors: owned by `Found.listeners` and `Found.pages`; other received ones are closed.
    """
    orphans = _started(directory)
    for path in worker_paths(directory):
        if named := parse_worker_socket(os.path.basename(path)):
            orphans.setdefault(named, Orphan(named[1], named[0], 0, path, user_of_socket(path)))
    asked = found_all = list(orphans.values())
    # Outside of the task group, which would wrap an error.
    errors: list[HotportError] = []

    async def ask(orphan: Orphan, timeout_s: float) -> None:
        with Containing("survey", path=orphan.control_path), anyio.move_on_after(timeout_s):
            try:
                await _ask(orphan)
            except HotportError as error:
                errors.append(error)

    for timeout_s in (ANSWER_TIMEOUT_S, LAST_ANSWER_TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            for orphan in asked:
                if not orphan.is_foreign:
                    tasks.start_soon(ask, orphan, timeout_s)
        alive = [orphan for orphan in found_all if orphan.pid]
        for orphan in alive:
            if not orphan.has_answered and not orphan.listeners:
                _take(orphan)
        asked = [orphan for orphan in alive if orphan.is_silent]
        if inherited or errors or any(orphan.listeners for orphan in alive):
            break
    if not alive:
        _tidy(directory)
    try:
        if errors:
            raise errors[0]
        found = _number(alive, memory, numbers or {})
        _gather(found, inherited or {}, directory)
    except HotportError:
        for orphan in alive:
            for listener in orphan.listeners.values():
                listener.close()
            if orphan.page >= 0:
                os.close(orphan.page)
        raise
    return found


def _places(directory: str) -> dict[int | None, str]:
    """The directories of workers' control sockets, by user; None: the service's own.

    Only root can have made one for another user: the directory around it is closed to that.
    """
    found: dict[int | None, str] = {None: directory}
    for name in os.listdir(directory):
        place = os.path.join(directory, name)
        uid = parse_user_directory(name)
        with suppress(OSError):
            if uid is not None and os.lstat(place).st_uid == uid and not os.path.islink(place):
                found[uid] = place
    return found


def worker_paths(directory: str) -> list[str]:
    """The control sockets in the runtime directory of a service."""
    places = _places(directory).values()
    return [os.path.join(place, file) for place in places for file in os.listdir(place) if parse_worker_socket(file)]


def _tidy(directory: str) -> None:
    """Remove files of processes that were killed between bind and rename (`hotport.kernel.sockets`)."""
    for place in _places(directory).values():
        for file in os.listdir(place):
            if file.startswith("."):
                with suppress(OSError):
                    os.unlink(os.path.join(place, file))


def _number(orphans: Sequence[Orphan], memory: Memory | None, numbers: Mapping[int, int]) -> Found:
    """Choose the generation to keep and the number of workers; number the workers that do not know theirs."""
    memories = [each for each in (memory, *(orphan.memory for orphan in orphans)) if each is not None]
    latest = max(memories, key=lambda memory: (memory.generations, memory.spawned), default=None)
    generations = max([latest.generations if latest else 0, *(each.generation for each in orphans)])
    spawned = max([latest.spawned if latest else 0, *(each.worker for each in orphans)])
    for orphan in orphans:
        if not orphan.worker and (number := numbers.get(orphan.pid)):
            orphan.worker = number
        elif not orphan.worker:
            spawned += 1
            orphan.worker = spawned
    ordered = tuple(sorted(orphans, key=lambda each: each.worker))
    options = [each.launch.options.workers for each in ordered if each.launch]
    wanted = latest.wanted if latest else max(options, default=0)
    found = Found(ordered, wanted, generations, spawned, latest.favoured if latest else 0)
    return replace(found, generation=service.surviving(found.workers, max(1, wanted), found.favoured))


def _gather(found: Found, inherited: Mapping[str, socket.socket], directory: str) -> None:
    """Keep one socket for each listener; close its duplicates."""
    known = {os.fstat(listener.fileno()).st_ino: listener for listener in inherited.values()}
    if inherited:
        found.listeners[found.current] = dict(inherited)
    for orphan in found.orphans:
        for address, listener in orphan.listeners.items():
            kept = known.setdefault(os.fstat(listener.fileno()).st_ino, listener)
            if kept is not listener:
                listener.close()
            orphan.listeners[address] = kept
            found.listeners.setdefault(orphan.generation, {}).setdefault(address, kept)
    silent = [each for each in found.orphans if each.is_silent]
    if silent and not found.listeners:
        pids = " ".join(str(each.pid) for each in silent)
        raise ControlError(
            "HP651",
            f"cannot adopt the workers of {os.path.basename(directory)}",
            cause=f"its workers (pid {pids.replace(' ', ', ')}) may have listeners, and give none of them back",
            fix=f"kill {pids}",
            note="then start the service again",
        )
    for orphan in found.orphans:
        if orphan.page >= 0 and found.pages.setdefault(orphan.generation, orphan.page) != orphan.page:
            os.close(orphan.page)
    if found.listeners and found.current not in found.listeners:  # released for the next generation
        found.listeners[found.current] = dict(found.listeners[max(found.listeners)])


def _started(directory: str) -> dict[tuple[int, int], Orphan]:
    """Find processes that were started as workers of this service, even if they do not listen yet."""
    found: dict[tuple[int, int], Orphan] = {}
    for user, place in _places(directory).items():
        path, uid = os.path.join(directory, notify_socket(user)), os.geteuid() if user is None else user
        for pid in procfs.leaders_with("NOTIFY_SOCKET", path, uid):
            with Containing("survey", worker_pid=pid):  # its environment may be malformed
                identity = None if user is None else identity_of(pid)
                if (orphan := _orphan(pid, place, identity)) is not None:
                    found.setdefault((orphan.generation, orphan.worker or -pid), orphan)
    return found


def _orphan(pid: int, directory: str, identity: Identity | None) -> Orphan | None:
    """Make an orphan of a process by its environment; None if it was not started as a worker.

    Args:
        identity: The kernel's word on who it is, if it is another user's: its own cannot be trusted. So whatever is
            started in its way is started as that user.
    """
    user = identity.uid if identity is not None else None
    environment = procfs.environment(pid)
    generation = int(environment.get("HOTPORT_GENERATION", "0"))
    if text := environment.get("HOTPORT_WORKER"):
        try:
            spec = msgspec.json.decode(text, type=WorkerSpec)
        except msgspec.MsgspecError:  # of another version: its control socket identifies it
            return None
        worker = spec.worker or _forked(pid)
        if not worker:  # a template, which ends with its supervisor
            return None
        path = os.path.join(directory, worker_socket(generation, worker))
        return Orphan(worker, generation, pid, path, user, launch=_launch(pid, spec, environment, identity))
    if environment.get("LISTEN_PID") != str(pid):  # a child of a foreign program, in its own process group
        return None
    return Orphan(0, generation, pid, "", user, is_foreign=True, phase=Phase.SERVING)


def _forked(pid: int) -> int:
    """The number of a worker that has its template's environment, by its last argument; 0 of a template."""
    label = (procfs.arguments(pid) or ("",))[-1]
    number = label.rpartition(".")[2].rstrip()
    return int(number) if number.isdecimal() else 0


def _launch(pid: int, spec: WorkerSpec, environment: Mapping[str, str], identity: Identity | None) -> Launch | None:
    python = next(iter(procfs.arguments(pid)), "")
    mine = (*PRIVATE_VARIABLES, "HOTPORT_GENERATION")
    kept = {key: value for key, value in environment.items() if key not in mine}
    directory = environment.get("PWD", "")
    return Launch(spec.options, python, directory, kept, identity) if python and directory else None


async def _ask(orphan: Orphan) -> None:
    """Ask a worker for its phase, the stored state, and its listeners."""
    try:
        channel = Channel.connect(orphan.control_path)
    except FileNotFoundError:  # started, but it does not listen yet
        return
    except PermissionError as error:
        get_logger("hotport.supervisor").warning("worker.refused", path=orphan.control_path, error=str(error))
        return
    except OSError:  # ECONNREFUSED: killed; EAGAIN: stuck for long
        if not orphan.pid:
            with suppress(FileNotFoundError):
                os.unlink(orphan.control_path)
        return
    # The listening process is the worker; others may have inherited its environment. 0: another pid namespace.
    pid, uid = channel.peer
    if orphan.user is None or procfs.user_of(pid) == uid:
        orphan.pid = pid or orphan.pid
    has_spoken = False
    with channel, suppress(EOFError, OSError):  # it is ending
        await channel.say(ListenersOrder())
        while not orphan.has_answered:
            match await channel.receive_word():
                case Hello() as hello:
                    _believe(orphan, hello)
                    has_spoken = True
                case Listening(addresses=addresses, has_page=has_page):
                    descriptors = channel.take_descriptors()
                    if has_page:
                        orphan.page = descriptors.pop()
                    listeners = [inherited_listener(fd, is_in_use=True) for fd in descriptors]
                    orphan.listeners = dict(zip(addresses, listeners, strict=True))
                    _check_listeners(orphan)
                    orphan.has_answered = True
                case _:
                    pass
    if not has_spoken:
        orphan.phase = Phase.DRAINING


def _believe(orphan: Orphan, hello: Hello) -> None:
    if hello.protocol != PROTOCOL:
        raise ControlError(
            "HP650",
            f"cannot supervise worker {orphan.worker} (pid {orphan.pid})",
            cause=f"it speaks version {hello.protocol} of the control protocol, and this hotport version {PROTOCOL}",
            fix=f"kill {orphan.pid}",
            note="to keep the worker, serve with the hotport version that started it",
        )
    orphan.phase = _PHASES.get(hello.phase, Phase.DRAINING)
    orphan.memory = hello.memory and replace_memory(hello.memory, wanted=min(hello.memory.wanted, WORKERS_MAX))


def _check_listeners(orphan: Orphan) -> None:
    """Close listeners that are not at the addresses that a worker of another user names.

    The supervisor would remove the files at these addresses.
    """
    for address, listener in list(orphan.listeners.items()):
        if orphan.user is not None and not is_bound_to(parse_address(address), listener):
            get_logger("hotport.supervisor").warning("listener.refused", address=address, worker_pid=orphan.pid)
            orphan.listeners.pop(address).close()


def _take(orphan: Orphan) -> None:
    """Duplicate the listeners of a process that does not answer, from its descriptor table."""
    environment = procfs.environment(orphan.pid)
    with suppress(OSError, HotportError):  # not permitted, or the process has ended
        pidfd = os.pidfd_open(orphan.pid)
        try:
            for fd, name in parse_listen_environment(environment, orphan.pid):
                if name in (COUNTERS, LOAD_PAGE):
                    continue
                listener = inherited_listener(duplicate_descriptor(pidfd, fd), is_in_use=True)
                orphan.listeners[str(parse_listener_name(name))] = listener
            _check_listeners(orphan)
        finally:
            os.close(pidfd)
